"""The report: what is read, what is drawn, what is advised, and that nothing in a run can take the page over."""

import hashlib
import html
import json
import math
import re
import shutil
from base64 import b64encode
from html.parser import HTMLParser

import pytest

from spin.cli import main
from spin.core.texts import marked, turns
from spin.report import advice, read_run, render, verdict
from spin.report.page import MOST_POINTS, number
from tests.report_runs import SCRIPT, step_metrics, write_fixed_prompts, write_run, write_store


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "my run", iterations=2, steps=10)


@pytest.fixture(scope="module")
def page(run_folder):
    return render(read_run(run_folder))


def chart_data(page):
    """What the page's script draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


class Elements(HTMLParser):
    """Tags and attributes of a page, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


# --- The page ---


def test_the_page_stands_alone(page):
    """One file, readable without a network: no style sheet, image, font or script from elsewhere, no handler. The
    policy lets only the page's own script and style sheet run, by their hashes, and no request out."""
    found = Elements(page)
    assert not {"link", "img", "iframe", "object", "embed", "form", "a"} & set(found.tags)
    assert not [each for each in found.attributes if each[1] in ("src", "href", "srcset", "action", "style")]
    assert not [each for each in found.attributes if each[1].startswith("on")]
    style, data, script = re.findall(r"<(?:style|script[^>]*)>(.*?)</(?:style|script)>", page, re.DOTALL)
    assert "@import" not in style and "url(" not in style and json.loads(data)["version"] is None
    policy = next(
        value for tag, name, value in found.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for kind, text in (("script-src", script), ("style-src", style)):
        assert parts[kind] == f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert parts["default-src"] == parts["connect-src"] == parts["base-uri"] == "'none'"
    assert "Permission is hereby granted" in script and "uPlot (v1.6.32)" in script
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_what_comes_from_the_run_is_escaped(tmp_path):
    """A prompt, a sample id, a config value and the folder's name that are markup come out as text."""
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>", config={"seed": SCRIPT})
    row = {"step": 20, "prompt": None, "real": 5, "margin": "x", "iteration": 1}
    row["sample_id"] = f'"><a href="//evil">{SCRIPT}'
    with (folder / "samples.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    page = render(read_run(folder))
    found = Elements(page)
    assert found.tags.count("script") == 2 and not {"img", "a"} & set(found.tags)
    assert "onerror" not in {name for _, name, _ in found.attributes}
    assert SCRIPT not in page and html.escape(SCRIPT, quote=False).split("'")[0] in page
    assert "generated <b>response" not in page and "generated &lt;b&gt;response" in page


def test_numbers_of_the_run_are_there(page):
    """Validation losses 3.0, 2.9, 2.8; last margin 2, its loss log(1 + e^-2); half of two responses truncated."""
    assert "Finished after 20 steps." in page
    loss = math.log1p(math.exp(-2))
    assert f"0.6931 → {loss:.4g}" in page
    for label, value, change, kind, good in (
        ("loss", f"{loss:.4g}", f"▼ {math.log(2) - loss:.4g}", " better", "lower is better"),
        ("validation loss", "2.8", "▼ 0.2", " better", "lower is better"),
        ("truncated", "50%", "as at the start", "", "lower is better"),
    ):
        tile = f'<dt>{label}</dt><dd>{value}</dd><dd class="change{kind}">{change}</dd><dd class="change">{good}</dd>'
        assert tile in page
    assert "15 / -5" in page and "<td>50%</td>" in page and "<td>3 / 2 / 3</td>" in page
    charts = {chart["title"]: chart for chart in chart_data(page)["charts"]}
    assert {"Rewards", "Log-prob against the opponent's, nats", "Validation loss, nats per token"} < charts.keys()
    assert charts["Loss"]["level"] == [pytest.approx(math.log(2)), "ln 2: equal models"]
    assert page.count('<section class="sample">') == 4
    assert "real response of 0" in page and "real response of 1" in page


def test_a_curve_ends_where_an_iteration_does(page):
    """Steps 0 (validation alone), 1 to 10 and 11 to 20: a point without values between two of them."""
    (run,) = chart_data(page)["runs"]
    assert run["x"] == [0, 0.5, *range(1, 11), 10.5, *range(11, 21)]
    assert [x for x, loss in zip(run["x"], run["y"]["loss"], strict=True) if loss is None] == [0, 0.5, 10.5]
    assert run["marks"] == [[1, "iteration 0"], [11, "iteration 1"]] and "low" not in run


def test_several_runs_and_an_evaluation_in_one_page(run_folder, tmp_path, capsys):
    """The charts have both; two folders of one name are told apart by their paths."""
    other = write_run(tmp_path / "my run", iterations=1, steps=5)
    summary = {
        "candidate": {"name": "<b>new</b>", "mean_tokens": 80.25, "truncated_fraction": 0.25},
        "baseline": {"name": "old", "mean_tokens": 90, "truncated_fraction": 0.5}, "verdict": "judge", "samples": 50,
        "wins": 30, "ties": 5, "losses": 15, "win_rate": 0.65, "win_rate_interval": [0.51, 0.77], "sign_test_p": 0.036,
    }  # fmt: skip
    for folder in (other / "evaluation", tmp_path / "elsewhere"):
        (folder / "new_vs_old").mkdir(parents=True)
        (folder / "new_vs_old" / "summary.json").write_text(json.dumps(summary))
    (other / "odd_vs_old").mkdir()
    (other / "odd_vs_old" / "summary.json").write_text('{"candidate": 5, "win_rate_interval": [1], "wins": "<i>"}')
    out = tmp_path / "both.html"
    assert main(["report", str(run_folder), str(other), str(tmp_path / "elsewhere"), "--out", str(out)]) == 0
    page = out.read_text()
    data = chart_data(page)
    assert [run["name"] for run in data["runs"]] == [str(run_folder), str(other)]
    assert [len(run["y"]["loss"]) for run in data["runs"]] == [23, 7]
    row = "<td>50</td><td>30</td><td>5</td><td>15</td><td>65% (51% to 77%)</td><td>0.036</td><td>80.25 / 90</td>"
    assert page.count(row) == 2 and "&lt;b&gt;new&lt;/b&gt; against old" in page and "&lt;i&gt;" in page
    assert capsys.readouterr().out == f"{out}\n"


def test_start_command_and_hardware(run_folder, tmp_path):
    folder = write_run(tmp_path, iterations=1, config={"dataset": {"source": "mine.jsonl"}})
    starts = [
        {"step": step, "time": f"2026-01-0{day}T10:00:00+00:00", "command": f"spin <run> {day}", "hardware": "8 x H100"}
        for day, step in ((1, 0), (2, 6))
    ]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    page = render(read_run(folder))
    for fact in (
        "<dt>data</dt><dd>mine.jsonl</dd>", "<dt>hardware</dt><dd>8 x H100</dd>",
        "<dt>started</dt><dd>2026-01-01 10:00:00 UTC, resumed 1 times, last at step 6</dd>",
        "<dt>command</dt><dd>spin &lt;run&gt; 2</dd>",
    ):  # fmt: skip
        assert fact in page


def test_fixed_prompts_before_and_after(tmp_path):
    """Turns instead of special tokens; words that a response has in place of those of the one before it are marked."""
    folder = write_run(tmp_path, iterations=2)
    write_fixed_prompts(folder, ["A cat <b>sat.", "A dog <b>sat.", "A dog <b>ran."])
    page = render(read_run(folder))
    table = page[page.index("Before and after") :]
    for text in (
        '<th scope="col">before self-play</th>', '<th scope="col">after iteration 1</th>',
        "<b>system</b>", "<b>user</b>",
        '<td class="text">A cat &lt;b&gt;sat.</td><td class="text">A <mark>dog</mark> &lt;b&gt;sat.</td>',
        '<td class="text">A dog &lt;b&gt;<mark>ran</mark>. <small>truncated</small></td>',
        '<td class="text">The real one.</td>',
    ):  # fmt: skip
        assert text in table
    assert "im_start" not in table[: table.index("Iterations")]
    assert "Before and after" not in render(read_run(write_run(tmp_path / "without", iterations=1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "system:Be. user:Hi",
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\nYes<|eot_id|>",
            "user:Hi assistant:Yes",
        ),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>", "user:Hi assistant:Yes"),
        ("<s>[INST] Hi [/INST] Yes</s>[INST] So?[/INST]", "user:Hi assistant:Yes user:So?"),
        ("<|system|>\nBe.</s>\n<|user|>\nHi</s>\n<|assistant|>\n", "system:Be. user:Hi"),
        ("No <markup> here", ":No <markup> here"),
        (None, ""),
    ],
)  # fmt: skip
def test_chat_markup_becomes_turns(text, expected):
    assert " ".join(f"{role}:{said}" for role, said in turns(text)) == expected


def test_only_differences_are_marked():
    assert marked("the cat sat", "the old cat sat down.") == "the<mark> old</mark> cat sat<mark> down.</mark>"
    assert marked("<a>", "<a>") == "&lt;a&gt;" and marked("a", "") == ""


def test_time_by_stage(run_folder, page):
    """Fitting: 10 steps of 2 seconds. Validation: 1.5. Playing: between the times in the store's manifest. Compiling:
    what the first step's line has."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[1]) | {"compile_time/score": 70.5, "compile_time/train": 60.0}
    (run_folder / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(first), *lines[2:], ""]))
    manifest = run_folder / "iteration_000" / "responses" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"begun_at": 1000.0, "sealed_at": 1065.0}))
    iteration = read_run(run_folder).iterations[0]
    assert iteration.seconds == {"fit": 20.0, "validate": 1.5, "play": 65.0}
    assert iteration.compiling == 130.5
    assert all(time in render(read_run(run_folder)) for time in ("1 min 05 s", "2 min 10 s"))


# --- Runs that are not whole ---


def test_a_run_that_is_still_writing(tmp_path):
    """Half a line of metrics, a line of binary, a store without a manifest, a shard that is cut: told, not fatal."""
    folder = write_run(tmp_path, iterations=2, steps=5, finished=False)
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff\xfe\n[1, 2]\n{"step": "x"}\n{"step": 11, "loss": NaN, "iteration": 1}\n{"step": 12, "lo')
    broken = folder / "iteration_001" / "responses"
    (broken / "manifest.json").unlink()
    shard = broken / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    run = read_run(folder)
    page = render(run)
    assert "Not finished: at step 11, in iteration 1." in page and "UTC" in page
    assert [iteration.responses for iteration in run.iterations] == [2, 1]
    assert "shard-00000.parquet: cannot be read" in page
    assert len(run.series("loss")) == 10


@pytest.mark.parametrize("gone", ["samples.jsonl", "config.yaml", "iteration_000", "metrics.jsonl", "all"])
def test_a_run_without_one_of_its_parts(tmp_path, gone):
    folder = write_run(tmp_path, iterations=1, steps=3)
    for path in list(folder.iterdir()) if gone == "all" else [folder / gone]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if gone == "all":  # a run that has only begun
        (folder / "iteration_000" / "responses").mkdir(parents=True)
    page = render(read_run(folder))
    assert "</html>" in page
    assert gone != "all" or ("Not finished" in page and chart_data(page)["charts"] == [])


@pytest.mark.parametrize("loss", [None, "text", {"_component_": "mine.Loss"}], ids=str)
def test_a_loss_section_of_another_form_and_a_config_that_is_being_written(tmp_path, loss):
    folder = write_run(tmp_path, iterations=1, steps=5, config={"loss": loss})
    assert ("ln 2: equal models" in str(chart_data(render(read_run(folder))))) == (not isinstance(loss, dict))
    (folder / "config.yaml").write_text("loss: {beta: 0.1")
    assert re.search(r"config.yaml:\d+:\d+: not valid YAML", render(read_run(folder)))


def add_line(folder, step, iteration, share, **changes):
    """Another line of a run's metrics."""
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(step_metrics(step, iteration, share, **changes)) + "\n")


def test_a_step_that_was_made_again_counts_once(tmp_path):
    folder = write_run(tmp_path, iterations=1, steps=3)
    add_line(folder, 3, 0, 1.0, loss=0.25)
    assert read_run(folder).series("loss")[-1] == (3, 0.25)
    assert len(read_run(folder).series("loss")) == 3


# --- Advice ---


def falling(step):
    return {"real_logp_drift": -3.0 * step, "generated_logp_drift": -9.0 * step}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (falling, ["both log-probs fall", "nll_weight"]),
        (lambda step: {"margin": 0.0}, ["margin stays at 0", "optimizer.lr"]),
        (lambda step: {"margin": 0.0, "updated_fraction": 0.01}, ["margin stays at 0", "dtype=fp32"]),
        (
            lambda step: {"margin": 0.0, "updated_fraction": 0.0, "equal_fraction": 1.0},
            ["margin stays at 0", "nothing is learned; all responses equal the real ones, so take other data"],
        ),
        (lambda step: {"acc": 1.0}, ["acc is 1.000", "epochs"]),
        (lambda step: {"loss": math.log(2) + 0.1 * (step - 1)}, ["far above ln 2", "optimizer.lr"]),
        (lambda step: {"loss": 0.75 if step == 1 else 0.5}, ["first loss is 0.7500", "self_test"]),
        (lambda step: {"nonfinite_steps": 2}, ["2 batches were left out"]),
    ],
)
def test_known_failures_get_advice(tmp_path, changes, words):
    run = read_run(write_run(tmp_path, iterations=1, steps=10, changes=changes))
    found = [text for text in advice(run) if "length limit" not in text]
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_a_truncated_fraction_and_a_rising_validation_loss_get_advice_and_a_good_run_none(tmp_path):
    """One of two responses is truncated in write_run; the validation loss goes from 3.0 to 3.5."""
    folder = write_run(tmp_path, iterations=1, steps=10)
    responses = folder / "iteration_000" / "responses"
    add_line(folder, 11, 0, 1.0, val_loss=3.5)
    found = advice(read_run(folder))
    assert any("50% of the opponent's responses were truncated" in text for text in found)
    assert any("rose from 3.000 to 3.500" in text for text in found)
    write_run(tmp_path, iterations=1, steps=10)
    shutil.rmtree(responses)
    assert advice(read_run(folder)) == []


