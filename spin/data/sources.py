"""Where the rows of a data set are: files, folders and their splits, saved data sets, Hugging Face data sets."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from spin.core.errors import DataError
from spin.core.files import read_bytes
from spin.core.terminal import counted, printable, show, some_of
from spin.data.rows import KNOWN_SUFFIXES, VALUE_FAULTS, Row, SourceNames, kind_of, make_row, rows_of_files, stem_of

log = logging.getLogger(__name__)

_LIBRARY_FAULTS = (OSError, *VALUE_FAULTS, AttributeError, RuntimeError, MemoryError)
_MAX_DEPTH = 3  # of folders in a folder
_QUIET_SECONDS = 5.0  # of reading, before a line says how far it is
# Builders of the datasets library that read rows from files of these kinds; others unpickle, run SQL or read media.
_FILE_BUILDERS = ("arrow", "csv", "json", "parquet", "text")
# What names of files and folders say of their split, as in the datasets library.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")

_Splits = Mapping[str, Callable[[], Iterable[Row]]]  # each call reads from the beginning
_Files = dict[str, list[Path]]  # by split
_Options = Mapping[str, str | None]
Source = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]


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

    The source is resolved at the call, its rows are read as they are asked for; those that cannot be read have
    ``error`` set. A DataError if nothing lies where ``source`` points, if its kind is unknown, if an option does not
    apply to it, if it has several splits and none is chosen, or if a file cannot be read or there are no rows.

    Args:
        source (Source): a file of JSON Lines (``.jsonl``, ``.ndjson``), a JSON list or an object that holds one
            (``.json``), ``.csv`` or ``.tsv`` with a header, each also compressed (``.gz``, ``.bz2``, ``.xz``,
            ``.zst``), ``.parquet`` or ``.arrow``; a glob pattern of these (in sorted order) or a folder; a folder
            written by ``datasets.save_to_disk``; the name of a Hugging Face data set (``org/name``; ``hf:name`` says so
            explicitly), a list of any of these, or a list of dictionaries.
        split (str | None): split, as ``datasets`` writes it: ``train``, ``train[:1000]``, ``train[10%:]+test``. None
            takes ``train``, or the only split there is. A folder's splits are those that its ``README.md`` declares in
            ``configs``, or else what the names of its files and folders say; other files are ``train``.
        name (str | None): configuration of a Hugging Face data set, or of a folder whose ``README.md`` declares them.
        data_dir (str | None): sub-folder of a Hugging Face data set or of a folder.
        revision (str | None): branch, tag or commit of a Hugging Face data set.
        streaming (bool): fetch the rows of a Hugging Face data set as they are asked for, instead of downloading all
            files first, and refuse a source that can only be read whole.

    Returns:
        Iterator[Row]: the rows.
    """
    options = {"split": split, "name": name, "data_dir": data_dir, "revision": revision}
    wrong = [f"dataset.{key}={value!r}" for key, value in options.items() if not isinstance(value, str | None)]
    if wrong:
        raise DataError(f"{', '.join(wrong)}: expected a text or null.")
    if not isinstance(source, (str, Path, Sequence)):
        kind = type(source).__name__
        raise DataError(f"dataset.source is a {kind}, expected a path, a data set name or a list of these.")
    locations = [source] if isinstance(source, (str, Path)) else list(source)
    if not locations:
        raise DataError("dataset.source is an empty list. Name at least one file or data set.")
    if isinstance(locations[0], Mapping):
        rows = (make_row(value, f"dataset.source[{index}]", f"row-{index}") for index, value in enumerate(locations))
        return _not_empty(rows, "dataset.source")
    names = SourceNames()  # of all locations, which are known before the first row is asked for
    try:
        readers = [_resolve(location, options, streaming, names) for location in locations]
    except OSError as error:  # no right to look into a folder, a name that is too long
        raise DataError(f"dataset.source={source} cannot be read: {error}.") from error
    found = _not_empty(chain.from_iterable(readers), ", ".join(map(str, locations)))
    return found if streaming or os.environ.get("RANK", "0") != "0" else _shown(found, label_of(source))


