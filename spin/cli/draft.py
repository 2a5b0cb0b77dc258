"""What ``spin new`` writes: a config for a model and data of the user's own, sized for this machine."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from spin.cli.memory import Estimate, estimate, fewest_sequences, longer_rows, shapes_of, usable_gib
from spin.cli.rates import kind_of_gpu
from spin.cli.timing import Cluster, PairTokens, is_extrapolated, stages
from spin.cli.workload import pair_of
from spin.config import COMPONENT, SPINConfig, complete, instantiate, load_config, nested, plain
from spin.config.files import with_overrides
from spin.config.follow import FROM_HF
from spin.config.full import inline_yaml
from spin.config.schema import fields_of
from spin.core.errors import ConfigError, DataError
from spin.core.terminal import clock, counted
from spin.data import ChatTokenizer, PromptTokenizer, adapt_tokenizer
from spin.data.conversation_template import THINKING_OPTIONS
from spin.data.survey import Survey, survey
from spin.model.build import build_model
from spin.model.lora import check_lora
from spin.model.moe import MoE

_MOST_LINES, _HEADER_LINES = 20, 2  # of a config
_FIRST_KEYS = ("output_dir", "model", "tokenizer", "dataset", "sampling", "generator", "pairs", "optimizer")
_KEPT = 0.99  # of prompts, and of responses, are within the limits that are chosen
_FEW_STEPS = 8  # of an epoch, before its batches are made smaller
_MOST_HELD_OUT = 1000  # about
_ANSWERED = 5  # fixed prompts, side by side in the terminal and in the report
_DATA_SET, _SMALL_OPTIMIZER = "spin.data.prompt_dataset", "spin.training.AdamW8bit"
_METHOD_TEXTS = {"full": "every weight is trained", "lora": "LoRA", "qlora": "QLoRA"}
_REMEDIES = {
    "full": "Give --lora or --qlora, more GPUs, fsdp_cpu_offload=true, or a lower dataset.max_response_tokens.",
    "lora": "Give --qlora, more GPUs, or a lower dataset.max_response_tokens.",
    "qlora": "Give more GPUs, or a lower dataset.max_response_tokens.",
}


@dataclass(frozen=True)
class Machine:
    """What a run is going to have."""

    name: str
    ranks: int
    gib: float  # for each rank, of which some is left free
    has_gpu: bool
    kind: str | None = None  # of the GPUs whose rates are known
    is_chosen: bool = False  # the CPU, although there is a GPU

    @classmethod
    def here(cls, gpus: int | None) -> Machine:
        """This machine, or that many of its GPUs; a ConfigError if it has fewer."""
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        ranks = found if gpus is None else gpus
        if not 0 <= ranks <= found:
            raise ConfigError(f"--gpus {gpus}: expected 0 to {found}, the GPUs that torch finds here.")
        if not ranks:
            cores, gib = len(os.sched_getaffinity(0)), _memory_bytes() / 2**30
            name = f"CPU, {counted(cores, 'core')}, {gib:.0f} GiB of memory"
            return cls(name, 1, 0.8 * gib, False, is_chosen=found > 0)
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(ranks)) / 2**30
        name = torch.cuda.get_device_name(0)
        return cls(f"{ranks} x {name}, {free:.0f} GiB free on each", ranks, usable_gib(free), True, kind_of_gpu(name))


def _memory_bytes() -> float:
    """Of this machine, or of the container that this process is in."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(physical, float(text)) if text.isdecimal() else physical


