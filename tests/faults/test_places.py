"""Where code and files are looked for: the folder that one stands in, a logger's files, optimizers that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from spin_recipe import SPINRecipe

from spin.core.errors import ConfigError
from tests.recipes.helpers import REPO, run, tiny_config


def test_modules_in_the_folder_of_a_run_are_not_imported(tmp_path):
    """`cd` into somebody's run folder, then `python -m spin ls .` or `validate`: a yaml.py in it does not run."""
    for name in ("yaml", "omegaconf", "torch", "datasets", "json", "dangerous"):
        (tmp_path / f"{name}.py").write_text(f"open('imported_{name}', 'w')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "recipes")])}
    for arguments in (["ls", "."], ["validate", "quickstart/cpu"]):
        done = subprocess.run(
            [sys.executable, "-m", "spin", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.glob("imported_*"))


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
