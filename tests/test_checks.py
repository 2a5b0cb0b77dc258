"""What a resumed run may not change, key by key; checks of single values that the fuzz test does not name."""

import copy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.checks import _RESULTS_DEPEND_ON, check_unchanged, run_fingerprint
from spin.defaults import RECIPE_DEFAULTS
from spin.errors import CheckpointError


@pytest.mark.parametrize("key", [*_RESULTS_DEPEND_ON, "dataset", "tokenizer"])
def test_every_key_that_results_depend_on_is_compared(key):
    """The tokenizer's fingerprint covers its chat template, see tests/data/test_chat.py."""
    config = copy.deepcopy(RECIPE_DEFAULTS)
    old = run_fingerprint(OmegaConf.create(config), "data", "tokens")
    check_unchanged(old, run_fingerprint(OmegaConf.create(config), "data", "tokens"), [], Path("out"))
    if key in config and key != "dataset" and key != "tokenizer":
        value = config[key]
        config[key] = {**value, "new": 1} if isinstance(value, dict) else "other"
    new = run_fingerprint(
        OmegaConf.create(config), "other" if key == "dataset" else "data", "other" if key == "tokenizer" else "tokens"
    )
    with pytest.raises(CheckpointError, match=rf"another config: {key} is .*other|another config: {key} is .*new"):
        check_unchanged(old, new, ["another_key"], Path("out"))
    check_unchanged(old, new, [key], Path("out"))
