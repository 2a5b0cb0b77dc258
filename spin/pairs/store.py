"""The pair store: the opponent's responses and their log-probs, on disk, resumed at any shard.

A store is a folder of parquet shards with a ``manifest.json``. The manifest names what the store was made from (its
fingerprint); it is written when the store is opened, and again, with every shard's checksum, when the store is sealed.
A shard appears whole or not at all, and its responses are in a journal before, so a store that a dead process left
behind is resumed.

Each shard names, in its own metadata, the store that it was made for, its number, and the SHA-256 of its rows. So it
may come from another machine's folder, and one of other weights, sampling or data, or with an edited row, is found. It
guards against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from operator import eq
from pathlib import Path
from typing import Any, get_args

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
    open_regular,
    parse_json,
    read_json,
    write_json,
)
from spin.core.terminal import some_of
from spin.pairs.journal import Journal
from spin.types import FinishReason, Pair, Response, Verdict

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_ORIGIN = b"spin"  # in a shard's parquet metadata: JSON of its store, number and rows
_MAX_SHARDS = 10_000_000

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


_CHECKED_SCHEMA = _SCHEMA.append(pa.field("verdict", pa.string()))  # where a checker has looked at the responses


class PairStore:
    """A folder of pairs with a manifest: a parquet row per generated response, those of a prompt numbered by ``k``."""

    def __init__(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = dict(manifest)

    @classmethod
    def open(cls, path: str | Path) -> PairStore:
        """Opens a store that exists, sealed or not; StoreError if its manifest is missing, damaged or of another
        version."""
        file = Path(path) / MANIFEST
        if not file.exists():
            files = [file for depth in ("*", "*/*") for file in Path(path).glob(f"{depth}/{MANIFEST}")]
            below = sorted(
                str(file.parent.relative_to(path)) for file in files if file.parent.parent.name != "checkpoints"
            )
            hint = f" Below it there are {some_of(below, 6)}." if below else ""
            raise StoreError(f"{path}: no pair store here ({MANIFEST} is missing).{hint}")
        manifest = read_json(file, StoreError, "Remove the folder; it will be made again.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{file}: expected a pair store of format {FORMAT_VERSION}. Made by another version of spin?"
            )
        fault = _manifest_fault(manifest)
        if fault is not None:
            raise StoreError(f"{file}: damaged manifest ({fault}). Remove the folder; it will be made again.")
        return cls(path, manifest)

    @classmethod
    def open_or_create(cls, path: str | Path, fingerprint: Mapping[str, Any], num_shards: int) -> PairStore:
        """Opens the store if it was made from the same things, else begins a new one; the old one is kept aside.

        Call it on one rank. Workers may call it at once: the first begins the store, the others open it.
        ``fingerprint`` has everything that the content depends on, JSON values by name. A store that is there keeps its
        own number of shards, whatever the number of ranks is now.
        """
        path, fingerprint = Path(path), json.loads(json.dumps(fingerprint))
        with file_lock(path):
            if (path / MANIFEST).exists() or (path.exists() and not path.is_dir()):
                try:
                    store = cls.open(path)
                    changed = differences(store.manifest["fingerprint"], fingerprint)
                except StoreError as error:
                    changed = [str(error)]
                if not changed:
                    # a shard that is made again may come out otherwise: another engine, another version of pyarrow
                    if store.is_sealed and store.missing_shards():
                        kept = ("format_version", "fingerprint", "num_shards")
                        store.manifest = {name: store.manifest[name] for name in kept} | {"sealed": False}
                        write_json(path / MANIFEST, store.manifest)
                    return store
                keep_aside(path, f"was made from something else ({'; '.join(changed)})")
            # without a manifest the folder is what a process left that died just then, or shards that were copied there
            with as_output_error(path):
                path.mkdir(parents=True, exist_ok=True)
            made_from = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "num_shards": num_shards}
            store = cls(path, made_from | {"sealed": False, "begun_at": time.time()})  # seconds since 1970
            write_json(path / MANIFEST, store.manifest)
            return store

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
        """Fingerprint of the weights that wrote or scored the responses."""
        return self.manifest["fingerprint"]["opponent"]

    def has_shard(self, index: int) -> bool:
        """Whether a shard's file is there, whatever is in it."""
        return self._shard(index).exists()

    def missing_shards(self) -> list[int]:
        """Shards that are not there, ascending; one that is damaged, edited or of another store is kept aside, and is
        missing. StoreError if the whole folder is of another store by now."""
        missing = []
        for index in range(self.num_shards):
            found = self._read(index)
            if isinstance(found, str):
                missing.append(index)
                if self.has_shard(index):
                    self._check_is_same_store()
                    with suppress(FileNotFoundError):  # another worker was faster
                        keep_aside(self._shard(index), f"is not used: {found}")
        return missing

    def faults(self) -> list[str]:
        """A line for each shard that is missing, damaged, edited or of another store; reads all of them."""
        found = ((self._shard(index), self._read(index)) for index in range(self.num_shards))
        return [f"{file}: {fault}" for file, fault in found if isinstance(fault, str)]

    def write_shard(self, index: int, pairs: Sequence[Pair]) -> None:
        """Writes a shard, which appears whole or not at all and may be empty. StoreError if a reference log-prob is not
        finite, or if another process has begun the store again, from something else."""
        broken = [
            pair.sample_id
            for pair in pairs
            if any(logp is not None and not math.isfinite(logp) for logp in pair.reference_logps)
        ]
        if broken:
            raise StoreError(
                f"{self._shard(index)}: the opponent's log-probs are not finite for {', '.join(broken)}. The weights, "
                "or the precision they are computed in, are broken; nothing was written."
            )
        table = _table_of(pairs, self.opponent)
        origin = self._origin(index) | {"rows": _rows_sha256(table)}
        with atomic_write(self._shard(index), "xb") as stream:
            table = table.replace_schema_metadata({_ORIGIN: json.dumps(origin)})
            pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
            self._check_is_same_store()

    def journal(self, index: int) -> Journal:
        """Where the responses of a shard are kept until all of them are there, and the store is sealed."""
        return Journal(self.path / f"journal-{index:05d}.jsonl", self._origin(index))

    def seal(self, report: Mapping[str, Any] | None = None) -> None:
        """Records the checksum of every shard, once, and ``report``, counts to keep with the store. Call it on one
        rank; workers may call it at once. StoreError as of :meth:`write_shard`, or if a shard is missing."""
        with file_lock(self.path):
            missing = self.missing_shards()
            if missing:
                raise StoreError(f"{self.path}: cannot be sealed, shards {missing} of {self.num_shards} are missing.")
            if self.is_sealed:
                return
            on_disk = self._check_is_same_store()
            if on_disk["sealed"]:  # by another worker
                self.manifest = on_disk
                return
            # journals, and what processes left that died while they wrote
            for name in ("journal-*.jsonl", ".shard-*.parquet.*.tmp", f".{MANIFEST}.*.tmp"):
                for leftover in self.path.glob(name):
                    leftover.unlink(missing_ok=True)
            self.manifest["shards"] = shards = []
            for file in map(self._shard, range(self.num_shards)):
                about = {"name": file.name, "rows": pq.read_metadata(file).num_rows, "bytes": file.stat().st_size}
                shards.append(about | {"sha256": file_sha256(file)})
            self.manifest |= {"report": dict(report or {}), "sealed_at": time.time(), "sealed": True}
            write_json(self.path / MANIFEST, self.manifest)

    def read_shard(self, index: int) -> list[Pair]:
        """The pairs of a shard in their order, token ids as views on one array; StoreError if it is missing, or does
        not read back as it was written."""
        return _pairs_of(self._table(index))

    def pairs(self) -> Iterator[Pair]:
        """All pairs, shard by shard."""
        for index in range(self.num_shards):
            yield from self.read_shard(index)

    def count_responses(self) -> Counter[str]:
        """:func:`count_responses` of every shard, without prompts, and the responses that are ``equal`` to the real
        one."""
        total: Counter[str] = Counter()
        for index in range(self.num_shards):
            table = self._table(index, columns=["finish_reason", "real_ids", "generated_ids"])
            total += count_responses(table)
            lengths = (pc.list_value_length(table[name]) for name in ("real_ids", "generated_ids"))
            alike = table.filter(pc.equal(*lengths))
            total["equal"] += sum(map(eq, alike["real_ids"].to_pylist(), alike["generated_ids"].to_pylist()))
        return total

    def count_verdicts(self) -> Counter[str]:
        """Responses by what a checker said of them; reads one column of every shard."""
        tables = (self._table(index, columns=["finish_reason", "verdict"]) for index in range(self.num_shards))
        return Counter(verdict for table in tables for verdict in table["verdict"].to_pylist())

    def _shard(self, index: int) -> Path:
        return self.path / _shard_name(index)

    def _origin(self, index: int) -> dict[str, Any]:
        """What a shard says of where it belongs."""
        store = json_fingerprint(self.manifest["fingerprint"])
        return {"store": store, "shard": index, "num_shards": self.num_shards}

    def _check_is_same_store(self) -> dict[str, Any]:
        """The manifest on the disk; StoreError if a worker with another config has moved this store aside."""
        on_disk = PairStore.open(self.path).manifest
        changed = differences(self.manifest["fingerprint"], on_disk["fingerprint"])
        if changed:
            raise StoreError(
                f"{self.path}: another process has begun this store again, from something else ({'; '.join(changed)}). "
                "All workers of an iteration need the same config. What was made here before is kept next to it, as "
                f"{self.path.name}.stale-*."
            )
        return on_disk

    def _table(self, index: int, columns: list[str] | None = None) -> pa.Table:
        found = self._read(index, columns)
        if isinstance(found, str):
            remedy = "Start" if found == "missing" else "Remove it and start"
            raise StoreError(f"{self._shard(index)}: {found}. {remedy} the run again; only this shard is made again.")
        return found

    def _read(self, index: int, columns: list[str] | None = None) -> pa.Table | str:
        """A shard's table, or why it cannot be used. Of some columns alone the values are not compared."""
        file = self._shard(index)
        shards = self.manifest["shards"] if self.is_sealed else []  # whose form was checked when it was opened
        recorded = next((shard["sha256"] for shard in shards if shard["name"] == file.name), None)
        try:
            open_regular(file).close()  # of a pipe nothing would ever come
            schema = pq.read_schema(file)
            if schema not in (_SCHEMA, _CHECKED_SCHEMA):
                return f"damaged (it has the columns {schema.names}, expected {_SCHEMA.names})"
            origin = _read_origin(schema)
            fault = self._origin_fault(index, origin)
            if fault is not None:
                return fault
            table = pq.read_table(file, columns=columns, page_checksum_verification=True)
            fault = _values_fault(table)
            if columns is None and fault is None:
                if recorded is not None and file_sha256(file) != recorded:
                    fault = "its bytes are not those that were sealed"
                elif recorded is None and origin.get("rows") != _rows_sha256(table):
                    fault = "its rows are not those that were written: they were changed since"
            return table if fault is None else f"damaged ({fault})"
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text in it is not UTF-8
            return f"damaged ({error})"

    def _origin_fault(self, index: int, origin: Mapping[str, Any]) -> str | None:
        """Why a shard was not made for this place in this store, or None if it was."""
        if not origin:
            return "of unknown origin (it does not say which store it was made for)"
        if origin.get("store") != self._origin(index)["store"]:
            return "of another store (other weights, sampling or data, or another iteration)"
        if (origin.get("shard"), origin.get("num_shards")) != (index, self.num_shards):
            found = f"number {str(origin.get('shard'))[:9]!r} of {str(origin.get('num_shards'))[:9]!r}"
            return f"out of place (it was made to be {found}, not {index} of {self.num_shards})"
        return None


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


