"""The files of a checkpoint: ``state.json`` and ``manifest.json``, which has the size and SHA-256 of every file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin.core.errors import CheckpointError, SpinError
from spin.core.files import file_sha256, json_fingerprint, read_json, write_json

FORMAT_VERSION = 1
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"  # the last is written by torch
STEP_FOLDER = re.compile(r"step_(\d+)(\.old)?")
_REMEDY = "Resume from another checkpoint."


@contextmanager
def as_checkpoint_error(file: Path) -> Iterator[None]:
    """Turns what Python raises on a ``file`` that lacks something, or holds something else, into CheckpointError."""
    try:
        yield
    except SpinError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: not what this version of SPIN writes ({type(error).__name__}: {error}). {_REMEDY}"
        ) from error


def encode_document(step: int, state: dict[str, Any], optimizer: dict[str, Any] | None) -> str:
    """The text of ``state.json``: everything but tensors."""
    document = {"format": FORMAT_VERSION, "step": step, "state": state, "optimizer": optimizer}
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE} of step {step}: {error}. Its values must be JSON.") from error


def read_document(folder: Path) -> dict[str, Any]:
    """``state.json`` of a complete checkpoint."""
    file = folder / STATE
    verify(file, read_manifest(folder)["files"][STATE])
    with as_checkpoint_error(file):
        document = read_json(file, CheckpointError, _REMEDY, allow_nan=True)
        if not isinstance(document["state"], dict) or not isinstance(document["optimizer"], dict | None):
            raise TypeError("no state, or a bad optimizer")
    return document


def write_manifest(
    folder: Path, *, step: int, sequence: int, metric: float | None, anchor: bool, files: dict[str, Any]
) -> None:
    """Seals a checkpoint. ``sequence`` is the order of saving: steps go back when a run resumes from an older one."""
    content = {
        "format": FORMAT_VERSION,
        "step": step,
        "sequence": sequence,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "anchor": anchor,
        "files": dict(sorted(files.items())),
    }
    write_json(folder / MANIFEST, content | {"checksum": json_fingerprint(content)})


def _checkpoints_near(folder: Path) -> str:
    """The newest checkpoints of a folder that was taken for one: of checkpoints, a run's, or a model's in a run."""
    places = [folder, *(each / "checkpoints" for each in (folder, *folder.parents[1:2])), folder.parent]
    for place in places:
        if found := sorted(str(path) for path in place.glob("step_*") if STEP_FOLDER.fullmatch(path.name)):
            return f" Checkpoints near it: {', '.join(found[-5:])}."
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and have their sizes; their bytes are not read."""
    if not folder.is_dir():
        problem = f"{folder}: no such folder. Give a folder like checkpoints/step_00000100, auto or never."
        raise CheckpointError(problem + _checkpoints_near(folder))
    file = folder / MANIFEST
    if not file.exists():
        hint = "" if STEP_FOLDER.fullmatch(folder.name) else _checkpoints_near(folder)
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is no checkpoint, or an interrupted one.{hint}")
    content = read_json(file, CheckpointError, _REMEDY)
    if content.pop("checksum", None) != json_fingerprint(content):
        raise CheckpointError(f"{file}: damaged, its checksum does not match. {_REMEDY}")
    if content.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format {content.get('format')}, this version of SPIN reads {FORMAT_VERSION}. "
            "Resume with the version that wrote it."
        )
    with as_checkpoint_error(file):
        _check_manifest(content)
    faults = []
    for name, entry in content["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            faults.append(f"{name} is missing")
        elif size != entry["bytes"]:
            faults.append(f"{name} has {size} bytes instead of {entry['bytes']}")
    if faults:
        raise CheckpointError(f"{folder}: incomplete: {', '.join(faults)}. {_REMEDY}")
    return dict(content)


def _check_manifest(content: dict[str, Any]) -> None:
    numbers = [content["step"], content["sequence"], *(entry["bytes"] for entry in content["files"].values())]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("steps, sequence and sizes must be whole numbers")
    if not isinstance(content["metric"], int | float | None) or not isinstance(content["anchor"], bool):
        raise ValueError("a bad metric or anchor")
    if not all(isinstance(entry["sha256"], str) for entry in content["files"].values()):
        raise ValueError("a bad checksum")
    if not {STATE, METADATA} <= content["files"].keys() or any(Path(name).name != name for name in content["files"]):
        raise ValueError(f"files must be in the folder, {STATE} and {METADATA} among them")


def verify(file: Path, entry: dict[str, Any]) -> None:
    """Compares a file's bytes with its entry in the manifest."""
    if file_sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file}: damaged, its SHA-256 is not the manifest's. {_REMEDY}")


def find_damage(folder: Path, entries: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Which of these files are not what the manifest says, in words."""
    faults = []
    for name, entry in entries:
        try:
            verify(folder / name, entry)
        except CheckpointError:
            faults.append(f"the SHA-256 of {name} is not the manifest's")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror or error}")
    return faults
