"""What ties a checkpoint to its run: the inputs of a run, compared between ranks and before a resume."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spin.config.checks import _is_number
from spin.core.errors import CheckpointError, ConfigError
from spin.core.files import file_sha256, json_fingerprint
from spin.model.hf_folder import weight_files
from spin.pairs.store import differences

log = logging.getLogger(__name__)


_RESULTS_DEPEND_ON = (
    "seed", "sampling", "pairs", "loss", "nll_weight", "optimizer", "lr_scheduler", "max_epochs", "global_batch_size",
    "limit_train_batches", "clip_grad_norm", "dtype", "compute_dtype",
    "enable_float8_training", "model",
)  # fmt: skip


_RECORDED_LATER = ("model", "base_dtype", "generator")  # states of earlier versions lack them


_COMPARED_BY_CONTENT = {"source", "path", "data_dir", "data_files", "checkpoint_dir", "model_dir"}


_OF_ONE_RANK = {"url", "verify", "api_key_env"}  # each rank may ask a server of its own


_SECRET = re.compile(r"(api_?key|secret|password|passwd|credentials?|auth_token|access_token)$", re.IGNORECASE)


def inputs_of_config(cfg: DictConfig) -> dict[str, Any]:
    """What all ranks of a run must have alike before anything is read: config, code, versions.

    Left out is what a host may have in its own place and is compared by content later (:func:`inputs_of_files`), a
    server's address, and the metric logger, which is rank 0's.

    Args:
        cfg (DictConfig): complete.

    Returns:
        dict[str, Any]: ``inputs`` and ``timeout_seconds``, arguments of :func:`spin.core.ranks.init_world`.

    Raises:
        ConfigError: If ``distributed_timeout_seconds`` cannot be.
    """
    seconds = cfg.distributed_timeout_seconds
    if not _is_number(seconds) or not 1 <= seconds <= 86400:
        raise ConfigError(f"distributed_timeout_seconds={seconds!r}: expected 1 to 86400 seconds.")
    found: dict[str, str] = {}

    def walk(value: Any, name: str, last: str) -> None:
        if last in _COMPARED_BY_CONTENT | _OF_ONE_RANK or name == "metric_logger":
            return
        if isinstance(value, dict) and value:
            for key, part in value.items():
                walk(part, f"{name}.{key}" if name else str(key), str(key))
            return
        text = json.dumps(value, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        if _SECRET.search(last):
            text = f"(not shown, {digest})"
        found[name] = text if len(text) <= 100 else f"{text[:80]}... ({digest})"

    walk(OmegaConf.to_container(cfg, resolve=True), "", "")
    package = Path(__file__).parents[1]
    code = [[str(file.relative_to(package)), file_sha256(file)] for file in sorted(package.rglob("*.py"))]
    found["code of spin"] = json_fingerprint(code)[:12]
    recipe = getattr(sys.modules["__main__"], "__file__", None)
    if recipe is not None and Path(recipe).is_file():
        found[f"code of {Path(recipe).name}"] = file_sha256(recipe)[:12]
    for name in ("torch", "torchtune", "torchao", "transformers"):
        found[f"version of {name}"] = importlib.metadata.version(name)
    return {"inputs": found, "timeout_seconds": float(seconds)}


def inputs_of_files(read: Mapping[str, Any], weights: DictConfig, of: str = "") -> dict[str, str]:
    """What all ranks of a run must have read alike: data, tokenizer, and the files of the weights.

    Files of up to 64 MiB are hashed whole, larger ones by size, header and 1,024 places; a value that was changed by
    hand in between is not seen there, other weights are.

    Args:
        read (Mapping[str, Any]): data sets and tokenizers, by name; those that are None are left out.
        weights (DictConfig): a config section; the folder is its ``checkpoint_dir``, if it has one.
        of (str): whose weights, for the message.

    Returns:
        dict[str, str]: for :func:`spin.core.ranks.check_ranks_agree`.

    Raises:
        CheckpointError: If there are no weights, or a file cannot be read.
    """
    found = {}
    for name, what in read.items():
        if what is not None:
            whole = getattr(what, "content_fingerprint", None)
            found[f"content of {name}"] = (whole() if callable(whole) else str(what.fingerprint))[:12]
    folder = weights.get("checkpoint_dir")
    if folder is not None and Path(folder).is_dir():
        files = [*weight_files(Path(folder)), *Path(folder).glob("config.json")]
        try:
            found |= {f"weights{of}: {file.name}": _sampled_digest(file) for file in files}
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error}).") from error
    return found


def _sampled_digest(file: Path) -> str:
    size = file.stat().st_size
    if size <= 64 << 20:
        return f"{size} bytes, {file_sha256(file)[:12]}"
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header, 64 << 20)))
        for place in range(1024):
            stream.seek(size * place // 1024)
            digest.update(stream.read(4096))
    return f"{size} bytes, {digest.hexdigest()[:12]}"


def run_fingerprint(
    cfg: DictConfig, dataset: str, tokenizer: str, dataset_settings: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What a run's results depend on, by config key.

    Args:
        cfg (DictConfig): complete.
        dataset (str): fingerprint of the training set's content.
        tokenizer (str): fingerprint of the tokenizer and its chat template.
        dataset_settings (Mapping[str, Any]): what else decides which samples are played, by key of ``dataset``.

    Returns:
        dict[str, Any]: JSON values.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return {
        **{key: plain[key] for key in _RESULTS_DEPEND_ON},
        **({} if plain["base_dtype"] is None else {"base_dtype": plain["base_dtype"]}),
        "generator": {"_component_": (plain["generator"] or {}).get("_component_")},  # its other keys are its speed
        **{f"dataset.{key}": value for key, value in dataset_settings.items()},
        "dataset": dataset,
        "tokenizer": tokenizer,
    }


def check_unchanged(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    allowed: Sequence[str],
    output_dir: Path,
    within_iteration: bool = False,
) -> None:
    """Refuses to resume a run under a config that would silently make another run of it.

    Args:
        old (Mapping[str, Any]): :func:`run_fingerprint` of the run that wrote the state.
        new (Mapping[str, Any]): that of this run.
        allowed (Sequence[str]): keys that may differ, the config's ``resume_with_changes``.
        output_dir (Path): the run's folder, for the message.
        within_iteration (bool): the state stands within an iteration, whose samples have been answered.

    Raises:
        CheckpointError: If another key differs, with its old and new value, or a key of the data set does within an
            iteration.
    """
    data = [name for name in sorted({*old, *new}) if name.partition(".")[0] == "dataset"]
    moved = [name for name in data if name in allowed and old.get(name) != new.get(name)]
    if within_iteration and moved:
        raise CheckpointError(
            f"{', '.join(moved)} can change between iterations only: the run in {output_dir} is within one, whose "
            "samples are chosen and answered. Finish it first, or name the state at its start in resume=<path>."
        )
    missing = object()
    unknown = [name for name in _RECORDED_LATER if name in new and name not in old]
    if unknown:
        log.warning(
            f"{output_dir}: the state is of an earlier version, which did not record {', '.join(unknown)}: whether "
            "that is what the run was started with is not known, and is taken to be so."
        )
    names = sorted({*old, *new} - {*allowed, *unknown})
    changed = [name for name in names if old.get(name, missing) != new.get(name, missing)]
    if changed:
        told = differences(*({name: run[name] for name in changed if name in run} for run in (old, new)))
        raise CheckpointError(
            f"The run in {output_dir} was started with another config: {'; '.join(told)}. Restore it, start a new "
            f"output_dir, or allow it by resume_with_changes=[{','.join([*allowed, *changed])}]."
        )
