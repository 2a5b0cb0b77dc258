"""Checks of a run's arithmetic that need neither data nor weights; all faults are reported at once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spin.config.parse import Faults, component_of
from spin.core.dtypes import TRAINED_DTYPES
from spin.core.errors import ConfigError
from spin.core.files import TRANSFER, check_own_folder
from spin.generators.generator import SamplingParams
from spin.model.build import AC_MODES, ATTENTION
from spin.pairs.filters import POLICIES
from spin.run.progress import SPINProgress, compute_interval, compute_limit_batches, parse_max_time
from spin.run.stopping import parse_signals
from spin.training.nonfinite import ON_NONFINITE
from spin.training.schedules import lr_factor, per_iteration
from spin.training.watch import check_limits

log = logging.getLogger(__name__)

_PACKAGES = {  # of torchtune's loggers, which import them when they are made: after the weights are loaded
    "WandBLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
}
_SECTIONS = ("model", "tokenizer", "checkpointer", "dataset", "generator", "loss", "optimizer")

# What numbers may be, from the least to the most, by the end of the key's path. An int counts, a float measures; the
# most is far above what makes sense, and below what takes a machine down before its own check.
_RANGES: dict[str, tuple[int, int] | tuple[float, float]] = {
    "max_iterations": (1, 10_000),
    "max_epochs": (1, 10_000),
    "max_steps": (-1, 10**9),
    "seed": (-(2**63), 2**63 - 1),
    "global_batch_size": (1, 2**20),
    "logprob_chunk_tokens": (1, 2**24),
    "log_every_n_steps": (1, 10**9),
    "replicas": (1, 2**16),
    "num_workers": (0, 4096),
    "nonfinite_limit": (1, 10**9),
    "ac_option": (1, 10_000),
    "pairs.responses_per_prompt": (1, 1024),
    "pairs.history": (0, 10_000),
    "prompts_per_shard": (1, 2**20),
    "pairs.row_tokens": (1, 2**24),
    "pairs.row_multiple": (1, 2**16),
    "validation.table_rows": (0, 10_000),
    "watch.window": (1, 10**6),
    "sampling.max_new_tokens": (1, 2**24),
    "sampling.min_new_tokens": (0, 2**24),
    "sampling.top_k": (0, 2**31 - 1),
    "sampling.temperature": (0.0, 1e3),
    "sampling.repetition_penalty": (0.0, 1e3),
    "loss.beta": (0.0, 1e6),
    "optimizer.lr": (0.0, 1e10),
    "nll_weight": (0.0, 1e6),
    "limit_train_batches": (0.0, 1e9),
    "limit_val_batches": (0.0, 1e9),
    "val_check_interval": (0.0, 1e9),
    "save_interval": (0.0, 1e9),
    "lr_scheduler.warmup": (0.0, 1e9),
    # of the components that come with this package, and of torchtune's models
    "checkpointer.keep_last": (1, 10**6),
    "checkpointer.keep_best": (0, 10**6),
    "dataset.limit": (1, 10**12),
    "dataset.shuffle_buffer": (0, 10**9),
    "generator.batch_size": (1, 2**16),
    "generator.prefill_batch": (1, 2**16),
    "generator.concurrency": (1, 2**16),
    "generator.timeout_seconds": (0.0, 1e7),
    "generator.wait_seconds": (0.0, 1e7),
    "generator.max_model_len": (1, 2**24),
    "model.vocab_size": (1, 2**24),
    "model.num_layers": (1, 1024),
    "model.num_heads": (1, 2**16),
    "model.num_kv_heads": (1, 2**16),
    "model.head_dim": (1, 2**16),
    "model.embed_dim": (1, 2**20),
    "model.intermediate_dim": (1, 2**22),
    "model.max_seq_len": (1, 2**24),
    "model.lora_rank": (1, 2**16),
}
_MOST = 2**63 - 1  # of any other number
_MAY_BE_NULL = (
    "max_steps", "ac_option", "dataset.limit", "generator.prefill_batch", "generator.max_model_len", "model",
)  # fmt: skip


def check_run(cfg: DictConfig) -> None:
    """Checks the values of a recipe's config against each other.

    Args:
        cfg (DictConfig): complete, as :func:`spin.config.parse.complete` returns it.

    Raises:
        ConfigError: If anything cannot work, with every fault in a line of its own.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    faults = Faults()
    for section in _SECTIONS:
        if plain[section] is None:
            faults.add(f"{section}=null: expected a section with _component_; a run cannot do without it.")
    faults.raise_if_any()

    def attempt(name: str, check: Callable[[], object]) -> None:
        try:
            check()
        except ConfigError as error:
            for line in str(error).splitlines():
                faults.add(line if name in line else f"{name}: {line}")
        except (TypeError, ValueError, OverflowError) as error:  # a list among numbers, infinity as a count
            faults.add(f"{name}={OmegaConf.select(cfg, name)!r}: {error}.")

    check_ranges(plain, faults)
    resume = plain["resume"]
    if not isinstance(resume, str) or not resume:
        faults.add(f"resume={resume!r}: expected auto (the newest state, if any), never, or a state's folder.")
    iterations = plain["max_iterations"]
    if not faults.messages:
        attempt("max_steps", lambda: SPINProgress(1, plain["max_epochs"], iterations, plain["max_steps"]))
    for section, key in (("loss", "beta"), ("optimizer", "lr")):
        value = plain[section].get(key)
        if value is None:  # its default goes with the default component
            faults.add(f"{section}.{key}: missing, expected a number, or a list of one per iteration.")
        elif isinstance(iterations, int) and 0 < iterations <= _RANGES["max_iterations"][1]:
            attempt(f"{section}.{key}", partial(per_iteration, value, 0, iterations))
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, (int, float)) and entry <= 0:
                    faults.add(f"{section}.{key}={entry}: expected more than 0.")
    attempt("optimizer", partial(_check_optimizer, cfg))
    attempt("sampling", lambda: _check_sampling(cfg, plain))
    attempt("max_time", lambda: parse_max_time(plain["max_time"]))
    attempt("stop_signals", lambda: parse_signals(plain["stop_signals"]))
    attempt("watch", lambda: check_limits(plain["watch"]))
    schedule = plain["lr_scheduler"]
    attempt("lr_scheduler", lambda: lr_factor(schedule["name"], 0, 10, schedule["warmup"], schedule["min_ratio"]))
    for name in ("limit_train_batches", "limit_val_batches"):
        value = plain[name]
        attempt(name, partial(compute_limit_batches, 1, value))
        if isinstance(value, float) and not 0 <= value <= 1:
            faults.add(f"{name}={value}: a float is a share in [0.0, 1.0]; write an int to count batches.")
    for name in ("val_check_interval", "save_interval"):
        attempt(name, partial(compute_interval, name, plain[name], 1_000_000_000))
    transfer_dir = plain["generator"].get("transfer_dir")
    if isinstance(transfer_dir, str) and transfer_dir:
        names = ("output_dir", "checkpointer.checkpoint_dir", "checkpointer.output_dir", "tokenizer.path")
        apart_from = {name: OmegaConf.select(cfg, name) for name in (*names, "generator.model_dir")}
        attempt(
            "generator.transfer_dir",
            partial(check_own_folder, "generator.transfer_dir", transfer_dir, TRANSFER, apart_from),
        )
    if not isinstance(plain["output_dir"], str) or not plain["output_dir"].strip() or "\0" in plain["output_dir"]:
        faults.add(f"output_dir={plain['output_dir']!r}: expected a folder's path.")
    if not _is_number(plain["nll_weight"]) or not 0 <= plain["nll_weight"] < math.inf:
        faults.add(f"nll_weight={plain['nll_weight']!r}: expected 0 or more.")
    share = plain["pairs"]["history_fraction"]
    if not _is_number(share) or not 0 <= share <= 1:
        faults.add(f"pairs.history_fraction={share}: expected a share in [0, 1].")
    for name, known in POLICIES.items():
        if plain["pairs"][name] not in known:
            faults.add(f"pairs.{name}={plain['pairs'][name]!r}: expected {', '.join(known)}.")
    for name in ("dtype", "compute_dtype"):
        if plain[name] not in TRAINED_DTYPES:
            faults.add(f"{name}={plain[name]!r}: expected {' or '.join(TRAINED_DTYPES)}.")
    if plain["on_nonfinite"] not in ON_NONFINITE:
        faults.add(f"on_nonfinite={plain['on_nonfinite']!r}: expected {' or '.join(ON_NONFINITE)}.")
    if plain["attention"] not in ATTENTION:
        faults.add(f"attention={plain['attention']!r}: expected {', '.join(ATTENTION)}.")
    if plain["ac_mode"] not in AC_MODES:
        faults.add(f"ac_mode={plain['ac_mode']!r}: expected {' or '.join(AC_MODES)}.")
    elif plain["ac_mode"] == "selective" and not (type(plain["ac_option"]) is int and plain["ac_option"] > 0):
        faults.add(
            f"ac_option={plain['ac_option']!r}: ac_mode=selective checkpoints every ac_option-th layer; give 1+."
        )
    if plain["dtype"] == "bf16" and plain["compute_dtype"] == "fp32":
        faults.add("dtype=bf16 with compute_dtype=fp32: weights are not computed in more precision than they have.")
    norm = plain["clip_grad_norm"]
    if norm is not None and not (_is_number(norm) and norm > 0):
        faults.add(f"clip_grad_norm={plain['clip_grad_norm']}: expected more than 0, or null for no clipping.")
    if isinstance(plain["validation_dataset"], dict) and plain["validation_dataset"].get("streaming"):
        faults.add("validation_dataset.streaming=true: a validation set is the same each time. Use its limit alone.")
    logger = str(plain["metric_logger"].get("_component_")).rpartition(".")[2] if plain["metric_logger"] else ""
    if str((plain["metric_logger"] or {}).get("_component_")).startswith("torchtune."):  # not one of the user's own
        _check_logger(plain["metric_logger"], faults)
    package = _PACKAGES.get(logger)
    if package is not None and importlib.util.find_spec(package) is None:
        faults.add(
            f"metric_logger: {logger} needs the package {package}, which is not installed: pip install {package}. "
            "metrics.jsonl has everything in any case."
        )
    if plain["validation"]["spin"] and plain["validation_dataset"] is None:
        faults.add("validation.spin=true needs a validation_dataset.")
    faults.raise_if_any()


