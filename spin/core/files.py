"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO, cast

from spin.core.errors import ConfigError, OutputError, SpinError

log = logging.getLogger(__name__)

LOCK = ".lock"
TRANSFER = "transfer_dir of a generator"  # a kind of folder, see start_folder
MARKER = ".spin"  # in every folder that this program may delete
# Limits of JSON that may come from anyone. The largest tokenizer.json in use has 35 MB, 12 levels and 31-digit numbers.
MAX_JSON_BYTES = 128 * 2**20  # of a file, or of a line of a JSON Lines file
MAX_JSON_DEPTH = 100
MAX_JSON_DIGITS = 100
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_JSON_DIGITS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turns what the system says about a write into an error that names the file and the remedy.

    Args:
        path (Path): what the block writes.

    Yields:
        None: the block runs.

    Raises:
        OutputError: If the block raises ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write ({error.strerror or error}). Free some space or mend the folder's rights, then "
            "start the same command again: what was saved before is whole."
        ) from error


class FolderLock:
    """Keeps other runs out of a folder until it is released or its process ends, however it ends.

    The lock is the system's, on the file ``.lock``; the file itself means nothing, and stays. Children of the process
    do not hold it, so nothing that a killed run leaves behind keeps the next one out.

    Args:
        folder (Path): made if it is not there.
        shared (bool): let others in that share it too.

    Raises:
        OutputError: If another process holds it, if the folder is none or cannot be written, or if its file system has
            no locks.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self._file = folder / LOCK
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is a file, expected a folder to write to. Give another output_dir.")
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
    """Lets one process at a time run a block that looks at ``path`` and then changes it; others wait here.

    The lock is the system's, on a hidden file beside ``path`` that stays. It ends with the process, however that ends.

    Args:
        path (Path): what the block is about; it need not exist.

    Yields:
        None: no other process is in such a block for this path.

    Raises:
        OutputError: If the lock's file cannot be made or locked.
    """
    file = path.with_name(f".{path.name}{LOCK}")
    with as_output_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open_own(file, "a+")
    with stream:
        with as_output_error(file):
            fcntl.lockf(stream, fcntl.LOCK_EX)
        yield


def next_backup_name(path: Path) -> Path:
    """Where ``path`` can be kept when something else takes its place: ``<name>.stale-0``, or the next number."""
    n = 0
    while os.path.lexists(aside := path.with_name(f"{path.name}.stale-{n}")):
        n += 1
    return aside


def keep_aside(path: Path, because: str) -> Path:
    """Renames what is in the way and may not be deleted, and says so.

    Args:
        path (Path): what is in the way.
        because (str): why it may not stay there, the end of a sentence.

    Returns:
        Path: where it is now.

    Raises:
        OutputError: If it cannot be renamed.
    """
    aside = next_backup_name(path)
    with as_output_error(aside):
        os.rename(path, aside)
    log.warning(f"{path} {because}: kept as {aside.name}.")
    return aside


def open_new(file: Path, mode: str = "x") -> IO[Any]:
    """Makes a file to write; what has its name already, a link to somebody's file perhaps, is deleted first.

    Args:
        file (Path): a temporary name, which another may have guessed.
        mode (str): ``x`` for text in UTF-8, ``xb`` for bytes.

    Returns:
        IO[Any]: empty.

    Raises:
        OSError: If it cannot be made.
    """
    file.unlink(missing_ok=True)
    return open(file, mode, encoding=None if "b" in mode else "utf-8")


def open_own(file: Path, mode: str) -> TextIO:
    """Opens a text file that a run goes on with; not a link, which could lead to any file, and no pipe or device.

    Args:
        file (Path): made if it is not there.
        mode (str): ``a`` or ``a+``.

    Returns:
        TextIO: UTF-8.

    Raises:
        OSError: If it is a link or no regular file, or cannot be opened.
    """

    def opener(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return descriptor

    if file.is_symlink():
        raise OSError(errno.ELOOP, "a link; what it leads to may be somebody's", str(file))
    return cast(TextIO, open(file, mode, encoding="utf-8", opener=opener))


def open_regular(file: Path) -> BinaryIO:
    """Opens a regular file to read bytes; what would block or never end (a pipe, ``/dev/zero``) is not opened.

    Args:
        file (Path): may be a link to a regular file.

    Returns:
        BinaryIO: at its start.

    Raises:
        OSError: If it is missing, no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise OSError(str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return open(descriptor, "rb")


def read_bytes(file: Path, error: type[SpinError], remedy: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Reads a file that may come from anyone.

    Args:
        file (Path): a regular file, or a link to one.
        error (type[SpinError]): what to raise.
        remedy (str): the last sentence of the error: what to do.
        max_bytes (int): a larger file is not read.

    Returns:
        bytes: its content.

    Raises:
        SpinError: An ``error``, if the file is missing, no regular file, too large, or cannot be read.
    """
    try:
        with open_regular(file) as stream:
            content = stream.read(max_bytes + 1)
    except OSError as failure:
        raise error(f"{file}: cannot be read ({failure.strerror or failure}). {remedy}") from failure
    if len(content) > max_bytes:
        raise error(f"{file}: larger than {max_bytes / 2**20:g} MiB, the most that is read of such a file. {remedy}")
    return content


def parse_json(content: bytes, allow_nan: bool = False) -> Any:
    """Parses JSON that may come from anyone.

    Args:
        content (bytes): UTF-8.
        allow_nan (bool): take Python's ``NaN`` and ``Infinity``, and numbers too large for a float.

    Returns:
        Any: the value; every text in it can be encoded, and every number can be made a float.

    Raises:
        ValueError: If it is no JSON in UTF-8, is larger, deeper or has longer numbers than the limits of this module,
            gives one key two values, or holds half a surrogate pair.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES / 2**20:g} MiB")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_short_int if _LONG_NUMBER.search(content) else None,
            parse_float=None if allow_nan else _finite,
            parse_constant=None if allow_nan else _refuse_constant,
        )
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from error
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half a surrogate pair") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def read_json(file: Path, error: type[SpinError], remedy: str, allow_nan: bool = False) -> dict[str, Any]:
    """Reads a JSON file that may come from anyone and should hold an object.

    Args:
        file (Path): a regular file, or a link to one.
        error (type[SpinError]): what to raise.
        remedy (str): the last sentence of the error: what to do.
        allow_nan (bool): as in :func:`parse_json`.

    Returns:
        dict[str, Any]: the object.

    Raises:
        SpinError: An ``error``, if the file cannot be read, is not what :func:`parse_json` takes, or holds no object.
    """
    content = read_bytes(file, error, remedy)
    try:
        value = parse_json(content, allow_nan)
    except ValueError as fault:
        raise error(f"{file}: not valid JSON ({fault}). {remedy}") from fault
    if not isinstance(value, dict):
        raise error(f"{file}: holds a JSON {type(value).__name__}, expected an object. {remedy}")
    return value


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file that may come from anyone, or that a kill may have cut short.

    Only a line feed ends a line. ``str.splitlines`` also splits at characters that JSON leaves in its texts as they
    are, such as U+2028.

    Args:
        file (Path): a regular file, or a link to one.

    Yields:
        bytes: without their line feeds. A line that is too long for :func:`parse_json` is the last one, and cut.

    Raises:
        OSError: As :func:`open_regular` does.
    """
    with open_regular(file) as stream:
        while line := stream.readline(MAX_JSON_BYTES + 1):
            yield line.removesuffix(b"\n")
            if len(line) > MAX_JSON_BYTES:
                return


def json_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The objects of a JSON Lines file of a run; lines that are not whole (yet), or no objects, are passed over.

    Args:
        file (Path): a regular file, or a link to one.

    Yields:
        tuple[bytes, dict[str, Any]]: the line as it stands there, and the object.

    Raises:
        OSError: As :func:`open_regular` does.
    """
    for line in read_lines(file):
        try:
            row = parse_json(line, allow_nan=True)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