def draft(arguments: argparse.Namespace, machine: Machine, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The config's text, and what was found and chosen, a line each."""
    method = arguments.method or "full"
    packaged = plain(load_config(method, ["model.path=x", "dataset.source=x"]))
    base = {
        "output_dir": f"runs/{arguments.out.stem}",
        "model": {**packaged["model"], "path": arguments.model},
        "dataset": {"source": arguments.data},
        **{section: packaged[section] for section in ("loss", "optimizer", "max_epochs")},
        **({"device": "cpu"} if machine.is_chosen else {}),
        **({"compile": packaged["compile"]} if machine.has_gpu else {}),
    }
    config = _Config(plain(with_overrides(OmegaConf.create(base), overrides)))
    before = {"dataset.validation_fraction": 0.1}  # another one may be chosen below
    cfg = config.complete(before)  # finds the model
    if cfg.model.component != FROM_HF or cfg.dataset.component != _DATA_SET or cfg.dataset.get("streaming"):
        raise ConfigError(
            "expected a model from its folder and one data set that is read whole. Set others in the written file."
        )
    if has_experts(cfg):  # which take no adapters
        config.values["model"].pop("apply_lora_to_mlp", None)
    model = build_model(config.complete(before).model, torch.float32)
    context: int = model.max_seq_len  # type: ignore[assignment]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = [f"model     {arguments.model}: context {context:,}; {parameters:,} parameters"]

    if not config.get("nll_weight"):  # which equal responses have a gradient by
        config.put("pairs.equal_to_real", packaged["pairs"]["equal_to_real"])

    # --- The data: its columns, lengths and parts ---
    found = _survey(cfg, config, report)
    for part, lengths in (("prompt", found.prompt_lengths), ("response", found.real_lengths)):
        limit = 16 * math.ceil(np.quantile(lengths, _KEPT, method="inverted_cdf") / 16)
        config.put(f"dataset.max_{part}_tokens", min(limit, context - 1))
    most_prompt, most_response = (config.get(f"dataset.max_{part}_tokens") for part in ("prompt", "response"))
    fit = found.within(most_prompt, most_response, context)
    dropped = f"{1 - fit.mean():.1%} are longer and dropped" if not fit.all() else "none is longer"
    report.append(
        f"lengths   prompts to {most_prompt:,} tokens, responses to {most_response:,}: of {len(fit):,} {dropped}"
    )
    if not (fit.all() and found.is_complete):
        config.put("dataset.on_long_prompt", "drop")
        config.put("dataset.on_long_response", "drop")
    if found.faults.total or not found.is_complete:
        config.put("dataset.on_bad_row", "skip")
    config.put("sampling.max_new_tokens", most_response, 256)
    trained, held_out = _hold_out(found, fit, cfg, config)
    config.put("validation.fixed_prompts", _ANSWERED)
    split = f"{counted(trained, 'sample')} to train on, {held_out:,} held out for validation"
    report.append(f"split     {split}, {min(_ANSWERED, held_out)} of them answered before and after each iteration")

    # --- Steps, and what fits the memory ---
    size = 64
    while size > machine.ranks and trained // size < _FEW_STEPS:
        size //= 2
    config.put("global_batch_size", max(1, min(size, trained // 2)), 64)  # two steps, validation behind each
    cfg = config.complete()
    longest, answers = cfg.sampling.max_new_tokens, cfg.pairs.responses_per_prompt
    pair = pair_of(found.prompt_lengths[fit], found.real_lengths[fit], longest, answers)
    needed = _fit_memory(config, machine, method, arguments.model, pair.total)
    cfg = config.complete()
    steps = trained // cfg.global_batch_size
    if steps < 1:
        raise ConfigError(f"global_batch_size={cfg.global_batch_size}: {trained} samples are no step. Lower it.")
    report += [
        f"steps     {counted(cfg.max_iterations, 'iteration')} x {counted(cfg.max_epochs, 'epoch')} x "
        f"{counted(steps, 'step')} of {counted(cfg.global_batch_size, 'prompt')}",
        f"memory    {_gib(needed.training)} GiB to train, {_gib(needed.playing)} to generate, of {machine.gib:.0f}: "
        f"rows of {cfg.pairs.row_tokens:,} tokens, {counted(fewest_sequences(cfg), 'response')} or more at once",
    ]
    report += _time(cfg, machine, steps * cfg.global_batch_size, pair)
    report[0] += f", of which {needed.trained:,} are trained" if method != "full" else ""
    title = f"# SPIN, {_METHOD_TEXTS[method]}, sized by `spin new` for {machine.name}"
    return f"{title}\n#   spin run spin_recipe --config {arguments.out}\n{config.text()}", report


def _gib(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else "under 0.1"


def has_experts(cfg: SPINConfig) -> bool:
    """Whether the model that a config names has experts in place of an MLP."""
    model = build_model({key: cfg.model[key] for key in (COMPONENT, "path")}, torch.float32)
    return any(isinstance(module, MoE) for module in model.modules())


class _Config:
    """A raw config in the making. What the user set stays as it is."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._folder: str | None = None  # of the model, once it was found

    def get(self, path: str) -> Any:
        value: Any = self.values
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def put(self, path: str, value: Any, default: Any = None) -> None:
        """Sets a key that is not set, unless to its default."""
        *sections, key = path.split(".")
        if self.get(path) is None and value != default:
            inner = self.values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = value

    def complete(self, changes: Mapping[str, Any] = MappingProxyType({})) -> SPINConfig:
        """The config that a run would have, with other keys by path; a model's name is looked up once."""
        other = _Config(deepcopy(self.values))
        for path, value in changes.items():
            other.put(path, value)
        if other.get(f"optimizer.{COMPONENT}") == _SMALL_OPTIMIZER:
            other.values["optimizer"].pop("fused", None)
        if self._folder is not None:
            other.values["model"]["path"] = self._folder
        cfg = complete(OmegaConf.create(other.values), SPINConfig)
        check_lora(cfg)
        self._folder = cfg.model.get("path")
        return cfg

    def text(self) -> str:
        """YAML: a section on a line; data set and model with a line for each key if there is room."""
        keys = [*_FIRST_KEYS, *(key for key in fields_of(SPINConfig) if key not in _FIRST_KEYS)]
        lines = {key: [f"{key}: {inline_yaml(self.values[key])}"] for key in keys if key in self.values}
        room = _MOST_LINES - _HEADER_LINES - len(lines)
        for section in ("dataset", "model"):
            items = self.values[section].items()
            if 1 < len(items) <= room:
                room -= len(items)
                lines[section] = [f"{section}:", *(f"  {key}: {inline_yaml(value)}" for key, value in items)]
        return "".join(f"{line}\n" for of_key in lines.values() for line in of_key)


def _survey(cfg: SPINConfig, config: _Config, report: list[str]) -> Survey:
    """What the data set holds, as the model's tokenizer sees it; sets columns and an option of the template."""
    options: dict[str, Any] = plain(cfg.dataset)
    transform = instantiate(nested(cfg.dataset, options.get("message_transform"), "message_transform"))
    tokenizer = adapt_tokenizer(instantiate(cfg.tokenizer))
    try:
        found = survey(tokenizer, options, transform)
    except DataError:
        quiet = _without_reasoning(tokenizer)
        if quiet is None:
            raise
        option, tokenizer = quiet
        found = survey(tokenizer, options, transform)
        config.put(f"tokenizer.template_options.{option}", False)
        report.append(f"template  {option}=false: the model would reason before it responds, the real responses do not")
    if found.column_map and not options.get("column_map"):
        config.put("dataset.column_map", found.column_map)
    columns = "".join(f", {column} is the column {name}" for column, name in found.column_map.items())
    report.append(f"data      {counted(found.rows, 'row')}{_formats(found)}{columns}")
    if found.faults.total:
        report.append(f"          {found.faults.total:,} cannot be used and are skipped: {found.faults.lines()[0]}")
    return found


def _formats(found: Survey) -> str:
    """Which format the rows have, or how many of them have which."""
    (first, count), *others = found.formats.items()
    if others:
        return f" of several formats: {', '.join(f'{name} {count:,}' for name, count in found.formats.items())}"
    how = "by dataset.message_transform" if first is None else f"in the format {first}"
    return f" {how}" if count == found.rows else f", {count:,} of them {how}"


def _without_reasoning(tokenizer: PromptTokenizer) -> tuple[str, ChatTokenizer] | None:
    """If a template has the model reason: the option by which it does not, and the tokenizer with it."""
    if not isinstance(tokenizer, ChatTokenizer) or not tokenizer.asks_reasoning:
        return None
    for name in THINKING_OPTIONS:
        try:
            return name, ChatTokenizer(tokenizer.path, tokenizer.chat_template, template_options={name: False})
        except DataError:  # the template does not read it
            continue
    return None


def _hold_out(found: Survey, fit: np.ndarray, cfg: SPINConfig, config: _Config) -> tuple[int, int]:
    """Chooses how much is held out, unless there is a validation set; samples for training and those held out."""
    turns = cfg.dataset.get("turns", "last")
    if cfg.validation_dataset is not None:
        parts = found.split(0.0, fit, turns)
    else:
        most = len(found.sample_ids)
        first = min(0.1, float(f"{_MOST_HELD_OUT / most:.1g}"))
        for fraction in (config.get("dataset.validation_fraction") or first, 0.2, 0.3, 0.4, 0.5):
            parts = found.split(fraction, fit, turns)
            if parts[1]:
                break
        config.put("dataset.validation_fraction", fraction)
    if parts[0] < 2 or (cfg.validation_dataset is None and not parts[1]):
        raise DataError(
            f"{cfg.dataset.source}: of {len(found.sample_ids)} usable samples {int(fit.sum())} fit within the limits, "
            "too few to train on some and hold out others. Give more data, or dataset.max_response_tokens."
        )
    return parts


def _fit_memory(config: _Config, machine: Machine, method: str, model: str, pair_tokens: int) -> Estimate:
    """Chooses rows, checkpointing, optimizer and the generator's batch so that a run fits; what it will need."""
    cfg = config.complete()
    shapes = shapes_of(cfg)  # which none of these changes
    long_rows, short_rows = [1024, 512], []
    if machine.has_gpu:
        long_rows = [*reversed(longer_rows(cfg, machine.ranks, pair_tokens, shapes)), 8192, 4096]
        short_rows = [2048, 1024, 512]
    training = [(False, row_tokens) for row_tokens in long_rows]
    training += [(True, row_tokens) for row_tokens in (*long_rows, *short_rows)]
    for optimizer in (None, _SMALL_OPTIMIZER) if machine.has_gpu and method == "full" else (None,):
        changes: dict[str, Any] = {} if optimizer is None else {f"optimizer.{COMPONENT}": optimizer}
        for checkpoints, row_tokens in training:
            changes |= {"enable_activation_checkpointing": checkpoints, "pairs.row_tokens": row_tokens}
            if estimate(config.complete(changes), machine.ranks, model=shapes).training <= machine.gib:
                break
        for batch_size in ("auto", 16, 8, 4, 2, 1):
            changes["generator.batch_size"] = batch_size
            needed = estimate(config.complete(changes), machine.ranks, model=shapes)
            if needed.playing <= machine.gib:
                break
        if needed.peak <= machine.gib:
            break
    else:
        raise ConfigError(
            f"{model}: {method} needs {needed.training:.1f} GiB to train and {needed.playing:.1f} to generate, "
            f"{machine.gib:.1f} are there on {machine.name}. {_REMEDIES[method]}"
        )
    if optimizer is not None:
        config.put(f"optimizer.{COMPONENT}", optimizer)
        config.values["optimizer"].pop("fused", None)
    config.put("enable_activation_checkpointing", checkpoints, False)
    config.put("pairs.row_tokens", row_tokens, 8192)
    config.put("generator.batch_size", batch_size, "auto")
    return needed


def _time(cfg: SPINConfig, machine: Machine, prompts: int, pair: PairTokens) -> list[str]:
    """How long the run takes by the rates of its GPUs, in a line; none if they are not known."""
    if machine.kind is None:
        return []
    needed = estimate(cfg, machine.ranks, pair=pair)
    cluster = Cluster(machine.ranks, 1, machine.kind, 0, 0.0)
    found = stages(cfg, needed.work, cluster, prompts, needed.pair, needed.rows)
    each, seconds = ", ".join(f"{stage.name} {clock(stage.seconds)}" for stage in found), sum(s.seconds for s in found)
    origin = "extrapolated" if any(is_extrapolated(stage, machine.kind) for stage in found) else "by measured rates"
    return [f"time      {clock(seconds)} an iteration ({each}), {clock(cfg.max_iterations * seconds)} in all; {origin}"]
