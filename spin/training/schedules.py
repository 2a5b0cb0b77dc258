"""Values that change over a run: per iteration (beta, learning rate) and per step (the learning rate's schedule)."""

import math
from collections.abc import Sequence
from typing import TypeVar

from spin.core.errors import ConfigError

Number = TypeVar("Number", int, float)


def per_iteration(value: Number | Sequence[Number], iteration: int, max_iterations: int) -> Number:
    """The value that holds in an iteration.

    Args:
        value (Number | Sequence[Number]): one number for the whole run, or one number per iteration.
        iteration (int): counted from 0.
        max_iterations (int): iterations of the run.

    Returns:
        Number: ``value`` itself or its entry for the iteration.

    Raises:
        ConfigError: If a list does not have exactly ``max_iterations`` entries, an entry is not a number, or the
            iteration is
            not one of the run's. NeMo-Aligner finds a short list out only when its iteration starts; call this once for
            iteration 0 before weights are loaded.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    entries: Sequence[Number] = value if is_list else [value]  # type: ignore[list-item,assignment]
    if is_list and len(entries) != max_iterations:
        raise ConfigError(
            f"{list(entries)} has {len(entries)} values for {max_iterations} iterations. Give one number, or one for "
            "each iteration."
        )
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)) or not math.isfinite(entry):
            raise ConfigError(
                f"{entry!r} of type {type(entry).__name__}: expected a finite number, or one per iteration."
            )
    if not 0 <= iteration < max_iterations:
        raise ConfigError(f"iteration {iteration} is outside this run's iterations 0 to {max_iterations - 1}.")
    return entries[iteration if is_list else 0]


def in_each_iteration(value: Number | Sequence[Number], max_iterations: int) -> list[Number]:
    """:func:`per_iteration` for all iterations of a run."""
    return [per_iteration(value, iteration, max_iterations) for iteration in range(max_iterations)]


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """Steps of warm-up."""
    if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
        raise ConfigError(f"lr_scheduler.warmup={warmup}: expected a number of steps, or a fraction in [0.0, 1.0].")
    return min(total_steps, int(warmup * total_steps) if isinstance(warmup, float) else warmup)


def lr_factor(name: str, step: int, total_steps: int, warmup: int | float = 0, min_ratio: float = 0.0) -> float:
    """What the learning rate is multiplied by in a step.

    Rises linearly over the warm-up (the first step is not 0, it would be wasted), then falls from 1 to ``min_ratio``.

    Args:
        name (str): ``linear``, ``cosine`` or ``constant``.
        step (int): counted from 0, within the span that the schedule covers.
        total_steps (int): length of that span.
        warmup (int | float): steps, or share of the span.
        min_ratio (float): where linear and cosine end.

    Returns:
        float: the factor, in [0, 1].

    Raises:
        ConfigError: If the name is unknown or a value is outside its range.
    """
    if name not in ("linear", "cosine", "constant"):
        raise ConfigError(f"lr_scheduler.name={name!r}: expected linear, cosine or constant.")
    if not 0 <= min_ratio <= 1:
        raise ConfigError(f"lr_scheduler.min_ratio={min_ratio}: expected a fraction in [0, 1].")
    warm = warmup_steps(warmup, total_steps)
    if step < warm:
        return (step + 1) / warm
    if name == "constant":
        return 1.0
    # (step - warm) of the remaining steps are done; the last step still moves, so it divides by one more than it can
    # reach
    done = min(1.0, (step - warm) / max(1, total_steps - warm))
    shape = 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_ratio + (1 - min_ratio) * shape
