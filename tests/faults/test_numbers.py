"""Numbers that are not finite: stop or skip; reference log-probs; the samples at fault are named."""

import json
import math
from dataclasses import replace

import pytest
import torch
from spin_recipe import SPINRecipe

from spin.core.errors import ConfigError, NonFiniteError, SelfTestError, StoreError
from spin.core.ranks import init_world
from spin.data import Pair, PairStore
from spin.training.nonfinite import NonFiniteGuard
from tests.ranks import run_ranks
from tests.recipes.helpers import (
    changing_loss,
    forged_references,
    metrics_of,
    run,
    step_of,
    stops_at,
    tiny_config,
    tiny_prompts,
    weights_of,
)

SHORT = ("max_iterations=1", "max_epochs=2", "validation_dataset=null")


def poisoned(*steps):
    """A recipe whose loss is NaN in some steps, on one row of the batch only."""

    def poison(recipe, losses):
        return losses * torch.tensor([math.nan] + [1.0] * (len(losses) - 1)) if recipe.is_poisoned else losses

    class Poisoned(changing_loss(poison)):
        def train_single_step(self, batch):
            self.before = tensors_of(self)
            self.is_poisoned, self.samples = step_of(self) in steps, [pair.sample_id for pair in batch.pairs]
            step = super().train_single_step(batch)
            assert not self.is_poisoned or tensors_of(self) == self.before
            return step

    return Poisoned


def tensors_of(recipe):
    """Weights and moments."""
    moments = [value.double().sum().item() for of in recipe._optimizer.state.values() for value in of.values()]
    return weights_of(recipe), moments


def nonfinite_lines(folder):
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


def test_stop_writes_the_samples_and_changes_nothing(tmp_path):
    recipe = poisoned(2)(tiny_config(tmp_path, *SHORT))
    recipe.setup()
    with pytest.raises(NonFiniteError, match=r"step 2: loss sum nan.*No weight was changed.*nonfinite\.jsonl") as error:
        recipe.train()
    assert tensors_of(recipe) == recipe.before
    assert nonfinite_lines(tmp_path) == [{"step": 2, "loss": "nan", "grad_norm": "nan", "samples": recipe.samples}]
    assert all(sample in str(error.value) for sample in recipe.samples)
    recipe.cleanup()


def test_skip_moves_neither_optimizer_nor_schedule(tmp_path):
    """Ten steps, warm-up of one and linear to 0: the two skipped ones leave the learning rate where it was."""
    changes = (*SHORT, "on_nonfinite=skip", "nonfinite_limit=2", "lr_scheduler.warmup=1")
    run(tmp_path / "a", *changes, recipe_class=poisoned(1, 3))
    rows = metrics_of(tmp_path / "a")
    rate = {done: 1e-4 * (1.0 if done == 0 else (9 - (done - 1)) / 9) for done in range(10)}
    assert [row["lr"] for row in rows] == pytest.approx([rate[done] for done in (0, 1, 1, 2, 2, 3, 4, 5, 6, 7)])
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [row["step"] for row in rows if "loss" not in row] == [2, 4]
    assert all("grad_norm" in row and math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert [row["updated_fraction"] == 0 for row in rows] == ["loss" not in row for row in rows]
    assert [line["step"] for line in nonfinite_lines(tmp_path / "a")] == [1, 3]

    run(tmp_path / "b", *changes, recipe_class=stops_at(5, poisoned(1, 3)))
    assert run(tmp_path / "b", *changes).state_dict()["nonfinite"] == [1, 3]
    assert metrics_of(tmp_path / "b") == rows


def test_skip_gives_up_after_some_in_a_row(tmp_path):
    changes = (*SHORT, "on_nonfinite=skip", "nonfinite_limit=3")
    with pytest.raises(NonFiniteError, match="3 batches in a row were not finite, which is nonfinite_limit"):
        run(tmp_path, *changes, recipe_class=poisoned(1, 3, 4, 5))
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in nonfinite_lines(tmp_path)] == [1, 3, 4, 5]


def test_the_self_test_waits_for_the_first_step_that_counts(tmp_path, monkeypatch):
    with forged_references(monkeypatch), pytest.raises(SelfTestError, match="first loss of iteration 0"):
        run(tmp_path / "a", *SHORT, "on_nonfinite=skip", recipe_class=poisoned(0))
    assert [row["step"] for row in metrics_of(tmp_path / "a")] == [1]
    run(tmp_path / "b", *SHORT, "on_nonfinite=skip", recipe_class=poisoned(0))
    assert metrics_of(tmp_path / "b")[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_guard(loss, norm, tmp_path):
    world, batch = init_world("cpu"), [Pair("a", 0, [1], [2])]
    guard = NonFiniteGuard("skip", 2, tmp_path)
    for step, of_step in enumerate([(1.0, 1.0), (loss, norm), (1.0, 1.0), (loss, norm)]):
        assert guard.check(*of_step, step, batch, world) == (step % 2 == 0)
    assert [line["step"] for line in nonfinite_lines(tmp_path)] == [1, 3]
    assert (guard.skipped, guard.skipped_between(1, 3), guard.skipped_between(2, 9)) == ([1, 3], 1, 1)
    with pytest.raises(NonFiniteError, match="a row"):
        guard.check(loss, norm, 4, batch, world)


def test_unknown_action(tmp_path):
    with pytest.raises(ConfigError, match="on_nonfinite: found 'ignore', expected stop or skip"):
        SPINRecipe(tiny_config(tmp_path, "on_nonfinite=ignore"))


def test_a_nan_reference_log_prob_is_not_sealed(tmp_path, monkeypatch):
    """The store names the sample, stays unsealed, and the next run, whose numbers are sound, makes the shard."""
    run(tmp_path / "a", *SHORT, "max_steps=1")
    poor, write = tiny_prompts()[6].sample_id, PairStore.write_shard

    def write_nan(self, index, pairs):
        bad = poor if self.path.name == "pairs" else None
        write(self, index, [replace(p, reference_real_logp=math.nan) if p.sample_id == bad else p for p in pairs])

    monkeypatch.setattr(PairStore, "write_shard", write_nan)
    with pytest.raises(StoreError, match=f"log-probs are not finite for {poor}\\."):
        run(tmp_path / "b", *SHORT)
    store = PairStore.open(tmp_path / "b" / "iteration_000" / "pairs")
    assert not store.is_sealed and store.missing_shards()
    with pytest.raises(StoreError, match="cannot be sealed"):
        store.seal()
    monkeypatch.undo()
    run(tmp_path / "b", *SHORT, "max_steps=1")
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")


@pytest.mark.slow
def test_one_of_two_ranks_has_a_nan_and_both_stop(tmp_path, subprocess_env):
    """So do a generator that dies on one of two ranks, a disk that only one sees and a shard that one cannot read: the
    same script looks at all."""
    run_ranks("recipe_faults.py", subprocess_env, tmp_path)