GRADIENTS = {"cosine": 0.98, "cosine_error": 0.01, "ratio": 0.05, "signal": 0.02, "sft_signal": 0.04}


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (GRADIENTS, None, "Iteration 1: this iteration moves as fine-tuning on the same responses would (cosine 0.98 ± "
         "0.01), by a gradient of 1/20 of its size, of which 2.0% is signal and the rest noise (of fine-tuning's 4.0% "
         "is signal): fine-tune instead (spin_sft)."),
        (GRADIENTS, GRADIENTS | {"cosine": 0.2}, "(spin_sft). At its end the cosine is 0.20 ± 0.01: the"),
        (GRADIENTS | {"cosine": 0.6, "ratio": 1.5}, None, "Iteration 1: SPIN's gradient has the cosine 0.60 ±"),
        ({"signal": 0.001, "sft_signal": -0.001}, None, "0.1% and -0.1% of a step's squared gradient are signal): t"),
        ({"signal": None, "sft_signal": 0.2}, None, "0.0% and 20.0% of a step's squared gradient are signal): there"),
        ({"signal": -0.05, "sft_signal": 0.95}, None, "-5.0% and 95.0% of a step's squared gradient are signal): fine"),
    ],
)  # fmt: skip
def test_what_gradients_say_is_said_of_the_newest_iteration(tmp_path, first, last, words):
    at = {1: GRADIENTS, 11: first, 16: last or {}}
    named = {step: {f"gradient/{name}": value for name, value in found.items()} for step, found in at.items()}
    run = read_run(write_run(tmp_path, iterations=2, steps=10, changes=lambda step: named.get(step, {})))
    (found,) = (text for text in advice(run) if "fine-tun" in text)
    assert words in found


