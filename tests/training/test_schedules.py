"""Values per iteration and the learning rate's schedule."""

import math

import pytest

from spin.core.errors import ConfigError
from spin.training.schedules import lr_factor, per_iteration


def test_beta_schedule_matches_nemo(oracles):
    for case in oracles["nemo_kl_schedule"]["cases"]:
        config, iteration = case["config"], case["iteration"]
        iterations = len(config) if isinstance(config, list) else iteration + 1
        if isinstance(case["result"], float):
            assert per_iteration(config, iteration, iterations) == case["result"]
        else:  # NeMo finds out when the iteration starts; here it is an error from the first call on
            with pytest.raises(ConfigError):
                per_iteration(config, 0, iteration + 1)


@pytest.mark.parametrize("value", [[0.1, 0.2], [0.1, 0.2, 0.3, 0.4], []])
def test_a_list_of_the_wrong_length_is_refused_for_iteration_0(value):
    with pytest.raises(ConfigError, match=f"{len(value)} values for 3 iterations"):
        per_iteration(value, 0, 3)


def test_linear_schedule_by_hand():
    """10 steps, 2 of warm-up: 1/2, 2/2, then 8 steps down from 1 by 1/8 each."""
    factors = [lr_factor("linear", step, 10, warmup=2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_cosine_schedule_ends_near_min_ratio():
    factors = [lr_factor("cosine", step, 100, warmup=0.1, min_ratio=0.1) for step in range(100)]
    assert factors[9] == 1.0
    assert factors[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert 0.1 < factors[-1] < 0.102
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_constant_schedule_and_fraction_of_warmup():
    assert [lr_factor("constant", step, 4, warmup=0.5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