def label_of(source: Source) -> str:
    """What messages call a source."""
    return str(source) if isinstance(source, (str, Path)) else counted(len(source), "source")


def missing(source: Source) -> list[str]:
    """The locations of a source that cannot be read without a download: paths that lead to nothing, and names of
    Hugging Face data sets, in the cache or not."""
    found = []
    for location in [source] if isinstance(source, (str, Path)) else source:
        if isinstance(location, (str, Path)):
            path = str(Path(location).expanduser())
            if str(location).startswith("hf:") or not (os.path.exists(path) or glob.glob(path, recursive=True)):
                found.append(str(location))
    return found


def describe_source(source: Source, **options: str | None) -> list[Any]:
    """Which data a source means, as far as that can be known without reading them, in JSON values: of each file its
    name and size in bytes, of a Hugging Face data set its name, and the options."""
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


def _resolve(location: object, options: _Options, streaming: bool, names: SourceNames) -> Iterable[Row]:
    if not isinstance(location, (str, Path)):
        raise DataError(f"dataset.source has an entry of type {type(location).__name__}, expected paths or names only.")
    text, path = str(location), Path(location).expanduser()
    if not text.strip():
        raise DataError("dataset.source is empty. Name a file, a folder or a Hugging Face data set.")

    def take_only(usable: Sequence[str], what: str) -> None:
        given = [f"dataset.{key}={value}" for key, value in options.items() if value is not None and key not in usable]
        if given:
            raise DataError(
                f"{', '.join(given)} has no meaning for {text}: it is {what}, not a Hugging Face data set. Remove the "
                "option, or name the file that holds these rows."
            )

    if text.startswith("hf:"):
        return _hub_rows(text.removeprefix("hf:"), options, streaming, names)
    if path.is_dir():
        if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            take_only(["split"], "a saved data set")
            return _disk_rows(path, options["split"], names)
        declared = _declared_configs(path)
        take_only(["split", "name" if declared else "data_dir"], "a folder of files")
        named = _declared_files(path, declared, options) if declared else _named_files(path, options)
    elif path.is_file() or glob.has_magic(text):
        named = {"train": [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))}
        named["train"] = [file for file in named["train"] if file.is_file()]
        if not named["train"]:
            raise DataError(f"No file matches dataset.source={text}. {_nearby(path)}")
        if path.is_file():
            named |= {split: [path] for split in _split_words(stem_of(path))[:1]}
        take_only(["split"], "a matter of files")
    elif text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith("/") or "\\" in text or kind_of(path):
        raise DataError(f"dataset.source={text} does not exist. {_nearby(path)}")
    else:
        return _hub_rows(text, options, streaming, names)
    for file in chain.from_iterable(named.values()):
        if not kind_of(file):
            raise DataError(f"{file} has the suffix {file.suffix!r}, expected one of {KNOWN_SUFFIXES}. Convert it.")

    def rows(files: list[Path]) -> Iterator[Row]:
        names.add(files)
        return rows_of_files(files, names, streaming)

    return _select(text, {split: partial(rows, files) for split, files in named.items()}, options["split"])


def _select(label: str, splits: _Splits, split: str | None) -> Iterable[Row]:
    """The rows of one split, of a part of it, or of several one behind the other."""
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if chosen is not None and chosen in splits:
        return splits[chosen]()
    found = f"{label} has the splits {', '.join(splits)}; found dataset.split={split}."
    if chosen is None or _SPLIT_NAME.fullmatch(chosen):
        raise DataError(f"{found} Set dataset.split to one of them.")
    import datasets

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
        elif entry.is_file() and kind_of(entry):
            found.append(entry)
    return found


