"""Where a run stands, and the arithmetic of steps, limits and intervals, whose ranges the config's schema checks."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from spin.core.errors import CheckpointError

Limit = int | float | None


def compute_num_steps_per_epoch(total_samples: int, global_batch_size: int, limit_train_batches: Limit = 1.0) -> int:
    """Optimizer steps of one epoch; an incomplete last batch is dropped.

    Source:
        ``nemo_aligner/utils/trainer_utils.py`` of https://github.com/NVIDIA/NeMo-Aligner.
    """
    batches = total_samples // global_batch_size
    return min(batches, compute_limit_batches(batches, limit_train_batches))


def compute_limit_batches(number_of_batches: int, limit_batches: Limit) -> int:
    """How many of ``number_of_batches`` a limit leaves: an int counts batches (-1 is no limit), a float is a fraction,
    None is no limit. So 1 is one batch and 1.0 is all of them.

    Source:
        ``nemo_aligner/utils/trainer_utils.py`` of https://github.com/NVIDIA/NeMo-Aligner.
    """
    if limit_batches is None or limit_batches == -1:
        return number_of_batches
    if isinstance(limit_batches, int):
        return min(number_of_batches, limit_batches)
    return int(limit_batches * number_of_batches)


def compute_interval(interval: int | float, steps_per_epoch: int) -> int:
    """Steps between two validations or saves: an int counts steps, a float is a fraction of an epoch, at least one step
    of it; 0 is never."""
    if isinstance(interval, float) and interval > 0:
        return max(1, compute_limit_batches(steps_per_epoch, interval))
    return int(interval)


@dataclass
class SPINProgress:
    """The position in iterations, epochs and steps. ``step`` and ``consumed_samples`` are its state."""

    steps_per_epoch: int | Sequence[int]  # a number per iteration where history makes later ones longer
    max_epochs: int  # passes over the pairs in an iteration
    max_iterations: int
    max_steps: int | None = -1  # of the run at most; -1 or None is no limit
    step: int = field(default=0, init=False)
    consumed_samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        per_epoch = self.steps_per_epoch
        self._per_epoch = [per_epoch] * self.max_iterations if isinstance(per_epoch, int) else list(per_epoch)
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
        return self._starts[-1] if self.max_steps in (-1, None) else min(self.max_steps, self._starts[-1])

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
        """Counts one optimizer step."""
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
