"""A damaged newest state never blocks a run whose earlier one is whole."""

import os
import shutil

import pytest
import spin_generate

from spin.checkpoint import SPINCheckpointer
from spin.config.parse import complete, load_config
from spin.core.errors import CheckpointError
from spin.core.ranks import init_world
from tests.recipes.helpers import CONFIG, metrics_of, run, tiny_overrides
from tests.torchrun import run_ranks

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "save_interval=1")
SHORT += ("lr_scheduler.name=constant", "lr_scheduler.warmup=0")  # the same rate whatever max_steps is


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was stopped after three of its five steps, with three states; and one that was not."""
    folder = tmp_path_factory.mktemp("states")
    run(folder / "three", *SHORT, "max_steps=3")
    run(folder / "five", *SHORT)
    return folder


def flip(file, position=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 4
    file.write_bytes(content)


def deep(file):
    file.write_text('{"a":' * 100_000)


DAMAGE = {
    "a flipped bit in the tensors": lambda state: flip(state / "__0_0.distcp"),
    "a flipped bit in state.json": lambda state: flip(state / "state.json"),
    "a flipped bit in the manifest": lambda state: flip(state / "manifest.json"),
    "a flipped bit in the metadata": lambda state: flip(state / ".metadata"),
    "a manifest of brackets": lambda state: deep(state / "manifest.json"),
    "a manifest without end": lambda state: (state / "manifest.json").write_bytes(b""),
    "a cut file": lambda state: os.truncate(state / "__0_0.distcp", 1000),
    "a missing file": lambda state: (state / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_run_goes_on_from_the_state_before(runs, tmp_path, caplog, damage):
    shutil.copytree(runs / "three", tmp_path / "out")
    state = tmp_path / "out" / "checkpoints" / "step_00000003"
    DAMAGE[damage](state)
    found = SPINCheckpointer("unused", "LLAMA3_2", str(tmp_path / "out")).latest("auto", init_world("cpu"))
    assert found == state.with_name("step_00000002")
    assert f"{state}" in caplog.text and "passed over" in caplog.text
    if damage in ("a flipped bit in the tensors", "a flipped bit in the manifest"):
        run(tmp_path / "out", *SHORT)
        assert metrics_of(tmp_path / "out") == metrics_of(runs / "five")
        assert SPINCheckpointer("unused", "LLAMA3_2", str(tmp_path / "out")).latest().name == "step_00000005"


def test_several_may_be_damaged(runs, tmp_path, caplog):
    shutil.copytree(runs / "three", tmp_path / "out")
    for step in (2, 3):
        flip(tmp_path / "out" / "checkpoints" / f"step_0000000{step}" / "__0_0.distcp")
    found = SPINCheckpointer("unused", "LLAMA3_2", str(tmp_path / "out")).latest("auto", init_world("cpu"))
    assert found.name == "step_00000001" and caplog.text.count("passed over") == 2


def test_where_none_is_whole_nothing_is_begun_over_them(runs, tmp_path):
    shutil.copytree(runs / "three", tmp_path / "out")
    states = sorted((tmp_path / "out" / "checkpoints").iterdir())
    for state, name in zip(states, ("__0_0.distcp", "manifest.json", "state.json"), strict=True):
        flip(state / name)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged .*step_00000001, .*resume=never"):
        run(tmp_path / "out", *SHORT)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert sorted((tmp_path / "out" / "checkpoints").iterdir()) == states


def test_a_state_that_is_named_is_not_replaced_by_another(runs, tmp_path):
    shutil.copytree(runs / "three", tmp_path / "out")
    state = tmp_path / "out" / "checkpoints" / "step_00000003"
    flip(state / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
        run(tmp_path / "out", *SHORT, f"resume={state}")


def test_the_damaged_one_does_not_count_among_the_last(runs, tmp_path):
    shutil.copytree(runs / "three", tmp_path / "out")
    flip(tmp_path / "out" / "checkpoints" / "step_00000003" / "__0_0.distcp")
    run(tmp_path / "out", *SHORT, "checkpointer.keep_last=2", "max_steps=4", "save_interval=2")
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003", "step_00000004"]  # 3 is left for people to look at


def test_generation_alone_steps_back_too(runs, tmp_path, caplog):
    shutil.copytree(runs / "five", tmp_path / "out")
    flip(tmp_path / "out" / "checkpoints" / "step_00000005" / "__0_0.distcp")
    recipe = spin_generate.SPINGenerate(
        complete(load_config(str(CONFIG), [*tiny_overrides(tmp_path / "out"), *SHORT]), spin_generate.DEFAULTS)
    )
    with pytest.raises(CheckpointError, match="step_00000004 is inside iteration 0"):
        recipe.setup()
    assert "step_00000005: damaged (the SHA-256 of __0_0.distcp is not the manifest's)" in caplog.text


@pytest.mark.slow
def test_two_ranks_step_back_together(runs, tmp_path, subprocess_env):
    shutil.copytree(runs / "three", tmp_path / "out")
    flip(tmp_path / "out" / "checkpoints" / "step_00000003" / ".metadata")  # rank 0's part of the files
    flip(tmp_path / "out" / "checkpoints" / "step_00000002" / "__0_0.distcp")  # rank 1's
    run_ranks("newest_state.py", subprocess_env, tmp_path / "out")
