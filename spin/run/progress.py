"""Where a run stands, and the arithmetic of steps, limits and intervals."""

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from spin.core.errors import CheckpointError, ConfigError


def compute_num_steps_per_epoch(
    total_samples: int, global_batch_size: int, limit_train_batches: int | float | None = 1.0
) -> int:
    """Optimizer steps of one epoch; an incomplete last batch is dropped.

    Source:
        ``nemo_aligner/utils/trainer_utils.py`` of https://github.com/NVIDIA/NeMo-Aligner.
    """
    batches = total_samples // global_batch_size
    if isinstance(limit_train_batches, float) and limit_train_batches > 1.0:
        limit_train_batches = 1.0
    return compute_limit_batches(batches, limit_train_batches)


def compute_limit_batches(number_of_batches: int, limit_batches: int | float | None) -> int:
    """How many of ``number_of_batches`` a limit leaves: an int counts batches (-1 is no limit), a float is a fraction,
    None is no limit. So 1 is one batch and 1.0 is all of them.

    Source:
        ``nemo_aligner/utils/trainer_utils.py`` of https://github.com/NVIDIA/NeMo-Aligner.
    """
    if limit_batches is None or (type(limit_batches) is int and limit_batches == -1):
        return number_of_batches
    if isinstance(limit_batches, bool) or not isinstance(limit_batches, (int, float)):
        raise ConfigError(
            f"{limit_batches!r} of type {type(limit_batches).__name__}: expected an int (batches) or a float "
            "(a fraction)."
        )
    if isinstance(limit_batches, int):
        if limit_batches < 0:
            raise ConfigError(f"{limit_batches}: expected a number of batches, or -1 for no limit.")
        return min(number_of_batches, limit_batches)
    return int(limit_batches * number_of_batches)


def compute_interval(name: str, interval: int | float, steps_per_epoch: int) -> int:
    """Steps between two validations or saves: an int counts steps, a float is a fraction of an epoch; 0 is never."""
    if isinstance(interval, bool) or not isinstance(interval, (int, float)):
        raise ConfigError(f"{name}={interval!r}: expected a number of batches, or a fraction of the epoch; 0 is never.")
    if interval < 0 or (isinstance(interval, float) and interval > 1.0):
        raise ConfigError(
            f"{name}={interval}: expected a number of batches, or a fraction of the epoch in [0.0, 1.0]; 0 is never."
        )
    steps = compute_limit_batches(steps_per_epoch, interval) if isinstance(interval, float) else interval
    if interval > 0 and steps == 0:
        raise ConfigError(
            f"{name}={interval} of an epoch of {steps_per_epoch} steps is less than one step. Use an int or more."
        )
    return steps


