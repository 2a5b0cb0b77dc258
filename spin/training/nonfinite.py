"""Policy for non-finite losses and gradients, and for updates that leave such weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from spin.core.errors import NonFiniteError, OutputError
from spin.core.ranks import World, raise_on_all_ranks
from spin.model.sharding import NONFINITE_REMEDY, check_weights
from spin.run.log import MetricsFile
from spin.types import Pair

log = logging.getLogger(__name__)


def check_last_update(model: nn.Module, world: World, step: int, values: Mapping[str, float]) -> None:
    """Refuses an update that no later loss has seen: a step's loss is that of the weights before it. Collective."""
    found = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if found:
        where = f"step {step}: {', '.join(found)} after the last update"
        check_weights(model, world, where)
        raise NonFiniteError(
            f"{where}, though every weight is finite: they are too large to compute with. {NONFINITE_REMEDY}"
        )


class NonFiniteGuard:
    """Stops the run before the update (``stop``), or leaves the batch out and gives up after ``limit`` in a row
    (``skip``); ``nonfinite.jsonl`` in the folder gets a line with each such batch's samples."""

    def __init__(self, action: str, limit: int, folder: Path) -> None:
        self._action, self._limit, self._file = action, limit, folder / "nonfinite.jsonl"
        self._lines: MetricsFile | None = None
        self.skipped: list[int] = []  # steps; the state

    def skipped_between(self, first: int, end: int) -> int:
        """Batches left out from step ``first`` to before step ``end``."""
        return sum(first <= each < end for each in self.skipped)

    def check(self, loss: float, grad_norm: float, step: int, batch: Sequence[Pair], world: World) -> bool:
        """Whether a step may update: False leaves the batch out, so that neither optimizer nor schedule moves.

        A NonFiniteError that names the batch's samples ends the run, with no weight changed. ``loss``, the batch's sum,
        and ``grad_norm`` are the same on every rank.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        samples = [pair.sample_id for pair in batch]
        with raise_on_all_ranks(world, OutputError):
            if world.is_main:
                self._lines = self._lines or MetricsFile(self._file, from_step=step - 1)
                self._lines.write(step, {"loss": str(loss), "grad_norm": str(grad_norm), "samples": samples})
        found = f"step {step}: loss sum {loss}, gradient norm {grad_norm}."
        where = f"Samples of the batch, also in {self._file}: {', '.join(samples)}."
        if self._action == "stop":
            raise NonFiniteError(f"{found} No weight was changed. {where}")
        self.skipped.append(step)
        in_a_row = sum(step - each == i for i, each in enumerate(reversed(self.skipped)))
        if in_a_row >= self._limit:
            raise NonFiniteError(
                f"{found} {in_a_row} batches in a row were not finite, which is nonfinite_limit. No weight was changed "
                f"in them. {where}"
            )
        if world.is_main:
            log.warning(f"{found} The batch is left out ({len(self.skipped)} so far). {where}")
        return False
