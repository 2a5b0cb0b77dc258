"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_json(file: Path, content: Any) -> None:
    """Writes JSON and waits until it is on the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


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
