"""Rows of files, each with the place to name when something is wrong with it.

A row that cannot be read is not an exception here but a :class:`Row` with ``error`` set, so that one pass can report
all of them; a file that cannot be read at all is a ``DataError``.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from spin.core.errors import DataError
from spin.core.files import MAX_JSON_BYTES, unique_keys

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = (*_LINE_SUFFIXES, ".json", *_TABLE_SUFFIXES)  # these may be compressed
_ARROW_SUFFIXES = (".parquet", ".arrow")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KNOWN_SUFFIXES = (
    f"{', '.join((*_TEXT_SUFFIXES, *_ARROW_SUFFIXES))} (or one of the first with {', '.join(_COMPRESSIONS)})"
)
_LIST_KEYS = ("data", "rows", "train", "examples", "samples", "items", "instances", "records")  # of a JSON object
_READING_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)
# What the libraries raise for values that Python has none for, and the datasets library on damaged files.
VALUE_FAULTS = (ValueError, OverflowError, LookupError, TypeError)
_TO_UTF8 = "Convert the file, for example with iconv -t utf-8"
_ONE_PER_LINE = "Expected one object per line. Fix the row"
_PARQUET_BATCH_ROWS = 1024
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by surrogateescape


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source. Messages name it by ``where``: ``data.jsonl:17`` (lines count from 1); ``data.parquet:row 3``,
    ``data.json:item 3`` and ``hf:name[train]:5`` count from 0."""

    where: str
    data: dict[str, Any]  # column name to value; empty if there is an error
    default_id: str  # name of the file, without suffix, and row number
    error: str | None = None  # why the row could not be read, with the remedy
    from_arrow: bool = False  # its structs have the keys of all rows, null where a row had none


def bad_row(fault: str, column: str | None = None) -> DataError:
    """What is wrong with a row, with the remedy; ``column`` is one that may mean something else in the data set."""
    other = f" A column of that name with another meaning is left out with dataset.column_map={{{column}: unused}}."
    return DataError(f"{fault} Fix the row or set dataset.on_bad_row=skip.{other if column else ''}")


