"""Pairs by key, read from disk when they are asked for: an iteration of any size in little memory."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from spin.core.errors import OutputError, StoreError
from spin.core.files import as_output_error, atomic_write, keep_aside
from spin.core.ranks import World, raise_on_all_ranks
from spin.types import Pair, Response

Key = tuple[int, str]
Item = TypeVar("Item")
_MAGIC = b"spin pairs\n"


class LazySequence(Sequence[Item]):
    """``make(index)`` for each of the indices; an item is made when it is asked for, and not kept."""

    def __init__(self, make: Callable[[int], Item], indices: range) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:  # type: ignore[override]
        return self._make(self._indices[position])


class PairLookup(Mapping[Key, Pair]):
    """Pairs by ``(iteration, sample_id)`` from a scratch file that :meth:`write` makes; 24 bytes of each in memory.

    A shard is read as one, but an epoch visits pairs in an order of its own. So they are copied to a file from which
    each is one read: a line of JSON, then its token ids (int32). Behind them stands the index: hashes of the keys,
    ascending, where each pair starts and stops, and the number of pairs. (Memory-mapped Arrow was tried: at a million
    pairs 260 MiB of mapped pages stay against 24 MiB of index, and a truncated file ends the process.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._file.seek(-8, os.SEEK_END)
        count = int(np.fromfile(self._file, np.int64, 1)[0])
        self._file.seek(-8 * (3 * count + 1), os.SEEK_END)
        self._hashes, self._starts, self._stops = np.fromfile(self._file, np.int64, 3 * count).reshape(3, count)
        for i in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            if self._pair(i).key == self._pair(i + 1).key:
                raise StoreError(f"{path}: sample {self._pair(i).key} is there twice, expected once.")

    @staticmethod
    def write(path: Path, pairs: Iterable[Pair]) -> None:
        """Copies pairs to a scratch file, one at a time; one that is there is replaced."""
        if path.exists() and not (path.is_file() and path.open("rb").read(len(_MAGIC)) == _MAGIC):
            keep_aside(path, "is in the way of an iteration's scratch file")
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        hashes, bounds = array("q"), array("q", [len(_MAGIC)])
        with atomic_write(path, "xb") as stream:
            stream.write(_MAGIC)
            for pair in pairs:
                hashes.append(hash_of(pair.key))
                bounds.append(bounds[-1] + stream.write(_encode(pair)))
            order = np.argsort(hashes, kind="stable")
            for numbers in (hashes, bounds[:-1], bounds[1:]):
                stream.write(np.asarray(numbers, np.int64)[order].data)
            stream.write(np.int64(len(hashes)).tobytes())

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[Key]:
        return (self._pair(i).key for i in np.argsort(self._starts).tolist())

    def __getitem__(self, key: Key) -> Pair:
        hashed = hash_of(key)
        for i in range(self._hashes.searchsorted(hashed), self._hashes.searchsorted(hashed, "right")):
            pair = self._pair(i)
            if pair.key == key:
                return pair
        raise KeyError(key)

    def _pair(self, i: int) -> Pair:
        start, stop = int(self._starts[i]), int(self._stops[i])
        content = os.pread(self._file.fileno(), stop - start, start)
        if len(content) != stop - start:
            raise StoreError(f"{self.path}: ends too early. Start the run again; this file will be made again.")
        return _decode(content)


def share_lookup(path: Path, pairs: Iterable[Pair], world: World) -> PairLookup:
    """Rank 0 copies pairs to a scratch file on a file system that all ranks share, all ranks read it. Collective.

    An ``OutputError`` of writing, and a ``StoreError`` of reading or of two pairs with one key, is raised on all ranks.
    """
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            PairLookup.write(path, pairs)
    with raise_on_all_ranks(world, StoreError):
        return PairLookup(path)


def hash_of(key: Key) -> int:
    """64 bits of a key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)


def _encode(pair: Pair) -> bytes:
    ids = pair.parts
    responses = [(response.finish_reason, response.reference_logp, response.verdict) for response in pair.generated]
    head = [pair.sample_id, pair.iteration, [len(each) for each in ids], pair.reference_real_logp, responses]
    return b"".join([json.dumps(head).encode(), b"\n", *(np.asarray(each, np.int32).tobytes() for each in ids)])


def _decode(content: bytes) -> Pair:
    head, _, ids = content.partition(b"\n")
    sample_id, iteration, lengths, real_logp, responses = json.loads(head)
    tokens = np.frombuffer(ids, np.int32)
    prompt_ids, real_ids, *generated = (tokens[a:b] for a, b in pairwise(accumulate(lengths, initial=0)))
    written = [
        Response(each, reason, logp, verdict=verdict)
        for each, (reason, logp, verdict) in zip(generated, responses, strict=True)
    ]
    return Pair(sample_id, iteration, prompt_ids, real_ids, written, real_logp)
