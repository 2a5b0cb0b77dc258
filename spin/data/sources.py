"""Rows of a data set, wherever it lies, each with the place to name when something is wrong with it.

A row that cannot be read is not an exception here but a :class:`Row` with ``error`` set, so that one pass can report
all of them; a source that cannot be read at all is a ``DataError``.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from spin.core.errors import DataError
from spin.core.files import MAX_JSON_BYTES, read_bytes

log = logging.getLogger(__name__)

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_TEXT_SUFFIXES = (*_LINE_SUFFIXES, ".json", *_TABLE_SUFFIXES)  # these may be compressed
_ARROW_SUFFIXES = (".parquet", ".arrow")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SHOWN_SUFFIXES = (
    f"{', '.join((*_TEXT_SUFFIXES, *_ARROW_SUFFIXES))} (or one of the first with {', '.join(_COMPRESSIONS)})"
)
_LIST_KEYS = ("data", "rows", "train", "examples", "samples", "items", "instances", "records")  # of a JSON object
_READING_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError)
# What the libraries raise for values that Python has none for, and the datasets library on damaged files.
_VALUE_FAULTS = (ValueError, OverflowError, LookupError, TypeError)
_LIBRARY_FAULTS = (OSError, *_VALUE_FAULTS, AttributeError, RuntimeError, MemoryError)
_TO_UTF8 = "Convert the file, for example with iconv -t utf-8"
_PARQUET_BATCH_ROWS = 1024
_MAX_DEPTH = 3  # of folders in a folder
_HF_PREFIX = "hf:"
# Builders of the datasets library that read rows from files of these kinds; others unpickle, run SQL or read media.
_FILE_BUILDERS = ("arrow", "csv", "json", "parquet", "text")
# What names of files and folders say of their split, as in the datasets library.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, by surrogateescape
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")

_Splits = Mapping[str, Callable[[], Iterable["Row"]]]  # each call reads from the beginning
Source = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Args:
        where (str): the place to name in a message: ``data.jsonl:17`` (lines count from 1), ``data.parquet:row 3``,
            ``data.json:item 3`` and ``hf:name[train]:5`` (these count from 0).
        data (dict[str, Any]): column name to value; empty if ``error`` is set.
        default_id (str): the row's id if it has none of its own: file stem and row number.
        error (str | None): why the row could not be read, with the remedy.
        from_arrow (bool): its structs have the keys of all rows, null where a row had none.
    """

    where: str
    data: dict[str, Any]
    default_id: str
    error: str | None = None
    from_arrow: bool = False


