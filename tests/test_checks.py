"""What a resumed run may not change, key by key; checks of single values that the fuzz test does not name."""

import copy
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.checks import _RESULTS_DEPEND_ON, check_first_loss, check_unchanged, run_fingerprint
from spin.defaults import RECIPE_DEFAULTS
from spin.errors import CheckpointError, SelfTestError


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


@pytest.mark.parametrize(
    ("drift", "cause"), [(0.25, r"by 0\.25 nats for real and 0 for generated"), (0.0, r"it is the loss that differs")]
)
def test_a_wrong_first_loss_tells_log_probs_from_a_loss_that_the_recipe_changed(drift, cause):
    """Twice ln 2, as of a recipe that multiplies its losses by 2; equal log-probs rule out other causes."""
    metrics = {"loss": 2 * math.log(2), "margin": 0.0, "real_logp_drift": drift, "generated_logp_drift": 0.0}
    with pytest.raises(SelfTestError, match=rf"is 1\.38629436, expected 0\.69314718 .*{cause}"):
        check_first_loss(metrics, (math.log(2), 0.0), "fp32", 0)
    check_first_loss(metrics | {"loss": math.log(2)}, (math.log(2), 0.0), "fp32", 0)
