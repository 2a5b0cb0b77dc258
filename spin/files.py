"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin.errors import OutputError

LOCK = ".lock"


@contextmanager
def writing(path: Path) -> Iterator[None]:
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
        with writing(self._file):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._file.open("a+", encoding="utf-8")
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
        with writing(self._file):
            self._stream.truncate(0)
            self._stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._stream.flush()

    def release(self) -> None:
        """Lets others in."""
        self._stream.close()


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
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
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
    with stream:
        with writing(file):
            fcntl.lockf(stream, fcntl.LOCK_EX)
        yield


def unused_name(path: Path) -> Path:
    """Where ``path`` can be kept when something else takes its place: ``<name>.stale-0``, or the next number."""
    n = 0
    while (aside := path.with_name(f"{path.name}.stale-{n}")).exists():
        n += 1
    return aside


def write_json(file: Path, content: Any) -> None:
    """Writes JSON and waits until it is on the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that a kill may have cut short, even within a character; empty ones are left out.

    Only a line feed ends a line. ``str.splitlines`` also splits at characters that JSON leaves in its texts as they
    are, such as U+2028.

    Args:
        file (Path): UTF-8; what is not becomes U+FFFD.

    Returns:
        list[str]: without their line feeds.
    """
    return [line.decode("utf-8", errors="replace") for line in file.read_bytes().split(b"\n") if line]


def replace_text(file: Path, text: str) -> None:
    """Writes a text file that appears whole: temporary name, fsync, rename.

    Args:
        file (Path): its folder exists; a file that is there is replaced.
        text (str): the content.

    Raises:
        OutputError: If it cannot be written; what was there before stays.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with writing(file):
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)


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


def start_folder(folder: Path) -> Path:
    """Makes the empty folder that :func:`finish_folder` will rename to ``folder``; leftovers of a dead process go.

    Args:
        folder (Path): the name to be.

    Returns:
        Path: where to write.
    """
    part = part_of(folder)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    return part


def finish_folder(folder: Path) -> None:
    """Gives a finished folder its name. One that has this name already stays whole until the new one stands.

    A kill between the two renames leaves the previous folder under ``old_of(folder)``.

    Args:
        folder (Path): as given to :func:`start_folder`.
    """
    part, old = part_of(folder), old_of(folder)
    sync(part)
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(folder, old)
    os.rename(part, folder)
    sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)
