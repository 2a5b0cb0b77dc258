"""Rows of a data set, wherever it lies, each with the place to name when something is wrong with it.

A row that cannot be read is not an exception here but a :class:`Row` with ``error`` set, so that one pass can report
all of them; a source that cannot be read at all is a ``DataError``.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.errors import DataError

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = (*_LINE_SUFFIXES, ".json", ".parquet")
_PARQUET_BATCH_ROWS = 1024
_HF_PREFIX = "hf:"

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
        source (Source): a JSON Lines file (``.jsonl``, ``.ndjson``), a JSON file that holds a list, a parquet file, a
            glob pattern or folder of these (in sorted order), a folder written by ``datasets.save_to_disk``, the name
            of a Hugging Face data set (``org/name``; ``hf:name`` says so explicitly), a list of any of these, or a
            list of dictionaries.
        split (str | None): split of a Hugging Face data set. None takes ``train``, or the only split there is.
        name (str | None): configuration of a Hugging Face data set.
        data_dir (str | None): sub-folder of a Hugging Face data set.
        revision (str | None): branch, tag or commit of a Hugging Face data set.
        streaming (bool): fetch the rows of a Hugging Face data set as they are asked for, instead of downloading all
            files first, and refuse a source that can only be read whole.

    Returns:
        Iterator[Row]: the rows; those that cannot be read have ``error`` set.

    Raises:
        DataError: If nothing lies where ``source`` points, if its kind is unknown, if an option does not apply to it,
            or if a file cannot be read. While iterating: if the source has no rows.
    """
    options = {"split": split, "name": name, "data_dir": data_dir, "revision": revision}
    if not isinstance(source, (str, Path, Sequence)):
        raise DataError(
            f"dataset.source is a {type(source).__name__}, expected a path, a data set name or a list of these."
        )
    if not isinstance(source, (str, Path)) and source and isinstance(source[0], Mapping):
        return _not_empty(_memory_rows(source), "dataset.source")
    locations = [source] if isinstance(source, (str, Path)) else list(source)
    if not locations:
        raise DataError("dataset.source is an empty list. Name at least one file or data set.")
    readers = [reader for location in locations for reader in _resolve(location, options, streaming)]
    return _not_empty((row for reader in readers for row in reader), ", ".join(str(each) for each in locations))


# --- Where the rows are ---


def describe_source(source: Source, **options: str | None) -> list[Any]:
    """Which data a source means, as far as that can be told without reading them.

    Args:
        source (Source): see :func:`read_rows`.
        **options (str | None): of a Hugging Face data set.

    Returns:
        list[Any]: JSON values: of each file its name and size in bytes, of a data set its name, and the options.
    """
    found: list[Any] = []
    for location in [source] if isinstance(source, (str, Path)) else source:
        path = None if isinstance(location, Mapping) else Path(location).expanduser()
        if path is None:
            found.append("row")
        elif path.is_dir():
            found += [[file.name, file.stat().st_size] for file in sorted(path.iterdir()) if file.is_file()]
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
    if path.is_dir():
        if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            return [_disk_rows(path, options)]
        files = _files_of_folder(path)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise DataError(f"No file matches dataset.source={text}. {_nearby(path)}")
    elif _could_be_hub_name(text):
        return [_hub_rows(text, options, streaming)]
    else:
        raise DataError(f"dataset.source={text} does not exist. {_nearby(path)}")
    given = [f"dataset.{key}={value}" for key, value in options.items() if value is not None]
    if given:
        raise DataError(
            f"{', '.join(given)} has no meaning for {text}: it is a matter of files, not a Hugging Face data set. "
            "Remove the option, or name the file that holds these rows."
        )
    whole = [file.name for file in files if file.suffix == ".json"] if streaming else []
    if whole:
        raise DataError(
            f"{', '.join(whole)}: a JSON list can only be read whole, dataset.streaming=true reads row by row. Convert "
            "it to JSON Lines or parquet."
        )
    return [_file_rows(file) for file in files]


def _files_of_folder(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _SUFFIXES)
    # A .json file next to data files is more often a description of them than a part of them.
    data_files = [file for file in files if file.suffix != ".json"] or files
    if not data_files:
        raise DataError(f"{path} holds no {', '.join(_SUFFIXES)} file. {_contents(path)}")
    return data_files


