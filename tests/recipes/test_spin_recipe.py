"""The recipe as a whole on a small trained model: the loop's order, restarts, options, exports, and refusals."""

import json
import math
import re
import shutil
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from spin_recipe import SPINRecipe
from transformers import AutoModelForCausalLM

from spin.config import instantiate
from spin.core.errors import CheckpointError, ConfigError, GeneratorError, SelfTestError
from spin.data import PairStore
from spin.generators import TorchtuneGenerator
from spin.report import read_run, render
from tests.quantizable import QUANTIZED, quantizable
from tests.recipes.helpers import (
    CONFIG,
    TINY_LM,
    TINY_LORA,
    forged_references,
    logp_by_transformers,
    metrics_of,
    run,
    run_adapters,
    step_of,
    steps_done,
    stops_at,
    tiny_config,
    tiny_prompts,
    weights_of,
)


class Recorder(SPINRecipe):
    """Notes how many optimizer steps the opponent of each step has behind it, and counts the second step's
    operations."""

    def setup(self):
        super().setup()
        self.weights_at, self.opponent_steps, self.saves, self.operations = {weights_of(self): 0}, [], [], {}

    def train_single_step(self, batch):
        self.opponent_steps.append(self.weights_at.get(self.state_dict()["opponent"]))
        with torch.profiler.profile() if step_of(self) == 1 else nullcontext() as profile:
            step = super().train_single_step(batch)
        self.operations = {each.key: each.count for each in profile.key_averages()} if profile else self.operations
        self.weights_at[weights_of(self)] = step_of(self)
        return step

    def save_checkpoint(self):
        self.saves.append(self.state_dict())
        return super().save_checkpoint()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """NeMo's trace: 20 samples, batches of 4, 2 epochs, 2 iterations, validated and saved every 2 steps."""
    output_dir = tmp_path_factory.mktemp("whole")
    recipe = run(output_dir, "validation.spin=true", "val_check_interval=0.4", recipe_class=Recorder)
    return output_dir, recipe


@pytest.fixture(scope="module")
def dora_run(tmp_path_factory):
    """20 samples, batches of 4, 2 epochs, 2 iterations."""
    output_dir = tmp_path_factory.mktemp("dora")
    return output_dir, run_adapters(output_dir, "model.use_dora=true", recipe_class=Recorder)