def test_validation_by_source(tmp_path):
    folder = write_run(tmp_path, iterations=1, steps=5)
    by_source = {f"val_loss/{name}": 2.0 + i for i, name in enumerate(("chat", "math", "code", "law"))}
    add_line(folder, 6, 0, 1.0, val_loss=3.5, **by_source)
    (chart,) = (each for each in chart_data(render(read_run(folder)))["charts"] if "by source" in each["title"])
    assert [label for _, label, _ in chart["lines"]] == ["chat", "code", "law", "math"]


def test_another_loss_is_not_measured_by_ln_2(tmp_path):
    changes = {"loss": {"beta": 0.1, "loss_type": "hinge"}}
    folder = write_run(tmp_path, iterations=1, steps=10, changes=lambda step: {"loss": 1.5}, config=changes)
    assert not any("ln 2" in text for text in advice(read_run(folder)))
    assert "ln 2: equal models" not in str(chart_data(render(read_run(folder))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Iteration 1 still learns; validation loss falls."),
        ({"loss": 0.6}, "Iteration 1 has levelled off; validation loss falls."),
        ({"acc": 0.995, "loss": 0.1}, "Iteration 1 has little left to learn; validation loss falls."),
        ({"acc": 0.0}, "Iteration 1 does not learn; validation loss falls."),
    ],
)
def test_the_verdict(tmp_path, changes, expected):
    assert verdict(read_run(write_run(tmp_path, iterations=2, steps=10, changes=lambda _: changes))) == expected


