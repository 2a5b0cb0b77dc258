"""The recipes as users start them: `spin run`, one and two processes, a copied file, and errors without a traceback."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import spin_generate
import spin_recipe
import torch

from tests.recipes import one_step
from tests.recipes.helpers import (
    REPO,
    TINY_LM,
    command,
    command_line,
    dies_before_training,
    environment,
    metrics_of,
    run,
    signalled,
    steps_done,
)

RECIPE = [sys.executable, str(REPO / "recipes" / "spin_recipe.py")]
LONG = ("max_iterations=2", "max_epochs=1")
TWO = (*LONG, "limit_train_batches=2")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one")
    run(output_dir, *TWO)
    return output_dir


@pytest.mark.slow
def test_two_processes_make_the_same_run_as_one(one_process, tmp_path):
    """Same responses, same order, same losses up to rounding; `spin run` from another folder; 3 shards, 2 ranks."""
    done = command(tmp_path / "out", *TWO, "pairs.prompts_per_shard=3", nproc=2, cwd=tmp_path)
    ours, theirs = metrics_of(tmp_path / "out"), metrics_of(one_process)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "val_loss", "grad_norm", "real_nll", "avg_generated_lengths"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
    for word in ("Iteration 0", "validation loss", "truncated fraction", "hf_model", "metrics.jsonl", "spin report"):
        assert word in done.stdout
    # stderr is a file here: whole lines, and those of one rank
    assert "\r" not in done.stderr
    for line in ("Finished after 4 steps", "iteration 0, generate: 8/8 responses", "iteration 1, train: 2/2 steps"):
        assert done.stderr.count(line) == 1, done.stderr[-3000:]


@pytest.fixture(scope="module")
def gradient(tmp_path_factory):
    """The first step's gradient as one vector, in this process or on several ranks."""
    folder = tmp_path_factory.mktemp("gradients")

    def measure(*changes, ranks=1):
        out = folder / f"{ranks} {changes}"
        arguments = (str(out), str(folder / f"run {out.name}"), *changes)
        if ranks == 1 and not out.exists():
            one_step.main(*arguments)
        elif ranks > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            words = [*torchrun, one_step.__file__, *arguments]
            done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out, weights_only=True)

    return measure


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        (["pairs.row_tokens=64"], 1),
        (["pairs.row_tokens=200", "enable_activation_checkpointing=true"], 1),
        pytest.param(["pairs.row_tokens=512"], 2, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_does_not_depend_on_rows_or_ranks(gradient, changes, ranks):
    """The same global batch in long rows, in short rows (more accumulation), and on two ranks: one gradient.

    The bound is float32 rounding of the sums over rows: 0.8e-6 to 1.1e-6 were measured.
    """
    expected = gradient("pairs.row_tokens=4096")
    assert ((gradient(*changes, ranks=ranks) - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_with_one(one_process, tmp_path):
    """The two by `tune run`, which starts the same recipe with the same arguments."""
    tune = [sys.executable, "-m", "torchtune._cli.tune", "run", "--nproc_per_node", "2", "spin_recipe"]
    command(tmp_path, *TWO, "save_interval=1", "max_steps=3", program=tune)
    run(tmp_path, *TWO)
    losses = [row["loss"] for row in metrics_of(tmp_path) if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in metrics_of(one_process) if "loss" in row], rel=1e-4)


@pytest.mark.slow
def test_pairs_that_one_process_scored_are_scored_again_by_two(tmp_path):
    """Killed between scoring and the first step. Two ranks have other rows, whose log-probs round otherwise: in bf16 by
    more than the self-test of the first loss lets pass."""
    changes = (*TWO, "max_iterations=1", "validation_dataset=null", "compute_dtype=bf16")
    dies_before_training(tmp_path, *changes)
    made = (tmp_path / "iteration_000" / "responses" / "manifest.json").stat().st_mtime_ns
    assert "num_ranks is 2, was 1" in command(tmp_path, *changes, nproc=2).stderr
    assert (tmp_path / "iteration_000" / "responses" / "manifest.json").stat().st_mtime_ns == made
    assert metrics_of(tmp_path)[-1]["step"] == 2


def test_a_copied_and_edited_recipe_runs_where_it_lies(tmp_path):
    """A key of its own, and a loss that is doubled in ``row_loss``: the log has what is minimised."""
    text = (REPO / "recipes" / "spin_recipe.py").read_text()
    edited = text.replace(
        "@config.parse(config.SPINConfig)",
        'class Mine(config.SPINConfig):\n    greeting: str = "hello"\n\n\n@config.parse(Mine)',
    )
    edited = edited.replace("        self._cfg = cfg\n", "        self._cfg = cfg\n        print(cfg.greeting)\n")
    edited = edited.replace("return (losses * row.weights).sum()", "return 2 * (losses * row.weights).sum()")
    assert edited.count("greeting") == 2 and edited.count("return 2 *") == 1
    (tmp_path / "mine.py").write_text(edited)
    changes = (*TWO, "max_iterations=1", "greeting=moin")
    assert "moin" in command(tmp_path / "out", *changes, program=[sys.executable, "mine.py"], cwd=tmp_path).stdout
    steps = [row for row in metrics_of(tmp_path / "out") if "loss" in row]
    assert [row["total_loss"] for row in steps] == pytest.approx([2 * row["loss"] for row in steps])


@pytest.mark.slow
def test_generation_elsewhere_gives_the_run_that_generates_itself(one_process, tmp_path):
    """Two workers fill the store of iteration 0; the recipe finds it, generates nothing, and trains as ever."""
    for worker in (1, 0):
        command(tmp_path, *TWO, f"worker={worker}", "num_workers=2", recipe="spin_generate")
    manifest = tmp_path / "iteration_000" / "responses" / "manifest.json"
    assert json.loads(manifest.read_text())["sealed"]
    made = manifest.stat().st_mtime_ns
    run(tmp_path, *TWO)
    assert manifest.stat().st_mtime_ns == made
    assert not list(tmp_path.glob("iteration_000/*.stale*"))
    assert metrics_of(tmp_path) == metrics_of(one_process)


@pytest.mark.slow
def test_a_stopped_run_resumes_where_its_folder_model_and_data_have_moved_to(tmp_path):
    """Nothing that is written knows where it lies; a sample without an id is named by its file's name and row."""
    before, unbroken = tmp_path / "before", tmp_path / "unbroken"
    words = command_line(before, *LONG, program=RECIPE)
    code, output = signalled(words, signal.SIGTERM, lambda: steps_done(before) > 1)  # there is a line for step 0
    assert code == 0 and "Resume with:" in output, output[-3000:]
    (tmp_path / "elsewhere").mkdir()
    after = before.rename(tmp_path / "elsewhere" / "after")
    model = shutil.copytree(TINY_LM, tmp_path / "elsewhere" / "model")
    data = shutil.copy(REPO / "examples" / "quickstart" / "jargon_train.jsonl", tmp_path / "elsewhere")
    places = (f"tokenizer.path={model}", f"checkpointer.checkpoint_dir={model}", f"dataset.source={data}")
    assert run(after, *LONG, *places).final_weights == run(unbroken, *LONG).final_weights
    assert metrics_of(after) == metrics_of(unbroken)
    assert not list(after.rglob("*.stale*"))


@pytest.mark.parametrize(
    ("program", "changes", "words"),
    [
        (spin_recipe, "loss.betta=0.1", ["betta", "beta"]),
        (spin_recipe, "generator._component_=os.system", ["os.system"]),
        (spin_recipe, "model.max_seq_len=24", ["dataset", "max_seq_len=24", "jargon_train.jsonl:"]),
        (spin_recipe, "checkpointer.checkpoint_dir=/nowhere", ["/nowhere"]),
        (spin_recipe, "model.vocab_size=1000", ["knows 1024 token ids", "has 1000", "sample 'jargon-"]),
        (spin_generate, "model.vocab_size=1000", ["knows 1024 token ids"]),
        (spin_recipe, "global_batch_size=400", ["global_batch_size"]),
        (spin_recipe, "loss.beta=[0.1,0.2,0.3]", ["loss.beta", "2 iterations"]),
        (spin_recipe, "loss.loss_type=logistics", ["loss.loss_type='logistics'", "logistic"]),
        (spin_recipe, "loss.label_smoothing=0.5", ["loss.label_smoothing=0.5", "[0, 0.5)"]),
        (spin_recipe, "dataset.source=empty.jsonl", ["empty.jsonl"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_users_mistake_is_an_error_without_a_traceback(tmp_path, monkeypatch, capsys, program, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setattr(sys, "argv", command_line(tmp_path / "out", changes, program=["recipe.py"]))
    with pytest.raises(SystemExit) as end:
        program.recipe_main()
    err = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in err
    assert all(word in err for word in words), err
    assert not (tmp_path / "out" / "iteration_000").exists()
