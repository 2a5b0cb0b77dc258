"""Runs the recipe in this process or by its command line, and reads what it wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import spin_recipe

from spin.config.parse import complete, load_config
from spin.model.fingerprint import weights_fingerprint

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "tests" / "assets" / "tiny.yaml"
# not the same in two runs
TIMES = ("step_time", "pairs_per_second", "tokens_per_second", "validation_step_time")


def tiny_overrides(output_dir):
    return [
        f"output_dir={output_dir}",
        f"tokenizer.path={REPO / 'tests/assets/tiny_lm'}",
        f"checkpointer.checkpoint_dir={REPO / 'tests/assets/tiny_lm'}",
        f"dataset.source={REPO / 'examples/quickstart/jargon_train.jsonl'}",
        f"validation_dataset.source={REPO / 'examples/quickstart/jargon_val.jsonl'}",
    ]


def tiny_config(output_dir, *overrides):
    """The test config, complete, as the command line would hand it to the recipe."""
    return complete(load_config(str(CONFIG), [*tiny_overrides(output_dir), *overrides]), spin_recipe.DEFAULTS)


def run(output_dir, *overrides, recipe_class=spin_recipe.SPINRecipe):
    """One run from start to end in this process."""
    recipe = recipe_class(tiny_config(output_dir, *overrides))
    recipe.setup()
    recipe.train()
    recipe.final_weights = weights_fingerprint(recipe._model)
    recipe.cleanup()
    return recipe


def metrics_of(output_dir, with_times=False):
    """The lines of metrics.jsonl; without what no two runs share."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return rows if with_times else [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def free_port():
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(output_dir, *overrides, recipe="spin_recipe", nproc=1, config=CONFIG, cwd=None, program=None, timeout=240):
    """One run by the command line, ``tune run`` unless a program is given; the finished process."""
    base = tiny_overrides(output_dir) if recipe != "spin_evaluate" else [f"output_dir={output_dir}"]
    launcher = [sys.executable, "-m", "torchtune._cli.tune", "run"]
    if nproc > 1:
        launcher += ["--nproc_per_node", str(nproc)]
    launcher = program or [*launcher, recipe]
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "recipes"), env.get("PYTHONPATH", "")])
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [*launcher, "--config", str(config), *base, *overrides],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