def test_opponents_steps_validations_saves_and_metrics_are_nemos_and_samples_are_shown(whole_run, oracles):
    output_dir, recipe = whole_run
    trace = oracles["nemo_loop_trace"]["trace"]
    rows = metrics_of(output_dir, with_times=True)
    steps = [row for row in rows if row["step"] > 0]
    assert recipe.opponent_steps == [step["opponent_weights"][0] for step in trace["steps"]]
    for row, expected in zip(steps, trace["steps"], strict=True):
        assert (row["epoch"], row["iteration"]) == (expected["epoch"], expected["iteration"])
        assert row["consumed_samples"] == expected["consumed_samples"]
    assert [row["step"] for row in steps if "val_loss" in row] == trace["val_steps"]
    for save, expected in zip(recipe.saves, trace["saves"], strict=True):
        for name in ("step", "consumed_samples", "epoch", "iteration"):
            assert save["progress"][name] == expected[name]
    names = {*oracles["nemo_loop_trace"]["train_metric_names"], "rewards_all_mean", "rewards_all_std", "grad_norm"}
    names |= {"rewards_actual_mean", "rewards_generated_mean", "beta", "margin", "truncated_fraction"}
    assert names | {"real_logp_drift", "updated_fraction"} <= {*steps[0]}
    assert {"val_loss", "val_spin_loss", "val_acc", "validation_step_time"} <= {*steps[1]}
    samples = [json.loads(line) for line in (output_dir / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "real", "generated", "margin", "step"} <= {*samples[0]}
    last = [row for row in samples if row["step"] == 20]
    assert len(last) == 4 and "What does the hacker slang term" in last[0]["prompt"]


def test_a_step_reduces_all_but_gradients_at_once(whole_run):
    """Sums and requests to stop of all ranks together. The gradient's norm, which clipping needs first, is one more
    where there are several."""
    _, recipe = whole_run
    assert recipe.operations["c10d::allreduce_"] == 1


@pytest.mark.gpu
def test_a_step_waits_for_the_device_twice(tmp_path):
    """For the sums before the update, and for what it changed. Rows have one length: compiling another waits too, as
    does the thread that writes a checkpoint."""
    waits = []

    class Watched(SPINRecipe):
        def train_single_step(self, batch):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                step = super().train_single_step(batch)
                torch.cuda.set_sync_debug_mode("default")
            waits.append([f"{each.filename}:{each.lineno}" for each in found if "synchroniz" in str(each.message)])
            return step

    changes = ["device=cuda", "compute_dtype=bf16", "optimizer.fused=true", "pairs.row_multiple=512", "save_interval=0"]
    run(tmp_path, *changes, "max_epochs=1", "max_iterations=1", recipe_class=Watched)
    assert [len(each) for each in waits[1:]] == [2] * len(waits[1:]), waits  # the first checks itself too


def test_the_generator_is_woken_once_for_an_iteration_and_its_validation(tmp_path, monkeypatch):
    woken, wake = [], TorchtuneGenerator.wake
    monkeypatch.setattr(TorchtuneGenerator, "wake", lambda self: (woken.append(steps_done(tmp_path)), wake(self)))
    run(tmp_path, "validation.spin=true", "max_epochs=1", "limit_train_batches=2")
    assert woken == [1, 3]  # lines of the log, the first of which is the validation at the start
    for iteration in (0, 1):
        trained, held_out = (
            PairStore.open(tmp_path / f"iteration_{iteration:03d}" / name)
            for name in ("responses", "validation/responses")
        )
        assert held_out.is_sealed and held_out.opponent == trained.opponent


@pytest.mark.parametrize("whole", ["whole_run", "dora_run"])
def test_every_iteration_starts_at_ln_2_and_learns(request, whole):
    output_dir, _ = request.getfixturevalue(whole)
    rows = {row["step"]: row for row in metrics_of(output_dir)}
    for first in (1, 11):
        assert rows[first]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert (
            rows[first]["rewards_actual_mean"]
            == rows[first]["rewards_generated_mean"]
            == rows[first]["acc"] - 0.5
            == 0.0
        )
        assert abs(rows[first + 1]["loss"] - math.log(2)) > 1e-4
        assert rows[first + 9]["loss"] < 0.55
        assert rows[first]["updated_fraction"] > 0.9  # of adapters' runs the frozen base is not counted
    if whole == "whole_run":
        assert abs(rows[10]["val_spin_loss"] - math.log(2)) > 1e-4


def test_pairs_on_disk_are_what_was_trained_on(whole_run):
    output_dir, recipe = whole_run
    prompts = {prompt.sample_id: prompt for prompt in tiny_prompts()}
    for iteration in range(2):
        store = PairStore.open(output_dir / f"iteration_{iteration:03d}" / "pairs")
        pairs = list(store.pairs())
        assert store.is_sealed
        assert recipe.weights_at[store.opponent] == 10 * iteration
        assert sorted(pair.sample_id for pair in pairs) == sorted(prompts)
        assert {pair.iteration for pair in pairs} == {iteration}
        for pair in pairs:
            prompt = prompts[pair.sample_id]
            assert np.array_equal(pair.prompt_ids, prompt.prompt_ids)
            assert np.array_equal(pair.real_ids, prompt.real_ids)
            response = pair.generated[0]
            assert (response.finish_reason == "stop") == (response.token_ids[-1] == 2)
            assert len(response.token_ids) <= 12
    validation = list(PairStore.open(output_dir / "iteration_001" / "validation" / "pairs").pairs())
    assert len(validation) == 6


def test_the_export_is_the_policy(whole_run):
    """transformers loads each iteration's folder; the last one gives the policy's log-probs of the real responses."""
    output_dir, _ = whole_run
    folder = output_dir / "iteration_001" / "hf_model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = tiny_prompts("validation_dataset")
    nats = -sum(logp_by_transformers(model, prompt.prompt_ids, prompt.real_ids) for prompt in prompts)
    tokens = sum(len(prompt.real_ids) for prompt in prompts)
    assert nats / tokens == pytest.approx(metrics_of(output_dir)[-1]["val_loss"], rel=1e-5)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("whole", "step"),
    [
        ("whole_run", 10),
        ("whole_run", 14),
        ("dora_run", 14),
        *(pytest.param("whole_run", step, marks=pytest.mark.slow) for step in (5, 20)),
    ],
)
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(request, tmp_path, whole, step):
    """At an epoch's end, at an iteration's end (NeMo's stale opponent), inside the last epoch, at the end; random
    points are those of tests/faults/test_kills.py. Unlike the whole run this one compares gradients, twice an
    iteration, which changes nothing."""
    output_dir, recipe = request.getfixturevalue(whole)
    how = {"config": TINY_LORA} if whole == "dora_run" else {}
    changes = ("model.use_dora=true",) if whole == "dora_run" else ("validation.spin=true",)
    changes += ("watch.gradient_checks=2",)
    run(tmp_path, *changes, recipe_class=stops_at(step), **how)
    assert metrics_of(tmp_path)[-1]["step"] == step
    resumed = run(tmp_path, *changes, **how)
    rows, compared = metrics_of(tmp_path), []
    for row in rows:
        if found := {name: row.pop(name) for name in list(row) if name.startswith("gradient/")}:
            compared.append(row["step"])
            assert {"gradient/signal", "gradient/sft_signal"} <= {*found}
    assert compared == [1, 6, 11, 16] and rows == metrics_of(output_dir)
    assert resumed.final_weights == recipe.final_weights
    for iteration in range(2):
        ours, theirs = (
            [
                (pair.key, pair.reference_real_logp, response.reference_logp, bytes(response.token_ids))
                for pair in PairStore.open(folder / f"iteration_{iteration:03d}/pairs").pairs()
                for response in pair.generated
            ]
            for folder in (tmp_path, output_dir)
        )
        assert ours == theirs


