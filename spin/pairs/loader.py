"""From pairs to the rows of each optimizer step, packed by worker threads while the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchdata.nodes import IterableWrapper, ParallelMapper, PinMemory

from spin.core.ranks import World
from spin.pairs.packing import PackedRow, RowLayout, loss_weight, pack_batch
from spin.types import Pair


@dataclass(frozen=True)
class RowBatch:
    """One global batch, packed."""

    pairs: Sequence[Pair]  # the global batch, the same on every rank
    rows: list[PackedRow]  # this rank's rows of it, equally many on every rank; on the CPU
    weight: float  # what the summed loss of the global batch is divided by, see loss_weight

    def pin_memory(self) -> RowBatch:
        """The batch with its rows in pinned memory."""
        return replace(self, rows=[row.pin_memory() for row in self.rows])


def load_rows(
    batches: Iterable[Sequence[Pair]], world: World, layout: RowLayout, num_workers: int = 1
) -> Iterator[RowBatch]:
    """Packs this rank's rows of each global batch, in order.

    Workers are threads that pack a few batches ahead (some milliseconds each) while the device computes; with 0 a batch
    is packed when asked for. Their rows come in pinned memory if the rank computes on a GPU. Nothing here needs saving:
    the order of batches is a function of the seed, and a resumed run starts with a later batch.
    """

    def packed(pairs: Sequence[Pair]) -> RowBatch:
        rows = pack_batch(pairs, layout, world.rank, world.world_size)
        return RowBatch(pairs, rows, loss_weight(pairs, layout))

    if num_workers == 0:
        yield from map(packed, batches)
        return
    node: Any = ParallelMapper(IterableWrapper(batches), packed, num_workers=num_workers, in_order=True)
    if world.device.type == "cuda":
        node = PinMemory(node)
    node.reset()
    yield from node  # its threads end with it, also when the caller stops early