def read_rows(
    source: Source,
    *,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Open a source and iterate over its rows in a fixed order.

    The source is resolved at the call, its rows are read as they are asked for.

    Args:
        source (Source): a file of JSON Lines (``.jsonl``, ``.ndjson``), a JSON list or an object that holds one
            (``.json``), ``.csv`` or ``.tsv`` with a header, each also compressed (``.gz``, ``.bz2``, ``.xz``,
            ``.zst``), ``.parquet`` or ``.arrow``; a glob pattern of these (in sorted order) or a folder; a folder
            written by ``datasets.save_to_disk``; the name of a Hugging Face data set (``org/name``; ``hf:name`` says so
            explicitly), a list of any of these, or a list of dictionaries.
        split (str | None): split, as ``datasets`` writes it: ``train``, ``train[:1000]``, ``train[10%:]+test``. None
            takes ``train``, or the only split there is. A folder's splits are those that its ``README.md`` declares in
            ``configs``, or else what the names of its files and folders say. Files that are named one by one or by a
            glob pattern are ``train``.
        name (str | None): configuration of a Hugging Face data set, or of a folder whose ``README.md`` declares them.
        data_dir (str | None): sub-folder of a Hugging Face data set or of a folder.
        revision (str | None): branch, tag or commit of a Hugging Face data set.
        streaming (bool): fetch the rows of a Hugging Face data set as they are asked for, instead of downloading all
            files first, and refuse a source that can only be read whole.

    Returns:
        Iterator[Row]: the rows; those that cannot be read have ``error`` set.

    Raises:
        DataError: If nothing lies where ``source`` points, if its kind is unknown, if an option does not apply to it,
            if it has several splits and none is chosen, or if a file cannot be read. While iterating: if the source has
            no rows.
    """
    options = {"split": split, "name": name, "data_dir": data_dir, "revision": revision}
    wrong = [f"dataset.{key}={value!r}" for key, value in options.items() if not isinstance(value, str | None)]
    if wrong:
        raise DataError(f"{', '.join(wrong)}: expected a text or null.")
    if not isinstance(source, (str, Path, Sequence)):
        raise DataError(
            f"dataset.source is a {type(source).__name__}, expected a path, a data set name or a list of these."
        )
    if not isinstance(source, (str, Path)) and source and isinstance(source[0], Mapping):
        rows = (_row(value, f"dataset.source[{index}]", f"row-{index}") for index, value in enumerate(source))
        return _not_empty(rows, "dataset.source")
    locations = [source] if isinstance(source, (str, Path)) else list(source)
    if not locations:
        raise DataError("dataset.source is an empty list. Name at least one file or data set.")
    try:
        readers = [reader for location in locations for reader in _resolve(location, options, streaming)]
    except OSError as error:  # no right to look into a folder, a name that is too long
        raise DataError(f"dataset.source={source} cannot be read: {error}.") from error
    return _not_empty((row for reader in readers for row in reader), ", ".join(str(each) for each in locations))


# --- Where the rows are ---


def describe_source(source: Source, **options: str | None) -> list[Any]:
    """Which data a source means, as far as that can be known without reading them.

    JSON values: of each file its name and size in bytes, of a Hugging Face data set its name, and the options.
    """
    found: list[Any] = []
    for location in [source] if isinstance(source, (str, Path)) else source:
        path = None if isinstance(location, Mapping) else Path(location).expanduser()
        if path is None:
            found.append("row")
        elif path.is_dir():
            found += [[str(file.relative_to(path)), file.stat().st_size] for file in _walk(path)]
        else:
            files = sorted(map(Path, glob.glob(str(path), recursive=True)))
            found += [[file.name, file.stat().st_size] for file in files] or [str(location)]
    return [*found, {name: value for name, value in options.items() if value is not None}]


def _resolve(location: object, options: dict[str, str | None], streaming: bool = False) -> list[Iterable[Row]]:
    if not isinstance(location, (str, Path)):
        raise DataError(f"dataset.source has an entry of type {type(location).__name__}, expected paths or names only.")
    text = str(location)
    if not text.strip():
        raise DataError("dataset.source is empty. Name a file, a folder or a Hugging Face data set.")
    if text.startswith(_HF_PREFIX):
        return [_hub_rows(text.removeprefix(_HF_PREFIX), options, streaming)]
    path = Path(text).expanduser()
    usable = ["split"]
    if path.is_dir():
        if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            _refuse_options(text, options, usable, "a saved data set")
            return [_disk_rows(path, options)]
        declared = _declared_configs(path)
        usable += ["data_dir"] if not declared else ["name"]
        _refuse_options(text, options, usable, "a folder of files")
        splits = _declared_splits(path, declared, options) if declared else _named_splits(path, options)
    elif path.is_file():
        splits = {"train": [path]} | {split: [path] for split in _split_words(_stem(path))[:1]}
    elif glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise DataError(f"No file matches dataset.source={text}. {_nearby(path)}")
        splits = {"train": files}
    elif _could_be_hub_name(text):
        return [_hub_rows(text, options, streaming)]
    else:
        raise DataError(f"dataset.source={text} does not exist. {_nearby(path)}")
    _refuse_options(text, options, usable, "a matter of files")
    for file in (file for files in splits.values() for file in files):
        if not _kind_of(file):
            raise DataError(f"{file} has the suffix {file.suffix!r}, expected one of {_SHOWN_SUFFIXES}. Convert it.")
    rows = {split: partial(_rows_of_files, files, streaming) for split, files in splits.items()}
    return [_select(text, rows, options["split"])]


def _refuse_options(text: str, options: Mapping[str, str | None], usable: Sequence[str], what: str) -> None:
    given = [f"dataset.{key}={value}" for key, value in options.items() if value is not None and key not in usable]
    if given:
        raise DataError(
            f"{', '.join(given)} has no meaning for {text}: it is {what}, not a Hugging Face data set. Remove the "
            "option, or name the file that holds these rows."
        )


def _select(label: str, splits: _Splits, split: str | None) -> Iterable[Row]:
    """The rows of one split, of a part of it, or of several one behind the other."""
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if chosen is not None and chosen in splits:
        return splits[chosen]()
    found = f"{label} has the splits {', '.join(splits)}; found dataset.split={split}."
    if chosen is None or _SPLIT_NAME.fullmatch(chosen):
        raise DataError(f"{found} Set dataset.split to one of them.")
    datasets = _datasets_library(f"dataset.split={split}")
    try:
        lengths = {
            name: sum(1 for _ in rows()) if re.search(rf"\b{re.escape(name)}\b", chosen) else 0
            for name, rows in splits.items()
        }
        parts = datasets.ReadInstruction.from_spec(chosen).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{found} It is no part of them: {error} An example: train[:1000].") from error
    return chain.from_iterable(islice(splits[part.splitname](), part.from_, part.to) for part in parts)


# --- Folders ---


def _walk(folder: Path, depth: int = _MAX_DEPTH) -> list[Path]:
    """The data files in a folder and those below it, sorted, without hidden ones."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir() and depth:
            found += _walk(entry, depth - 1)
        elif entry.is_file() and _kind_of(entry):
            found.append(entry)
    return found


def _named_splits(folder: Path, options: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Splits by the names of files and folders, by the rules of the datasets library."""
    folder = folder / (options["data_dir"] or "")
    if not folder.is_dir():
        raise DataError(f"dataset.data_dir={options['data_dir']}: there is no folder {folder}. {_nearby(folder)}")
    files = _walk(folder, depth=0) or _walk(folder)
    # A .json file next to data files is more often a description of them than a part of them.
    data_files = [file for file in files if _kind_of(file) != ".json"] or files
    if not data_files:
        raise DataError(f"{folder} holds no {_SHOWN_SUFFIXES} file. {_contents(folder)}")
    if len(data_files) < len(files):
        log.info("%s: not read: %s", folder, ", ".join(file.name for file in files if file not in data_files))
    kinds = sorted({_kind_of(file).replace(".ndjson", ".jsonl") for file in data_files})
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(kinds)} files, which may be the same rows twice. Name those to read, "
            f"such as dataset.source={folder / '*'}{kinds[0]}."
        )
    names = {file: file.relative_to(folder) for file in data_files}
    shards = {file: match[1] for file in data_files if (match := _SHARD.match(file.name))}
    in_data = all(file.parent.name == "data" for file in data_files)
    if shards and (in_data or any(map(_split_words, shards.values()))):
        by_split = {file: [shards[file]] if file in shards else [] for file in data_files}
    else:
        by_split = {file: _split_words("/".join(name.parts[:-1])) for file, name in names.items()}
    if not any(by_split.values()):
        by_split = {file: _split_words(_stem(file)) for file in data_files}
    if not any(by_split.values()):
        return {"train": data_files}
    splits: dict[str, list[Path]] = {}
    for file, found in by_split.items():
        for split in found if len(found) == 1 else ():
            splits.setdefault(split, []).append(file)
    rest = [str(names[file]) for file, found in by_split.items() if len(found) != 1]
    if rest and options["split"] is None:
        raise DataError(
            f"{folder}: by their names, files belong to the splits {', '.join(splits) or 'none'}, and "
            f"{', '.join(rest[:5])} to none or several. Set dataset.split, or name the files to read, such as "
            f"dataset.source={folder / '*'}{kinds[0]}."
        )
    return splits


def _split_words(name: str) -> list[str]:
    return [
        split
        for split, words in _SPLIT_WORDS.items()
        if re.search(rf"(?:^|[-._ 0-9/])(?:{'|'.join(words)})(?:[-._ 0-9/]|$)", name)
    ]


def _declared_configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The ``configs`` that a data repository's README.md declares, by name."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    import yaml

    text = read_bytes(readme, DataError, "Name the files to read.", 4 * 2**20).decode("utf-8", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        declared = yaml.safe_load(header[1]) if header and "configs" in header[1] else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{readme}: its header is no valid YAML: {error}. Fix it, or name the files to read."
        ) from error
    configs = declared.get("configs") if isinstance(declared, Mapping) else None
    if not isinstance(configs, list):
        return {}
    return {
        str(each.get("config_name", "default")): each
        for each in configs
        if isinstance(each, Mapping) and (each.get("data_files") or each.get("data_dir"))
    }


def _declared_path(folder: Path, path: object) -> str:
    if not isinstance(path, str) or "://" in path or PurePosixPath(path).is_absolute() or ".." in path or "\0" in path:
        raise DataError(
            f"{folder / 'README.md'} declares the path {path!r:.80}, expected one in the folder. Name the "
            "files to read."
        )
    return path


def _declared_splits(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], options: Mapping[str, str | None]
) -> dict[str, list[Path]]:
    chosen = name = options["name"]
    if chosen is None:
        defaults = [each for each, value in configs.items() if value.get("default") is True or each == "default"]
        chosen = defaults[0] if defaults else next(iter(configs)) if len(configs) == 1 else None
    if chosen is None or chosen not in configs:
        raise DataError(
            f"{folder / 'README.md'} declares the configurations {', '.join(configs)}; found dataset.name={name}. Set "
            "dataset.name to one of them."
        )
    given, data_dir = configs[chosen].get("data_files"), configs[chosen].get("data_dir")
    data_dir = _declared_path(folder, data_dir) if data_dir else ""
    if not given:
        return _named_splits(folder, {"data_dir": data_dir, "split": options["split"]})
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        given = {str(each.get("split", "train")): each.get("path") for each in given}
    patterns = given if isinstance(given, Mapping) else {"train": given}
    splits: dict[str, list[Path]] = {}
    for split, paths in patterns.items():
        for path in paths if isinstance(paths, list) else [paths]:
            pattern = Path(glob.escape(str(folder / data_dir))) / _declared_path(folder, path)
            found = [file for file in map(Path, sorted(glob.glob(str(pattern), recursive=True))) if file.is_file()]
            readable = [file for file in found if _kind_of(file)]
            if not readable:
                raise DataError(
                    f"{folder / 'README.md'} declares {path} for split {split}, and no {_SHOWN_SUFFIXES} file matches "
                    "it. Name the files to read."
                )
            splits.setdefault(str(split), []).extend(readable)
    return splits


def _could_be_hub_name(text: str) -> bool:
    return (
        text.count("/") <= 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith("/")
        and not _kind_of(Path(text))
        and "\\" not in text
    )


def _nearby(path: Path) -> str:
    """What exists close to a path that does not."""
    for depth, parent in enumerate(path.parents):
        if parent.is_dir():
            wanted = path.parts[-1 - depth]
            close = difflib.get_close_matches(wanted, [entry.name for entry in parent.iterdir()], n=3)
            if close:
                return f"Did you mean {' or '.join(str(parent / each) for each in close)}?"
            return _contents(parent)
    return "Check the path."


def _contents(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return f"The folder {folder.resolve()} is empty."
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"The folder {folder.resolve()} holds: {', '.join(names[:10])}{more}."


# --- Readers, one per kind ---


def _not_empty(rows: Iterable[Row], label: str) -> Iterator[Row]:
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise DataError(f"{label} has no rows. Training needs at least one.")


def _row(value: object, where: str, default_id: str, from_arrow: bool = False) -> Row:
    if isinstance(value, Mapping):
        return Row(where, dict(value), default_id, from_arrow=from_arrow)
    return Row(
        where, {}, default_id, f"found a {type(value).__name__}, expected an object with named columns. Fix the row"
    )


def _kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression; empty if it cannot be read."""
    name = path.name.lower()
    compression = next((each for each in _COMPRESSIONS if name.endswith(each)), "")
    kind = Path(name.removesuffix(compression)).suffix
    return kind if kind in _TEXT_SUFFIXES or (kind in _ARROW_SUFFIXES and not compression) else ""


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in _COMPRESSIONS else path.stem


def _rows_of_files(paths: Sequence[Path], streaming: bool) -> Iterator[Row]:
    for path in paths:
        yield from _file_rows(path, streaming)


def _file_rows(path: Path, streaming: bool) -> Iterator[Row]:
    kind = _kind_of(path)
    if streaming and kind == ".json":
        raise DataError(
            f"{path.name}: a JSON list can only be read whole, dataset.streaming=true reads row by row. Convert it to "
            "JSON Lines or parquet."
        )
    if kind in _ARROW_SUFFIXES:
        yield from _arrow_rows(path, kind[1:])
        return
    number = 0
    try:
        with _open_bytes(path) as stream:
            rows = _line_rows(path, stream) if kind in _LINE_SUFFIXES else _json_rows(path, stream)
            if kind in _TABLE_SUFFIXES:
                rows = _table_rows(path, stream, _TABLE_SUFFIXES[kind])
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


def _line_rows(path: Path, stream: BinaryIO) -> Iterator[Row]:
    # Bytes, not text: one bad byte must cost one row, and must not move the line numbers.
    number = 0
    while line := stream.readline(MAX_JSON_BYTES + 1):
        number += 1
        if len(line) > MAX_JSON_BYTES:
            raise DataError(f"{path.name}:{number}: a line of more than {MAX_JSON_BYTES // 2**20} MiB. Fix the file.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _parse_line(line, f"{path.name}:{number}", f"{_stem(path)}-{number}")


def _table_rows(path: Path, stream: BinaryIO, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV file with a header; all values are texts, and empty ones are null."""
    csv.field_size_limit(MAX_JSON_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        # pandas writes its index under an empty name, and reads it back under this one
        header = [name or f"Unnamed: {index}" for index, name in enumerate(next(reader, []))]
        if len(set(header)) < len(header):
            raise DataError(f"{path.name}:1: columns {header!r:.200}, expected a header of different names.")
        line = reader.line_num
        for cells in reader:
            where, default_id = f"{path.name}:{line + 1}", f"{_stem(path)}-{line + 1}"
            line = reader.line_num
            if not cells:
                continue
            fault = None
            if len(cells) != len(header):
                fault = f"found {len(cells)} columns, expected {len(header)} as in the header. Fix the row"
            elif any(not cell.isascii() and _ESCAPED.search(cell) for cell in cells):
                fault = f"a byte is not UTF-8. {_TO_UTF8}"
            data = {} if fault else {name: cell or None for name, cell in zip(header, cells, strict=True)}
            yield Row(where, data, default_id, fault)
    except csv.Error as error:
        raise DataError(f"{path.name}:{reader.line_num}: not valid CSV: {error}. Fix the file.") from error


def _parsed(raw: bytes) -> tuple[Any, str, int]:
    """A JSON value, or what is wrong with it and in which line."""
    try:
        return json.loads(raw.decode("utf-8")), "", 0
    except UnicodeDecodeError as error:
        line, begin = raw.count(b"\n", 0, error.start) + 1, raw.rfind(b"\n", 0, error.start) + 1
        fault = f"byte 0x{raw[error.start]:02x} at position {error.start - begin} is not UTF-8. {_TO_UTF8}"
        return None, fault, line
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} at column {error.colno}", error.lineno
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        return None, f"not usable JSON: {error}", 1


def _parse_line(line: bytes, where: str, default_id: str) -> Row:
    value, fault, _ = _parsed(line)
    if not fault:
        return _row(value, where, default_id)
    remedy = "" if fault.endswith(_TO_UTF8) else ". Expected one object per line. Fix the row"
    return Row(where, {}, default_id, fault + remedy)


def _json_rows(path: Path, stream: BinaryIO) -> Iterator[Row]:
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
        yield from _line_rows(path, io.BytesIO(raw))
        return
    items, fault, line = _parsed(raw)
    if fault:
        raise DataError(
            f"{path.name}:{line}: {fault}. A JSON list can only be read whole: fix the file, or convert it to JSON "
            "Lines, where one bad row does not hide the others."
        )
    for index, value in enumerate(items if isinstance(items, list) else _list_in(items, path)):
        yield _row(value, f"{path.name}:item {index}", f"{_stem(path)}-{index}")


def _list_in(value: Mapping[str, Any], path: Path) -> list[Any]:
    """The rows of a JSON object: the list that it holds under a name for rows, or itself."""
    wrapped = [key for key in _LIST_KEYS if key in value]
    if not wrapped:
        return [value]
    lists = [key for key in wrapped if isinstance(value[key], list) and value[key]]
    rows = [key for key in lists if all(isinstance(each, Mapping) for each in value[key])]
    if not lists or not rows:
        raise DataError(
            f"{path} starts with '{{', expected a JSON list of objects, one object per line, or an object with such a "
            f"list under 'data'; found {', '.join(map(str, value))}."
        )
    if len(rows) > 1:
        raise DataError(f"{path} holds several lists: {', '.join(rows)}. Write those to read to a file of their own.")
    return value[rows[0]]


def _arrow_rows(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
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
                batch.validate(full=True)  # offsets of a damaged file would be read as they are
                for start in range(0, batch.num_rows, _PARQUET_BATCH_ROWS):
                    for value in _values(batch.slice(start, _PARQUET_BATCH_ROWS), path, index):
                        yield _row(value, f"{path.name}:row {index}", f"{path.stem}-{index}", from_arrow=True)
                        index += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, SystemError, MemoryError) as error:
        raise DataError(f"{path} cannot be read as {kind} after {index} rows: {error}.") from error


def _values(batch: Any, path: Path, index: int) -> list[dict[str, Any]]:
    """Rows as Python values; a value that Python has none for (a date of the year 0) is an error with its column."""
    try:
        return batch.to_pylist()
    except _VALUE_FAULTS as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except _VALUE_FAULTS as fault:
                raise DataError(
                    f"{path}: column {name!r} ({column.type}) has a value that cannot be read, in the rows from "
                    f"{index} on: {fault}. Fix or remove the column."
                ) from fault
        raise DataError(f"{path}: the rows from {index} on cannot be read: {error}.") from error


def _datasets_library(wanted_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{wanted_for} needs the datasets library. Install it with: pip install datasets") from error
    return datasets


def _disk_rows(path: Path, options: dict[str, str | None]) -> Iterable[Row]:
    datasets = _datasets_library(f"The saved data set {path}")
    try:
        loaded = datasets.load_from_disk(str(path))
        for each in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
            each.data.validate(full=True)  # offsets of a damaged file would be read as they are
    except _LIBRARY_FAULTS as error:
        raise DataError(
            f"{path} cannot be read as a saved data set ({type(error).__name__}: {error}). Save it again."
        ) from error
    return _dataset_rows(loaded, path.name, options["split"])


def _hub_rows(hub_name: str, options: dict[str, str | None], streaming: bool) -> Iterable[Row]:
    datasets = _datasets_library(f"dataset.source={hub_name} (not a file, so taken as a Hugging Face data set)")
    is_builder = hub_name.isidentifier() and find_spec(f"datasets.packaged_modules.{hub_name}") is not None
    if is_builder and hub_name not in _FILE_BUILDERS:
        raise DataError(
            f"dataset.source={hub_name} is a builder of the datasets library that may unpickle or run what it "
            f"reads, or reads no text. Expected a data set, a file or one of {', '.join(_FILE_BUILDERS)}."
        )
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    try:
        loaded = datasets.load_dataset(hub_name, **given, **({"streaming": True} if streaming else {}))  # nosec B615
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, unknown configuration or split
        raise DataError(
            f"dataset.source={hub_name} is no file here, and as a Hugging Face data set it cannot be loaded: {error} "
            f"{_nearby(Path(hub_name))}"
        ) from error
    if options["split"] is None or isinstance(loaded, Mapping):
        return _dataset_rows(loaded, hub_name, options["split"])
    return _rows_of_split(loaded, hub_name, options["split"])


def _dataset_rows(loaded: Any, label: str, split: str | None) -> Iterable[Row]:
    """Rows of a ``datasets.Dataset``, or of the wanted split of a ``DatasetDict``."""
    if isinstance(loaded, Mapping):
        return _select(label, {name: partial(_rows_of_split, loaded[name], label, name) for name in loaded}, split)
    own = None if loaded.split is None else str(loaded.split)
    rows = partial(_rows_of_split, loaded, label, own or "all")
    return rows() if split is None else _select(label, {own or "train": rows}, split)


def _rows_of_split(loaded: Any, label: str, split: str) -> Iterator[Row]:
    stem = f"{label.rsplit('/', 1)[-1]}-{split}"
    iterator = iter(loaded)
    for index in count():
        where = f"hf:{label}[{split}]:{index}"
        try:
            value = next(iterator)
        except StopIteration:
            return
        except _LIBRARY_FAULTS as error:
            raise DataError(f"{where}: cannot be read: {_bad_column(loaded, index)}{error}.") from error
        yield _row(value, where, f"{stem}-{index}", from_arrow=True)


def _bad_column(loaded: Any, index: int) -> str:
    """The column of a row that Python has no value for, if it can be found."""
    for name in loaded.column_names or () if hasattr(loaded, "__getitem__") else ():
        try:
            loaded.select_columns([name])[index]
        except _LIBRARY_FAULTS:
            return f"column {name!r} has a value that Python has none for: "
    return ""