def test_a_changed_config_is_refused_by_name_unless_allowed(tmp_path):
    short = ("max_iterations=1", "max_epochs=1")
    run(tmp_path, *short, recipe_class=stops_at(2))
    with pytest.raises(CheckpointError, match=r"loss\.beta is 0\.3, was 0\.1") as error:
        run(tmp_path, *short, "loss.beta=0.3", "clip_grad_norm=0.5")
    assert "clip_grad_norm" in str(error.value)
    assert "seed" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"config: dataset\.max_response_tokens is 70, was 80\. Restore"):
        run(tmp_path, *short, "dataset.max_response_tokens=70")
    run(tmp_path, *short, "loss.beta=0.3", "resume_with_changes=[loss]")
    assert [row.get("beta") for row in metrics_of(tmp_path)] == [None, 0.1, 0.1, 0.3, 0.3, 0.3]


def test_an_optimizers_changed_options_hold_at_once_if_allowed(tmp_path):
    """Within an iteration too, where the optimizer's state is that of the run so far."""
    short = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
    run(tmp_path, *short, recipe_class=stops_at(2))
    changes = ("optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.6]", "resume_with_changes=[optimizer]")
    resumed = run(tmp_path, *short, *changes)
    (group,) = resumed._optimizer.param_groups
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.6))
    assert {int(state["step"]) for state in resumed._optimizer.state.values()} == {5}


