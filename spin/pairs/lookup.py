"""Pairs by key, read from the disk when they are asked for: an iteration of any size in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from spin.core.errors import OutputError, StoreError
from spin.core.files import as_output_error, keep_aside, open_new
from spin.core.ranks import World, raise_on_all_ranks
from spin.types import Pair, Response

Key = tuple[int, str]
Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence whose items are made when they are asked for, and not kept.

    Args:
        make (Callable[[int], Item]): the item of an index.
        indices (range): the indices.
    """

    def __init__(self, make: Callable[[int], Item], indices: range) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:  # type: ignore[override]
        return self._make(self._indices[position])


class PairLookup(Mapping[Key, Pair]):
    """Pairs by ``(iteration, sample_id)``: their numbers in memory (some 100 bytes each), their token ids on disk.

    A shard of a pair store can only be read whole, but an epoch visits pairs in an order of its own. So the pairs are
    copied to a scratch file of plain token ids, from which one pair is one read. The file may be removed at any time:
    it is made anew from the store.

    Args:
        path (Path): the scratch file, from :meth:`write`.

    Raises:
        StoreError: If two pairs have one key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(_numbers_file(path), allow_pickle=False) as numbers:
            self._numbers = {name: numbers[name] for name in numbers.files}
        self._tokens = path.open("rb", buffering=0)
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        for i in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            if self._key(self._order[i]) == self._key(self._order[i + 1]):
                raise StoreError(f"{path}: sample {self._key(self._order[i])} is there twice, expected once.")

    @staticmethod
    def write(path: Path, pairs: Iterable[Pair]) -> None:
        """Copies pairs to a scratch file, one at a time.

        Args:
            path (Path): the file; one that is there is replaced.
            pairs (Iterable[Pair]): any number of them.

        Raises:
            OutputError: If it cannot be written.
        """
        numbers = _Numbers()
        part = path.with_name(f".{path.name}.tmp")
        if path.exists() and not _numbers_file(path).exists():
            keep_aside(path, "is in the way of an iteration's scratch file")
        with as_output_error(path):
            with open_new(part, "xb") as stream:
                for pair in pairs:
                    for ids in (pair.prompt_ids, pair.real_ids, *(response.token_ids for response in pair.generated)):
                        stream.write(np.asarray(ids, np.int32).data)
                    numbers.add(pair)
            with open_new(_numbers_file(part), "xb") as stream:
                np.savez(stream, **numbers.arrays())  # type: ignore[arg-type]
            _numbers_file(part).rename(_numbers_file(path))
            part.rename(path)

    def remove(self) -> None:
        """Deletes the files; pairs can still be read through this object on this host."""
        self.path.unlink(missing_ok=True)
        _numbers_file(self.path).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._numbers["iteration"])

    def __iter__(self) -> Iterator[Key]:
        return map(self._key, range(len(self)))

    def __contains__(self, key: object) -> bool:
        return self._row(key) is not None

    def __getitem__(self, key: Key) -> Pair:
        row = self._row(key)
        if row is None:
            raise KeyError(key)
        numbers = self._numbers
        first, last = numbers["response_start"][row : row + 2]
        lengths = [numbers["prompt_tokens"][row], numbers["real_tokens"][row], *numbers["tokens"][first:last]]
        size = 4 * int(sum(lengths))
        content = os.pread(self._tokens.fileno(), size, 4 * int(numbers["token_start"][row]))
        if len(content) != size:
            raise StoreError(f"{self.path}: ends too early. Start the run again; this file will be made again.")
        prompt_ids, real_ids, *generated = np.split(np.frombuffer(content, np.int32), np.cumsum(lengths[:-1]))
        answers = zip(generated, numbers["is_cut"][first:last], numbers["logp"][first:last], strict=True)
        return Pair(
            sample_id=key[1],
            iteration=key[0],
            prompt_ids=prompt_ids,
            real_ids=real_ids,
            generated=[Response(ids, "length" if is_cut else "stop", _or_none(logp)) for ids, is_cut, logp in answers],
            reference_real_logp=_or_none(numbers["real_logp"][row]),
        )

    def _key(self, row: int) -> Key:
        begin, end = self._numbers["id_start"][row : row + 2]
        return int(self._numbers["iteration"][row]), self._numbers["ids"][begin:end].tobytes().decode()

    def _row(self, key: object) -> int | None:
        first, last = (np.searchsorted(self._hashes, hash(key), side) for side in ("left", "right"))
        return next((int(row) for row in self._order[first:last] if self._key(row) == key), None)


def share_lookup(path: Path, pairs: Iterable[Pair], world: World) -> PairLookup:
    """Rank 0 copies pairs to a scratch file, all ranks read it. Collective.

    Args:
        path (Path): on a file system that all ranks share.
        pairs (Iterable[Pair]): read on rank 0 only.
        world (World): the ranks.

    Returns:
        PairLookup: the pairs.

    Raises:
        OutputError: On all ranks, if the file cannot be written.
        StoreError: On all ranks, if one cannot read it, or if two pairs have one key.
    """
    with raise_on_all_ranks(world, OutputError):
        if world.is_main:
            PairLookup.write(path, pairs)
    with raise_on_all_ranks(world, StoreError):
        lookup = PairLookup(path)
    return lookup


class _Numbers:
    """What is known of each pair besides its token ids, as growing arrays."""

    def __init__(self) -> None:
        self._columns: dict[str, array] = {name: array(code, first) for name, (code, first) in _COLUMNS.items()}

    def add(self, pair: Pair) -> None:
        """Appends a pair."""
        columns, sample_id = self._columns, pair.sample_id.encode()
        columns["iteration"].append(pair.iteration)
        columns["prompt_tokens"].append(len(pair.prompt_ids))
        columns["real_tokens"].append(len(pair.real_ids))
        columns["real_logp"].append(_or_nan(pair.reference_real_logp))
        for response in pair.generated:
            columns["tokens"].append(len(response.token_ids))
            columns["is_cut"].append(response.finish_reason == "length")
            columns["logp"].append(_or_nan(response.reference_logp))
        columns["token_start"].append(columns["token_start"][-1] + pair.num_tokens)
        columns["response_start"].append(len(columns["tokens"]))
        columns["ids"].frombytes(sample_id)
        columns["id_start"].append(len(columns["ids"]))

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns."""
        return {name: np.frombuffer(column, column.typecode) for name, column in self._columns.items()}


_COLUMNS: dict[str, tuple[str, list[int]]] = {
    # of each pair
    "iteration": ("i", []),
    "prompt_tokens": ("i", []),
    "real_tokens": ("i", []),
    "real_logp": ("d", []),
    # where each pair's begin, and where all end
    "token_start": ("q", [0]),
    "response_start": ("q", [0]),
    "id_start": ("q", [0]),
    "ids": ("B", []),
    # of each response
    "tokens": ("i", []),
    "is_cut": ("B", []),
    "logp": ("d", []),
}


def _numbers_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.npz")


def _or_nan(logp: float | None) -> float:
    return float("nan") if logp is None else logp


def _or_none(logp: float) -> float | None:
    return None if np.isnan(logp) else float(logp)
