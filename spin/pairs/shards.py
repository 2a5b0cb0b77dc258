"""Pair stores that all ranks fill: opened and sealed by one of them, shard by shard, whoever makes which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin.core.errors import OutputError, Stopped, StoreError
from spin.core.ranks import World, any_rank, broadcast_object, raise_on_all_ranks
from spin.pairs.store import PairStore


def split_evenly(n: int, parts: int) -> list[range]:
    """``range(n)`` in consecutive parts whose lengths differ by one at most."""
    return [range(n * part // parts, n * (part + 1) // parts) for part in range(parts)]


def open_store(path: Path, fingerprint: Mapping[str, Any], num_shards: int, world: World) -> PairStore:
    """:meth:`PairStore.open_or_create` on rank 0, for all ranks. Collective."""
    store = None
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            store = PairStore.open_or_create(path, fingerprint, num_shards)
    return broadcast_object(store, world)


def missing_shards(store: PairStore, world: World) -> list[int]:
    """:meth:`PairStore.missing_shards` as rank 0 sees them. Collective."""
    missing: list[int] = []
    with raise_on_all_ranks(world, StoreError):
        if world.is_main:
            missing = store.missing_shards()
    return broadcast_object(missing, world)


def seal(store: PairStore, world: World, is_asked_to_stop: bool, report: Mapping[str, float] | None = None) -> None:
    """:meth:`PairStore.seal` when all ranks have made their part of it. Collective.

    ``Stopped`` on all ranks, and nothing is sealed, if one of them was asked to stop: then shards may be missing.
    """
    if any_rank(is_asked_to_stop, world):  # waits for all ranks
        raise Stopped
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            store.seal(report)
