"""Exports: how many are kept, and the space that they take."""

import shutil

import pytest
from spin_recipe import SPINRecipe

from spin.core.errors import CheckpointError, ConfigError
from tests.recipes.helpers import adapters_config, run, run_adapters, tiny_config

SHORT = ("max_iterations=3", "max_epochs=1", "limit_train_batches=1", "validation_dataset=null")


def exports(folder):
    found = [*folder.glob("*/hf_model"), *folder.glob("*/adapter")]
    return sorted(str(path.relative_to(folder)) for path in found)


def test_the_newest_are_kept_and_what_is_not_ours(tmp_path):
    (tmp_path / "iteration_000_mine" / "hf_model").mkdir(parents=True)
    (tmp_path / "iteration_000_mine" / "hf_model" / "config.json").write_text("{}")
    run(tmp_path, *SHORT, "checkpointer.keep_exports=1")
    assert exports(tmp_path) == ["iteration_000_mine/hf_model", "iteration_002/hf_model"]
    (tmp_path / "iteration_002" / "hf_model" / ".spin").unlink()
    run(tmp_path, *SHORT, "checkpointer.keep_exports=1", "max_iterations=4", "lr_scheduler.name=linear")
    assert exports(tmp_path)[1:] == ["iteration_002/hf_model", "iteration_003/hf_model"]


def test_of_adapters(tmp_path):
    run_adapters(tmp_path, *SHORT, "checkpointer.keep_exports=2")
    assert exports(tmp_path) == [f"iteration_00{i}/{name}" for i in (1, 2) for name in ("adapter", "hf_model")]


@pytest.mark.parametrize("config_of", [tiny_config, adapters_config])
def test_the_exports_of_all_iterations_are_counted_before_anything_is_loaded(tmp_path, monkeypatch, config_of):
    """918,656 parameters in fp32 are 3.5 MiB an export, and a full state as much at least."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40 * 2**20))
    changes = ("max_iterations=20", "checkpointer.export_dtype=fp32")
    with pytest.raises(CheckpointError, match=r"40\.0 MiB free, but one checkpoint and 20 exports .*keep_exports=1"):
        SPINRecipe(config_of(tmp_path, *changes)).setup()
    started = SPINRecipe(config_of(tmp_path, *changes, "checkpointer.keep_exports=1"))
    started.setup()
    started.cleanup()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all"])
def test_what_keep_exports_cannot_be(tmp_path, value):
    with pytest.raises(ConfigError, match="keep_exports"):
        run(tmp_path, *SHORT, f"checkpointer.keep_exports={value}")
