"""What a run's folder holds, read without starting anything; a run that is still writing, or was killed, is fine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spin.errors import ConfigError, OutputError

_ITERATION = re.compile(r"iteration_(\d+)")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; lines that are not whole (yet) are passed over.

    Args:
        file (Path): may be missing.

    Returns:
        list[dict[str, Any]]: in the order of the file.
    """
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill, or being written
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_config(run: Path) -> DictConfig | None:
    """The config that a run was started with.

    Args:
        run (Path): the run's output_dir.

    Returns:
        DictConfig | None: None before the run has written it.

    Raises:
        ConfigError: If the file is no YAML mapping.
    """
    file = run / "config.yaml"
    if not file.is_file():
        return None
    cfg = OmegaConf.load(file)
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{file}: the top level is a list, expected the config that the run wrote.")
    return cfg


def iteration_folders(run: Path) -> dict[int, Path]:
    """The folders of a run's iterations, by number.

    Args:
        run (Path): the run's output_dir.

    Returns:
        dict[int, Path]: ascending.

    Raises:
        OutputError: If this is no run's folder.
    """
    if not run.is_dir():
        raise OutputError(f"{run}: no such folder; expected the output_dir of a run.")
    folders = [(match, path) for path in sorted(run.iterdir()) if (match := _ITERATION.fullmatch(path.name))]
    if not folders and not (run / "metrics.jsonl").exists():
        raise OutputError(
            f"{run}: neither metrics.jsonl nor a folder iteration_000 is here; expected the output_dir of a run."
        )
    return {int(match[1]): path for match, path in folders}
