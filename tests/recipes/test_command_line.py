"""The recipes as users start them: `tune run`, one and two processes, a copied file, and errors without a traceback."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import spin_generate
import spin_recipe
import torch
from spin_recipe import SPINRecipe

from tests.recipes.helpers import (
    REPO,
    command,
    command_line,
    environment,
    metrics_of,
    run,
    signalled,
    steps_done,
    tiny_config,
)

RECIPE = [sys.executable, str(REPO / "recipes" / "spin_recipe.py")]
SHORT = ("max_iterations=1", "max_epochs=1", "limit_train_batches=2")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one")
    run(output_dir, "max_iterations=2", "max_epochs=1", "limit_train_batches=2")
    return output_dir


@pytest.mark.slow
def test_two_processes_make_the_same_run_as_one(one_process, tmp_path):
    """Same responses, same order, same losses up to rounding; `tune run` from another folder; 3 shards, 2 ranks."""
    changes = ("max_iterations=2", "max_epochs=1", "limit_train_batches=2", "pairs.prompts_per_shard=3")
    done = command(tmp_path / "out", *changes, nproc=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
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
    for line in ("Finished after 4 steps", "iteration_000 responses: 0/", "iteration 1, epoch 0: 2/2 step"):
        assert done.stderr.count(line) == 1, done.stderr[-3000:]


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_rows_or_ranks(tmp_path):
    """The same global batch in long rows, in short rows (more accumulation), and on two ranks: one gradient.

    The bound is float32 rounding of the sums over rows: 0.8e-6 to 1.1e-6 were measured.
    """
    script = str(REPO / "tests" / "recipes" / "one_step.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    gradients = []
    for name, ranks, row_tokens in (("long", 1, 4096), ("short", 1, 64), ("ranks", 2, 512)):
        done = subprocess.run(
            [*torchrun, str(ranks), script, str(tmp_path / name), str(tmp_path / f"{name}_run")]
            + [f"pairs.row_tokens={row_tokens}"],
            env=environment(), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        parts = torch.load(tmp_path / name, weights_only=True)
        gradients.append(torch.cat([parts[key].double().flatten() for key in sorted(parts)]))
    for other in gradients[1:]:
        assert ((other - gradients[0]).norm() / gradients[0].norm()).item() < 2e-6


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_with_one(one_process, tmp_path):
    done = command(
        tmp_path, "max_iterations=2", "max_epochs=1", "limit_train_batches=2", "save_interval=1", "max_steps=3",
        nproc=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path, "max_iterations=2", "max_epochs=1", "limit_train_batches=2")
    losses = [row["loss"] for row in metrics_of(tmp_path) if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in metrics_of(one_process) if "loss" in row], rel=1e-4)


@pytest.mark.slow
def test_pairs_that_one_process_scored_are_scored_again_by_two(tmp_path):
    """Killed between scoring and the first step. Two ranks have other rows, whose log-probs round otherwise: in bf16 by
    more than the self-test of the first loss lets pass."""
    changes = ("max_iterations=1", "max_epochs=1", "limit_train_batches=2", "validation_dataset=null")
    changes += ("compute_dtype=bf16",)

    class Dies(SPINRecipe):
        def train_single_step(self, batch):
            raise KeyboardInterrupt

    recipe = Dies(tiny_config(tmp_path, *changes))
    recipe.setup()
    with pytest.raises(KeyboardInterrupt):
        recipe.train()
    recipe.cleanup()
    made = (tmp_path / "iteration_000" / "responses" / "manifest.json").stat().st_mtime_ns
    done = command(tmp_path, *changes, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "num_ranks is 2, was 1" in done.stderr
    assert (tmp_path / "iteration_000" / "responses" / "manifest.json").stat().st_mtime_ns == made
    assert metrics_of(tmp_path)[-1]["step"] == 2


def test_a_copied_and_edited_recipe_runs_where_it_lies(tmp_path):
    text = (REPO / "recipes" / "spin_recipe.py").read_text()
    edited = text.replace(
        "@config.parse(config.SPINConfig)",
        'class Mine(config.SPINConfig):\n    greeting: str = "hello"\n\n\n@config.parse(Mine)',
    )
    edited = edited.replace("        self._cfg = cfg\n", "        self._cfg = cfg\n        print(cfg.greeting)\n")
    assert edited.count("greeting") == 2
    (tmp_path / "mine.py").write_text(edited)
    done = command(tmp_path / "out", *SHORT, "greeting=moin", program=[sys.executable, "mine.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "moin" in done.stdout


@pytest.mark.slow
def test_generation_elsewhere_gives_the_run_that_generates_itself(one_process, tmp_path):
    """Two workers fill the store of iteration 0; the recipe finds it, generates nothing, and trains as ever."""
    changes = ("max_iterations=2", "max_epochs=1", "limit_train_batches=2")
    for worker in (1, 0):
        done = command(tmp_path, *changes, f"worker={worker}", "num_workers=2", recipe="spin_generate")
        assert done.returncode == 0, done.stderr[-3000:]
    manifest = tmp_path / "iteration_000" / "responses" / "manifest.json"
    assert json.loads(manifest.read_text())["sealed"]
    made = manifest.stat().st_mtime_ns
    run(tmp_path, *changes)
    assert manifest.stat().st_mtime_ns == made
    assert not list(tmp_path.glob("iteration_000/*.stale*"))
    assert metrics_of(tmp_path) == metrics_of(one_process)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken")
    return output_dir, run(output_dir, "max_iterations=2", "max_epochs=1").final_weights


def signalled_at(step, output_dir, changes, signal_number):
    """The recipe's command, signalled when a step's metrics are written: exit code and output."""
    words = command_line(output_dir, *changes, program=RECIPE)
    return signalled(words, signal_number, lambda: steps_done(output_dir) > step)  # there is a line for step 0


@pytest.mark.slow
def test_a_stopped_run_resumes_where_its_folder_model_and_data_have_moved_to(unbroken, tmp_path):
    """Nothing that is written knows where it lies; a sample without an id is named by its file's name and row."""
    changes = ("max_iterations=2", "max_epochs=1")
    code, output = signalled_at(1, tmp_path / "before", changes, signal.SIGTERM)
    assert code == 0 and "Resume with:" in output, output[-3000:]
    (tmp_path / "elsewhere").mkdir()
    after = (tmp_path / "before").rename(tmp_path / "elsewhere" / "after")
    model = shutil.copytree(REPO / "tests" / "assets" / "tiny_lm", tmp_path / "elsewhere" / "model")
    data = shutil.copy(REPO / "examples" / "quickstart" / "jargon_train.jsonl", tmp_path / "elsewhere")
    places = (f"tokenizer.path={model}", f"checkpointer.checkpoint_dir={model}", f"dataset.source={data}")
    assert run(after, *changes, *places).final_weights == unbroken[1]
    assert metrics_of(after) == metrics_of(unbroken[0])
    assert not list(after.rglob("*.stale*"))


@pytest.mark.slow
def test_a_killed_run_resumes_as_if_it_had_not_been(unbroken, tmp_path):
    """SIGKILL in the second iteration; tests/faults/test_kills.py kills everywhere else."""
    changes = ("max_iterations=2", "max_epochs=1")
    code, output = signalled_at(6, tmp_path, changes, signal.SIGKILL)
    assert code == -signal.SIGKILL, output[-3000:]
    assert run(tmp_path, *changes).final_weights == unbroken[1]
    assert metrics_of(tmp_path) == metrics_of(unbroken[0])


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
