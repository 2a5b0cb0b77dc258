"""Runs of adapters as a whole: whose log-probs the reference is, restarts, QLoRA, exports."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import spin_recipe
import torch
from spin_recipe import SPINRecipe
from transformers import AutoModelForCausalLM

from spin.config.parse import complete, load_config
from spin.core.errors import CheckpointError, ConfigError
from spin.data import PairStore
from spin.generators import GeneratorContext, SamplingParams, TorchtuneGenerator
from spin.model.adapters import adapted_modules
from spin.model.build import build_model
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import named_full_tensors
from spin.pairs.packing import pack_batch
from spin.reference.logprobs import response_logps
from tests.quantizable import QUANTIZED, quantizable
from tests.recipes.helpers import command, metrics_of, tiny_config, tiny_overrides

CONFIG = Path(__file__).resolve().parents[1] / "assets" / "tiny_lora.yaml"


def lora_config(output_dir, *overrides):
    config = load_config(str(CONFIG), [*tiny_overrides(output_dir), *overrides])
    return complete(config, spin_recipe.DEFAULTS)


def run(output_dir, *overrides, recipe_class=SPINRecipe):
    """One run from start to end in this process."""
    recipe = recipe_class(lora_config(output_dir, *overrides))
    recipe.setup()
    recipe.train()
    recipe.final_weights = weights_fingerprint(recipe._model)
    recipe.cleanup()
    return recipe


class Watched(SPINRecipe):
    """Notes at the start of an iteration what the opponent is."""

    def augment_dataloader(self, iteration):
        self.opponents = [*getattr(self, "opponents", []), weights_fingerprint(self._model)]
        return super().augment_dataloader(iteration)

    def setup(self):
        super().setup()
        self.base = weights_fingerprint(self._model, frozen_only=True)


def stops_at(step):
    class StopsAt(SPINRecipe):
        """Is asked to stop, as by SIGTERM, after a number of steps."""

        def train_single_step(self, batch):
            if self._progress.step + 1 == step:
                self._stop.note(15, None)
            return super().train_single_step(batch)

    return StopsAt


@pytest.fixture(scope="module")
def dora_run(tmp_path_factory):
    """20 samples, batches of 4, 2 epochs, 2 iterations."""
    output_dir = tmp_path_factory.mktemp("dora")
    return output_dir, run(output_dir, "model.use_dora=true", recipe_class=Watched)


def test_every_iteration_starts_at_ln_2_and_learns(dora_run):
    rows = {row["step"]: row for row in metrics_of(dora_run[0])}
    for first in (1, 11):
        assert rows[first]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[first]["rewards_actual_mean"] == rows[first]["rewards_generated_mean"] == 0.0
        assert rows[first + 9]["loss"] < 0.55
    assert rows[1]["updated_fraction"] > 0.9  # the frozen base, 95 % of all weights, is not counted


def logps_by_transformers(folder: Path, pairs) -> list[tuple[float, float]]:
    """Summed log-probs of real and generated responses under a Hugging Face model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(prompt, response) -> float:
        ids = torch.tensor([[*prompt, *response]])
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(-1, ids[0, len(prompt) :, None]).sum().item()

    return [(score(p.prompt_ids, p.real_ids), score(p.prompt_ids, p.generated[0].token_ids)) for p in pairs]


def test_the_opponent_is_the_base_with_the_adapter_of_the_iteration_before(dora_run, tiny_lm):
    """Iteration 0: the base. Iteration 1: the model that iteration 0 exported, and not the base."""
    output_dir, recipe = dora_run
    distances = {}
    for iteration in range(2):
        pairs = list(PairStore.open(output_dir / f"iteration_{iteration:03d}" / "pairs").pairs())[:6]
        reference = torch.tensor([(p.reference_real_logp, p.generated[0].reference_logp) for p in pairs])
        for name, folder in (("base", tiny_lm), ("exported", output_dir / "iteration_000" / "hf_model")):
            other = torch.tensor(logps_by_transformers(folder, pairs))
            distances[iteration, name] = (other - reference).abs().max().item()
    assert distances[0, "base"] < 1e-3 and distances[1, "exported"] < 1e-3
    assert distances[0, "exported"] > 1 and distances[1, "base"] > 1
    assert len(set(recipe.opponents)) == 2
    assert weights_fingerprint(recipe._model, frozen_only=True) == recipe.base


def test_another_adapter_is_another_reference(dora_run):
    """The reference pass runs with the adapter as it is: change one, and the log-probs change."""
    _, recipe = dora_run
    pairs = list(PairStore.open(dora_run[0] / "iteration_001" / "pairs").pairs())[:2]
    row = pack_batch(pairs, recipe._layout)[0]
    with torch.no_grad():
        before = response_logps(recipe._model, row)
        module = next(iter(adapted_modules(recipe._model).values()))
        module.lora_b.weight.mul_(-1)
        assert (response_logps(recipe._model, row) - before).abs().max() > 0.01
        module.lora_b.weight.mul_(-1)
        assert torch.equal(response_logps(recipe._model, row), before)


