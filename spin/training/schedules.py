"""Values that change over a run: per iteration (beta, learning rate) and per step (the learning rate's schedule)."""

import math
from typing import TypeVar

from spin.core.errors import ConfigError
from spin.core.terminal import counted

Number = TypeVar("Number", int, float)


def per_iteration(value: Number | list[Number], iteration: int, max_iterations: int) -> Number:
    """``value`` itself, or its entry for an iteration; ConfigError for a list of another length than
    ``max_iterations``."""
    if not isinstance(value, list):
        return value
    if not iteration < len(value) == max_iterations:
        raise ConfigError(
            f"{value} has {counted(len(value), 'value')} for {counted(max_iterations, 'iteration')}. Give one "
            "number, or one for each iteration."
        )
    return value[iteration]


def in_each_iteration(value: Number | list[Number], max_iterations: int) -> list[Number]:
    """:func:`per_iteration` for all iterations of a run."""
    return [per_iteration(value, iteration, max_iterations) for iteration in range(max_iterations)]


def lr_factor(name: str, step: int, total_steps: int, warmup: int | float = 0, min_ratio: float = 0.0) -> float:
    """What the learning rate is multiplied by in a step.

    Rises linearly over the warm-up (the first step is not 0, it would be wasted), then falls from 1 to ``min_ratio``,
    or stays at 1 if ``constant``. ``step`` counts from 0 in the ``total_steps`` that the schedule covers; ``warmup`` is
    steps or a fraction of them.
    """
    warm = min(total_steps, int(warmup * total_steps) if isinstance(warmup, float) else warmup)
    if step < warm:
        return (step + 1) / warm
    if name == "constant":
        return 1.0
    # (step - warm) of the remaining steps are done: the last step still moves
    done = min(1.0, (step - warm) / max(1, total_steps - warm))
    shape = 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_ratio + (1 - min_ratio) * shape