def make_row(value: object, where: str, default_id: str, from_arrow: bool = False) -> Row:
    if isinstance(value, Mapping):
        return Row(where, dict(value), default_id, from_arrow=from_arrow)
    fault = f"found a {type(value).__name__}, expected an object with named columns. Fix the row"
    return Row(where, {}, default_id, fault)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression; empty if it cannot be read."""
    name = path.name.lower()
    compression = next((each for each in _COMPRESSIONS if name.endswith(each)), "")
    kind = Path(name.removesuffix(compression)).suffix
    return kind if kind in _TEXT_SUFFIXES or (kind in _ARROW_SUFFIXES and not compression) else ""


def stem_of(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in _COMPRESSIONS else path.stem


class SourceNames:
    """What the files and data sets of a source are called: each by its name, with folders in front of it where others
    have that name too.

    Names that differ by their suffix alone count as equal, as ``default_id`` does not have it: in one folder they are
    the same rows twice.
    """

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._names: dict[Path, Path] = {}

    def add(self, paths: Iterable[Path]) -> None:
        self._paths += paths
        self._names = {}

    def __getitem__(self, path: Path) -> Path:
        self._names = self._names or self._distinct()
        return self._names[path]

    def _distinct(self) -> dict[Path, Path]:
        keys = {path: (*Path(os.path.abspath(path)).parent.parts, stem_of(path)) for path in self._paths}
        names: dict[Path, Path] = {}
        depth = 0
        while len(names) < len(keys):
            depth += 1
            counts = Counter(key[-depth:] for key in set(keys.values()))
            for path, key in keys.items():
                if path not in names and counts[key[-depth:]] == 1:
                    names[path] = Path(*key[-depth:-1], path.name)
        return names


def rows_of_files(paths: Sequence[Path], names: SourceNames, streaming: bool) -> Iterator[Row]:
    for path in paths:
        if streaming and kind_of(path) == ".json":
            raise DataError(
                f"{path.name}: a JSON list can only be read whole, dataset.streaming=true reads row by row. Convert it "
                "to JSON Lines or parquet."
            )
        yield from (_arrow_rows if kind_of(path) in _ARROW_SUFFIXES else _text_rows)(path, names[path])


def _id_prefix(name: Path) -> str:
    return name.with_name(stem_of(name)).as_posix()


def _text_rows(path: Path, name: Path) -> Iterator[Row]:
    kind, number = kind_of(path), 0
    try:
        with _open_bytes(path) as stream:
            rows = _line_rows(name, stream) if kind in _LINE_SUFFIXES else _json_rows(path, name, stream)
            if kind in _TABLE_SUFFIXES:
                rows = _table_rows(name, stream, _TABLE_SUFFIXES[kind])
            for number, row in enumerate(rows, start=1):  # noqa: B007 - an error says where reading ended
                yield row
    except _READING_FAULTS as error:
        behind = f" after {number} rows" if number else ""
        raise DataError(f"{path} cannot be read{behind}: {getattr(error, 'strerror', None) or error}.") from error


def _open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, decompressed by what its name says."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return cast("BinaryIO", io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("BinaryIO", openers.get(suffix, open)(path, "rb"))


def _line_rows(name: Path, stream: BinaryIO) -> Iterator[Row]:
    # Bytes, not text: one bad byte must cost one row, and must not move the line numbers.
    number, prefix = 0, _id_prefix(name)
    while line := stream.readline(MAX_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_JSON_BYTES:
            raise DataError(f"{name}:{number}: a line of more than {MAX_JSON_BYTES // 2**20} MiB. Fix the file.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _parse_line(line, f"{name}:{number}", f"{prefix}-{number}")


def _table_rows(name: Path, stream: BinaryIO, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV file with a header; all values are texts, and empty ones are null."""
    csv.field_size_limit(MAX_JSON_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader, prefix = csv.reader(text, delimiter=delimiter, strict=True), _id_prefix(name)
    try:
        # pandas writes its index under an empty name, and reads it back under this one
        header = [column or f"Unnamed: {index}" for index, column in enumerate(next(reader, []))]
        if len(set(header)) < len(header):
            raise DataError(f"{name}:1: columns {header!r:.200}, expected a header of different names.")
        line = reader.line_num
        for cells in reader:
            where, default_id = f"{name}:{line + 1}", f"{prefix}-{line + 1}"
            line = reader.line_num
            if not cells:
                continue
            fault = None
            if len(cells) != len(header):
                fault = f"found {len(cells)} columns, expected {len(header)} as in the header. Fix the row"
            elif any(not cell.isascii() and _ESCAPED.search(cell) for cell in cells):
                fault = f"a byte is not UTF-8. {_TO_UTF8}"
            data = {} if fault else {column: cell or None for column, cell in zip(header, cells, strict=True)}
            yield Row(where, data, default_id, fault)
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not valid CSV: {error}. Fix the file.") from error


def _parsed(raw: bytes) -> tuple[Any, str, int]:
    """A JSON value, or what is wrong with it and in which line."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys), "", 0
    except UnicodeDecodeError as error:
        line, begin = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start) + 1
        return None, f"byte 0x{raw[error.start]:02x} at position {error.start - begin} is not UTF-8", line
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} at column {error.colno}", error.lineno
    except (ValueError, RecursionError) as error:  # a long integer, endless nesting, a key twice
        return None, f"not usable JSON: {error}", 1


def _parse_line(line: bytes, where: str, default_id: str) -> Row:
    value, fault, _ = _parsed(line)
    if not fault:
        return make_row(value, where, default_id)
    return Row(where, {}, default_id, f"{fault}. {_TO_UTF8 if 'UTF-8' in fault else _ONE_PER_LINE}")


def _json_rows(path: Path, name: Path, stream: BinaryIO) -> Iterator[Row]:
    raw = stream.read().removeprefix(b"\xef\xbb\xbf")
    start = raw.lstrip()
    if not start:
        return
    if start[:1] not in (b"[", b"{"):
        raise DataError(
            f"{path} starts with {chr(start[0])!r}, expected a JSON list of objects or one object per line."
        )
    first, _, rest = start.partition(b"\n")
    if start[:1] == b"{" and rest.strip() and _parse_line(first, "", "").error is None:
        # Many files that are called .json hold one object per line.
        yield from _line_rows(name, io.BytesIO(raw))
        return
    items, fault, line = _parsed(raw)
    if fault:
        raise DataError(
            f"{name}:{line}: {fault}. A JSON list can only be read whole: fix the file, or convert it to JSON "
            "Lines, where one bad row does not hide the others."
        )
    for index, value in enumerate(items if isinstance(items, list) else _list_in(items, path)):
        yield make_row(value, f"{name}:item {index}", f"{_id_prefix(name)}-{index}")


def _list_in(value: Mapping[str, Any], path: Path) -> list[Any]:
    """The rows of a JSON object: the list that it holds under a name for rows, or itself."""
    wrapped = [key for key in _LIST_KEYS if key in value]
    lists = [key for key in wrapped if isinstance(value[key], list) and value[key]]
    rows = [key for key in lists if all(isinstance(each, Mapping) for each in value[key])]
    if wrapped and not rows:
        raise DataError(
            f"{path} starts with '{{', expected a JSON list of objects, one object per line, or an object with such a "
            f"list under 'data'; found {', '.join(map(str, value))}."
        )
    if len(rows) > 1:
        raise DataError(f"{path} holds several lists: {', '.join(rows)}. Write those to read to a file of their own.")
    return value[rows[0]] if rows else [value]


def _arrow_rows(path: Path, name: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, index, prefix = kind_of(path)[1:], 0, _id_prefix(name)
    try:
        with path.open("rb") as file:
            if kind == "parquet":
                batches: Iterable[Any] = pq.ParquetFile(file).iter_batches(batch_size=_PARQUET_BATCH_ROWS)
            elif file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = pa.ipc.open_stream(file)
            for batch in batches:
                if len(set(batch.schema.names)) < batch.num_columns:
                    raise DataError(f"{path}: columns {batch.schema.names!r:.200}, expected different names.")
                batch.validate(full=True)  # offsets of a damaged file would be read as they are
                for start in range(0, batch.num_rows, _PARQUET_BATCH_ROWS):
                    for value in _values(batch.slice(start, _PARQUET_BATCH_ROWS), path, index):
                        yield make_row(value, f"{name}:row {index}", f"{prefix}-{index}", from_arrow=True)
                        index += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, SystemError, MemoryError) as error:
        raise DataError(f"{path} cannot be read as {kind} after {index} rows: {error}.") from error


def _values(batch: Any, path: Path, index: int) -> list[dict[str, Any]]:
    """Rows as Python values; a value that Python has none for (a date of the year 0) is an error with its column."""
    try:
        return batch.to_pylist()
    except VALUE_FAULTS as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except VALUE_FAULTS as fault:
                raise DataError(
                    f"{path}: column {name!r} ({column.type}) has a value that cannot be read, in the rows from "
                    f"{index} on: {fault}. Fix or remove the column."
                ) from fault
        raise DataError(f"{path}: the rows from {index} on cannot be read: {error}.") from error