def _named_files(folder: Path, options: _Options) -> _Files:
    """Files of each split by their names and those of their folders, by the rules of the datasets library."""
    folder = folder / (options["data_dir"] or "")
    if not folder.is_dir():
        raise DataError(f"dataset.data_dir={options['data_dir']}: there is no folder {folder}. {_nearby(folder)}")
    files = _walk(folder, depth=0) or _walk(folder)
    # A .json file next to data files is more often a description of them than a part of them.
    data_files = [file for file in files if kind_of(file) != ".json"] or files
    if not data_files:
        raise DataError(f"{folder} holds no {KNOWN_SUFFIXES} file. {_contents(folder)}")
    if len(data_files) < len(files):
        log.info("%s: not read: %s", folder, ", ".join(file.name for file in files if file not in data_files))
    kinds = sorted({kind_of(file).replace(".ndjson", ".jsonl") for file in data_files})
    remedy = f"name those to read, such as dataset.source={folder / '*'}{kinds[0]}."
    if len(kinds) > 1:
        raise DataError(f"{folder} holds {' and '.join(kinds)} files, which may be the same rows twice: {remedy}")
    shards = [match[1] if (match := _SHARD.match(file.name)) else "" for file in data_files]
    namings = [
        [_split_words("/".join(file.relative_to(folder).parts[:-1])) for file in data_files],
        [_split_words(stem_of(file)) for file in data_files],
    ]
    if any(map(_split_words, shards)) or (any(shards) and all(file.parent.name == "data" for file in data_files)):
        namings = [[[shard] if shard else [] for shard in shards]]
    naming = next(filter(any, namings), None)
    if naming is None:
        return {"train": data_files}
    splits: _Files = {}
    rest = []
    for file, found in zip(data_files, naming, strict=True):
        if len(found) == 1:
            splits.setdefault(found[0], []).append(file)
        else:
            rest.append(str(file.relative_to(folder)))
    if rest and options["split"] is None:
        raise DataError(
            f"{folder}: by their names, files belong to the splits {', '.join(splits) or 'none'}, and "
            f"{', '.join(rest[:5])} to none or several. Set dataset.split, or {remedy}"
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
        raise DataError(f"{readme}: its header is no YAML: {error}. Fix it, or name the files to read.") from error
    configs = declared.get("configs") if isinstance(declared, Mapping) else None
    return {
        str(each.get("config_name", "default")): each
        for each in (configs if isinstance(configs, list) else [])
        if isinstance(each, Mapping) and (each.get("data_files") or each.get("data_dir"))
    }


def _declared_files(folder: Path, configs: Mapping[str, Mapping[str, Any]], options: _Options) -> _Files:
    declares, name = f"{folder / 'README.md'} declares", options["name"]

    def checked(path: object) -> str:
        if (
            not isinstance(path, str)
            or PurePosixPath(path).is_absolute()
            or any(x in path for x in ("://", "..", "\0"))
        ):
            raise DataError(f"{declares} the path {path!r:.80}, expected one in the folder. Name the files to read.")
        return path

    defaults = [each for each, value in configs.items() if value.get("default") is True or each == "default"]
    chosen = name or next(iter(defaults or (configs if len(configs) == 1 else ())), None)
    if chosen is None or chosen not in configs:
        known = ", ".join(configs)
        raise DataError(f"{declares} the configurations {known}; found dataset.name={name}. Set it to one of them.")
    given, data_dir = configs[chosen].get("data_files"), checked(configs[chosen].get("data_dir") or "")
    if not given:
        return _named_files(folder, {"data_dir": data_dir, "split": options["split"]})
    if isinstance(given, list) and all(isinstance(each, Mapping) for each in given):
        given = {str(each.get("split", "train")): each.get("path") for each in given}
    splits: _Files = {}
    for split, paths in given.items() if isinstance(given, Mapping) else [("train", given)]:
        for path in paths if isinstance(paths, list) else [paths]:
            pattern = Path(glob.escape(str(folder / data_dir))) / checked(path)
            found = map(Path, sorted(glob.glob(str(pattern), recursive=True)))
            readable = [file for file in found if file.is_file() and kind_of(file)]
            if not readable:
                raise DataError(f"{declares} {path} for split {split}, and no {KNOWN_SUFFIXES} file matches it.")
            splits.setdefault(str(split), []).extend(readable)
    return splits


def _nearby(path: Path) -> str:
    """What exists close to a path that does not."""
    for depth, parent in enumerate(path.parents):
        if parent.is_dir():
            close = difflib.get_close_matches(path.parts[-1 - depth], [entry.name for entry in parent.iterdir()], n=3)
            if close:
                return f"Did you mean {' or '.join(str(parent / each) for each in close)}?"
            return _contents(parent)
    return "Check the path."


def _contents(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    holds = f"holds: {some_of(names, 10)}" if names else "is empty"
    return f"The folder {folder.resolve()} {holds}."


# --- The datasets library ---


def _not_empty(rows: Iterable[Row], label: str) -> Iterator[Row]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(f"{label} has no rows, expected at least one.")


def _shown(rows: Iterable[Row], label: str) -> Iterator[Row]:
    """The rows, with a line on stderr after some seconds, and whenever it has taken twice as long."""
    began, quiet = time.monotonic(), _QUIET_SECONDS
    for number, row in enumerate(rows, start=1):
        yield row
        if time.monotonic() - began >= quiet:
            quiet *= 2
            show(f"{printable(label, one_line=True)}: {counted(number, 'row')} read", sys.stderr)


def _disk_rows(path: Path, split: str | None, names: SourceNames) -> Iterable[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        for each in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
            each.data.validate(full=True)  # offsets of a damaged file would be read as they are
    except _LIBRARY_FAULTS as error:
        raise DataError(
            f"{path} cannot be read as a saved data set ({type(error).__name__}: {error}). Save it again."
        ) from error
    return _dataset_rows(loaded, path.name, split, _named(path, names))


def _named(path: Path, names: SourceNames) -> Callable[[], str]:
    """Adds a data set to those that are read; what its rows go by can be asked when all are known."""
    names.add([path])
    return lambda: names[path].as_posix()


def _hub_rows(hub_name: str, options: _Options, streaming: bool, names: SourceNames) -> Iterable[Row]:
    import datasets

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
            f"dataset.source={hub_name} is no file here, and as a Hugging Face data set it cannot be loaded: "
            f"{str(error).rstrip('.')}. {_nearby(Path(hub_name))}"
        ) from error
    name = _named(Path(hub_name), names)
    if options["split"] is None or isinstance(loaded, Mapping):
        return _dataset_rows(loaded, hub_name, options["split"], name)
    return _rows_of_split(loaded, hub_name, name, options["split"])


def _dataset_rows(loaded: Any, label: str, split: str | None, name: Callable[[], str]) -> Iterable[Row]:
    """Rows of a ``datasets.Dataset``, or of the wanted split of a ``DatasetDict``."""
    if isinstance(loaded, Mapping):
        rows_of = {each: partial(_rows_of_split, loaded[each], label, name, each) for each in loaded}
        return _select(label, rows_of, split)
    own = None if loaded.split is None else str(loaded.split)
    rows = partial(_rows_of_split, loaded, label, name, own or "all")
    return rows() if split is None else _select(label, {own or "train": rows}, split)


def _rows_of_split(loaded: Any, label: str, name: Callable[[], str], split: str) -> Iterator[Row]:
    index, iterator, prefix = 0, iter(loaded), name()
    while True:
        where = f"hf:{label}[{split}]:{index}"
        try:
            value = next(iterator)
        except StopIteration:
            return
        except _LIBRARY_FAULTS as error:
            raise DataError(f"{where}: cannot be read: {_bad_column(loaded, index)}{error}.") from error
        yield make_row(value, where, f"{prefix}-{split}-{index}", from_arrow=True)
        index += 1


def _bad_column(loaded: Any, index: int) -> str:
    """The column of a row that Python has no value for, if it can be found."""
    for name in loaded.column_names or () if hasattr(loaded, "__getitem__") else ():
        try:
            loaded.select_columns([name])[index]
        except _LIBRARY_FAULTS:
            return f"column {name!r} has a value that Python has none for: "
    return ""