def test_beta_and_learning_rate_per_iteration(tmp_path):
    run(tmp_path, "loss.beta=[0.1,0.4]", "optimizer.lr=[1e-4,1e-5]", "max_epochs=1", "validation_dataset=null")
    rows = metrics_of(tmp_path)
    assert [row["beta"] for row in rows] == [0.1] * 5 + [0.4] * 5
    # linear without a whole step of warm-up: 1, 0.8, 0.6, 0.4, 0.2 of each iteration's rate
    expected = [rate * share for rate in (1e-4, 1e-5) for share in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_an_optimizer_that_continues_schedules_over_the_run(tmp_path):
    changes = ("max_epochs=1", "validation_dataset=null", "optimizer.reset_each_iteration=false")
    changes += ("lr_scheduler.name=cosine", "lr_scheduler.warmup=2")
    run(tmp_path / "a", *changes)
    whole = metrics_of(tmp_path / "a")
    factors = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * done / 8)) for done in range(8)]
    assert [row["lr"] for row in whole] == pytest.approx([1e-4 * factor for factor in factors])
    run(tmp_path / "b", *changes, recipe_class=stops_at(5))
    run(tmp_path / "b", *changes)
    assert metrics_of(tmp_path / "b") == whole


def test_history_mixes_in_the_iteration_before_under_todays_opponent(tmp_path):
    changes = ("pairs.history=1", "pairs.history_fraction=0.6", "max_epochs=1", "limit_train_batches=2")
    recipe = run(tmp_path, *changes, "max_iterations=3", recipe_class=Recorder)
    # 8 samples play in each iteration; from the second on int(0.6 * 8) = 4 old ones join: 2, 3 and 3 steps
    assert recipe.opponent_steps == [0, 0, 2, 2, 2, 5, 5, 5]
    for iteration, steps in ((1, 2), (2, 5)):
        store = PairStore.open(tmp_path / f"iteration_{iteration:03d}" / "pairs")
        pairs = list(store.pairs())
        assert sorted(pair.iteration for pair in pairs) == [iteration - 1] * 4 + [iteration] * 8
        assert recipe.weights_at[store.opponent] == steps
    rows = {row["step"]: row for row in metrics_of(tmp_path)}
    assert [rows[step]["loss"] for step in (1, 3, 6)] == pytest.approx([math.log(2)] * 3, abs=1e-6)


def test_a_generator_whose_log_probs_are_not_the_policys_stops_the_run_before_it_plays(tmp_path):
    """With a limit that no gap is below; what is found of wrong weights: tests/generators/test_vllm.py."""

    class Strict(SPINRecipe):
        def setup(self):
            super().setup()
            self._generator.max_logprob_gap = -1.0

    with pytest.raises(GeneratorError, match="TorchtuneGenerator on rank 0: its log-probs differ"):
        run(tmp_path, recipe_class=Strict)
    assert not list((tmp_path / "iteration_000").rglob("shard-*"))


def test_responses_from_a_store_are_played_back(tmp_path, caplog):
    """A run on the responses of another run's store has that run's losses; other responses are not taken for them."""
    changes = ("max_iterations=1", "max_epochs=1")
    run(tmp_path / "a", *changes)
    responses = tmp_path / "a" / "iteration_000" / "responses"
    replay = ("~generator.batch_size", "generator._component_=spin.generators.ReplayGenerator")
    run(tmp_path / "b", *changes, *replay, f"generator.path={responses}", "validation.fixed_prompts=2")
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    assert "fixed_prompts: left out" in caplog.text and not (tmp_path / "b" / "fixed_prompts.jsonl").exists()
    store = PairStore.open(tmp_path / "b" / "iteration_000" / "responses")
    assert store.manifest["fingerprint"]["generator"] == "spin.generators.replay.ReplayGenerator"
    assert store.manifest["fingerprint"]["generator_source"]