def _could_be_hub_name(text: str) -> bool:
    return (
        text.count("/") <= 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith("/")
        and Path(text).suffix not in _SUFFIXES
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


def _memory_rows(rows: Sequence[Any]) -> Iterator[Row]:
    for index, value in enumerate(rows):
        yield _row(value, f"dataset.source[{index}]", f"row-{index}")


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json":
        return _json_rows(path)
    if path.suffix in _LINE_SUFFIXES:
        return _line_rows(path)
    raise DataError(
        f"{path} has the suffix {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}. Rename or convert it."
    )


def _line_rows(path: Path) -> Iterator[Row]:
    # Bytes, not text: one bad byte must cost one row, and must not move the line numbers.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _parse_line(line, f"{path.name}:{number}", f"{path.stem}-{number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _parse_line(line: bytes, where: str, default_id: str) -> Row:
    try:
        return _row(json.loads(line.decode("utf-8")), where, default_id)
    except UnicodeDecodeError as error:
        fault = (
            f"byte 0x{line[error.start]:02x} at position {error.start} is not UTF-8. "
            "Convert the file, for example with iconv -t utf-8"
        )
    except json.JSONDecodeError as error:
        fault = f"not valid JSON: {error.msg} at column {error.colno}. Expected one object per line. Fix the row"
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        fault = f"not usable JSON: {error}. Fix the row"
    return Row(where, {}, default_id, fault)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    start = raw.lstrip()
    if not start.startswith(b"["):
        # Many files that are called .json hold one object per line.
        if start.startswith(b"{") and _parse_line(start.split(b"\n", 1)[0], "", "").error is None:
            yield from _line_rows(path)
            return
        if start:
            raise DataError(
                f"{path} starts with {chr(start[0])!r}, expected a JSON list of objects or one object per line."
            )
        return
    try:
        items = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8. Convert the file, for example with "
            "iconv -t utf-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}. A JSON list can only be "
            "read whole: fix the file, or convert it to JSON Lines, where one bad row does not hide the others."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not usable JSON: {error}.") from error
    for index, value in enumerate(items):
        yield _row(value, f"{path.name}:item {index}", f"{path.stem}-{index}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    yield _row(value, f"{path.name}:row {index}", f"{path.stem}-{index}", from_arrow=True)
                    index += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet after {index} rows: {error}.") from error


def _datasets_library(wanted_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{wanted_for} needs the datasets library. Install it with: pip install datasets") from error
    return datasets


def _disk_rows(path: Path, options: dict[str, str | None]) -> Iterator[Row]:
    datasets = _datasets_library(f"The saved data set {path}")
    unusable = [f"dataset.{key}" for key in ("name", "data_dir", "revision") if options[key] is not None]
    if unusable:
        raise DataError(f"{', '.join(unusable)} has no meaning for the saved data set {path}. Remove the option.")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a saved data set: {error}") from error
    return _dataset_rows(loaded, path.name, options["split"])


def _hub_rows(hub_name: str, options: dict[str, str | None], streaming: bool) -> Iterator[Row]:
    datasets = _datasets_library(f"dataset.source={hub_name} (not a file, so taken as a Hugging Face data set)")
    arguments: dict[str, Any] = {
        key: options[key] for key in ("name", "data_dir", "revision", "split") if options[key] is not None
    }
    if streaming:
        arguments["streaming"] = True
    try:
        loaded = datasets.load_dataset(hub_name, **arguments)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, unknown configuration or split
        raise DataError(
            f"dataset.source={hub_name} is no file here, and as a Hugging Face data set it cannot be loaded: {error} "
            f"{_nearby(Path(hub_name))}"
        ) from error
    return _dataset_rows(loaded, hub_name, options["split"])


def _dataset_rows(loaded: Any, label: str, split: str | None) -> Iterator[Row]:
    """Rows of a ``datasets.Dataset``, or of the wanted split of a ``DatasetDict``."""
    if isinstance(loaded, Mapping):
        chosen = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
        if chosen not in loaded:
            found = ", ".join(loaded)
            raise DataError(
                f"{label} has the splits {found}; found dataset.split={split}. Set dataset.split to one of them."
            )
        loaded, split = loaded[chosen], chosen
    elif split is not None and loaded.split is not None and str(loaded.split) != split:
        raise DataError(f"{label} holds the split {loaded.split}, not dataset.split={split}.")
    shown = split or (str(loaded.split) if loaded.split is not None else "all")
    stem = f"{label.rsplit('/', 1)[-1]}-{shown}"
    return (_row(value, f"hf:{label}[{shown}]:{index}", f"{stem}-{index}", True) for index, value in enumerate(loaded))