def _manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """What a manifest lacks, or None."""
    fingerprint, num_shards, shards = (manifest.get(name) for name in ("fingerprint", "num_shards", "shards"))
    if not isinstance(fingerprint, dict) or not isinstance(fingerprint.get("opponent"), str):
        return "no fingerprint with the opponent's"
    if type(num_shards) is not int or not 0 <= num_shards <= _MAX_SHARDS:
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


def _values_fault(table: pa.Table) -> str | None:
    """What no shard holds that was written by :meth:`PairStore.write_shard`, or None."""
    for name in table.column_names:
        if not name.startswith("reference_") and table[name].null_count:
            return f"{name} is missing in {table[name].null_count} rows"
        if name.endswith("_ids"):
            ids = pc.list_flatten(table[name])
            if ids.null_count or (pc.min(ids).as_py() or 0) < 0:
                return f"{name} holds what is no token id"
    for name, values in (("finish_reason", FinishReason), ("verdict", Verdict)):
        unknown = set(pc.unique(table[name]).to_pylist() if name in table.column_names else ()) - {*get_args(values)}
        if unknown:
            return f"{name} is {', '.join(sorted(unknown))}"
    return None


def _read_origin(schema: pa.Schema) -> dict[str, Any]:
    """What a shard says of itself; empty if it says nothing."""
    try:
        origin = parse_json((schema.metadata or {})[_ORIGIN])
    except (KeyError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


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


def count_responses(table: pa.Table) -> Counter[str]:
    """The number of ``responses`` of a shard, of ``truncated`` ones, and, as far as their columns are there, the tokens
    of all: ``prompt``, ``real`` and ``generated``."""
    truncated = pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
    names = (name for name in ("prompt", "real", "generated") if f"{name}_ids" in table.column_names)
    tokens = {name: pc.sum(pc.list_value_length(table[f"{name}_ids"])).as_py() or 0 for name in names}
    return Counter(responses=table.num_rows, truncated=truncated, **tokens)


def _table_of(pairs: Sequence[Pair], opponent: str) -> pa.Table:
    rows = [
        (pair.sample_id, pair.iteration, k, pair.prompt_ids, pair.real_ids, response.token_ids)
        + (response.finish_reason, pair.reference_real_logp, response.reference_logp, opponent, response.verdict)
        for pair in pairs
        for k, response in enumerate(pair.generated)
    ]
    schema = _CHECKED_SCHEMA if any(row[-1] is not None for row in rows) else _SCHEMA
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(values, each.type) for values, each in zip(columns, schema, strict=False)], schema=schema)


def _pairs_of(table: pa.Table) -> list[Pair]:
    columns: list[list[Any]] = []
    for name in ("verdict", *_SCHEMA.names[:-1]):
        if name not in table.column_names:  # there was no checker
            columns.append([None] * table.num_rows)
            continue
        column = table[name].combine_chunks()
        if name.endswith("_ids"):
            ids = column.values.to_numpy()
            columns.append([ids[a:b] for a, b in pairwise(column.offsets.to_numpy())])
        else:
            columns.append(column.to_pylist())
    pairs: list[Pair] = []
    for verdict, sample_id, iteration, k, prompt_ids, real_ids, ids, reason, real_logp, logp in zip(
        *columns, strict=True
    ):
        if k == 0 or not pairs or pairs[-1].key != (iteration, sample_id):
            pairs.append(Pair(sample_id, iteration, prompt_ids, real_ids, [], real_logp))
        pairs[-1].generated.append(Response(ids, reason, logp, verdict=verdict))
    return pairs
