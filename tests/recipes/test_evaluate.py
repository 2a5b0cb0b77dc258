"""recipes/spin_evaluate.py on the tiny model: a judge, exact match, restarts, and what it refuses."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.cli import main
from spin.core.errors import CheckpointError, ConfigError, DataError, OutputError
from spin.data import ChatTokenizer, PairStore
from spin.evaluation import verdicts
from spin.evaluation.models import EvalModel, check_evaluation
from tests.false_server import false_servers
from tests.recipes.helpers import REPO, TINY_LM, command, evaluate, generate, run
from tests.recipes.helpers import TINY_EVALUATE as CONFIG
from tests.recipes.helpers import evaluate_config as configured

ROLES = ("candidate", "baseline")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_lm):
    """The tiny model with noise on its weights, in the shape in which an iteration exports a model."""
    folder = tmp_path_factory.mktemp("run") / "iteration_001" / "hf_model"
    shutil.copytree(tiny_lm, folder)
    noise = torch.Generator().manual_seed(0)
    tensors = load_file(tiny_lm / "model.safetensors")
    moved = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=noise) for name, tensor in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def paths(trained, tiny_lm):
    """Overrides that make the test config work from any folder."""
    return [
        f"candidate.checkpoint_dir={trained}",
        f"baseline.checkpoint_dir={tiny_lm}",
        f"judge.checkpoint_dir={tiny_lm}",
        f"dataset.source={REPO / 'examples/quickstart/jargon_val.jsonl'}",
    ]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def judged(tmp_path_factory, paths):
    """An evaluation with a judge: its folder and summary."""
    folder = tmp_path_factory.mktemp("judged")
    return folder, evaluate(folder, *paths)


def test_the_run_before_them_in_this_process_is_not_theirs(tmp_path, paths):
    """Its speeds are not mixed with theirs, and its folder may be gone."""
    short = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "dataset.limit=4")
    run(tmp_path / "run", *short)
    (tmp_path / "run").rename(tmp_path / "gone")
    generate(tmp_path / "generated", *short)
    evaluate(tmp_path / "evaluated", *paths, "dataset.limit=2")
    assert {path.name for path in tmp_path.iterdir()} == {"gone", "generated", "evaluated"}


# --- A judge ---


def test_verdicts_are_what_the_judge_wrote(judged):
    folder, summary = judged
    rows = rows_of(folder / "trained_vs_start")
    assert len(rows) == summary["samples"] == 12
    pattern = configured(folder, "candidate.checkpoint_dir=x").judge.pattern
    for row in rows:
        assert row["verdicts"] == [verdicts.read_verdict(text, pattern) for text in row["judge_texts"]]
        assert row["outcome"] == verdicts.outcome_of(*row["verdicts"])
    outcomes = [row["outcome"] for row in rows]
    assert set(outcomes) >= {"tie", "loss"}, "the tiny judge decides nothing, so this test shows nothing"
    for name, outcome in (("wins", "win"), ("ties", "tie"), ("losses", "loss"), ("unreadable", None)):
        assert summary[name] == outcomes.count(outcome)
    assert json.loads((folder / "trained_vs_start" / "summary.json").read_text()) == summary


def test_the_judge_is_asked_in_both_orders_by_token_ids(judged, tiny_lm):
    """What it was asked lies in the store: the template, filled in both orders, through its own chat template."""
    folder, _ = judged
    rows = rows_of(folder / "trained_vs_start")
    tokenizer = ChatTokenizer(tiny_lm)
    judgements = PairStore.open(folder / "trained_vs_start/judgements").pairs()
    asked = {pair.sample_id: list(pair.prompt_ids) for pair in judgements}
    assert len(asked) == 24
    for row in rows:
        for first, second in (ROLES, ROLES[::-1]):
            text = f"{row['prompt']}\n\nA: {row[first]}\n\nB: {row[second]}"
            expected = tokenizer.encode_prompt([{"role": "user", "content": text}])
            assert asked[f"{row['sample_id']}#{first}"] == expected


def test_responses_are_those_of_the_models_to_the_held_out_prompts(judged, tiny_lm):
    folder, summary = judged
    rows = rows_of(folder / "trained_vs_start")
    source = [json.loads(line) for line in (REPO / "examples/quickstart/jargon_val.jsonl").read_text().splitlines()]
    tokenizer = ChatTokenizer(tiny_lm)
    stores = [PairStore.open(folder / "responses" / name).pairs() for name in ("trained", "start")]
    stores = [{pair.sample_id: pair for pair in store} for store in stores]
    assert [row["sample_id"] for row in rows] == [each["id"] for each in source[:12]]
    for row, original in zip(rows, source, strict=False):
        assert (row["prompt"], row["reference"]) == tuple(message["content"] for message in original["messages"])
        for role, store in zip(ROLES, stores, strict=True):
            (response,) = store[row["sample_id"]].generated
            assert row[role] == tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
            assert row[f"{role}_tokens"] == len(response.token_ids)
    assert any(row["candidate"] != row["baseline"] for row in rows)
    assert summary["candidate"]["mean_tokens"] == sum(row["candidate_tokens"] for row in rows) / 12


def test_swapped_roles_mirror_every_outcome(judged, paths, trained, tiny_lm, tmp_path):
    folder, summary = judged
    swap = [f"candidate.checkpoint_dir={tiny_lm}", f"baseline.checkpoint_dir={trained}"]
    mirrored = evaluate(tmp_path, *paths, *swap, "candidate.name=start", "baseline.name=trained")
    mirror = {"win": "loss", "loss": "win", "tie": "tie"}
    before, after = rows_of(folder / "trained_vs_start"), rows_of(tmp_path / "start_vs_trained")
    assert [mirror[row["outcome"]] for row in before] == [row["outcome"] for row in after]
    assert [row["verdicts"][::-1] for row in before] == [row["verdicts"] for row in after]
    assert (mirrored["wins"], mirrored["losses"]) == (summary["losses"], summary["wins"])
    assert mirrored["win_rate"] == pytest.approx(1 - summary["win_rate"])
    assert mirrored["judge"]["first_fraction"] == summary["judge"]["first_fraction"]


def test_a_model_ties_with_itself_unasked(paths, tiny_lm, tmp_path):
    """Seeds are (seed, sample id): equal weights give equal responses, and no judge has to say so."""
    summary = evaluate(tmp_path, *paths, f"candidate.checkpoint_dir={tiny_lm}")
    assert (summary["ties"], summary["win_rate"], summary["sign_test_p"]) == (12, 0.5, 1.0)
    assert summary["judge"]["equal_responses"] == 12 and summary["judge"]["asked"] == 0
    assert not (tmp_path / "trained_vs_start" / "judgements").exists()


def test_verdicts_that_cannot_be_read_and_questions_too_long_for_the_judge_are_errors_that_show_one(
    paths, tmp_path, capsys
):
    with pytest.raises(DataError, match=r"no verdict of the judge could be read by judge.pattern='(.*)'. It wrote"):
        evaluate(tmp_path, *paths, "dataset.limit=2", r"judge.pattern='\[\[([ABC])\]\]'")
    assert [row["outcome"] for row in rows_of(tmp_path / "trained_vs_start")] == [None, None]
    assert "2 prompts without a readable verdict" in capsys.readouterr().out
    with pytest.raises(DataError, match="'jargon-.*the judge's prompt has .* tokens, at most 112 leave room"):
        evaluate(tmp_path / "b", *paths, "judge.sampling.max_new_tokens=400", "sampling.max_new_tokens=40")


def test_responses_from_elsewhere_play_too(judged, paths, tmp_path):
    """A model without weights: its generator has the responses, here those of the trained model."""
    folder, summary = judged
    replay = [
        "candidate.checkpoint_dir=null",
        "~candidate.generator.batch_size",
        "candidate.generator=spin.generators.ReplayGenerator",
        f"candidate.generator.path={folder / 'responses/trained'}",
        f"candidate.tokenizer.path={TINY_LM}",
    ]
    own = "{_component_: spin.generators.TorchtuneGenerator, batch_size: 8}"
    found = evaluate(tmp_path, *paths, f"baseline.generator={own}", f"judge.generator={own}", *replay)
    assert found["win_rate"] == summary["win_rate"] and found["judge"] == summary["judge"]
    assert found["candidate"]["weights"] != summary["candidate"]["weights"]  # a hash of the responses


def test_a_server_with_a_model_of_its_own_may_judge(judged, paths, tiny_lm, tmp_path):
    """One that always says A: every pair of responses is a tie, and the bias is plain."""
    folder, _ = judged
    shutil.copytree(folder / "responses", tmp_path / "responses")
    tokenizer = ChatTokenizer(tiny_lm)
    _, says_a = tokenizer.encode_pair([{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}])
    responses = {
        "v1__models": {"data": [{"id": "large", "max_model_len": 4096}]},
        "v1__completions": {"choices": [{"token_ids": says_a, "finish_reason": "stop"}]},
    }
    with false_servers() as serve:
        server = serve(**responses)
        generator = f"{{_component_: spin.generators.VLLMServerGenerator, url: '{server.url}', concurrency: 2}}"
        judge = ["judge.checkpoint_dir=null", f"judge.tokenizer.path={tiny_lm}", f"judge.generator={generator}"]
        summary = evaluate(tmp_path, *paths, *judge)
    asked = [body["prompt"] for body in server.bodies("/v1/completions")]
    expected = [list(p.prompt_ids) for p in PairStore.open(folder / "trained_vs_start/judgements").pairs()]
    assert sorted(asked) == sorted(expected)
    assert summary["judge"]["weights"] == "served large" and summary["judge"]["first_fraction"] == 1.0
    assert (summary["ties"], summary["judge"]["same_place_fraction"]) == (12, 1.0)


# --- Restarts ---


@pytest.fixture
def copied(judged, tmp_path):
    """A finished evaluation that a test may damage."""
    shutil.copytree(judged[0], tmp_path / "evaluation")
    return tmp_path / "evaluation", judged[1]


def written(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("shard-*.parquet")}


def test_what_is_finished_is_not_made_again(copied, paths, monkeypatch):
    """No weights are loaded: the hash is of their files."""
    folder, summary = copied
    before = written(folder)
    rows = (folder / "trained_vs_start" / "rows.jsonl").read_bytes()
    monkeypatch.setattr(EvalModel, "load", lambda *args: pytest.fail("weights were loaded"))
    assert evaluate(folder, *paths) == summary
    assert written(folder) == before
    assert (folder / "trained_vs_start" / "rows.jsonl").read_bytes() == rows


def test_a_killed_evaluation_makes_what_is_missing_and_nothing_else(copied, paths, monkeypatch):
    folder, summary = copied
    before = written(folder)
    lost = {"responses/trained/shard-00001.parquet", "trained_vs_start/judgements/shard-00002.parquet"}
    for name in lost:
        (folder / name).unlink()
    loaded, load = [], EvalModel.load
    monkeypatch.setattr(EvalModel, "load", lambda self, *args: loaded.append(self.role) or load(self, *args))
    assert evaluate(folder, *paths) == summary
    assert loaded == ["candidate", "judge"]
    after = written(folder)
    assert after.keys() == before.keys()
    assert {str(path) for path in before if before[path] != after[path]} == lost


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("sampling.temperature=0.5", {"responses/start", "responses/trained", "trained_vs_start/judgements"}),
        ("judge.sampling.max_new_tokens=20", {"trained_vs_start/judgements"}),
        ("candidate.checkpoint_dir=tests/assets/tiny_lm", {"responses/trained"}),  # equal responses: no judge is asked
    ],
)
def test_responses_of_other_weights_or_sampling_are_not_used(copied, paths, change, stale, monkeypatch):
    monkeypatch.chdir(REPO)
    folder, _ = copied
    evaluate(folder, *paths, change)
    assert {str(path.relative_to(folder))[: -len(".stale-0")] for path in folder.rglob("*.stale-0")} == stale


def test_results_that_cannot_be_written_are_an_error_and_leave_no_half(copied, paths):
    folder, _ = copied
    rows = folder / "trained_vs_start" / "rows.jsonl"
    rows.unlink()
    rows.mkdir()
    with pytest.raises(OutputError, match=r"rows\.jsonl: cannot write"):
        evaluate(folder, *paths)
    assert not list(rows.parent.glob(".*.tmp"))


# --- Exact match ---


@pytest.fixture(scope="module")
def questions(tmp_path_factory, judged):
    """A data set whose right answers are known: by turns what both, the candidate alone, the baseline alone or neither
    of the two models says first."""
    rows = rows_of(judged[0] / "trained_vs_start")
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    firsts = [[row[role].split()[0] for role in ROLES] for row in rows]
    expected, lines = [], []
    for i, (row, (candidate, baseline)) in enumerate(zip(rows, firsts, strict=True)):
        right = (candidate, baseline, "zebra")[i % 3]
        same = verdicts.canonical(candidate) == verdicts.canonical(baseline)
        expected.append("tie" if same or right == "zebra" else "win" if right == candidate else "loss")
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": f"#### {right}."}]
        lines.append(json.dumps({"id": row["sample_id"], "messages": messages, "right": right.upper()}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file, expected


@pytest.mark.parametrize(
    "reference",
    [["exact_match.column=right"], [r"exact_match.reference_pattern='####\s*(.+)'"]],
    ids=["column", "real response"],
)
def test_exact_match_with_known_references(questions, paths, tmp_path, capsys, reference):
    """The models respond as they did in `judged`: same prompts, ids, seed and weights."""
    file, expected = questions
    first_word = r"exact_match.pattern='(?s)^\s*(\S+).*'"
    overrides = ["verdict=exact_match", f"dataset.source={file}", first_word, *reference]
    summary = evaluate(tmp_path, *paths, *overrides)
    rows = rows_of(tmp_path / "trained_vs_start")
    assert [row["outcome"] for row in rows] == expected
    assert {"win", "loss", "tie"} == set(expected)
    for row in rows:
        assert row["candidate_right"] == (row["candidate_answer"] == row["right_answer"])
    for role in ROLES:
        right = sum(row[f"{role}_right"] for row in rows)
        assert 4 <= right < 12 and summary[role]["accuracy"] == right / 12
        assert summary[role]["accuracy_interval"] == list(verdicts.wilson_interval(right, 12))
    assert summary["wins"] == expected.count("win") and summary["losses"] == expected.count("loss")
    out = capsys.readouterr().out
    assert f"accuracy {summary['candidate']['accuracy']:.1%}" in out and "judge" not in out


def test_what_no_data_and_no_model_have_is_found_before_anything_is_generated(questions, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(EvalModel, "load", lambda *args: pytest.fail("weights were loaded"))
    exact_match = ("verdict=exact_match", f"dataset.source={questions[0]}")
    for changes, message in (
        ((*exact_match, "exact_match.column=solution"), "column=solution: no row has it; found the columns id, mess"),
        (
            (*exact_match, r"exact_match.reference_pattern='= (\d+)'"),
            "12 samples without a right answer in the real",
        ),
        (["sampling.stop_token_ids=[99999]"], "stop token 99999"),
        (["judge.sampling.stop_token_ids=[99999]"], "stop token 99999"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(tmp_path, *paths, *changes)
    assert not (tmp_path / "responses").exists()


def test_several_data_sets_are_played_completely(questions, paths, tmp_path, capsys):
    """Rows of both, by name, with what exact match takes from their columns; validate sees the same."""
    val = REPO / "examples/quickstart/jargon_val.jsonl"
    overrides = [
        *paths[:-1], "verdict=exact_match", "~dataset.source", "~dataset.limit", "dataset.common.limit=3",
        "dataset._component_=spin.data.mixed_prompt_dataset", f"dataset.sources.asked.source={questions[0]}",
        f"dataset.sources.held.source={val}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"dataset\.sources\.held\.weight: an evaluation plays every sample once"):
        check_evaluation(configured("out", *overrides, "dataset.sources.held.weight=2"))
    validate = ["validate", str(CONFIG), "--recipe", "spin_evaluate", f"output_dir={tmp_path}"]
    assert main([*validate, *overrides]) == 0
    assert "asked 3, held 3" in capsys.readouterr().out
    summary = evaluate(tmp_path, *overrides)
    rows = rows_of(tmp_path / "trained_vs_start")
    assert summary["samples"] == 6
    assert Counter(row["sample_id"].split("/")[0] for row in rows) == {"asked": 3, "held": 3}
    real = {row["id"]: row["messages"][-1]["content"] for row in map(json.loads, val.read_text().splitlines()[:3])}
    held = {row["sample_id"].split("/")[1]: row["reference"] for row in rows if row["sample_id"].startswith("held")}
    assert held == real


# --- The command line, and what is refused ---


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_find_the_same(judged, paths, tmp_path):
    """As users start it; on two ranks responses lie in other shards, and are the same."""
    folder, _ = judged
    done = command(tmp_path, *paths, recipe="spin_evaluate", nproc=2, config=CONFIG)
    assert done.stdout.count("=== trained against start, 12 prompts ===") == 1
    assert "position bias" in done.stdout
    assert rows_of(tmp_path / "trained_vs_start") == rows_of(folder / "trained_vs_start")
    assert len(list((tmp_path / "responses/start").glob("shard-*"))) == 4


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("verdict=vote", ["verdict: found 'vote', expected judge or exact_match."]),
        ("candidate.name=start", ["candidate and baseline are both called 'start'"]),
        ("candidate.name=../x", ["candidate.name='../x': expected letters"]),
        ("judge.template=which?", ["judge.template: has no {first} and no {second}"]),
        ("judge.template=null", ["judge.template: found null, expected a text"]),
        ("judge.pattern=null", ["judge.pattern: found null, expected a text"]),
        ("dataset.streaming=true", ["dataset.streaming=true: an evaluation reads its prompts once"]),
        ("judge.pattern=A|B", ["judge.pattern='A|B': has 0 groups"]),
        ("dataset=null", ["dataset: found null, expected a section"]),
        ("judge.generator=null", ["judge.generator: found null, expected a section with _component_"]),
        (
            "baseline.checkpoint_dir=null",
            ["baseline.checkpoint_dir: not set. Name a Hugging Face folder"],
        ),
        ("sampling.top_p=2", ["sampling.top_p: found 2, expected a number, above 0, at most 1"]),
        ("judge.sampling.top_p=2", ["judge.sampling.top_p: found 2, expected a number, above 0, at most 1"]),
        ("prompts_per_shard=0", ["prompts_per_shard: found 0, expected a whole number"]),
        ("compute_dtype=fp8", ["compute_dtype: found 'fp8', expected auto, fp32 or bf16"]),
        ("judge.patern=x", ["judge.patern: unknown key. Did you mean 'pattern'?"]),
        ("exact_match.field=x", ["exact_match.field: unknown key"]),
        ("candidate.model.num_layer=2", ["candidate.model.num_layer", "Did you mean 'num_layers'?"]),
    ],
)
def test_configs_that_cannot_work(paths, override, messages):
    with pytest.raises(ConfigError) as refused:
        check_evaluation(configured("out", *paths, override))
    for message in messages:
        assert message in str(refused.value)


def test_all_faults_at_once(paths):
    """Of single values, then of values that do not go together; exact match needs no judge, and a judge's model and
    tokenizer are known from its folder."""
    for faults in (
        ("prompts_per_shard=0", "seed=x", "compute_dtype=fp8"),
        ("judge.pattern=x", "judge.template=x", "judge.name=/"),
    ):
        with pytest.raises(ConfigError, match="3 faults"):
            check_evaluation(configured("out", *paths, *faults))
    for changes in (("verdict=exact_match", "~judge"), ["judge.model=null"], ["judge.tokenizer=null"]):
        check_evaluation(configured("out", *paths, *changes))


def test_folders_that_are_no_model_are_named_before_anything_runs(paths, tmp_path):
    with pytest.raises(CheckpointError, match="baseline.checkpoint_dir=no_such_folder: no_such_folder: no such folder"):
        evaluate(tmp_path, *paths, "baseline.checkpoint_dir=no_such_folder")
    run = tmp_path / "run"
    (run / "iteration_000" / "hf_model").mkdir(parents=True)
    (run / "iteration_000" / "adapter").mkdir()
    (run / "iteration_000" / "adapter" / "adapter_config.json").write_text("{}")
    for folder, message in (
        (run, "config.json: no such file. A run's folder; name one of its models: .*iteration_000/hf_model"),
        (run / "iteration_000", "config.json: no such file. A run's folder; name one of its models: .*hf_model"),
        (run / "iteration_000" / "adapter", "An adapter of peft, without its base. Merge it"),
        (run / "iteration_000" / "hf_model", "Nothing in this folder is a model's. checkpoint_dir is a folder with"),
    ):
        with pytest.raises(CheckpointError, match=message):
            evaluate(tmp_path, *paths, f"baseline.checkpoint_dir={folder}", "baseline.tokenizer.path=" + str(folder))
    with pytest.raises(CheckpointError, match="model has 5 layers, config.json has 4"):
        evaluate(tmp_path, *paths, "candidate.model.num_layers=5")
    assert not (tmp_path / "responses").exists()


def test_validate_knows_an_evaluation(paths, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("# spin run spin_evaluate --config mine.yaml\n" + CONFIG.read_text())
    arguments = ["validate", str(config), f"output_dir={tmp_path / 'out'}", *paths]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "for spin_evaluate" in out and out.count("every weight in its shape") == 3
    assert main([*arguments, "judge.checkpoint_dir=nowhere", "dataset.limit=0"]) == 1
    assert "FAULT" in capsys.readouterr().out
    for changes, words in (
        (["sampling.stop_token_ids=[99999]"], "stop token 99999"),
        (["judge.sampling.stop_token_ids=[-1]"], "stop token -1"),
        (["verdict=exact_match", "exact_match.column=nope"], "exact_match.column=nope: no row has it"),
    ):
        assert main([*arguments, *changes]) == 1
        assert words in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
