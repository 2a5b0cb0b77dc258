"""The pair store: what the opponent answered and how it scored the answers, on disk, restartable at any shard.

A store is a folder of parquet shards with a ``manifest.json``. The manifest names what the store was made from (its
fingerprint); it is written when the store is opened, and again, with every shard's checksum, when the store is sealed.
A shard appears whole or not at all, so a store that a dead process left behind goes on where it stopped.

Each shard names, in its own metadata, the store that it was made for, its number, and the SHA-256 of its rows. So it
may come from another machine's folder, and one of other weights, sampling or data, or with an edited row, is found. It
guards against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin.core.errors import StoreError
from spin.core.files import (
    as_output_error,
    atomic_write,
    file_lock,
    file_sha256,
    json_fingerprint,
    keep_aside,
    next_backup_name,
    open_regular,
    parse_json,
    read_json,
    write_json,
)
from spin.types import Pair, Response

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_ABOUT = b"spin"  # in a shard's parquet metadata: JSON of what _about gives
MANIFEST = "manifest.json"
_MOST_SHARDS = 10_000_000

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("iteration", pa.int32()),
        ("k", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("real_ids", pa.list_(pa.int32())),
        ("generated_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("reference_real_logp", pa.float64()),
        ("reference_generated_logp", pa.float64()),
        ("opponent", pa.string()),
    ]
)


class PairStore:
    """A folder of pairs: one parquet row per generated response, the responses of a prompt numbered by ``k``.

    Args:
        path (str | Path): the folder.
        manifest (Mapping[str, Any]): the content of its manifest.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = dict(manifest)

    @classmethod
    def open(cls, path: str | Path) -> PairStore:
        """Opens a store that exists, sealed or not.

        Args:
            path (str | Path): the folder.

        Returns:
            PairStore: with the manifest that lies there.

        Raises:
            StoreError: If there is no manifest, or it is damaged or of another version.
        """
        file = Path(path) / MANIFEST
        if not file.exists():
            files = [file for depth in ("*", "*/*") for file in Path(path).glob(f"{depth}/{MANIFEST}")]
            below = sorted(str(file.parent.relative_to(path)) for file in files)
            hint = f" Below it there are {', '.join(below[:6])}{', ...' if len(below) > 6 else ''}." if below else ""
            raise StoreError(f"{path}: no pair store here ({MANIFEST} is missing).{hint}")
        manifest = read_json(file, StoreError, "Remove the folder; it will be made again.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{file}: expected a pair store of format {FORMAT_VERSION}. Made by another version of spin?"
            )
        fault = _fault_of(manifest)
        if fault is not None:
            raise StoreError(f"{file}: damaged manifest ({fault}). Remove the folder; it will be made again.")
        return cls(path, manifest)

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        fingerprint: Mapping[str, Any],
        num_shards: int,
        on_stale: Callable[[str], None] | None = None,
    ) -> PairStore:
        """Opens the store if it was made from the same things, else begins a new one beside which the old one is kept.

        Call it on one rank. Workers may call it at once: the first begins the store, the others open it.

        Args:
            path (str | Path): the folder.
            fingerprint (Mapping[str, Any]): everything that the content depends on, JSON values by name.
            num_shards (int): shards that a new store will have; one that is there keeps its own number, which another
                number of ranks does not change.
            on_stale (Callable[[str], None] | None): told in a sentence when a store made from other things was moved
                aside.

        Returns:
            PairStore: sealed, or to be filled with its missing shards.

        Raises:
            OutputError: If the folder cannot be written.
        """
        with file_lock(Path(path)):
            return cls._open_or_create(Path(path), json.loads(json.dumps(fingerprint)), num_shards, on_stale)

    @classmethod
    def _open_or_create(
        cls, path: Path, fingerprint: dict[str, Any], num_shards: int, on_stale: Callable[[str], None] | None
    ) -> PairStore:
        if (path / MANIFEST).exists() or (path.exists() and not path.is_dir()):
            try:
                store = cls.open(path)
                changed = differences(store.manifest["fingerprint"], fingerprint)
            except StoreError as error:
                changed = [str(error)]
            if not changed:
                store._unseal_if_damaged()
                return store
            aside = next_backup_name(path)
            with as_output_error(path):
                path.rename(aside)
            if on_stale is not None:
                on_stale(
                    f"{path} was made from something else ({'; '.join(changed)}): kept as {aside.name}, making it anew."
                )
        # without a manifest the folder is what a process left that died just then, or shards that were copied there
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "num_shards": num_shards,
            "sealed": False,
            "begun_at": time.time(),  # seconds since 1970
        }
        with as_output_error(path):
            path.mkdir(parents=True, exist_ok=True)
        write_json(path / MANIFEST, manifest)
        return cls(path, manifest)

    @property
    def is_sealed(self) -> bool:
        """Every shard is there and its checksum is on record."""
        return bool(self.manifest.get("sealed"))

    @property
    def num_shards(self) -> int:
        """Shards of the sealed store."""
        return self.manifest["num_shards"]

    @property
    def opponent(self) -> str:
        """Fingerprint of the weights that answered or scored."""
        return self.manifest["fingerprint"]["opponent"]

    def missing_shards(self) -> list[int]:
        """Shards that are not there; one that is damaged, edited or of another store is kept aside, and is missing.

        Returns:
            list[int]: ascending.

        Raises:
            StoreError: If one is of another store, and so is this whole folder by now.
        """
        missing = []
        for index in range(self.num_shards):
            file = self._shard(index)
            if file.exists():
                _, fault = self._try_to_read(index)
                if fault is None:
                    continue
                self._check_is_still_mine()
                with suppress(FileNotFoundError):  # another worker was faster
                    keep_aside(file, f"is not used: {fault}")
            missing.append(index)
        return missing

    def faults(self) -> list[str]:
        """Reads every shard, and compares it with the manifest and with what it says of itself.

        Returns:
            list[str]: for each shard that is missing, damaged, edited or of another store a line that says so.
        """
        found = ((self._shard(index), self._try_to_read(index)[1]) for index in range(self.num_shards))
        return [f"{file}: {fault}" for file, fault in found if fault is not None]

    def _recorded(self, file: Path) -> str | None:
        """The checksum that a sealed store has of a shard."""
        shards = self.manifest["shards"] if self.is_sealed else []  # whose form was checked when it was opened
        return next((shard["sha256"] for shard in shards if shard["name"] == file.name), None)

    def _about(self, index: int) -> dict[str, Any]:
        """What a shard says of itself, but for its rows' checksum."""
        return {
            "store": json_fingerprint(self.manifest["fingerprint"]),
            "shard": index,
            "num_shards": self.num_shards,
        }

    def _unseal_if_damaged(self) -> None:
        """A shard that is made again may come out otherwise: another engine, another version of pyarrow."""
        if self.is_sealed and self.missing_shards():
            self.manifest = {name: self.manifest[name] for name in ("format_version", "fingerprint", "num_shards")}
            self.manifest["sealed"] = False
            write_json(self.path / MANIFEST, self.manifest)

    def write_shard(self, index: int, pairs: Sequence[Pair]) -> None:
        """Writes a shard: temporary name, fsync, rename.

        Args:
            index (int): which shard.
            pairs (Sequence[Pair]): its content; may be empty.

        Raises:
            StoreError: If a reference log-prob is not finite, naming the samples, or if another process has begun the
                store anew, from something else.
            OutputError: If it cannot be written; no part of it is left.
        """
        broken = [
            pair.sample_id
            for pair in pairs
            for logp in (pair.reference_real_logp, *(response.reference_logp for response in pair.generated))
            if logp is not None and not math.isfinite(logp)
        ]
        if broken:
            names = ", ".join(dict.fromkeys(broken))
            raise StoreError(
                f"{self._shard(index)}: the opponent's log-probs are not finite for {names}. The weights, or the "
                "precision they are computed in, are broken; nothing was written."
            )
        rows = [(pair, k, response) for pair in pairs for k, response in enumerate(pair.generated)]
        columns: dict[str, list[Any]] = {
            "sample_id": [pair.sample_id for pair, _, _ in rows],
            "iteration": [pair.iteration for pair, _, _ in rows],
            "k": [k for _, k, _ in rows],
            "prompt_ids": [pair.prompt_ids for pair, _, _ in rows],
            "real_ids": [pair.real_ids for pair, _, _ in rows],
            "generated_ids": [response.token_ids for _, _, response in rows],
            "finish_reason": [response.finish_reason for _, _, response in rows],
            "reference_real_logp": [pair.reference_real_logp for pair, _, _ in rows],
            "reference_generated_logp": [response.reference_logp for _, _, response in rows],
            "opponent": [self.opponent] * len(rows),
        }
        file = self._shard(index)
        with atomic_write(file, "xb") as stream:
            table = pa.table(columns, schema=_SCHEMA)
            about = self._about(index) | {"rows": _rows_sha256(table)}
            table = table.replace_schema_metadata({_ABOUT: json.dumps(about)})
            pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
            self._check_is_still_mine()

    def seal(self, report: Mapping[str, Any] | None = None) -> None:
        """Records the checksum of every shard, once. Call it on one rank when no shard is missing; workers may call it
        at once.

        Args:
            report (Mapping[str, Any] | None): counts to keep with the store.

        Raises:
            StoreError: If a shard is missing, or if another process has begun the store anew, from something else.
            OutputError: If the manifest cannot be written.
        """
        with file_lock(self.path):
            self._seal(report or {})

    def _check_is_still_mine(self) -> dict[str, Any]:
        """The manifest on the disk, unless a worker with another config has moved the store aside and begun its own."""
        on_disk = PairStore.open(self.path).manifest
        changed = differences(self.manifest["fingerprint"], on_disk["fingerprint"])
        if changed:
            raise StoreError(
                f"{self.path}: another process has begun this store anew, from something else ({'; '.join(changed)}). "
                "All workers of an iteration need the same config. What was made here before is kept beside it, as "
                f"{self.path.name}.stale-*."
            )
        return on_disk

    def _seal(self, report: Mapping[str, Any]) -> None:
        missing = self.missing_shards()
        if missing:
            raise StoreError(f"{self.path}: cannot be sealed, shards {missing} of {self.num_shards} are missing.")
        if self.is_sealed:
            return
        on_disk = self._check_is_still_mine()
        if on_disk["sealed"]:  # by another worker
            self.manifest = on_disk
            return
        for name in (".shard-*.parquet.*.tmp", f".{MANIFEST}.*.tmp"):  # of processes that died while they wrote
            for leftover in self.path.glob(name):
                leftover.unlink(missing_ok=True)
        files = [self._shard(index) for index in range(self.num_shards)]
        self.manifest["shards"] = [
            {
                "name": file.name,
                "rows": pq.read_metadata(file).num_rows,
                "bytes": file.stat().st_size,
                "sha256": file_sha256(file),
            }
            for file in files
        ]
        self.manifest["report"] = dict(report)
        self.manifest["sealed_at"] = time.time()
        self.manifest["sealed"] = True
        write_json(self.path / MANIFEST, self.manifest)

    def read_shard(self, index: int) -> list[Pair]:
        """The pairs of a shard, token ids as views on one array.

        Args:
            index (int): which shard.

        Returns:
            list[Pair]: in the order in which they were written.

        Raises:
            StoreError: If the shard is missing, or does not read back as it was written.
        """
        return _pairs_of(self._read(index))

    def _read(self, index: int, columns: list[str] | None = None) -> pa.Table:
        table, fault = self._try_to_read(index, columns)
        if fault is not None:
            remedy = "" if fault.startswith("missing") else "Remove it and start"
            raise StoreError(
                f"{self._shard(index)}: {fault}. {remedy or 'Start'} the run again; only this shard will be made again."
            )
        return table

    def _try_to_read(self, index: int, columns: list[str] | None = None) -> tuple[pa.Table | None, str | None]:
        """A shard's table, or why it cannot be used. Of some columns alone the values are not compared."""
        file = self._shard(index)
        recorded = self._recorded(file)
        try:
            open_regular(file).close()  # of a pipe nothing would ever come
            found = pq.read_schema(file)
            if not found.equals(_SCHEMA):
                return None, f"damaged (it has the columns {found.names}, expected {_SCHEMA.names})"
            about = _read_about(found)
            fault = self._fault_of_origin(index, about, is_sealed=recorded is not None)
            if fault is not None:
                return None, fault
            table = pq.read_table(file, columns=columns, page_checksum_verification=True)
            fault = _fault_in(table)
            if columns is None and fault is None:
                if recorded is not None and file_sha256(file) != recorded:
                    fault = "its bytes are not those that were sealed"
                elif recorded is None and about is not None and about.get("rows") != _rows_sha256(table):
                    fault = "its rows are not those that were written: they were changed since"
            return table, None if fault is None else f"damaged ({fault})"
        except FileNotFoundError:
            return None, "missing"
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text in it is not UTF-8
            return None, f"damaged ({error})"

    def _fault_of_origin(self, index: int, about: Mapping[str, Any] | None, is_sealed: bool) -> str | None:
        """Why a shard was not made for this place in this store, or None if it was."""
        if about is None:  # sealed by an earlier version, whose shards did not say
            return None if is_sealed else "of unknown origin (it does not say which store it was made for)"
        expected = self._about(index)
        if about.get("store") != expected["store"]:
            return "of another store (other weights, sampling or data, or another iteration)"
        if (about.get("shard"), about.get("num_shards")) != (index, self.num_shards):
            found = f"number {str(about.get('shard'))[:9]!r} of {str(about.get('num_shards'))[:9]!r}"
            return f"out of place (it was made to be {found}, not {index} of {self.num_shards})"
        return None

    def count_answers(self) -> tuple[int, int, int]:
        """Answers, those of them that were cut, and the tokens of all; reads two columns of every shard.

        Returns:
            tuple[int, int, int]: number of answers, of truncated answers, of tokens.
        """
        answers = truncated = tokens = 0
        for index in range(self.num_shards):
            table = self._read(index, columns=["finish_reason", "generated_ids"])
            answers += table.num_rows
            truncated += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
            tokens += pc.sum(pc.list_value_length(table["generated_ids"])).as_py() or 0
        return answers, truncated, tokens

    def pairs(self) -> Iterator[Pair]:
        """All pairs, shard by shard."""
        for index in range(self.num_shards):
            yield from self.read_shard(index)

    def _shard(self, index: int) -> Path:
        return self.path / _shard_name(index)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two fingerprints differ, in words; of sections within them only what differs."""
    found, missing = [], object()
    for name in sorted({*old, *new}):
        before, now = old.get(name, missing), new.get(name, missing)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += [f"{name}.{difference}" for difference in differences(before, now)]
        elif before != now:
            found.append(f"{name} is {new.get(name, 'absent')!r}, was {old.get(name, 'absent')!r}")
    return found


def _fault_of(manifest: Mapping[str, Any]) -> str | None:
    """What a manifest lacks, or None."""
    fingerprint, num_shards, shards = (manifest.get(name) for name in ("fingerprint", "num_shards", "shards"))
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get("opponent"), str):
        return "no fingerprint with the opponent's"
    if type(num_shards) is not int or not 0 <= num_shards <= _MOST_SHARDS:
        return f"num_shards is {num_shards!r}"
    if not isinstance(manifest.get("sealed"), bool):
        return f"sealed is {manifest.get('sealed')!r}"
    if not manifest["sealed"]:
        return None
    if not isinstance(shards, list) or not isinstance(manifest.get("report"), dict):
        return "sealed without a list of shards and a report"
    names = [shard.get("name") for shard in shards if isinstance(shard, dict) and isinstance(shard.get("sha256"), str)]
    if names != [_shard_name(index) for index in range(num_shards)]:
        return f"the list of shards does not name {num_shards} shards with their checksums"
    return None


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _fault_in(table: pa.Table) -> str | None:
    """What no shard holds that was written by :meth:`PairStore.write_shard`, or None."""
    for name in table.column_names:
        if not name.startswith("reference_") and table[name].null_count:
            return f"{name} is missing in {table[name].null_count} rows"
        if name.endswith("_ids"):
            ids = pc.list_flatten(table[name])
            if ids.null_count or (pc.min(ids).as_py() or 0) < 0:
                return f"{name} holds what is no token id"
    unknown = set(pc.unique(table["finish_reason"]).to_pylist()) - {"stop", "length"}
    return f"finish_reason is {', '.join(sorted(unknown))}" if unknown else None


def _read_about(schema: pa.Schema) -> dict[str, Any] | None:
    """What a shard says of itself, or None if it says nothing."""
    try:
        about = parse_json((schema.metadata or {})[_ABOUT])
    except (KeyError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _rows_sha256(table: pa.Table) -> str:
    """SHA-256 of a shard's values, however they are encoded in the file."""
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name} {len(column)} {column.null_count} ".encode())
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # of no chunk
            continue
        if pa.types.is_list(array.type):
            digest.update(array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            array = array.flatten()
        if pa.types.is_string(array.type):
            digest.update("".join(f"{len(text or '')}:{text or ''}" for text in array.to_pylist()).encode())
        else:  # a log-prob is finite or missing, and then NaN here
            digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _pairs_of(table: pa.Table) -> list[Pair]:
    lists = {}
    for name in ("prompt_ids", "real_ids", "generated_ids"):
        column = table[name].combine_chunks()
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        lists[name] = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    rest = {
        name: table[name].to_pylist()
        for name in ("sample_id", "iteration", "k", "finish_reason", "reference_real_logp", "reference_generated_logp")
    }
    pairs: list[Pair] = []
    for i in range(table.num_rows):
        response = Response(lists["generated_ids"][i], rest["finish_reason"][i], rest["reference_generated_logp"][i])
        if rest["k"][i] > 0 and pairs and pairs[-1].key == (rest["iteration"][i], rest["sample_id"][i]):
            pairs[-1].generated.append(response)
            continue
        pairs.append(
            Pair(
                sample_id=rest["sample_id"][i],
                iteration=rest["iteration"][i],
                prompt_ids=lists["prompt_ids"][i],
                real_ids=lists["real_ids"][i],
                generated=[response],
                reference_real_logp=rest["reference_real_logp"][i],
            )
        )
    return pairs
