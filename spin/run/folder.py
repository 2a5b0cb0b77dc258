"""Reads what a run's folder holds; a run that is still writing, or was killed, is fine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from spin import config
from spin.core.errors import OutputError
from spin.core.files import FolderLock, json_lines, read_lines
from spin.core.redact import redacted
from spin.model.hf_folder import ADAPTER_CONFIG

if TYPE_CHECKING:
    from spin.core.ranks import World

_ITERATION = re.compile(r"iteration_(\d+)")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without incomplete lines; none if it is missing."""
    return [row for _, row in json_lines(read_lines(file))] if file.is_file() else []


def read_config(run: Path) -> DictConfig | None:
    """A run's config without secrets, ``${...}`` not resolved; None before the run has written it."""
    file = run / "config.yaml"
    if not file.is_file():
        return None
    content = OmegaConf.to_container(config.read_yaml(file), resolve=False)
    return OmegaConf.create(config.escaped(redacted(content)))


def data_sources(cfg: DictConfig) -> str:
    """The data of a run's config: its source, or those of a mixture with their weights."""
    sources = OmegaConf.select(cfg, "dataset.sources")
    parts = [part for part in sources.values() if OmegaConf.is_dict(part)] if OmegaConf.is_dict(sources) else []
    mixed = (f"{part.get('source')}{f' (weight {part.weight})' if 'weight' in part else ''}" for part in parts)
    return str(OmegaConf.select(cfg, "dataset.source") or ", ".join(mixed))


def model_of(iteration: Path, adapter: bool = False) -> Path | None:
    """An iteration's exported ``hf_model``, or its ``adapter`` if that is asked for or all there is."""
    for name, head in (("hf_model", "config.json"), ("adapter", ADAPTER_CONFIG)):
        folder = iteration / name
        if (name == "adapter" or not adapter) and (folder / head).is_file() and any(folder.glob("*.safetensors")):
            return folder
    return None


def iteration_folders(run: Path) -> dict[int, Path]:
    """The folders of a run's iterations, by number ascending; OutputError if this is no run's folder."""
    if not run.is_dir():
        raise OutputError(f"{run}: no such folder; expected the output_dir of a run.")
    folders = [(match, path) for path in sorted(run.iterdir()) if (match := _ITERATION.fullmatch(path.name))]
    if not folders and not (run / "metrics.jsonl").exists():
        results = sorted(str(path.relative_to(run)) for path in run.glob("*_vs_*/summary.json"))
        found = "neither metrics.jsonl nor a folder iteration_000 is here; expected the output_dir of a run."
        if results:
            found = (
                f"an evaluation's folder, expected the output_dir of a run. Its results are in {', '.join(results)}, "
                "and prompt by prompt in rows.jsonl next to it."
            )
        raise OutputError(f"{run}: {found}")
    return {int(match[1]): path for match, path in folders}


def exported_model(run: Path, iteration: int | None = None, adapter: bool = False) -> tuple[int, Path]:
    """An iteration, by default the last that is finished, and the folder of its model (:func:`model_of`)."""
    found = {n: model_of(path, adapter) for n, path in iteration_folders(run).items()}
    models = {n: model for n, model in found.items() if model is not None}
    if not models and adapter and any(map(model_of, iteration_folders(run).values())):
        raise OutputError(f"{run}: its iterations have no adapter, only LoRA runs do. Leave --adapter out.")
    if not models:
        raise OutputError(f"{run}: no iteration is finished, so there is no model yet.")
    number = max(models) if iteration is None else iteration
    if number not in models:
        raise OutputError(f"{run}: iteration {number} has no model; finished are {', '.join(map(str, models))}.")
    return number, models[number]


def run_of(model: Path) -> Path | None:
    """The run whose iteration made a model, by its folder's place; None if it lies elsewhere."""
    iteration = model.absolute().parent
    return iteration.parent if _ITERATION.fullmatch(iteration.name) else None


def lock_output_dir(folder: Path, world: World, shared: bool = False) -> FolderLock | None:
    """Rank 0's lock of a run's folder, see :class:`spin.core.files.FolderLock`; an ``OutputError`` is raised on all
    ranks. Collective."""
    from spin.core.ranks import raise_on_all_ranks  # imports torch, which reports and exports need not

    with raise_on_all_ranks(world, OutputError):
        return FolderLock(folder, shared) if world.is_main else None
