"""What a resumed run may not change, key by key; checks of single values that the fuzz test does not name."""

import copy
import math
from pathlib import Path

import pytest
import spin_generate
from omegaconf import OmegaConf
from spin_generate import SPINGenerate

from spin.config.checks import check_run
from spin.config.defaults import RECIPE_DEFAULTS
from spin.config.parse import complete, load_config
from spin.core.errors import CheckpointError, ConfigError, SelfTestError
from spin.run.resume import RESULTS_DEPEND_ON, check_unchanged, run_fingerprint
from spin.training.selftest import check_first_loss

CONFIG = Path(__file__).parents[1] / "assets" / "tiny.yaml"


@pytest.mark.parametrize("key", [*RESULTS_DEPEND_ON, "dataset", "tokenizer"])
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
    with pytest.raises(
        CheckpointError, match=rf"config: {key}(\.new)? is .* resume_with_changes=\[another_key,{key}\]"
    ):
        check_unchanged(old, new, ["another_key"], Path("out"))
    check_unchanged(old, new, [key], Path("out"))


def test_a_changed_section_is_told_by_what_differs_in_it():
    """Nothing is said of the other nine keys of the section, and nothing of how this package marks its own."""
    run = {"optimizer": {"_component_": "AdamW", "lr": 1e-4, "_extra_": ["reset"]}, "seed": 1}
    changed = {"optimizer": {**run["optimizer"], "lr": 1e-6}, "seed": 1}
    with pytest.raises(CheckpointError) as error:
        check_unchanged(run, changed, [], Path("out"))
    assert str(error.value) == (
        "The run in out was started with another config: optimizer.lr is 1e-06, was 0.0001. Restore it, start a new "
        "output_dir, or allow it by resume_with_changes=[optimizer]."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (f"{name}=null", f"{name}=null: expected a section with _component_")
            for name in ("model", "tokenizer", "checkpointer", "dataset", "generator", "loss", "optimizer")
        ),
        ("optimizer._component_=torch.optim.LBFGS", r"torch\.optim\.LBFGS: .* no closure, such as torch\.optim\.AdamW"),
        ("max_epochs=1.5", r"max_epochs=1\.5: expected a whole number, 1 or more"),
        ("max_iterations=1.5", r"max_iterations=1\.5: expected a whole number, 1 or more"),
        ("max_steps=1.5", r"max_steps=1\.5: expected a whole number, or -1"),
        ("max_steps=0", "max_steps=0: expected 1 or more"),
        ("seed=1.5", r"seed=1\.5: expected a whole number"),
        ("seed=null", "seed=None: expected a whole number"),
        ("resume=null", "resume=None: expected auto"),
        ("resume=''", "resume='': expected auto"),
        ("max_time=10:00:00:00", "max_time=2160000: .* put quotes around them"),  # a number of base 60
        ("save_interval=null", "save_interval=None: expected a number of batches"),
        ("val_check_interval=null", "val_check_interval=None: expected a number of batches"),
        ("sampling.max_new_tokens=2.5", r"sampling\.max_new_tokens=2\.5: expected a whole number"),
        ("sampling.max_new_tokens=null", r"sampling\.max_new_tokens=None: expected a whole number"),
        ("sampling.top_k=1.5", r"sampling\.top_k=1\.5: expected a whole number"),
        ("sampling.temperature=null", r"sampling\.temperature=None: expected a number"),
        ("sampling.stop_token_ids=[abc]", r"sampling\.stop_token_ids=\['abc'\]: expected token ids"),
        ("sampling.stop_strings=['']", r"sampling\.stop_strings=\[''\]: expected texts that are not empty"),
        ("sampling.stop_strings=[1]", r"sampling\.stop_strings=\[1\]: expected texts"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(override, message):
    overrides = ["output_dir=runs/none", override]
    with pytest.raises(ConfigError, match=message):
        check_run(complete(load_config(str(CONFIG), overrides), RECIPE_DEFAULTS))


@pytest.mark.parametrize(
    "override",
    [
        "max_steps=null",
        "metric_logger=null",
        "max_time='10:00:00:00'",
        "seed=-1",
        *(f"optimizer._component_={name}" for name in ("torch.optim.RMSprop", "spin.training.AdamW8bit")),
    ],
)
def test_values_that_work(override):
    check_run(complete(load_config(str(CONFIG), ["output_dir=runs/none", override]), RECIPE_DEFAULTS))


@pytest.mark.parametrize("key", ["temperature=0", "temperature=1.0e-6", "top_k=1", "top_p=1.0e-7"])
def test_several_responses_to_a_prompt_are_sampled(key):
    """Greedy ones would all be the same; a file of responses is not sampled from."""
    name = key.partition("=")[0]
    overrides = ["output_dir=runs/none", f"sampling.{key}", "pairs.responses_per_prompt=2"]
    remedy = (
        rf"responses_per_prompt=2 with sampling\.{key.replace('1.0e-', '1e-0')}.* Set sampling\.{name}=\S+ to sample"
    )
    with pytest.raises(ConfigError, match=remedy):
        check_run(complete(load_config(str(CONFIG), overrides), RECIPE_DEFAULTS))
    check_run(complete(load_config(str(CONFIG), overrides[:2]), RECIPE_DEFAULTS))
    replay = [
        "~generator.batch_size",
        "generator._component_=spin.generators.ReplayGenerator",
        "generator.path=a.jsonl",
    ]
    check_run(complete(load_config(str(CONFIG), [*overrides, *replay]), RECIPE_DEFAULTS))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_workers=0", "num_workers=0: expected the number of machines, 1 or more"),
        ("worker=1", r"worker=1: expected 0 to num_workers - 1 = 0"),
        ("worker=0.5", r"worker=0\.5: expected 0 to"),
    ],
)
def test_workers_that_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message):
        SPINGenerate(complete(load_config(str(CONFIG), ["output_dir=runs/none", override]), spin_generate.DEFAULTS))


@pytest.mark.parametrize(
    ("drift", "cause"), [(0.25, r"by 0\.25 nats for real and 0 for generated"), (0.0, r"it is the loss that differs")]
)
def test_a_wrong_first_loss_tells_log_probs_from_a_loss_that_the_recipe_changed(drift, cause):
    """Twice ln 2, as of a recipe that multiplies its losses by 2; equal log-probs rule out other causes."""
    metrics = {"loss": 2 * math.log(2), "margin": 0.0, "real_logp_drift": drift, "generated_logp_drift": 0.0}
    with pytest.raises(SelfTestError, match=rf"is 1\.38629436, expected 0\.69314718 .*{cause}"):
        check_first_loss(metrics, (math.log(2), 0.0), "fp32", 0)
    check_first_loss(metrics | {"loss": math.log(2)}, (math.log(2), 0.0), "fp32", 0)
