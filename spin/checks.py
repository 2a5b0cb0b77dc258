"""Checks of a run's arithmetic that need neither data nor weights; all faults are reported at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spin.config import Faults, component_of
from spin.data.filters import POLICIES
from spin.data.store import differences
from spin.dtypes import TRAINED_DTYPES
from spin.errors import CheckpointError, ConfigError, SelfTestError
from spin.files import TRANSFER, check_own_folder
from spin.fingerprint import file_sha256, json_fingerprint
from spin.generators.base import SamplingParams
from spin.hf_folder import weight_files
from spin.models import AC_MODES, ATTENTION
from spin.nonfinite import ON_NONFINITE
from spin.progress import SPINProgress, compute_interval, compute_limit_batches, parse_max_time
from spin.schedules import lr_factor, per_iteration
from spin.stopping import parse_signals
from spin.triplets import takes_triplets
from spin.watch import check_limits

log = logging.getLogger(__name__)

_PACKAGES = {  # of torchtune's loggers, which import them when they are made: after the weights are loaded
    "WandBLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
}
_LEAST_MOVED_SHARE = 0.1
_SECTIONS = ("model", "tokenizer", "checkpointer", "dataset", "generator", "loss", "optimizer")
_RESULTS_DEPEND_ON = (
    "seed", "sampling", "pairs", "loss", "nll_weight", "optimizer", "lr_scheduler", "max_epochs", "global_batch_size",
    "limit_train_batches", "clip_grad_norm", "dtype", "compute_dtype",
    "enable_float8_training", "model",
)  # fmt: skip
_RECORDED_LATER = ("model", "base_dtype", "generator")  # states of earlier versions lack them

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
        cfg (DictConfig): complete, as :func:`spin.config.complete` returns it.

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
    for name in ("history_fraction", "start_share"):
        share = plain["pairs"][name]
        if not _is_number(share) or not 0 <= share <= 1:
            faults.add(f"pairs.{name}={share}: expected a share in [0, 1].")
    least, most = (plain["pairs"][name] for name in ("min_margin", "max_margin"))
    for name, margin in (("min_margin", least), ("max_margin", most)):
        if margin is not None and not (_is_number(margin) and math.isfinite(margin)):
            faults.add(f"pairs.{name}={margin!r}: expected nats per token, or null for no limit.")
    if _is_number(least) and _is_number(most) and least > most:
        faults.add(f"pairs.min_margin={least} is above pairs.max_margin={most}: no pair can pass.")
    if takes_triplets(cfg):
        loss = plain["loss"]["_component_"]
        for name, value in (("responses_per_prompt", 1), ("history", 0), ("start_share", 0)):
            if plain["pairs"][name] != value:
                faults.add(
                    f"pairs.{name}={plain['pairs'][name]} with loss._component_={loss}: a triplet has one answer of "
                    "today's opponent and one of what the run started from, and its loss has no reference. Set "
                    f"pairs.{name}={value}."
                )
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
        dict[str, Any]: ``inputs`` and ``timeout_seconds``, arguments of :func:`spin.distributed.init_world`.

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
    package = Path(__file__).parent
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
        dict[str, str]: for :func:`spin.distributed.check_ranks_agree`.

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


def check_first_loss(
    metrics: Mapping[str, float], expected: tuple[float, float], compute_dtype: str, iteration: int
) -> None:
    """The self-test of an iteration's first step: policy and opponent are the same weights.

    Args:
        metrics (Mapping[str, float]): of the step, see :func:`spin.metrics.pair_metrics`.
        expected (tuple[float, float]): loss and margin of two equal models, see
            :func:`spin.validation.loss_of_equal_models`; ln 2 and 0 for the logistic SPIN loss.
        compute_dtype (str): ``fp32`` allows 1e-6, ``bf16`` 1e-4.
        iteration (int): counted from 0.

    Raises:
        SelfTestError: If the loss or the margin is off.
    """
    tolerance = 1e-6 if compute_dtype == "fp32" else 1e-4
    loss, margin = expected
    if abs(metrics["loss"] - loss) <= tolerance and abs(metrics["margin"] - margin) <= tolerance:
        return
    drifts = metrics["real_logp_drift"], metrics["generated_logp_drift"]
    cause = (
        f"The policy's log-probs are off the reference by {drifts[0]:.3g} nats for real and {drifts[1]:.3g} for "
        "generated responses: something differs between the reference pass and training (dropout, precision, "
        "another number of ranks, a changed pair store)."
    )
    if not any(drifts):
        cause = (
            "Their log-probs are equal too, so it is the loss that differs from what the config's loss gives for them, "
            "as in a recipe whose own lines change it. If that is meant, put it into a loss of your own "
            "(loss._component_), which this test then asks."
        )
    raise SelfTestError(
        f"The first loss of iteration {iteration} is {metrics['loss']:.8f}, expected {loss:.8f} +- {tolerance:g}, "
        f"because policy and opponent are the same weights. {cause} No weight was changed. self_test=false skips this "
        "test."
    )


def check_moved_share(
    share: float, lr: float, dtype: str, stochastic_rounding: bool, iteration: int, warned: set[int]
) -> None:
    """Warns, once an iteration, of steps that change next to nothing.

    The spacing of bf16 weights is 1/256 to 1/128 of their size: a step of less than half of that is rounded away.
    Rounded at random it moves few weights too, but those by enough: nothing is lost on average, and nothing is said.

    Args:
        share (float): of the weights that a step has moved, see :class:`spin.metrics.MovedShare`.
        lr (float): the step's learning rate; 0 may move nothing.
        dtype (str): of the master weights, ``fp32`` or ``bf16``.
        stochastic_rounding (bool): whether the optimizer rounds bf16 weights at random.
        iteration (int): counted from 0.
        warned (set[int]): iterations that have been warned of; this one is added.
    """
    if lr <= 0 or share >= _LEAST_MOVED_SHARE or iteration in warned or (stochastic_rounding and dtype == "bf16"):
        return
    warned.add(iteration)
    remedy = (
        "bf16 weights round so small a step away. Set dtype=fp32, or "
        "optimizer._component_=spin.optim.AdamWStochasticRounding (or spin.optim.AdamW8bit, which rounds so too)."
        if dtype == "bf16"
        else "The learning rate is too small for these weights, or their gradients are zero: see grad_norm."
    )
    log.warning(
        f"A step of iteration {iteration} at learning rate {lr:.3g} changed {share:.1%} of the weights "
        f"(dtype={dtype}): this is hardly training. {remedy}"
    )


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
        **({"base_dtype": plain["base_dtype"]} if "base_dtype" in plain else {}),
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