@pytest.mark.parametrize("policy", ["mask", "drop"])
def test_truncated_responses_are_masked_or_dropped_in_training_and_validation(tmp_path, policy):
    """Two responses to a prompt, of which some are truncated. Validation by transformers from the export: means over
    pairs.

    A masked response takes its half of the pair out of numerator and denominator; where it is dropped, the other one
    has all of the pair.
    """
    changes = ("max_iterations=1", "max_epochs=1", "validation.spin=true", 'sampling.stop_strings=[" a","in"]')
    run(tmp_path, *changes, "pairs.responses_per_prompt=2", "sampling.max_new_tokens=8", f"pairs.truncated={policy}")
    made, kept = (list(PairStore.open(tmp_path / "iteration_000" / name).pairs()) for name in ("responses", "pairs"))
    ends = [[response.finish_reason for response in pair.generated] for pair in made]
    assert {len(pair.generated) for pair in made} == {2} and len(made) == 20
    assert any(bytes(p.generated[0].token_ids) != bytes(p.generated[1].token_ids) for p in made)
    truncated = PairStore.open(tmp_path / "iteration_000/pairs").manifest["report"]["truncated"]
    assert 0 < truncated == sum(each.count("length") for each in ends) < 40
    assert len(kept) == (20 if policy == "mask" else sum("stop" in each for each in ends))
    assert metrics_of(tmp_path)[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_000/hf_model", dtype=torch.float32)
    logp = partial(logp_by_transformers, model)
    found, responses = [], set()
    for pair in PairStore.open(tmp_path / "iteration_000/validation/pairs").pairs():
        real = 0.1 * (logp(pair.prompt_ids, pair.real_ids) - pair.reference_real_logp)
        responses.add(sum(response.finish_reason == "stop" for response in pair.generated))
        for response in pair.generated:
            margin = real - 0.1 * (logp(pair.prompt_ids, response.token_ids) - response.reference_logp)
            is_masked = policy == "mask" and response.finish_reason == "length"
            weight = 0.0 if is_masked else 1 / len(pair.generated)
            found.append((weight, math.log1p(math.exp(-margin)), margin > 0, margin))
    weights, losses, wins, margins = map(np.asarray, zip(*found, strict=True))
    assert {1, 2} <= responses
    last = metrics_of(tmp_path)[-1]
    assert last["val_acc"] == pytest.approx(weights @ wins / weights.sum(), abs=1e-9)
    assert last["val_margin"] == pytest.approx(weights @ margins / weights.sum(), abs=1e-5)
    assert last["val_spin_loss"] == pytest.approx(weights @ losses / weights.sum(), abs=1e-5)


def test_the_nll_term_is_logged_and_changes_nothing_else_at_the_first_step(tmp_path, capsys):
    run(tmp_path / "with", "max_steps=1", "nll_weight=0.5")
    run(tmp_path / "without", "max_steps=1")
    first, plain = metrics_of(tmp_path / "with")[1], metrics_of(tmp_path / "without")[1]
    assert first["loss"] == plain["loss"] and first["real_nll"] == plain["real_nll"]
    assert first["total_loss"] == pytest.approx(math.log(2) + 0.5 * first["real_nll"], abs=1e-6)
    assert "total_loss" not in plain and first["grad_norm"] != plain["grad_norm"]
    assert capsys.readouterr().out.count("total loss:") == 1
    assert '"total"' in render(read_run(tmp_path / "with"))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, ("compute_dtype=bf16",)),
        (CONFIG, ("enable_activation_checkpointing=true",)),
        (CONFIG, ("nll_weight=0.5", "loss.loss_type=exponential")),
        (CONFIG, ("loss.loss_type=hinge", "loss.label_smoothing=0.1", "clip_grad_norm=null")),
        (CONFIG, ("pairs.row_tokens=64",)),
        (CONFIG, ("dtype=bf16", "compute_dtype=bf16")),
        (TINY_LORA, ("base_dtype=bf16", "compute_dtype=bf16")),
        (TINY_LORA, ("enable_activation_checkpointing=true", "fsdp_accumulate_unsharded=true", "pairs.row_tokens=64")),
        (TINY_LORA, ("nll_weight=0.5", "fsdp_reshard_after_forward=false", "checkpointer.export_merged=false")),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value[0],
)
def test_options_start_at_the_loss_of_equal_models(tmp_path, config, changes):
    short = ("max_iterations=1", "max_epochs=1", "limit_train_batches=2")
    run(tmp_path, *short, *changes, config=config)
    _, first, second = metrics_of(tmp_path)
    zero, loss = torch.zeros(1), tiny_config("unused", *changes, config=config).loss
    assert first["loss"] == pytest.approx(instantiate(loss)(zero, zero, zero, zero)[0].item(), abs=1e-4)
    assert first["acc"] == 0.5 and second["grad_norm"] > 0
    exported = tmp_path / "iteration_000"
    assert (exported / "hf_model").exists() == ("checkpointer.export_merged=false" not in changes)
    assert (exported / "adapter" / "adapter_config.json").exists() == (config == TINY_LORA)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, TINY_LORA], ids=lambda config: config.stem)
