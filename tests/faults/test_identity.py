"""The whole model section is part of what a run is: checkpoints and responses on disk are not taken for another's."""

import json
import shutil
from pathlib import Path

import pytest

from spin.core.errors import CheckpointError
from tests.families import edit_config
from tests.recipes.helpers import metrics_of, run, run_adapters, step_of

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "save_interval=1", "lr_scheduler.name=constant")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped after two steps, with each recipe."""
    folder = tmp_path_factory.mktemp("identity")
    run(folder / "full", *SHORT, "max_steps=2")
    run_adapters(folder / "lora", *SHORT, "max_steps=2")
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("model.rope_base=500000", r"model\.rope_base is 500000, was 10000"),
        ("model.norm_eps=1.0e-3", r"model\.norm_eps is 0\.001, was 1e-05"),
        ("model.scale_factor=32", r"model\.scale_factor is 32, was 1"),
        ("model.attn_dropout=0.0", r"model\.attn_dropout is 0\.0, was 'absent'"),
        ("model.max_seq_len=500", r"model\.max_seq_len is 500, was 512"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_key(begun, kind, change, shown):
    run_of = run if kind == "full" else run_adapters
    before = (begun / kind / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=rf"{shown}.*resume_with_changes=\[model\]"):
        run_of(begun / kind, *SHORT, change)
    assert (begun / kind / "metrics.jsonl").read_bytes() == before


def test_so_is_another_generator_and_another_base_dtype(begun):
    replay = ("generator._component_=spin.generators.ReplayGenerator", "~generator.batch_size")
    with pytest.raises(CheckpointError, match=r"generator\._component_ is .*ReplayGenerator.*\[generator\]"):
        run(begun / "full", *SHORT, *replay, f"generator.path={Path(__file__)}")
    with pytest.raises(CheckpointError, match=r"base_dtype is '?bf16'?, was '?fp32"):
        run_adapters(begun / "lora", *SHORT, "base_dtype=bf16")


def test_it_can_be_allowed(begun, tiny_lm, tmp_path):
    shutil.copytree(begun / "full", tmp_path / "out")
    shutil.copytree(tiny_lm, tmp_path / "model")
    edit_config(tmp_path / "model", rms_norm_eps=1.1e-5)  # which exports copy
    changes = ("model.norm_eps=1.1e-5", f"checkpointer.checkpoint_dir={tmp_path}/model", "resume_with_changes=[model]")
    assert step_of(run(tmp_path / "out", *SHORT, *changes)) == 5


def test_responses_and_log_probs_of_the_same_weights_in_another_model_are_made_again(begun, tiny_lm, tmp_path, caplog):
    """Two folders whose weights are the same bytes, and whose rotary bases are not."""
    shutil.copytree(begun / "full", tmp_path / "out")
    shutil.copytree(tiny_lm, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    rope = settings["rope_parameters"] if settings.get("rope_parameters") else settings
    assert rope["rope_theta"] == 10000
    rope["rope_theta"] = 20000
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    changes = (*SHORT, "model.rope_base=20000", f"checkpointer.checkpoint_dir={tmp_path}/model", "max_steps=1")
    run(tmp_path / "out", *changes, "resume=never")
    for name in ("responses", "pairs"):
        assert (tmp_path / "out" / "iteration_000" / f"{name}.stale-0").is_dir(), name
    assert "model.rope_base is 20000, was 10000" in caplog.text
    run(tmp_path / "fresh", *changes)
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "fresh")
