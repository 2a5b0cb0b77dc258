"""The SFT stage: its loss and gradient against transformers, exact restarts, and self-play from its result."""

import math

import pytest
import torch
from spin_recipe import SPINRecipe
from spin_sft import SFTRecipe
from transformers import AutoModelForCausalLM

from spin.config import SFTConfig, SPINConfig, as_written, plain, sft_stage
from spin.core.errors import CheckpointError
from tests.recipes.helpers import (
    CONFIG,
    TINY_LM,
    TINY_LORA,
    command,
    metrics_of,
    run,
    stops_at,
    tiny_config,
    weights_of,
)

SHORT = ("max_iterations=1", "max_epochs=1", "limit_train_batches=2", "sft.lr=1e-3")


class OwnConfig(SPINConfig):
    """Of a recipe of one's own, which spin_sft does not know."""

    greeting: str = "hello"


def sft(output_dir, *overrides, recipe_class=SFTRecipe, config=CONFIG):
    return run(output_dir, *SHORT, *overrides, recipe_class=recipe_class, config=config)


def test_a_step_is_that_of_transformers_on_the_mean_over_all_response_tokens(tmp_path):
    """Plain SGD without clipping: the exported weights show the whole gradient."""
    batches = []

    class Recorder(SFTRecipe):
        def train_single_step(self, batch):
            batches.append(batch.pairs)
            return super().train_single_step(batch)

    keys = ("sft.limit_train_batches=1", "sft.lr_scheduler.name=constant", "sft.lr_scheduler.warmup=0")
    recipe_keys = ("optimizer={_component_: torch.optim.SGD, lr: 1.0}", "clip_grad_norm=null", "sft.lr=0.1")
    sft(tmp_path, *keys, *recipe_keys, recipe_class=Recorder)

    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32)
    nats, tokens = torch.zeros(()), 0
    for pair in batches[0]:
        prompt, real = list(map(int, pair.prompt_ids)), list(map(int, pair.real_ids))
        labels = torch.tensor([[-100] * len(prompt) + real])
        nats = nats + model(torch.tensor([prompt + real]), labels=labels).loss * len(real)
        tokens += len(real)
    (nats / tokens).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    row = metrics_of(tmp_path / "sft")[1]
    assert row["loss"] == pytest.approx((nats / tokens).item(), rel=1e-5)
    norm = torch.stack([each.norm() for each in gradients.values()]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert "beta" not in row and "acc" not in row
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/iteration_000/hf_model", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        moved = trained.get_parameter(name) - parameter
        torch.testing.assert_close(moved, -0.1 * gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, TINY_LORA], ids=["full", "lora"])
def test_it_resumes_bit_for_bit_and_self_play_starts_from_its_result(tmp_path, config, caplog):
    """The same config does both; SPIN's first loss is that of two equal models, its policy the one that SFT left."""
    keys = ("sft.epochs=2", "save_interval=1")
    whole = sft(tmp_path / "whole", *keys, config=config)
    sft(tmp_path / "stopped", *keys, config=config, recipe_class=stops_at(3, SFTRecipe))
    recipe = SPINRecipe(tiny_config(tmp_path / "stopped", *SHORT, config=config))
    with pytest.raises(CheckpointError, match=r"sft: supervised fine-tuning has not ended.*Run spin_sft"):
        recipe.setup()
    recipe.cleanup()
    resumed = sft(tmp_path / "stopped", *keys, "sampling.max_new_tokens=9", config=config)  # of pairs alone: may change
    assert resumed.final_weights == whole.final_weights
    assert metrics_of(tmp_path / "stopped/sft") == metrics_of(tmp_path / "whole/sft")
    recipe = SFTRecipe(tiny_config(tmp_path / "stopped", "sft.epochs=3", config=config, model=SFTConfig))
    with pytest.raises(CheckpointError, match=r"max_epochs is 3, was 2;.* the section sft sets it\. Restore it, start"):
        recipe.setup()
    recipe.cleanup()
    rows = metrics_of(tmp_path / "whole/sft")
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.1

    slow = ("sft.epochs=2", "loss.beta=0.3", "optimizer.lr=2e-5")  # a fiftieth of SFT's
    for changes, warned in (("sft.epochs=3", "sft.lr=2e-3", "optimizer.lr=1e-4"), True), (slow, False):
        caplog.clear()
        recipe = SPINRecipe(tiny_config(tmp_path / "whole", *SHORT, *changes, config=config, model=OwnConfig))
        recipe.setup()
        assert ("sft.epochs is 3, was 2; sft.lr is 0.002, was 0.001: self-play" in caplog.text) == warned
        assert ("set a new output_dir and run spin_sft" in caplog.text) == warned
        assert ("optimizer.lr=0.0001 is 1/10 of the rate that fine-tuned this model (0.001)" in caplog.text) == warned
        assert ("Lower optimizer.lr to 1e-05" in caplog.text) == warned
        if warned:
            recipe.cleanup()
    assert weights_of(recipe) == whole.final_weights
    recipe.train()
    recipe.cleanup()
    first, step = metrics_of(tmp_path / "whole")[:2]
    assert first["val_loss"] == pytest.approx(rows[-1]["val_loss"], abs=1e-9)
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_its_config_is_the_runs_with_what_the_section_says(tmp_path):
    logger = "metric_logger={_component_: torchtune.training.metric_logging.DiskLogger, log_dir: '${output_dir}/log'}"
    cfg = tiny_config(tmp_path, "loss.beta=[0.1,0.2]", "pairs.history=1", logger, model=SFTConfig)
    stage = sft_stage(cfg)
    assert (stage.optimizer.lr, stage.lr_scheduler.name, stage.max_epochs, stage.max_iterations) == (
        2e-5,
        "cosine",
        1,
        1,
    )
    assert stage.output_dir == stage.checkpointer.output_dir == f"{tmp_path}/sft"
    assert stage.metric_logger.log_dir == f"{tmp_path}/sft/log" == as_written(stage).metric_logger.log_dir
    assert cfg.output_dir == str(tmp_path) and stage.loss.beta == 0.1
    assert plain(stage.dataset) == plain(cfg.dataset)
    lora = sft_stage(tiny_config(tmp_path, config=TINY_LORA, model=SFTConfig))
    assert lora.optimizer.lr == 3e-4 and lora.optimizer._where == "optimizer"


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_and_one_plays_from_their_result(tmp_path):
    sft(tmp_path / "one")
    command(tmp_path / "two", *SHORT, recipe="spin_sft", nproc=2)
    one, two = (
        [row.get("loss", row.get("val_loss")) for row in metrics_of(tmp_path / n / "sft")] for n in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)
    after = metrics_of(tmp_path / "two" / "sft")[-1]["val_loss"]
    recipe = SPINRecipe(tiny_config(tmp_path / "two", *SHORT))
    recipe.setup()
    assert recipe.run_validation()["val_loss"] == pytest.approx(after, abs=1e-6)
    recipe.cleanup()