@pytest.mark.parametrize(
    ("val_loss", "said"), [(3.01, "; validation loss stays"), (2.99, "; validation loss stays"), (3.05, "")]
)
def test_a_validation_loss_within_half_a_percent_neither_falls_nor_rises(tmp_path, val_loss, said):
    """It was 3.0 before training."""
    folder = write_run(tmp_path, iterations=1, steps=10)
    add_line(folder, 11, 0, 0.01, val_loss=val_loss)
    assert verdict(read_run(folder)) == f"Iteration 0 gets worse{said}."


def test_the_verdict_of_a_run_that_has_begun_or_changes_its_length(tmp_path):
    """Two steps say nothing. Later, 100 tokens instead of 3 on average, and all of them truncated."""
    assert verdict(read_run(write_run(tmp_path / "new", iterations=1, steps=2))).startswith("Too early to say")
    folder = write_run(tmp_path, iterations=2, steps=10)
    shutil.rmtree(folder / "iteration_001" / "responses")
    write_store(folder / "iteration_001" / "responses", responses=[([7] * 100, "length", -30.0)] * 2)
    add_line(folder, 21, 1, 1.0, val_loss=4.0)
    assert verdict(read_run(folder)) == (
        "Iteration 1 still learns; validation loss rises: watch; responses get longer: watch; more responses are "
        "truncated: watch."
    )


