"""What ties a checkpoint to its run: the inputs of a run, compared between ranks and before a resume."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf

from spin.config import Component, SFTConfig, SPINConfig, as_written, own_code, plain, read_yaml, sft_settings
from spin.config.follow import FROM_HF
from spin.config.schema import Config, EvaluatedModel
from spin.core.errors import CheckpointError
from spin.core.files import file_sha256, json_fingerprint
from spin.core.ranks import World, check_ranks_agree
from spin.core.redact import is_secret_key, redacted
from spin.model.hf_folder import weight_files
from spin.pairs.store import differences

log = logging.getLogger(__name__)

RESULTS_DEPEND_ON = (
    "seed", "sampling", "pairs", "loss", "nll_weight", "optimizer", "lr_scheduler", "max_epochs", "global_batch_size",
    "limit_train_batches", "clip_grad_norm", "dtype", "compute_dtype",
    "enable_float8_training", "model",
)  # fmt: skip
_OF_PAIRS = {"sampling", "loss", "nll_weight", "generator"}  # what an SFT stage does not depend on
_SET_BY_SFT = {"max_epochs", "limit_train_batches", "lr_scheduler", "optimizer"}
_COMPARED_BY_CONTENT = {"source", "path", "data_dir", "data_files", "checkpoint_dir", "model_dir"}
_OF_ONE_RANK = {"url", "verify", "api_key_env"}  # each rank may ask a server of its own


def inputs_of_config(cfg: Config) -> dict[str, Any]:
    """``inputs`` and ``timeout_seconds`` of :func:`spin.core.ranks.init_world`: what all ranks must have alike before
    anything is read, which is config, code and versions.

    Left out is what a host may have in its own place and is compared by content later (:func:`check_files_agree`), a
    server's address, and the metric logger, which is rank 0's.
    """
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
        if is_secret_key(last):
            text = f"(not shown, {digest})"
        found[name] = text if len(text) <= 100 else f"{text[:80]}... ({digest})"

    walk(plain(cfg), "", "")
    package = Path(__file__).parents[1]
    code = [[str(file.relative_to(package)), file_sha256(file)] for file in sorted(package.rglob("*.py"))]
    found["code of spin"] = json_fingerprint(code)[:12]
    recipe = getattr(sys.modules["__main__"], "__file__", None)
    if recipe is not None and Path(recipe).is_file():
        found[f"code of {Path(recipe).name}"] = file_sha256(recipe)[:12]
    found |= {f"code of {name}": digest[:12] for name, digest in own_code(cfg).items()}
    for name in ("torch", "torchtune", "torchao", "transformers"):
        found[f"version of {name}"] = importlib.metadata.version(name)
    return {"inputs": found, "timeout_seconds": cfg.distributed_timeout_seconds}


def check_files_agree(read: Mapping[str, Any], weights: Component | EvaluatedModel, world: World, of: str = "") -> None:
    """A ``ConfigError`` on all ranks if they have read different data sets or tokenizers, given by name, or different
    weights in the ``checkpoint_dir`` of a config section, if it has one. Collective.

    Files of up to 64 MiB are hashed entirely, larger ones by size, header and 1,024 places; a value that was changed by
    hand in between is not seen there, other weights are.
    """
    found = {}
    for name, what in read.items():
        if what is not None:
            whole = getattr(what, "content_fingerprint", None)
            found[f"content of {name}"] = (whole() if callable(whole) else str(what.fingerprint))[:12]
    folder = getattr(weights, "checkpoint_dir", None)
    if folder is not None and Path(folder).is_dir():
        files = [*weight_files(Path(folder)), *Path(folder).glob("config.json")]
        try:
            found |= {f"weights{of}: {file.name}": _sampled_digest(file) for file in files}
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error}).") from error
    check_ranks_agree(found, world)


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
    cfg: SPINConfig, dataset: str, tokenizer: str, dataset_settings: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What a run's results depend on, as JSON values by config key. ``dataset`` and ``tokenizer`` are fingerprints,
    ``dataset_settings`` what else decides which samples are played."""
    values = plain(cfg)
    if cfg.model.component == FROM_HF:  # the folder may move; what it holds may not change
        values["model"]["path"] = file_sha256(Path(cfg.model.path) / "config.json")[:12]
    found = {
        **{key: values[key] for key in RESULTS_DEPEND_ON},
        "pairs": {
            key: redacted(value) if key == "checker" else value  # a judge on a server has a key
            for key, value in values["pairs"].items()
            if key != "checker" or value is not None
        },
        **({} if cfg.base_dtype is None else {"base_dtype": cfg.base_dtype}),
        "generator": {"_component_": cfg.generator.component},  # its other keys are its speed
        **{f"dataset.{key}": value for key, value in dataset_settings.items()},
        "dataset": dataset,
        "tokenizer": tokenizer,
    }
    return {key: value for key, value in found.items() if not (isinstance(cfg, SFTConfig) and key in _OF_PAIRS)}