def test_the_embedded_generator_plays_with_the_adapter(dora_run):
    """Its greedy tokens are those of a generator that was given merged tensors, and of transformers on the export."""
    output_dir, recipe = dora_run
    prompts = [list(map(int, recipe._prompts[i].prompt_ids)) for i in range(6)]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=10, stop_token_ids=(2,))
    answers = recipe._generator.generate(prompts, sampling, list(range(6)))
    # one that takes weights is given the merged ones
    plain = build_model(tiny_config("unused").model, torch.float32).to_empty(device="cpu")
    for layer in plain.layers:
        layer.attn.pos_embeddings.rope_init()
    context = GeneratorContext(plain, torch.device("cpu"), 512, recipe._tokenizer.decode)
    merged = TorchtuneGenerator(context, batch_size=4)
    merged.update_weights(named_full_tensors(recipe._model))
    assert merged.generate(prompts, sampling, list(range(6))) == answers
    model = AutoModelForCausalLM.from_pretrained(output_dir / "iteration_001" / "hf_model", dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert answer.token_ids == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("step", [10, 14])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(dora_run, tmp_path, step):
    """At an iteration's end, and inside an epoch of the second: metrics and weights bit for bit."""
    output_dir, recipe = dora_run
    run(tmp_path, "model.use_dora=true", recipe_class=stops_at(step))
    assert metrics_of(tmp_path)[-1]["step"] == step
    resumed = run(tmp_path, "model.use_dora=true")
    assert metrics_of(tmp_path) == metrics_of(output_dir)
    assert resumed.final_weights == recipe.final_weights


@pytest.mark.slow
def test_qlora_trains_and_resumes(tiny_lm, tmp_path):
    """NF4 base of bf16, fp32 adapters. Iterations start at ln 2; the stopped run is the other one, bit for bit."""
    base = quantizable(tiny_lm, tmp_path / "base")
    changes = [*QUANTIZED, f"checkpointer.checkpoint_dir={base}", "base_dtype=bf16", "max_epochs=1"]
    whole = run(tmp_path / "a", *changes)
    rows = {row["step"]: row for row in metrics_of(tmp_path / "a")}
    assert [rows[step]["loss"] for step in (1, 6)] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert rows[5]["val_loss"] < rows[0]["val_loss"]
    run(tmp_path / "b", *changes, recipe_class=stops_at(7))
    resumed = run(tmp_path / "b", *changes)
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    assert resumed.final_weights == whole.final_weights


@pytest.mark.parametrize(
    "changes",
    [
        ("base_dtype=bf16", "compute_dtype=bf16"),
        ("enable_activation_checkpointing=true", "fsdp_accumulate_unsharded=true", "pairs.row_tokens=64"),
        ("nll_weight=0.5", "fsdp_reshard_after_forward=false", "checkpointer.export_merged=false"),
    ],
    ids=lambda changes: changes[0],
)
def test_options_start_at_ln_2(tmp_path, changes):
    run(tmp_path, "max_iterations=1", "max_epochs=1", "limit_train_batches=2", *changes)
    rows = metrics_of(tmp_path)
    if "nll_weight=0.5" not in changes:
        assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[1]["acc"] == 0.0 and rows[2]["grad_norm"] > 0
    assert (tmp_path / "iteration_000" / "hf_model").exists() == ("checkpointer.export_merged=false" not in changes)
    assert (tmp_path / "iteration_000" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_compiled_layers_change_nothing_but_rounding(tiny_lm, tmp_path):
    """With everything that layers can hold: DoRA over NF4."""
    base = quantizable(tiny_lm, tmp_path / "base")
    changes = [*QUANTIZED, f"checkpointer.checkpoint_dir={base}", "model.use_dora=true", "pairs.row_multiple=512"]
    changes += ["max_steps=2", "max_iterations=1", "validation_dataset=null"]
    losses = []
    for flag in ("false", "true"):
        run(tmp_path / flag, *changes, f"compile={flag}")
        losses.append([row["loss"] for row in metrics_of(tmp_path / flag)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_rank_alpha_and_a_plain_model_are_told_apart(tmp_path):
    short = ("max_iterations=1", "max_epochs=1")
    run(tmp_path, *short, recipe_class=stops_at(2))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        run(tmp_path, *short, "model.lora_alpha=16")
    plain = [f"~model.{key}" for key in ("lora_attn_modules", "apply_lora_to_mlp", "lora_rank", "lora_alpha")]
    plain.append("model._component_=torchtune.models.llama3_2.llama3_2")
    with pytest.raises(ConfigError, match="has no adapter.* or set checkpointer=spin.checkpoint.SPINCheckpointer"):
        run(tmp_path / "b", *plain)
    full = "checkpointer._component_=spin.checkpoint.SPINCheckpointer"
    with pytest.raises(ConfigError, match="has adapters, and .* Set checkpointer=spin.checkpoint.LoRACheckpointer"):
        run(tmp_path / "b", full, "base_dtype=null")
    with pytest.raises(ConfigError, match="base_dtype=fp32 is of the frozen weights"):
        run(tmp_path / "b", full)


def test_the_command_line_says_how_much_is_trained(tmp_path):
    """In a process of its own, as users run it. Rank 4 in 4 layers: q and o 256, k and v 192, MLP 3 x 512 each."""
    done = command(tmp_path, "max_steps=1", "validation_dataset=null", recipe="spin_recipe", config=CONFIG)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = 4 * 4 * (2 * 256 + 2 * 192 + 3 * 512)
    assert f"parameters: {trained:,} trainable" in done.stdout + done.stderr
    state = json.loads(next((tmp_path / "checkpoints").glob("*/state.json")).read_text())["state"]
    assert re.fullmatch(r"[0-9a-f]{64}", state["base"])