def test_compiled_layers_change_nothing_but_rounding(tiny_lm, tmp_path, config):
    """Adapters with everything that layers can hold: DoRA over NF4."""
    changes = ["max_steps=2", "max_iterations=1", "validation_dataset=null", "pairs.row_multiple=512"]
    if config == TINY_LORA:
        base = quantizable(tiny_lm, tmp_path / "base")
        changes += [*QUANTIZED, f"checkpointer.checkpoint_dir={base}", "model.use_dora=true"]
    losses = []
    for flag in ("false", "true"):
        run(tmp_path / flag, *changes, f"compile={flag}", config=config)
        losses.append([row["loss"] for row in metrics_of(tmp_path / flag)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_finished_run_says_so_and_resumes_with_more_iterations(tmp_path, caplog, capsys):
    short = ("max_epochs=1", "limit_train_batches=2", "validation_dataset=null")
    run(tmp_path, *short)
    assert "2 iterations: in each the model" in caplog.text
    assert "1 x 2 steps of 4 pairs; 4 steps in all, 0 don" in caplog.text
    assert f"Finished after 4 steps; everything is in {tmp_path}" in caplog.text
    assert "iteration_001/hf_model loads in transformers" in caplog.text and "max_iterations=3" in caplog.text
    assert capsys.readouterr().out.count("no rewards, acc 0.5)") == 2
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [2] * 4 + [4] * 4  # without a validation set, those trained on
    caplog.clear()
    assert step_of(run(tmp_path, *short)) == 4
    assert "was finished before, after 4 steps: nothing was left to do" in caplog.text
    assert step_of(run(tmp_path, *short, "max_iterations=3")) == 6


def test_keeps_the_last_and_the_best(tmp_path):
    run(tmp_path, "checkpointer.keep_last=2", "checkpointer.keep_best=1", "max_iterations=1", "save_interval=1")
    rows = {row["step"]: row for row in metrics_of(tmp_path)}
    kept = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept[-2:] == [9, 10]
    _, best = min((row["val_loss"], step) for step, row in rows.items() if "val_loss" in row and step > 0)
    assert set(kept) == {best, 9, 10}  # and not the state after it, whose weights were not validated


# ---- adapters


def test_the_opponent_is_the_base_with_the_adapter_of_the_iteration_before(dora_run, tiny_lm):
    """Iteration 0: the base. Iteration 1: the model that iteration 0 exported, and not the base."""
    output_dir, recipe = dora_run
    distances = {}
    for iteration in range(2):
        pairs = list(PairStore.open(output_dir / f"iteration_{iteration:03d}" / "pairs").pairs())[:6]
        reference = torch.tensor([(p.reference_real_logp, p.generated[0].reference_logp) for p in pairs])
        for name, folder in (("base", tiny_lm), ("exported", output_dir / "iteration_000" / "hf_model")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            logp = partial(logp_by_transformers, model)
            other = [[logp(p.prompt_ids, ids) for ids in (p.real_ids, p.generated[0].token_ids)] for p in pairs]
            distances[iteration, name] = (torch.tensor(other) - reference).abs().max().item()
    assert distances[0, "base"] < 1e-3 and distances[1, "exported"] < 1e-3
    assert distances[0, "exported"] > 1 and distances[1, "base"] > 1
    assert recipe.opponent_steps == [0] * 10 + [10] * 10
    untrained = SPINRecipe(tiny_config(output_dir.with_name("untrained"), "model.use_dora=true", config=TINY_LORA))
    untrained.setup()
    assert weights_of(recipe, frozen_only=True) == weights_of(untrained, frozen_only=True)
    untrained.cleanup()


def test_the_embedded_generator_plays_with_the_adapter(tmp_path):
    """Its greedy tokens in iteration 1 are those of transformers on the model that iteration 0 exported."""
    changes = ("model.use_dora=true", "sampling.temperature=0", "max_epochs=1", "max_steps=6", "dataset.limit=20")
    run_adapters(tmp_path, *changes, "optimizer.lr=1e-2", "validation_dataset=null")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "iteration_000/hf_model", dtype=torch.float32)
    stores = [PairStore.open(tmp_path / f"iteration_{i:03d}/responses") for i in (0, 1)]
    before, after = ({p.sample_id: p.generated[0].token_ids.tolist() for p in store.pairs()} for store in stores)
    assert before != after
    for pair in list(stores[1].pairs())[:6]:
        prompt = torch.tensor(pair.prompt_ids)[None]
        ids = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert after[pair.sample_id] == ids[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
def test_qlora_trains_and_resumes(tiny_lm, tmp_path):
    """NF4 base of bf16, fp32 adapters. Iterations start at ln 2; the stopped run is the other one, bit for bit."""
    base = quantizable(tiny_lm, tmp_path / "base")
    changes = [*QUANTIZED, f"checkpointer.checkpoint_dir={base}", "base_dtype=bf16", "max_epochs=1"]
    whole = run_adapters(tmp_path / "a", *changes)
    rows = {row["step"]: row for row in metrics_of(tmp_path / "a")}
    assert [rows[step]["loss"] for step in (1, 6)] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert rows[5]["val_loss"] < rows[0]["val_loss"]
    run_adapters(tmp_path / "b", *changes, recipe_class=stops_at(7))
    resumed = run_adapters(tmp_path / "b", *changes)
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    assert resumed.final_weights == whole.final_weights


def test_rank_alpha_and_a_plain_model_are_distinguished(tmp_path):
    short = ("max_iterations=1", "max_epochs=1")
    run_adapters(tmp_path, *short, recipe_class=stops_at(2))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        run_adapters(tmp_path, *short, "model.lora_alpha=16")
    plain = [f"~model.{key}" for key in ("lora_attn_modules", "apply_lora_to_mlp", "lora_rank", "lora_alpha")]
    plain.append("model._component_=torchtune.models.llama3_2.llama3_2")
    with pytest.raises(ConfigError, match="has no adapter.* or set checkpointer=spin.checkpoint.SPINCheckpointer"):
        run_adapters(tmp_path / "b", *plain)
    full = "checkpointer._component_=spin.checkpoint.SPINCheckpointer"
    with pytest.raises(ConfigError, match="has adapters, and .* Set checkpointer=spin.checkpoint.LoRACheckpointer"):
        run_adapters(tmp_path / "b", full, "base_dtype=null")
    with pytest.raises(ConfigError, match="base_dtype=fp32 is of the frozen weights"):
        run_adapters(tmp_path / "b", full)


def test_the_log_says_how_much_is_trained_and_a_checkpoint_names_its_base(tmp_path, caplog):
    """Rank 4 in 4 layers: q and o 256, k and v 192, MLP 3 x 512 each."""
    run_adapters(tmp_path, "max_steps=1", "validation_dataset=null")
    trained = 4 * 4 * (2 * 256 + 2 * 192 + 3 * 512)
    assert f"parameters: {trained:,} trainable" in caplog.text
    state = json.loads(next((tmp_path / "checkpoints").glob("*/state.json")).read_text())["state"]
    assert re.fullmatch(r"[0-9a-f]{64}", state["base"])


# ---- what cannot work is refused; what was there stays


def test_pairs_that_another_model_scored_fail_the_self_test_unless_it_is_off(tmp_path, monkeypatch):
    changes = ("max_iterations=1", "max_epochs=1", "limit_train_batches=1")
    with forged_references(monkeypatch), pytest.raises(SelfTestError, match="expected 0.69314718"):
        run(tmp_path / "on", *changes)
    with forged_references(monkeypatch):
        run(tmp_path / "off", *changes, "self_test=false")


def test_the_self_test_waits_for_the_first_batch_that_trains(tmp_path, whole_run, monkeypatch):
    """All responses but one were truncated and are masked; that one is not in the first batch. Nor is the test
    lost, or done again, where the run stops before it and after it."""
    pairs = list(PairStore.open(whole_run[0] / "iteration_000/responses").pairs())
    rows = [
        {"prompt_ids": p.prompt_ids.tolist(), "generated_ids": p.generated[0].token_ids.tolist(),
         "finish_reason": "length"} for p in pairs
    ]  # fmt: skip
    rows[7]["finish_reason"], rows[7]["generated_ids"][-1] = "stop", 2  # what ends a response
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (
        "~generator.batch_size", "generator._component_=spin.generators.ReplayGenerator", f"generator.path={file}",
        "pairs.truncated=mask", "max_iterations=1", "max_epochs=1", "validation_dataset=null",
    )  # fmt: skip
    run(tmp_path / "whole", *changes)
    trained = [row["step"] for row in metrics_of(tmp_path / "whole") if "loss" in row]
    assert len(trained) == 1 and trained[0] > 1
    refused = pytest.raises(SelfTestError, match="first loss of iteration 0")
    with forged_references(monkeypatch), refused:
        run(tmp_path / "forged", *changes)
    run(tmp_path / "stopped", *changes, recipe_class=stops_at(trained[0] - 1))
    with forged_references(monkeypatch), refused:
        run(tmp_path / "stopped", *changes)
    run(tmp_path / "stopped", *changes, recipe_class=stops_at(trained[0]))
    with forged_references(monkeypatch):
        run(tmp_path / "stopped", *changes)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")


def test_the_self_test_compares_logits_before_weights_are_loaded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("spin.model.hf.read_rows", lambda *_: pytest.fail("read a weight"))
    folder = shutil.copytree(TINY_LM, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    with pytest.raises(CheckpointError, match=r"rope_scaling.rope_type is 'linear' with {'factor': 4.0}"):
        run(tmp_path / "out", f"checkpointer.checkpoint_dir={folder}")
    # what no key tells: a model whose norm is not the one that config.json means
    monkeypatch.setattr("torchtune.modules.RMSNorm.forward", lambda self, x: x * self.scale)
    with pytest.raises(CheckpointError, match="largest difference to the logits of transformers .*0.001 at most"):
        run(tmp_path / "out")


def test_pairs_lost_in_the_middle_of_an_iteration(tmp_path):
    run(tmp_path, recipe_class=stops_at(2))
    manifest = tmp_path / "iteration_000" / "pairs" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"opponent": "', '"opponent": "x'))
    with pytest.raises(CheckpointError, match="of another opponent"):
        run(tmp_path)


def test_all_faults_of_the_arithmetic_at_once(tmp_path):
    """Of values against each other; those of single values are in tests/config/test_parse.py."""
    changes = ("loss.beta=[0.1]", "ac_mode=selective", "dtype=bf16", "validation_dataset.streaming=true")
    with pytest.raises(ConfigError) as error:
        SPINRecipe(tiny_config(tmp_path, *changes))
    for name in (change.split("=")[0].replace("ac_mode", "ac_option") for change in changes):
        assert name in str(error.value), name
    assert not (tmp_path / "iteration_000").exists()