@dataclass
class SPINProgress:
    """The position in iterations, epochs and steps. ``step`` and ``consumed_samples`` are the state; the rest follows.

    Args:
        steps_per_epoch (int | Sequence[int]): optimizer steps of an epoch; one number per iteration where history
            mixing makes later iterations longer.
        max_epochs (int): passes over the pairs inside an iteration.
        max_iterations (int): SPIN rounds.
        max_steps (int | None): optimizer steps of the whole run at most; -1 or None is no limit.

    Raises:
        ConfigError: If there would be no step, or a count is not positive.
    """

    steps_per_epoch: int | Sequence[int]
    max_epochs: int
    max_iterations: int
    max_steps: int | None = -1
    step: int = field(default=0, init=False)
    consumed_samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more.")
        self._max_steps = -1 if self.max_steps is None else self.max_steps
        if self._max_steps == 0 or self._max_steps < -1:
            raise ConfigError(f"max_steps={self.max_steps}: expected 1 or more, or -1 for no limit.")
        per_epoch = self.steps_per_epoch
        self._per_epoch = [per_epoch] * self.max_iterations if isinstance(per_epoch, int) else list(per_epoch)
        if len(self._per_epoch) != self.max_iterations:
            raise ConfigError(f"{len(self._per_epoch)} values of steps_per_epoch for {self.max_iterations} iterations.")
        if min(self._per_epoch) < 1:
            raise ConfigError(
                f"steps_per_epoch={self.steps_per_epoch}: an epoch has no step, so nothing would be trained. The data "
                "set is smaller than global_batch_size, or limit_train_batches leaves less than one batch."
            )
        # first step of every iteration, and of the one after the last
        self._starts = [0, *accumulate(steps * self.max_epochs for steps in self._per_epoch)]

    @property
    def iteration(self) -> int:
        """The iteration of the next step; ``max_iterations`` when all are done."""
        return bisect_right(self._starts, self.step) - 1

    @property
    def epoch(self) -> int:
        """The epoch of the next step, within its iteration."""
        return 0 if self.is_after_last else self._step_in_iteration // self._per_epoch[self.iteration]

    @property
    def step_in_epoch(self) -> int:
        """The batch of the next step, within its epoch."""
        return 0 if self.is_after_last else self._step_in_iteration % self._per_epoch[self.iteration]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._starts[-1] if self._max_steps == -1 else min(self._max_steps, self._starts[-1])

    @property
    def is_done(self) -> bool:
        """No step is left."""
        return self.step >= self.total_steps

    @property
    def is_after_last(self) -> bool:
        """All iterations are complete."""
        return self.step >= self._starts[-1]

    @property
    def is_iteration_start(self) -> bool:
        """The next step is the first of an iteration: the policy is the opponent."""
        return self.step in self._starts

    @property
    def _step_in_iteration(self) -> int:
        return self.step - self._starts[self.iteration]

    def iteration_start(self, iteration: int) -> int:
        """First step of an iteration."""
        return self._starts[iteration]

    def steps_in_epoch(self, iteration: int) -> int:
        """Steps of an epoch of the iteration."""
        return self._per_epoch[iteration]

    def advance(self, samples: int) -> None:
        """Counts one optimizer step over ``samples`` samples."""
        self.step += 1
        self.consumed_samples += samples

    def state_dict(self) -> dict[str, int]:
        """Step and consumed samples, with what follows from them for the reader."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "epoch": self.epoch,
            "iteration": self.iteration,
            "is_iteration_start": self.is_iteration_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the position from a checkpoint."""
        self.step, self.consumed_samples = int(state["step"]), int(state["consumed_samples"])
        for name in ("epoch", "iteration"):
            if name in state and state[name] != getattr(self, name):
                raise CheckpointError(
                    f"The saved run is at step {self.step} in {name} {state[name]}, but by this config step "
                    f"{self.step} is in {name} {getattr(self, name)}. The data set, global_batch_size, max_epochs or "
                    "limit_train_batches has changed; restore it, or start a new output_dir."
                )


def parse_max_time(text: str | None) -> float | None:
    """Seconds of a wall-clock budget."""
    if text is None:
        return None
    if isinstance(text, int) and not isinstance(text, bool):
        raise ConfigError(
            f"max_time={text}: expected DD:HH:MM:SS. YAML reads digits with colons as a number unless the first is 0: "
            "put quotes around them, max_time: '10:00:00:00', and on the command line \"max_time='10:00:00:00'\"."
        )
    parts = str(text).split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise ConfigError(
            f"max_time={text!r}: expected DD:HH:MM:SS, for example 00:03:30:00 for three and a half hours."
        )
    days, hours, minutes, seconds = map(int, parts)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class RunTimer:
    """Tells when a run's wall-clock budget is used up.

    Args:
        max_time (str | None): ``DD:HH:MM:SS``; None is no budget.
    """

    def __init__(self, max_time: str | None) -> None:
        self._budget_seconds = parse_max_time(max_time)
        self._started = time.monotonic()

    @property
    def is_over(self) -> bool:
        """The budget is used up."""
        return self._budget_seconds is not None and time.monotonic() - self._started >= self._budget_seconds
