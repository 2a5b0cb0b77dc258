"""A damaged newest checkpoint never blocks a run whose earlier one is complete."""

import os
import shutil

import pytest

from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError
from spin.core.ranks import init_world
from tests.ranks import run_ranks
from tests.recipes.helpers import flip_bit, generate, metrics_of, run

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "save_interval=1")
SHORT += ("lr_scheduler.name=constant", "lr_scheduler.warmup=0")  # the same rate whatever max_steps is


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was stopped after three of its five steps, with three checkpoints; and one that was not."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run(folder / "three", *SHORT, "max_steps=3")
    run(folder / "five", *SHORT)
    return folder


@pytest.fixture
def out(runs, tmp_path):
    """A copy of the stopped run."""
    return shutil.copytree(runs / "three", tmp_path / "out")


def step(out, number):
    return out / "checkpoints" / f"step_{number:08d}"


def latest(out, *arguments):
    return SPINCheckpointer("unused", str(out), "LLAMA3_2").latest(*arguments)


DAMAGE = {
    **{
        f"a flipped bit in {name}": lambda path, name=name: flip_bit(path / name)
        for name in ("__0_0.distcp", "state.json", "manifest.json", ".metadata")
    },
    "a manifest of brackets": lambda path: (path / "manifest.json").write_text('{"a":' * 100_000),
    "a manifest without end": lambda path: (path / "manifest.json").write_bytes(b""),
    "a truncated file": lambda path: os.truncate(path / "__0_0.distcp", 1000),
    "a missing file": lambda path: (path / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_run_resumes_from_the_checkpoint_before(runs, out, caplog, damage):
    DAMAGE[damage](step(out, 3))
    assert latest(out, "auto", init_world("cpu")) == step(out, 2)
    assert f"{step(out, 3)}" in caplog.text and caplog.text.count("passed over") == 1
    if damage == "a flipped bit in __0_0.distcp":
        flip_bit(step(out, 2) / "__0_0.distcp")  # several may be damaged
        run(out, *SHORT)
        assert metrics_of(out) == metrics_of(runs / "five")
        assert latest(out) == step(out, 5) and caplog.text.count("passed over") == 3


def test_where_all_are_damaged_nothing_is_begun_over_them(out):
    for number, name in enumerate(("__0_0.distcp", "manifest.json", "state.json"), start=1):
        flip_bit(step(out, number) / name)
    before = (out / "metrics.jsonl").read_bytes(), sorted((out / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="every checkpoint is damaged .*step_00000001, .*resume=never"):
        run(out, *SHORT)
    assert ((out / "metrics.jsonl").read_bytes(), sorted((out / "checkpoints").iterdir())) == before


def test_a_checkpoint_that_is_named_is_not_replaced_by_another(out):
    flip_bit(step(out, 3) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
        run(out, *SHORT, f"resume={step(out, 3)}")


def test_the_damaged_one_does_not_count_among_the_last(out):
    flip_bit(step(out, 3) / "__0_0.distcp")
    run(out, *SHORT, "checkpointer.keep_last=2", "max_steps=4", "save_interval=2")
    # 3 is left for people to look at
    assert sorted((out / "checkpoints").iterdir()) == [step(out, number) for number in (2, 3, 4)]


def test_generation_alone_steps_back_too(runs, tmp_path, caplog):
    out = shutil.copytree(runs / "five", tmp_path / "out")
    flip_bit(step(out, 5) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="step_00000004 is inside iteration 0"):
        generate(out, *SHORT)
    assert "step_00000005: damaged (the SHA-256 of __0_0.distcp is not the manifest's)" in caplog.text


@pytest.mark.slow
def test_two_ranks_step_back_together(out, subprocess_env):
    flip_bit(step(out, 3) / ".metadata")  # rank 0's part of the files
    flip_bit(step(out, 2) / "__0_0.distcp")  # rank 1's
    run_ranks("newest_checkpoint.py", subprocess_env, out)