def _check_logger(section: Mapping[str, Any], faults: Faults) -> None:
    """A service's library takes further settings: among them programs to run and servers that get the key."""
    for key, value in section.items():
        items = value if isinstance(value, list) else [value]
        if key not in ("_component_", "_extra_") and (
            key == "settings" or any(isinstance(item, dict | list) for item in items)
        ):
            faults.add(
                f"metric_logger.{key}: found {value!r:.80}, expected a number, a text, a switch or a list of them."
            )
    name = section.get("filename")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.(txt|log)", name)):
        faults.add(
            f"metric_logger.filename={name!r}: lines are appended to it; expected a name such as log.txt, without a "
            "folder (that is log_dir)."
        )


def _check_sampling(cfg: DictConfig, plain: dict[str, Any]) -> None:
    greedy, answers = SamplingParams(**plain["sampling"]).greedy_by, plain["pairs"]["responses_per_prompt"]
    if greedy and answers != 1 and getattr(component_of(cfg, "generator"), "takes_sampling", True):
        raise ConfigError(
            f"pairs.responses_per_prompt={answers} with sampling.{greedy}={plain['sampling'][greedy]}: all responses "
            f"to a prompt would be the same. Set sampling.{greedy}={getattr(SamplingParams, greedy)} to sample them, "
            "or pairs.responses_per_prompt=1."
        )