@contextmanager
def atomic_write(file: Path, mode: str = "x", private: bool = False) -> Iterator[IO[Any]]:
    """Writes a file that appears whole or not at all: temporary name, fsync, rename.

    Args:
        file (Path): its folder exists; a file that is there is replaced.
        mode (str): ``x`` for text in UTF-8, ``xb`` for bytes.
        private (bool): nobody but its owner may read it.

    Yields:
        IO[Any]: what to write to; it gets its name if the block ends without an error.

    Raises:
        OutputError: If it cannot be written; what was there before stays.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with as_output_error(file):
        for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            if not _is_alive(leftover.name.split(".")[-2]):  # it was killed while it wrote
                leftover.unlink(missing_ok=True)
        try:
            with open_new(temporary, mode) as stream:
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
    """Writes a text file that appears whole; see :func:`atomic_write`.

    Args:
        file (Path): its folder exists; a file that is there is replaced.
        text (str): the content.
        private (bool): nobody but its owner may read it.
    """
    with atomic_write(file, private=private) as stream:
        stream.write(text)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file that appears whole; see :func:`atomic_write`.

    Args:
        file (Path): its folder exists; a file that is there is replaced.
        content (Any): what JSON can hold.
    """
    text = json.dumps(content, indent=2)
    replace_text(file, text + "\n")


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(folder: Path) -> Path:
    """The hidden sibling in which ``folder`` is made."""
    return folder.with_name(f".{folder.name}.part")


