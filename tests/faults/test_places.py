"""What a config may give a metric logger and an optimizer."""

from __future__ import annotations

import pytest
from spin_recipe import SPINRecipe

from spin.core.errors import ConfigError
from tests.recipes.helpers import run, tiny_config

WANDB, DISK = (f"torchtune.training.metric_logging.{name}Logger" for name in ("WandB", "Disk"))


@pytest.mark.parametrize(
    ("component", "change"),
    [
        (WANDB, "settings={x_executable: /tmp/x, base_url: 'http://elsewhere'}"),
        (WANDB, "config={a: 1}"),
        (WANDB, "tags=[{a: 1}]"),
        (DISK, "filename=/etc/profile.txt"),
        (DISK, "filename=../x.txt"),
        (DISK, "filename=.bashrc"),
        (DISK, "filename=x.py"),
        (DISK, "filename=1"),
    ],
)
def test_a_logger_takes_values_and_appends_to_logs(component, change, tmp_path):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"metric_logger\.{key}.*expect"):
        SPINRecipe(tiny_config(tmp_path, f"metric_logger._component_={component}", f"metric_logger.{change}"))
    SPINRecipe(tiny_config(tmp_path, "metric_logger.filename=my-log.1.txt"))


@pytest.mark.parametrize(
    "change",
    [
        "optimizer=torch.optim.SparseAdam",
        "optimizer=torch.optim.Adafactor",
        "optimizer=torchao.optim.AdamW8bit",
        "optimizer.differentiable=true",
        "optimizer.capturable=true",
    ],
)
def test_an_optimizer_that_cannot_update_such_weights_is_named(change, tmp_path):
    short = ("max_iterations=1", "max_steps=1", "validation_dataset=null", "sampling.max_new_tokens=2")
    with pytest.raises(ConfigError, match=r"optimizer: \S+ cannot update the model's weights: "):
        run(tmp_path, *short, change)
    assert not list(tmp_path.glob("checkpoints/step_*"))
