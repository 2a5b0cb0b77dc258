"""Steps, limits and intervals against NeMo-Aligner's (tests/oracles/spin_oracles.json), and progress against its
trace."""

import pytest

from spin.core.errors import CheckpointError
from spin.run.progress import SPINProgress, compute_interval, compute_limit_batches, compute_num_steps_per_epoch
from spin.run.stopping import StopRequest, seconds_of


def test_steps_per_epoch_match_nemo(oracles):
    for case in oracles["nemo_steps_and_limits"]["num_steps_per_epoch"]:
        arguments = (case[name] for name in ("total_samples", "global_batch_size", "limit_train_batches"))
        assert compute_num_steps_per_epoch(*arguments) == case["steps_per_epoch"], case


def test_limits_match_nemo(oracles):
    for case in oracles["nemo_steps_and_limits"]["limit_batches"]:
        assert compute_limit_batches(case["number_of_batches"], case["limit_batches"]) == case["result"], case
    assert compute_limit_batches(7, None) == compute_limit_batches(7, -1) == 7


def test_progress_follows_nemos_trace(oracles):
    trace = oracles["nemo_loop_trace"]
    config, steps = trace["config"], trace["trace"]["steps"]
    progress = SPINProgress(
        compute_num_steps_per_epoch(config["total_samples"], config["global_batch_size"]),
        config["max_epochs"],
        config["max_iterations"],
    )
    assert progress.total_steps == trace["trace"]["max_steps"] == len(steps)
    for expected in steps:
        assert (progress.epoch, progress.iteration) == (expected["epoch"], expected["iteration"])
        progress.advance(config["global_batch_size"])
        assert progress.consumed_samples == expected["consumed_samples"]
    assert progress.is_done
    last, state = trace["trace"]["saves"][-1], progress.state_dict()
    for name in ("step", "consumed_samples", "epoch", "iteration"):
        assert state[name] == last[name]


def test_longer_epochs_in_later_iterations():
    """Iteration 0 has epochs of 2 steps, iterations 1 and 2 of 4 (with the pairs before): 2*2 + 4*2 + 4*2 = 20."""
    progress = SPINProgress([2, 4, 4], 2, 3)
    assert progress.total_steps == 20
    seen = []
    while not progress.is_done:
        seen.append((progress.iteration, progress.epoch, progress.step_in_epoch))
        assert progress.is_iteration_start == (progress.step in (0, 4, 12))
        progress.advance(1)
    assert seen == [(i, e, s) for i, n in enumerate([2, 4, 4]) for e in range(2) for s in range(n)]
    assert (progress.epoch, progress.iteration) == (0, 3)


def test_max_steps_ends_the_run_early():
    progress = SPINProgress(5, 2, 2, 7)
    assert progress.total_steps == 7
    for _ in range(7):
        progress.advance(4)
    assert progress.is_done
    assert not progress.is_after_last


def test_state_round_trip():
    progress = SPINProgress(5, 2, 2)
    for _ in range(13):
        progress.advance(4)
    again = SPINProgress(5, 2, 2)
    again.load_state_dict(progress.state_dict())
    assert (again.step, again.consumed_samples, again.epoch, again.iteration) == (13, 52, 0, 1)


def test_a_checkpoint_of_other_arithmetic_is_refused():
    progress = SPINProgress(5, 2, 2)
    progress.step = 13
    with pytest.raises(CheckpointError, match="iteration"):
        SPINProgress(20, 2, 2).load_state_dict(progress.state_dict())


def test_intervals():
    found = [compute_interval(interval, 5) for interval in (0.4, 3, 0, 0.0, 0.1)]
    assert found == [2, 3, 0, 0, 1]  # a part of a step is one: a config is used with few rows too


def test_max_time():
    assert seconds_of("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    ends = [StopRequest([], max_time).is_out_of_time for max_time in ("00:00:00:00", "00:01:00:00", None)]
    assert ends == [True, False, False]
