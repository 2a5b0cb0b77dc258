"""The arithmetic of a run, from a config: samples, steps, intervals, and the batches of an epoch."""

import math
import re

import pytest
from omegaconf import OmegaConf

from spin.core.errors import ConfigError
from spin.core.progress import stage
from spin.data import Pair, Prompt, PromptDataset, epoch_order, iteration_samples
from spin.run.plan import RunPlan

PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, 0]) for i in range(23)])


def plan(num_val=0, prompts=PROMPTS, **changes):
    """Batches of 4: 23 samples make 5, of which a share of 0.6 is 3, which take 12 samples."""
    values = {
        "seed": 7, "global_batch_size": 4, "limit_train_batches": 0.6, "limit_val_batches": 1.0, "max_iterations": 3,
        "max_epochs": 2, "max_steps": -1, "val_check_interval": 0.34, "save_interval": 2,
        "pairs": {"history": 0, "history_fraction": 1.0, "checker": None}, "optimizer": {"reset_each_iteration": True},
        "validation": {"at_start": True, "spin": False, "fixed_prompts": 0},
        "generator": {"component": "spin.generators.TorchtuneGenerator"}, "enable_float8_training": False,
        "loss": {"component": "spin.loss.SPINLoss"}, "nll_weight": 0.0,
    }  # fmt: skip
    return RunPlan(OmegaConf.create(values | changes), prompts, num_val)


def test_steps_and_intervals():
    """0.34 of 3 steps is 1. Six validation samples are 2 batches, of which a limit of 1 leaves 4 samples."""
    made = plan(num_val=6)
    assert (made.steps, made.val_every, made.save_every, made.num_val_samples) == (3, 1, 2, 6)
    assert made.progress.total_steps == 3 * 2 * 3
    assert plan(num_val=6, limit_val_batches=1).num_val_samples == 4
    assert plan(num_val=6, limit_val_batches=-1).num_val_samples == 6
    assert plan(num_val=6, limit_val_batches=0).num_val_samples == plan().num_val_samples == 0


def test_history_makes_epochs_longer():
    """Half of an iteration's 12 samples are 6: 12, then 18 and 18 items, in 3, 4 and 4 whole batches."""
    made = plan(pairs={"history": 1, "history_fraction": 0.5})
    assert [len(made.items(iteration)) for iteration in range(3)] == [12, 18, 18]
    assert [made.progress.steps_in_epoch(iteration) for iteration in range(3)] == [3, 4, 4]
    assert made.samples(1) == iteration_samples(23, 12, 7, 1)
    old, new = ([(i, sample) for sample in made.samples(i)] for i in (0, 1))
    assert made.items(1) == old[:6] + new


def test_batches_follow_the_epochs_order_and_start_anywhere():
    made = plan()
    pairs = {(1, f"s{i}"): Pair(f"s{i}", 1, [1], [2]) for i in range(23)}
    batches = made.batches(pairs, 1, epoch=1)
    ids = [pair.sample_id for batch in batches for pair in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert ids == [f"s{made.samples(1)[i]}" for i in epoch_order(12, 7, 1, 1)]
    assert list(made.batches(pairs, 1, epoch=1, start=1)) == list(batches)[1:]
    dropped = pairs.pop((1, ids[5]))
    assert [len(batch) for batch in made.batches(pairs, 1, epoch=1)] == [4, 3, 4]
    assert dropped not in made.batches(pairs, 1, epoch=1)[1]


def test_every_epoch_visits_what_the_first_one_did():
    """18 items make 4 batches of 4: the two that the first epoch leaves out are not scored, so no epoch may ask for
    them."""
    made = plan(pairs={"history": 1, "history_fraction": 0.5})
    pairs = {(played, f"s{i}"): Pair(f"s{i}", played, [1], [2]) for played in (0, 1) for i in range(23)}
    scored = {pair.key: pair for batch in made.batches(pairs, 1, epoch=0) for pair in batch}
    epochs = [[pair.key for batch in made.batches(pairs, 1, epoch) for pair in batch] for epoch in range(3)]
    assert [sorted(keys) for keys in epochs] == [sorted(scored)] * 3 and len(scored) == 16
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(batch) for batch in made.batches(scored, 1, epoch=1)] == [4, 4, 4, 4]