def _check_optimizer(cfg: DictConfig) -> None:
    step = getattr(component_of(cfg, "optimizer"), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer._component_={cfg.optimizer._component_}: its step computes the loss several times, where a "
            "batch passes through the model once. Choose one whose step needs no closure, such as torch.optim.AdamW."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_ranges(values: Any, faults: Faults, path: str = "") -> None:
    """Notes every number of a config that is out of its range, at any depth.

    Args:
        values (Any): the config, or a part of it, as plain containers.
        faults (Faults): takes them.
        path (str): of the part.
    """
    if isinstance(values, Mapping):
        for key, item in values.items():
            check_ranges(item, faults, f"{path}.{key}" if path else str(key))
        return
    if isinstance(values, list):
        for item in values:
            check_ranges(item, faults, path)
        return
    keys = path.split(".")
    name = next((name for count in (2, 1) if (name := ".".join(keys[-count:])) in _RANGES), "")
    bounds = _RANGES.get(name)
    if values is None and (name in _MAY_BE_NULL or name.partition(".")[0] in _MAY_BE_NULL):
        return
    if bounds is not None and isinstance(bounds[0], int):
        if type(values) is not int or values < bounds[0]:
            expected = "or -1 for no limit" if bounds[0] == -1 else f"{bounds[0]:,} or more"
            faults.add(f"{path}={values!r:.100}: expected a whole number, {expected}.")
        elif values > bounds[1]:
            faults.add(f"{path}={values!r:.100}: expected a whole number, at most {bounds[1]:,}.")
    elif _is_number(values):
        least, most = bounds or (-_MOST, _MOST)
        # infinity may stand for no limit where there is none of ours
        if not (least <= values <= most or (bounds is None and values in (math.inf, -math.inf))):
            faults.add(f"{path}={values!r:.100}: expected a number from {least:g} to {most:g}.")