def old_of(folder: Path) -> Path:
    """The sibling to which a ``folder`` that is being replaced moves for a moment."""
    return folder.with_name(f"{folder.name}.old")


def mark(folder: Path, kind: str) -> None:
    """Writes into a folder that it is this program's, to replace and to delete."""
    text = f"spin: {kind}\nThis file says that the folder is SPIN's; without it nothing here is replaced or deleted.\n"
    (folder / MARKER).write_text(text, encoding="utf-8")


def is_marked(folder: Path, kind: str) -> bool:
    """Whether a folder was made by :func:`start_folder` for that purpose. A link to one was not."""
    file = folder / MARKER
    try:
        with open_regular(file) as stream:
            return not folder.is_symlink() and stream.readline(100) == f"spin: {kind}\n".encode()
    except OSError:
        return False


def is_replaceable(folder: Path, kind: str) -> bool:
    """Whether nothing is lost if a folder of that kind takes its place: it is one, or is empty, or is not there."""
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    return is_marked(folder, kind) or not any(folder.iterdir())


def remove_folder(folder: Path) -> None:
    """Deletes a folder that is known to be this program's; its marker goes last, so that it is known until then."""
    for entry in folder.iterdir():
        if entry.name != MARKER and not (entry.is_dir() and not entry.is_symlink()):
            entry.unlink()
    shutil.rmtree(folder)


def make_way(folder: Path, kind: str) -> None:
    """Deletes a folder that is replaceable; anything else that has its name is kept under another one.

    Args:
        folder (Path): it need not exist.
        kind (str): what it is to be replaced by, see :func:`start_folder`.

    Raises:
        OutputError: If what is there cannot be renamed.
    """
    if not os.path.lexists(folder):
        return
    if is_replaceable(folder, kind):
        remove_folder(folder)
    else:
        keep_aside(folder, f"is in the way and is not a {kind} that this program made (it has no such {MARKER} file)")


def check_own_folder(name: str, folder: str | Path, kind: str, apart_from: Mapping[str, str | Path]) -> None:
    """Refuses a folder that will be replaced and deleted, unless nothing can be lost by that.

    Args:
        name (str): its key in the config.
        folder (str | Path): new, empty, or made by an earlier run for the same purpose.
        kind (str): that purpose, see :func:`start_folder`.
        apart_from (Mapping[str, str | Path]): folders by key, which it may neither hold nor be in.

    Raises:
        ConfigError: If it is anything else.
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
                f"{name}={folder}: {relation} {key} ({other}). It is replaced and deleted as a whole: give it a new "
                "folder of its own, beside that one."
            )
    if not is_replaceable(resolved, kind):
        found = "is a folder with files that this program did not put there" if path.is_dir() else "is not a folder"
        raise ConfigError(
            f"{name}={folder}: {found} (no {MARKER} file that says so). It would be deleted: name a new or an empty "
            "folder."
        )


def start_folder(folder: Path, kind: str) -> Path:
    """Makes the folder that :func:`finish_folder` will rename to ``folder``; what a dead process left of one goes.

    It is empty but for ``.spin``, by which it is known later: nothing without one is ever deleted.

    Args:
        folder (Path): the name to be.
        kind (str): what it will be, such as ``state``.

    Returns:
        Path: where to write.
    """
    part = part_of(folder)
    make_way(part, kind)
    part.mkdir(parents=True)
    mark(part, kind)
    return part


def finish_folder(folder: Path) -> None:
    """Gives a finished folder its name. One that has this name already stays whole until the new one stands.

    A kill between the two renames leaves the previous folder under ``old_of(folder)``. What has one of these names and
    is not of the same kind is kept aside.

    Args:
        folder (Path): as given to :func:`start_folder`.
    """
    part, old = part_of(folder), old_of(folder)
    kind = (part / MARKER).read_text(encoding="utf-8").split("\n")[0].removeprefix("spin: ")
    sync(part)
    if is_marked(folder, kind):
        make_way(old, kind)
        os.rename(folder, old)
    else:
        make_way(folder, kind)
    os.rename(part, folder)
    sync(folder.parent)
    if is_marked(old, kind):
        remove_folder(old)


_FILE_CHUNK_BYTES = 16 << 20


def json_fingerprint(obj: Any) -> str:
    """SHA-256 of ``obj`` as JSON with sorted keys.

    Args:
        obj (Any): what JSON can hold; keys of dicts are strings.

    Returns:
        str: 64 hexadecimal digits.

    Raises:
        TypeError: If JSON cannot hold ``obj``.
        ValueError: If it holds NaN or infinity, which are not JSON.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces.

    Args:
        path (str | Path): the file.

    Returns:
        str: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open_regular(Path(path)) as file:
        while piece := file.read(_FILE_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