def test_a_run_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size=.*: an epoch has no step.*samples"):
        plan(prompts=PromptDataset([PROMPTS[i] for i in range(3)]))


def test_a_schedule_that_had_another_end_is_logged(caplog):
    """Six steps an iteration, 18 in all; the state was saved after two steps."""
    one_each, one = (plan(optimizer={"reset_each_iteration": each}) for each in (True, False))
    for made in (one_each, one):
        made.progress.advance(4)
        made.progress.advance(4)
    assert one_each.lr_span() == (0, 6) and one.lr_span() == (0, 18)
    for total_steps, made in ((18, one_each), (12, one_each), (18, one), (None, one)):
        made.compare_schedules(total_steps)
    assert not caplog.records
    one_each.compare_schedules(2)
    one.compare_schedules(12)
    first, second = caplog.messages
    assert "ends at step 6 now" in first and "ended at step 2" in first and "max_steps" in first
    assert "ends at step 18 now" in second and "ended at step 12" in second
    for _ in range(4):
        one_each.progress.advance(4)
    one_each.compare_schedules(6)
    assert len(caplog.messages) == 2, "iteration 1 begins with a schedule of its own"


@pytest.mark.parametrize(
    ("step", "kind", "number", "left"),
    [
        # validation of 2 batches, at the start and after steps 2, 4, 6, 8 and 10; two responses to 12 and 6
        # prompts, one to 3 fixed ones in each iteration and at the end
        (
            0,
            "validate",
            1,
            {"validate": 2 * 6, "generate": 2 * (2 * 18 + 3) + 3, "score": 2 * (3 + 2), "train": 10, "save": 2},
        ),
        (4, "train", 4, {"validate": 2 * 3, "generate": 2 * 18 + 2 * 3, "score": 3 + 2, "train": 6, "save": 2}),
        (6, "generate", 6, {"validate": 2 * 2, "generate": 2 * 18 + 2 * 3, "score": 3 + 2, "train": 4, "save": 1}),
        (8, "train", 8, {"validate": 2, "generate": 3, "train": 2, "save": 1}),
    ],
)
def test_the_progress_of_a_run_begins_where_it_stands(step, kind, number, left):
    """Of three iterations of 6 steps max_steps leaves 10 steps, in two."""
    made = plan(
        num_val=6, max_steps=10, val_check_interval=2,
        validation={"at_start": True, "spin": True, "fixed_prompts": 3},
        pairs={"history": 0, "history_fraction": 1.0, "responses_per_prompt": 2, "checker": None},
    )  # fmt: skip
    made.progress.step = step
    made.start(math.inf)
    with stage(kind, "unit", 1) as bar:
        assert bar.run.place + 1 == number and len(bar.run.stages) == 1 + 2 * 4 + 1
        assert +bar.run.left == left


def test_a_checker_is_a_stage_of_each_iteration():
    """Three iterations of 12 prompts and 6 held-out ones; before the first, validation."""
    pairs = {"history": 0, "history_fraction": 1.0, "responses_per_prompt": 2, "checker": {"right_weight": 0.0}}
    made = plan(num_val=6, pairs=pairs, validation={"at_start": True, "spin": True, "fixed_prompts": 0})
    made.start(math.inf)
    with stage("check", "unit", 1) as bar:
        assert bar.title == "iteration 0, check" and len(bar.run.stages) == 1 + 3 * 5
        assert bar.run.left["check"] == bar.run.left["generate"] == 3 * 2 * (12 + 6)


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"enable_float8_training": True}, "enable_float8_training=true.*spin_sft can have it"),
        ({"nll_weight": 0.1}, "pairs.equal_to_real=drop with nll_weight.*equal_to_real=keep"),
        ({"loss": {"component": "spin.loss.SPACELoss"}}, "pairs.equal_to_real=drop with SPACELoss"),
        ({}, None),
    ],
)
def test_what_is_doubtful_in_self_play_is_said(changes, doubt, caplog):
    pairs = {"history": 0, "history_fraction": 1.0, "responses_per_prompt": 1, "checker": None, "equal_to_real": "drop"}
    plan(pairs=pairs, **changes).start(math.inf)
    assert re.search(doubt, caplog.text) if doubt else "=drop" not in caplog.text
