"""Files and folders that appear complete or not at all, locks, and limits on what is read."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO, cast

from spin.core.errors import ConfigError, OutputError, SpinError

log = logging.getLogger(__name__)

LOCK = ".lock"
SFT_STAGE = "sft"  # folder, in that of a run, of its SFT stage
TRANSFER = "transfer_dir of a generator"  # a kind of folder, see begin_atomic_dir
MARKER = ".spin"  # in every folder that this program may delete
# Limits of JSON that may come from anyone. The largest tokenizer.json in use has 35 MB, 12 levels and 31-digit numbers.
MAX_JSON_BYTES = 128 * 2**20  # of a file, or of a line of a JSON Lines file
MAX_JSON_DEPTH = 100
MAX_JSON_DIGITS = 100
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_JSON_DIGITS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block, which writes ``path``, into an OutputError with the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write ({error.strerror or error}). Free some space or fix the folder's permissions, then "
            "run the same command again: what was saved before is complete."
        ) from error


class FolderLock:
    """Keeps other runs out of a folder until it is released or its process ends, by the system's lock on ``.lock``.

    Children of the process do not hold it, so nothing that a killed run leaves behind keeps the next one out.
    ``shared`` locks exclude only those that are not.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self._file = folder / LOCK
        check_can_be_made(folder)
        with as_output_error(self._file):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = open_own(self._file, "a+")
        try:
            fcntl.lockf(self._stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._stream.seek(0)
            holder = self._stream.read().strip() or "an unknown process"
            self._stream.close()
            raise OutputError(
                f"{folder}: another run is writing here ({holder}). Wait for it, stop it, or give this run an "
                "output_dir of its own."
            ) from None
        except OSError as error:
            self._stream.close()
            raise OutputError(
                f"{self._file}: cannot be locked ({error.strerror or error}), and without a lock two runs could write "
                "here at once. Is this a network file system without locks? Mount it with them, or give an output_dir "
                "on another one."
            ) from error
        with as_output_error(self._file):
            self._stream.truncate(0)
            self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._stream.flush()

    def release(self) -> None:
        """Lets others in."""
        self._stream.close()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time run a block that looks at ``path``, which need not exist, and then changes it."""
    file = path.with_name(f".{path.name}{LOCK}")
    with as_output_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open_own(file, "a+")
    with stream:
        with as_output_error(file):
            fcntl.lockf(stream, fcntl.LOCK_EX)
        yield


def keep_aside(path: Path, because: str) -> None:
    """Renames what is in the way and may not be deleted to ``<name>.stale-0`` or the next number that is not taken, and
    logs it; ``because`` ends the sentence."""
    names = (path.with_name(f"{path.name}.stale-{n}") for n in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    with as_output_error(aside):
        os.rename(path, aside)
    log.warning(f"{path} {because}: kept as {aside.name}.")


def open_own(file: Path, mode: str) -> TextIO:
    """Opens a text file to append to, making it if need be; OSError for a link, a pipe or a device."""

    def opener(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return descriptor

    if file.is_symlink():
        raise OSError(errno.ELOOP, "a link; its target may be another user's", str(file))
    return cast(TextIO, open(file, mode, encoding="utf-8", opener=opener))


def open_regular(file: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, to read; OSError for what would block or never end (a pipe, a device)."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise OSError(str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return open(descriptor, "rb")


def read_bytes(file: Path, error: type[SpinError], remedy: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a file of untrusted origin. Raises ``error``, ending in ``remedy``, if that fails or it is too large."""
    try:
        with open_regular(file) as stream:
            content = stream.read(max_bytes + 1)
    except OSError as failure:
        raise error(f"{file}: cannot be read ({failure.strerror or failure}). {remedy}") from failure
    if len(content) > max_bytes:
        raise error(f"{file}: larger than {max_bytes / 2**20:g} MiB, the most that is read of such a file. {remedy}")
    return content


def parse_json(content: bytes, allow_nan: bool = False) -> Any:
    """Parses untrusted JSON: every text of the result can be encoded, and every number can be made a float.

    Raises ValueError for anything but UTF-8 JSON within this module's limits, for a key with two values and for half
    a surrogate pair. ``allow_nan`` admits Python's ``NaN`` and ``Infinity``, and numbers too large for a float.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES / 2**20:g} MiB")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_short_int if _LONG_NUMBER.search(content) else None,
            parse_float=None if allow_nan else _finite,
            parse_constant=None if allow_nan else _finite,
        )
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from error
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        parents = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [child for children in parents for child in children if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half a surrogate pair") from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        for key, each in pairs:
            if each != value[key]:
                raise ValueError(f"the key {key[:60]!r} has two values")
    return value


def _short_int(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than {MAX_JSON_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is not a finite number")
    return value


def read_json(file: Path, error: type[SpinError], remedy: str, allow_nan: bool = False) -> dict[str, Any]:
    """Reads a JSON object of untrusted origin, see :func:`read_bytes` and :func:`parse_json`."""
    content = read_bytes(file, error, remedy)
    try:
        value = parse_json(content, allow_nan)
    except ValueError as fault:
        raise error(f"{file}: not valid JSON ({fault}). {remedy}") from fault
    if not isinstance(value, dict):
        raise error(f"{file}: holds a JSON {type(value).__name__}, expected an object. {remedy}")
    return value


def read_lines(file: Path) -> Iterator[bytes]:
    """Lines of an untrusted file without their line feeds; one that :func:`parse_json` finds too long is the last."""
    # str.splitlines would also split at characters that JSON leaves in its texts as they are, such as U+2028
    with open_regular(file) as stream:
        while line := stream.readline(MAX_JSON_BYTES + 1):
            yield line.removesuffix(b"\n")
            if len(line) > MAX_JSON_BYTES:
                return


def json_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of a run's JSON Lines file with their objects; incomplete lines, and those with no object, are skipped."""
    for line in lines:
        try:
            row = parse_json(line, allow_nan=True)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


class AppendedLines:
    """The objects of a JSON Lines file that grows, or that a restart replaces."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: BinaryIO | None = None  # stays open: no other file can get its inode
        self.rows: list[dict[str, Any]] = []
        self.times_replaced = 0

    def read(self) -> list[dict[str, Any]]:
        """All objects so far; what is read is only what was appended since the last call, by whole lines."""
        if not self._file.is_file():
            return self.rows
        stream, held = open_regular(self._file), self._stream
        is_same = held is not None and os.path.sameopenfile(stream.fileno(), held.fileno())
        if held is not None and is_same and os.fstat(held.fileno()).st_size >= held.tell():
            stream.close()
            stream = held
        else:
            self._stream, self.rows = stream, []
            self.times_replaced += 1
        self.rows += [row for _, row in json_lines(self._whole_lines(stream))]
        return self.rows

    def _whole_lines(self, stream: BinaryIO) -> Iterator[bytes]:
        while line := stream.readline(MAX_JSON_BYTES + 1):
            if not line.endswith(b"\n"):
                if len(line) <= MAX_JSON_BYTES:
                    stream.seek(-len(line), os.SEEK_CUR)  # it is still being written
                return
            yield line


@contextmanager
def atomic_write(file: Path, mode: str = "x", private: bool = False) -> Iterator[IO[Any]]:
    """Writes a file that appears complete, or not at all if the block fails: temporary name, fsync, rename.

    ``mode`` is ``x`` for text in UTF-8 or ``xb`` for bytes; only its owner may read a ``private`` file.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with as_output_error(file):
        for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            if not _is_alive(leftover.name.split(".")[-2]):  # it was killed while it wrote
                leftover.unlink(missing_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # a link, perhaps
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
                if private:
                    os.fchmod(stream.fileno(), 0o600)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def replace_text(file: Path, text: str, private: bool = False) -> None:
    """:func:`atomic_write` of a text."""
    with atomic_write(file, private=private) as stream:
        stream.write(text)


def write_json(file: Path, content: Any) -> None:
    """:func:`atomic_write` of a JSON file."""
    replace_text(file, json.dumps(content, indent=2) + "\n")


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """:func:`atomic_write` of a JSON Lines file."""
    replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark(folder: Path, kind: str) -> None:
    """Marks a folder as this program's, to replace and to delete."""
    text = f"spin: {kind}\nThis file says that the folder is SPIN's; without it nothing here is replaced or deleted.\n"
    (folder / MARKER).write_text(text, encoding="utf-8")


def is_marked(folder: Path, kind: str) -> bool:
    """Whether a folder was made by :func:`begin_atomic_dir` for that purpose. A link to one was not."""
    try:
        with open_regular(folder / MARKER) as stream:
            return not folder.is_symlink() and stream.readline(100) == f"spin: {kind}\n".encode()
    except OSError:
        return False


def is_replaceable(folder: Path, kind: str) -> bool:
    """Whether nothing is lost if a folder of that kind takes its place: it is one, is empty, or is not there."""
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    return is_marked(folder, kind) or not any(folder.iterdir())


def remove_folder(folder: Path) -> None:
    """Deletes a folder that is this program's, its marker last, so that an interrupted deletion can be completed."""
    for entry in folder.iterdir():
        if entry.name != MARKER and not (entry.is_dir() and not entry.is_symlink()):
            entry.unlink()
    shutil.rmtree(folder)


def remove_or_keep_aside(folder: Path, kind: str) -> None:
    """Deletes a folder that is replaceable; anything else that has its name is renamed."""
    if os.path.lexists(folder) and is_replaceable(folder, kind):
        remove_folder(folder)
    elif os.path.lexists(folder):
        keep_aside(folder, f"is in the way and is not a {kind} that this program made (it has no such {MARKER} file)")


def check_own_folder(name: str, folder: str | Path, kind: str, apart_from: Mapping[str, str | Path]) -> None:
    """Refuses a folder that will be replaced, unless it is new, empty or of that kind.

    ``name`` is its config key; it may neither hold nor be in one of the folders ``apart_from``, which are given by key.
    """
    path = Path(folder)
    resolved = path.resolve()
    for key, other in apart_from.items():
        if not (isinstance(other, str | Path) and str(other)):
            continue
        where = Path(other).resolve()
        if resolved == where or resolved in where.parents or where in resolved.parents:
            relation = "is" if resolved == where else "holds" if resolved in where.parents else "is in"
            raise ConfigError(
                f"{name}={folder}: {relation} {key} ({other}). It is replaced and deleted entirely: give it a new "
                "folder of its own, next to that one."
            )
    if not is_replaceable(resolved, kind):
        found = "is a folder with files that this program did not put there" if path.is_dir() else "is not a folder"
        raise ConfigError(
            f"{name}={folder}: {found} (no {MARKER} file that says so). It would be deleted: name a new or an empty "
            "folder."
        )


def check_new_file(file: Path, remedy: str = "", replaces: bool = False, folder_remedy: str = "Make it.") -> None:
    """OutputError if a file that is to be made is there already, is a folder, or would lie in none.

    To be called before the work whose result the file holds. ``replaces``: a file may be there.
    """
    if file.is_dir():
        raise OutputError(f"{file}: is a folder. Name a file.")
    if file.exists() and not replaces:
        raise OutputError(f"{file}: is there already. {remedy}")
    if not file.parent.is_dir():
        raise OutputError(f"{file.parent}: no such folder. {folder_remedy}")


def check_can_be_made(folder: Path, named_by: str = "output_dir") -> Path:
    """OutputError if a folder, as far as it exists, cannot be written; gives the part that exists. Writes nothing."""
    path = folder.absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        raise OutputError(f"{folder}: cannot write ({there} is not a folder). Change {named_by}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot write ({there} may not be written to). Change {named_by}.")
    return there


def staging_dir(folder: Path) -> Path:
    """The hidden sibling in which ``folder`` is made."""
    return folder.with_name(f".{folder.name}.part")


def begin_atomic_dir(folder: Path, kind: str) -> None:
    """Makes :func:`staging_dir`, empty but for its marker; what a dead process left there is removed."""
    staging = staging_dir(folder)
    remove_or_keep_aside(staging, kind)
    staging.mkdir(parents=True)
    mark(staging, kind)


def commit_atomic_dir(folder: Path, kind: str) -> None:
    """Gives :func:`staging_dir` its name; what has it already is deleted last if it is of this kind, else kept aside.

    A kill between the two renames leaves the previous folder as ``<name>.old``.
    """
    staging, old = staging_dir(folder), folder.with_name(f"{folder.name}.old")
    sync(staging)
    if is_marked(folder, kind):
        remove_or_keep_aside(old, kind)
        os.rename(folder, old)
    else:
        remove_or_keep_aside(folder, kind)
    os.rename(staging, folder)
    sync(folder.parent)
    if is_marked(old, kind):
        remove_folder(old)


def abort_atomic_dir(folder: Path, kind: str) -> None:
    """Removes :func:`staging_dir`, if there is one; what has the folder's name stays."""
    if is_marked(staging_dir(folder), kind):
        remove_folder(staging_dir(folder))


@contextmanager
def atomic_dir(folder: Path, kind: str) -> Iterator[Path]:
    """Yields where to write a folder that appears complete, or not at all if the block fails."""
    try:
        begin_atomic_dir(folder, kind)
        yield staging_dir(folder)
        commit_atomic_dir(folder, kind)
    except Exception:
        abort_atomic_dir(folder, kind)
        raise


def json_fingerprint(obj: Any) -> str:
    """SHA-256 of ``obj`` as JSON with sorted keys; ValueError for NaN and infinity, which are not JSON."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(Path(path)) as file:
        while piece := file.read(16 << 20):
            digest.update(piece)
    return digest.hexdigest()
