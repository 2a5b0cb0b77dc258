"""Pair stores that all ranks fill: opened and sealed by one of them, shard by shard, whoever makes which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spin.core.errors import OutputError, StoreError
from spin.core.ranks import World, any_rank, broadcast_object, raise_on_all_ranks
from spin.pairs.store import PairStore


def split_evenly(n: int, parts: int) -> list[range]:
    """``range(n)`` in consecutive parts whose lengths differ by one at most."""
    return [range(n * part // parts, n * (part + 1) // parts) for part in range(parts)]


def open_store(
    path: Any,
    fingerprint: Mapping[str, Any],
    num_shards: int,
    world: World,
    on_stale: Callable[[str], None] | None = None,
) -> PairStore:
    """Opens or begins a store on rank 0 and hands it to all ranks. Collective."""
    store = None
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            store = PairStore.open_or_create(path, fingerprint, num_shards, on_stale)
    return broadcast_object(store, world)


def missing_shards(store: PairStore, world: World) -> list[int]:
    """The shards that a store lacks, as rank 0 sees it. Collective.

    Args:
        store (PairStore): the same on every rank.
        world (World): the ranks.

    Returns:
        list[int]: ascending.

    Raises:
        StoreError: On all ranks, if a shard cannot be read, or a damaged one not removed.
    """
    missing: list[int] = []
    with raise_on_all_ranks(world, StoreError):
        if world.is_main:
            missing = store.missing_shards()
    return broadcast_object(missing, world)


def seal(store: PairStore, world: World, is_asked_to_stop: bool, report: Mapping[str, float] | None = None) -> bool:
    """Seals a store when all ranks have made their part of it. Collective.

    Args:
        store (PairStore): without a missing shard, unless the run was asked to stop.
        world (World): the ranks.
        is_asked_to_stop (bool): this rank was asked to stop.
        report (Mapping[str, float] | None): figures to keep in it.

    Returns:
        bool: False, and nothing is sealed, if one rank was asked to stop.

    Raises:
        StoreError: On all ranks, if the store is not whole.
        OutputError: On all ranks, if it cannot be written.
    """
    if any_rank(is_asked_to_stop, world):  # waits for all ranks
        return False
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            store.seal(report)
    return True