# --- Charts ---


def test_a_hundred_thousand_steps_make_a_page_of_bounded_size(tmp_path):
    """100,000 losses that alternate between 0 and 1: means of 0.5 over a range from 0 to 1."""
    folder = write_run(tmp_path, iterations=1, steps=1)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {i}, "iteration": {i // 50000}, "loss": {i % 2}}}\n' for i in range(100_000))
    page = render(read_run(folder))
    (run,) = chart_data(page)["runs"]
    drawn = {kind: {value for value in run[kind]["loss"] if value is not None} for kind in ("y", "low", "high")}
    assert drawn == {"y": {0.5}, "low": {0}, "high": {1}} and len(run["x"]) <= MOST_POINTS + 2
    assert run["x"][-1] == 99_999 and len(page) < 200_000


def test_numbers_are_short():
    values = (0.69314718, 12345.6, 0.0, 2e-7, -0.5, 1.5e6)
    assert [number(value) for value in values] == ["0.6931", "12346", "0", "2e-07", "-0.5", "1.5e+06"]


# --- The command ---


def test_the_command_writes_one_file(tmp_path, capsys):
    folder = write_run(tmp_path / "run", iterations=1, steps=3)
    before = {path.name for path in folder.iterdir()}
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}
    assert main(["report", str(folder), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == (folder / "report.html").read_text()


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["report", str(folder)]) == 1
        text = capsys.readouterr().err
        assert "expected the output_dir of a run" in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a_vs_b").mkdir()
    (tmp_path / "a_vs_b" / "summary.json").write_text("{}")
    for command in ("report", "export"):
        assert main([command, str(tmp_path)]) == 1
        assert "an evaluation's folder" in (text := capsys.readouterr().err) and "a_vs_b/summary.json" in text