def check_unchanged(
    old: Mapping[str, Any], new: Mapping[str, Any], cfg: SPINConfig, within_iteration: bool = False
) -> None:
    """Refuses to resume a run under a config that would silently make another run of it: a CheckpointError if the
    :func:`run_fingerprint` of then and now differ in a key that ``resume_with_changes`` does not allow, or in one of
    the data set within an iteration, whose samples have their responses."""
    allowed, output_dir = cfg.resume_with_changes, Path(cfg.output_dir)
    data = [name for name in sorted({*old, *new}) if name.partition(".")[0] == "dataset"]
    moved = [name for name in data if name in allowed and old.get(name) != new.get(name)]
    if within_iteration and moved:
        raise CheckpointError(
            f"{', '.join(moved)} can change between iterations only: the run in {output_dir} is within one, whose "
            "samples are chosen and played. Finish it first, or name the checkpoint at its start in resume=<path>."
        )
    missing = object()
    names = sorted({*old, *new} - set(allowed))
    changed = [name for name in names if old.get(name, missing) != new.get(name, missing)]
    if changed:
        hashed = [name for name in ("dataset", "tokenizer") if name in changed]
        named = [name for name in changed if name not in hashed]
        found = differences(*({name: run[name] for name in named if name in run} for run in (old, new)))
        found += [each for name in hashed for each in _changed_keys(name, cfg)]
        kept = [name for name in allowed if name in old or name in new]
        # an SFT stage's config.yaml is what spin_sft makes of the run's config, not what it takes
        where = "" if isinstance(cfg, SFTConfig) else f" (--config {output_dir / 'config.yaml'})"
        of_sft = "; the section sft sets it" if isinstance(cfg, SFTConfig) and _SET_BY_SFT & {*changed} else ""
        raise CheckpointError(
            f"The run in {output_dir} was started with another config: {'; '.join(found)}{of_sft}. Restore it{where}, "
            f"start a new output_dir, or allow it by resume_with_changes=[{','.join([*kept, *changed])}]."
        )


def compare_own_code(old: Mapping[str, str], cfg: SPINConfig) -> None:
    """Warns if :func:`own_code` is not what it was when the checkpoint was saved that the run resumes from."""
    changed = [name for name, code in own_code(cfg).items() if old.get(name, code) != code]
    has_checker = cfg.pairs.checker is not None and cfg.pairs.checker.component in changed
    kept = (
        " Pairs that are being trained on keep their verdicts until the next iteration starts." if has_checker else ""
    )
    if changed:
        names = ", ".join(changed)
        log.warning(f"The code of {names} has changed since the checkpoint was saved, and is used as it is now.{kept}")


def doubts_after_sft(old: Mapping[str, Any], cfg: SPINConfig) -> list[str]:
    """What is seldom meant in self-play that starts from an SFT stage with this :func:`run_fingerprint`: a section
    ``sft`` that has changed since, learning rates that ruined models (docs/when_it_helps.md)."""
    ran = {"epochs": old["max_epochs"], "lr": old["optimizer"]["lr"]}
    ran |= {key: old[key] for key in ("lr_scheduler", "limit_train_batches")}
    found, rates = [], cfg.optimizer["lr"]
    if changed := "; ".join(differences({"sft": ran}, {"sft": sft_settings(cfg)})):
        found.append(
            f"{changed}: self-play starts from what was fine-tuned before this change. To fine-tune with it, set a new "
            "output_dir and run spin_sft, then spin_recipe."
        )
    highest = max(rates) if isinstance(rates, list) else rates
    if highest > ran["lr"] / 50:
        found.append(
            f"optimizer.lr={highest:g} is 1/{ran['lr'] / highest:.2g} of the rate that fine-tuned this model "
            f"({ran['lr']:g}): with beta 0.1, 1/30 ruined every model that it was tried on, and 1/100 none. Lower "
            f"optimizer.lr to {ran['lr'] / 100:g}, or watch val_loss."
        )
    return found


def _changed_keys(section: str, cfg: SPINConfig) -> list[str]:
    """What has changed in a section that is compared by a hash of what it gives, since the last start's config.yaml."""
    file = Path(cfg.output_dir) / "config.yaml"
    configs = (read_yaml(file) if file.is_file() else OmegaConf.create(), as_written(cfg))
    old, new = (redacted(OmegaConf.to_container(each, resolve=False)) for each in configs)
    found = differences({section: old.get(section)}, {section: new[section]})
    return found or [
        f"{section} has the keys that it had, and gives something else: its files, or the tokenizer, have changed"
    ]
