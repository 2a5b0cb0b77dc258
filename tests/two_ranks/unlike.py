"""Two ranks that were given different things: both refuse, alike, before anything is written. Argument: a folder."""

import itertools
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import spin_evaluate
import spin_generate
import spin_recipe

from spin.config import EvaluateConfig, GenerateConfig, SPINConfig, complete, load_config
from spin.core.errors import ConfigError
from spin.core.ranks import shutdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import REPO, tiny_overrides  # noqa: E402

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
NUMBERS = itertools.count()
BY_RANK = os.environ["RANK"]
SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
MODEL, DATA = REPO / "tests/assets/tiny_lm", REPO / "examples/quickstart/jargon_train.jsonl"
PROGRAMS = {
    "recipe": (spin_recipe.SPINRecipe, SPINConfig, "tiny.yaml"),
    "lora": (spin_recipe.SPINRecipe, SPINConfig, "tiny_lora.yaml"),
    "generate": (spin_generate.SPINGenerate, GenerateConfig, "tiny.yaml"),
    "evaluate": (spin_evaluate.SPINEvaluate, EvaluateConfig, "tiny_evaluate.yaml"),
}


def made(name, out, *overrides):
    program, defaults, file = PROGRAMS[name]
    usual = [*tiny_overrides(out), *SHORT]
    if name == "evaluate":
        usual = [f"output_dir={out}", f"dataset.source={DATA}", "dataset.limit=4"]
        usual += [f"{role}.checkpoint_dir={MODEL}" for role in ("candidate", "baseline", "judge")]
        usual += ["candidate.name=a", "baseline.name=b"]
    return program(complete(load_config(str(REPO / "tests/assets" / file), [*usual, *overrides]), defaults))


def refused(name, pattern, *overrides):
    out = folder / f"{name}_{next(NUMBERS)}"
    recipe = made(name, out, *overrides)
    with pytest.raises(ConfigError, match="the 2 ranks were given different inputs") as error:
        recipe.setup()
    assert re.search(rf"{pattern}.* on rank 0 \(\S+\), .* on rank 1 \(\S+\)\n", str(error.value)), (overrides, error)
    return sorted(path.name for path in out.rglob("*"))


# --- the config, before there is a process group ---
for key, value in (
    ("loss.beta", f"0.1{BY_RANK}"),
    ("optimizer.lr", f"1.{BY_RANK}e-4"),
    ("sampling.temperature", f"1.{BY_RANK}"),
    ("seed", "${oc.decode:${oc.env:RANK}}"),
    ("global_batch_size", f"1{BY_RANK}"),
    ("replicas", f"1{BY_RANK}"),  # which would hang in making the mesh
    ("dataset.limit", f"1{BY_RANK}"),
    ("model.max_seq_len", f"51{BY_RANK}"),
    ("output_dir", f"{folder}/out_{BY_RANK}"),
):
    assert refused("recipe", f"\n{re.escape(key)}: ", f"{key}={value}") == []
for name in ("lora", "generate", "evaluate"):
    assert refused(name, "\nseed: 0", f"seed={BY_RANK}") == []

# --- code of one's own ---
site = folder / f"site_{rank}"
site.mkdir()
(site / "my_checker.py").write_text(f"def check(prompt, real, generated, truncated):\n    return {bool(rank)}\n")
sys.path.insert(0, str(site))
own = ("allow_components=[my_checker]", "pairs.checker=my_checker.check")
assert refused("recipe", r"\ncode of my_checker\.check: ", *own) == []

# --- what lies in files, after reading ---
mine = folder / f"rank_{rank}"
for copy in ("equal", "model", "tokenizer"):
    shutil.copytree(MODEL, mine / copy)
text = DATA.read_text()
if rank == 1:
    with (mine / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x02")
    words = (mine / "tokenizer" / "tokenizer.json").read_text()
    (mine / "tokenizer" / "tokenizer.json").write_text(
        words.replace('"normalizer": null', '"normalizer": {"type": "NFC"}')
    )
    text = text.replace(" the ", " a ", 40)
(mine / "data.jsonl").write_text(text)
for name in ("recipe", "lora", "generate"):
    weights = f"checkpointer.checkpoint_dir={mine / 'model'}"
    left = refused(name, r"weights: model\.safetensors: \d+ bytes, \w+", weights)
    assert left == [".lock", "checkpoints"], left  # an empty folder, made to see whether one can be
refused("recipe", "content of dataset: ", f"dataset.source={mine / 'data.jsonl'}")
refused("generate", "content of dataset: ", f"dataset.source={mine / 'data.jsonl'}")
refused("recipe", "content of tokenizer: ", f"tokenizer.path={mine / 'tokenizer'}")
refused("evaluate", r"weights of baseline: model\.safetensors: ", f"baseline.checkpoint_dir={mine / 'model'}")
refused("evaluate", "content of dataset of candidate: ", f"dataset.source={mine / 'data.jsonl'}")

# --- copies of equal content in places of their own are fine ---
recipe = made("recipe", folder / "fine", f"checkpointer.checkpoint_dir={mine / 'equal'}")
recipe.setup()
recipe.cleanup()
shutdown()
print(f"rank {rank} refused")
