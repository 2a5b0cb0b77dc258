"""Whether a config fits, the least change that makes it fit, and the page of ``spin estimate``:

    spin estimate lora model.path=FOLDER
    spin estimate full --gpus 64 --hosts 8 --gpu H200 model.path=FOLDER pairs.row_tokens=12288

Memory is that of :mod:`spin.cli.memory`, times are those of :mod:`spin.cli.timing`.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spin.cli.memory import STAGES, Estimate, estimate, fewest_sequences, longer_rows, shapes_of, size_text, usable_gib
from spin.cli.rates import GPUS, kind_of_gpu
from spin.cli.timing import Cluster, PairTokens, Stage, stages, table
from spin.cli.workload import workload
from spin.config import SPINConfig, complete, load_config
from spin.core.errors import ConfigError

_MOST_GPUS = 16384  # that are asked for
_MOST_GPUS_OF_REMEDY = 1024
# of torch's AdamW, which the one of 8 bits does not take
_ADAMW_KEYS = ("fused", "foreach", "capturable", "differentiable")
_Change = tuple[list[str], ...]  # overrides of each switch, none if it stays


def print_estimate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prints the tables of a config, and what makes it fit."""
    gpus, hosts = arguments.gpus, arguments.hosts
    if hosts < 1 or not 1 <= gpus <= _MOST_GPUS or gpus % hosts:
        raise ConfigError(
            f"--gpus {gpus} --hosts {hosts}: expected 1 to {_MOST_GPUS:,} GPUs, the same number on each host."
        )
    name, note = (arguments.gpu, "") if arguments.gpu else _gpu_here()

    def load(more: Sequence[str]) -> SPINConfig:
        raw = load_config(arguments.config, [*overrides, *more])
        if raw.get("compute_dtype", "auto") == "auto" and raw.get("device") != "cpu":
            raw.compute_dtype = "bf16"  # of the GPUs that it is for, wherever this runs
        return complete(raw, SPINConfig)

    cfg = load([])
    model = shapes_of(cfg)  # no switch changes it
    work = workload(cfg, model.max_seq_len, arguments.prompts, arguments.pair_tokens)
    case = _Case(name, gpus // hosts, arguments.links, arguments.pair_tokens, work.prompts, work.pair, model)
    found = case.memory(cfg, gpus)
    given = {"--pair-tokens": (arguments.pair_tokens, found.pair.total), "--prompts": (arguments.prompts, work.prompts)}
    lowered = "".join(
        f"{option} {asked}: the config lets {taken:,} through at most, which are counted\n"
        for option, (asked, taken) in given.items()
        if asked is not None and taken < asked
    )
    if cfg.device == "cpu":
        note += "device is cpu, whose rates are not known: this is what GPUs would take\n"
    of_hosts = f" of {hosts} hosts" if hosts > 1 else ""
    print(
        f"{note}{work.note}{lowered}{arguments.config} on {gpus} {name}{of_hosts}: an estimate\n\n"
        f"{found.table(case.gpus_of_host)}\n"
    )
    if case.seconds(cfg, gpus) is not None:
        _print_that_it_fits(case, cfg, gpus, found, load)
    else:
        cfg, gpus, found = _print_what_makes_it_fit(case, cfg, gpus, found, load)
    print(table(*case.stages(cfg, gpus, found), work.prompts, found.pair.total, cfg.max_iterations))


def _gpu_here() -> tuple[str, str]:
    """The kind of GPU of this machine, and a line if it is another that is assumed."""
    here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    kind = kind_of_gpu(here) if here else None
    found = f"{here} here, whose rates are not known" if here else "no GPU here"
    return (kind, "") if kind else ("H100", f"{found}: H100 assumed (--gpu names another)\n")


@dataclass(frozen=True)
class _Case:
    """What stays the same while settings change."""

    gpu: str  # kind, by its name in the table of rates
    gpus_of_host: int
    links: tuple[int, float]  # of a host: network cards, and Gb/s of each
    pair_tokens: int | None  # that are asked for
    prompts: int  # of an iteration
    pair: PairTokens | None  # of the data
    model: Any  # on the meta device

    def memory(self, cfg: SPINConfig, gpus: int) -> Estimate:
        memory_gib = GPUS[self.gpu].memory_gib
        return estimate(cfg, gpus, self.pair_tokens, memory_gib, self.model, self.prompts, self.pair)

    def stages(self, cfg: SPINConfig, gpus: int, found: Estimate) -> tuple[list[Stage], Cluster]:
        cluster = Cluster(gpus, gpus // self.gpus_of_host, self.gpu, *self.links)
        return stages(cfg, found.work, cluster, self.prompts, found.pair, found.rows), cluster

    def seconds(self, cfg: SPINConfig, gpus: int) -> float | None:
        """Of an iteration; None: it does not fit."""
        if gpus % cfg.replicas or cfg.generator.get("tensor_parallel_size", 1) > gpus:
            return None
        found, memory_gib = self.memory(cfg, gpus), GPUS[self.gpu].memory_gib
        engine = cfg.generator.get("gpu_memory_utilization", 0.5) * memory_gib
        is_engine = cfg.generator.component.endswith(".VLLMGenerator")
        if found.peak > usable_gib(memory_gib) or (is_engine and found.playing_copy > 0.9 * engine):
            return None
        return sum(stage.seconds for stage in self.stages(cfg, gpus, found)[0])


_Load = Callable[[Sequence[str]], SPINConfig]  # the config with more overrides


def _print_that_it_fits(case: _Case, cfg: SPINConfig, gpus: int, found: Estimate, load: _Load) -> None:
    memory_gib = GPUS[case.gpu].memory_gib
    usable = f"{usable_gib(memory_gib):.1f} GiB that {memory_gib:.1f} leave for tensors"
    print(f"It fits: {size_text(found.peak)} of the {usable}.")
    longer = longer_rows(cfg, gpus, found.pair.total, case.model)
    fitting = [n for n in longer if case.seconds(load([f"pairs.row_tokens={n}"]), gpus) is not None]
    print(f"Longer rows, which are faster, fit too: pairs.row_tokens={fitting[-1]}\n" if fitting else "")


def _print_what_makes_it_fit(
    case: _Case, cfg: SPINConfig, gpus: int, found: Estimate, load: _Load
) -> tuple[SPINConfig, int, Estimate]:
    """Gives the config, the number of GPUs and the memory that the times are for."""
    memory_gib = GPUS[case.gpu].memory_gib
    usable = usable_gib(memory_gib)
    over = [f"{stage} ({peak:.1f})" for stage, peak in zip(STAGES, found.peaks(), strict=True) if peak > usable]
    what = f"{', '.join(over)} of {usable:.1f} GiB" if over else "the engine's weights in its part of the memory"
    print(f"It does not fit: {what} that {memory_gib:.1f} leave for tensors.")
    change = remedy(load, gpus, min(8, case.gpus_of_host), case.seconds)
    if change is None:
        print("No switch that is tried here makes it fit; the times are those that it would take.\n")
        return cfg, gpus, found
    overrides, number = change
    cfg = load(overrides)
    found = case.memory(cfg, number)
    more = [f"--gpus {number} --hosts {number // case.gpus_of_host}"] if number > gpus else []
    peaks = ", ".join(f"{stage} {size_text(peak)}" for stage, peak in zip(STAGES, found.peaks(), strict=True))
    words = " ".join([*more, *map(shlex.quote, overrides)])
    print(f"The least change that fits, with which the times are:\n  {words}")
    print(f"  on each GPU: {peaks}\n  on each host: {found.host(case.gpus_of_host)}\n")
    return cfg, number, found


def _switches(cfg: SPINConfig, gpus: int, gpus_of_host: int) -> list[list[list[str]]]:
    """Settings that save memory on the same GPUs without offload, as overrides: a list for each switch, the mildest
    first. The last switch is the generator."""
    found = []
    if not cfg.enable_activation_checkpointing:
        found.append([["enable_activation_checkpointing=true"]])
    halves = (cfg.pairs.row_tokens >> i for i in range(1, 16))
    found.append([[f"pairs.row_tokens={tokens}"] for tokens in halves if tokens >= 1024])
    if cfg.optimizer.component.rsplit(".", 1)[-1] == "AdamW":
        without = [f"~optimizer.{key}" for key in _ADAMW_KEYS if key in (cfg.optimizer.model_extra or {})]
        found.append([["optimizer._component_=spin.training.AdamW8bit", *without]])
    generators = []
    if cfg.generator.component.rsplit(".", 1)[-1] == "TorchtuneGenerator":
        size = fewest_sequences(cfg)
        generators = [[f"generator.batch_size={size >> i}"] for i in range(1, 16) if size >> i]
        engine = "generator={_component_: spin.generators.VLLMGenerator}"
        sizes = (size for size in (1, 2, 4, 8) if size <= gpus_of_host and gpus % size == 0)
        generators += [[engine, f"generator.tensor_parallel_size={size}"] for size in sizes]
    return [*(settings for settings in found if settings), generators]


def remedy(
    load: Callable[[Sequence[str]], SPINConfig],
    gpus: int,
    gpus_of_host: int,
    seconds: Callable[[SPINConfig, int], float | None],
) -> tuple[list[str], int] | None:
    """The least change that makes a config fit: of those that need every switch that they have, the fastest.

    Of settings that differ in size alone it is the mildest, and of changes within 5 % the one of fewest switches.
    Offload is tried where no other switch makes it fit, and more GPUs where that does not either.

    Args:
        load (Callable[[Sequence[str]], SPINConfig]): the config with overrides.
        gpus (int): how many there are.
        gpus_of_host (int): the most that share an engine.
        seconds (Callable[[SPINConfig, int], float | None]): of an iteration on that many GPUs; None: it does not fit.

    Returns:
        tuple[list[str], int] | None: overrides and GPUs; None: nothing here does.
    """
    cfg = load([])
    *switches, generators = _switches(cfg, gpus, gpus_of_host)
    can_offload = not cfg.fsdp_cpu_offload and not cfg.model.get("quantize_base")
    hardest = [override for settings in switches for override in settings[-1]]
    for number in (gpus << i for i in range(11) if gpus << i <= max(gpus, _MOST_GPUS_OF_REMEDY)):
        for last in ([], ["fsdp_cpu_offload=true"])[: 1 + can_offload]:
            found: dict[tuple[int, ...], tuple[float, _Change]] = {}
            for generator in ([], *generators):
                if seconds(load([*hardest, *generator, *last]), number) is None:
                    continue
                for chosen in itertools.product(*([[], *settings] for settings in switches)):
                    change = (*chosen, generator)
                    sizes = tuple(map(len, change))  # an engine has two overrides, a batch size one
                    if sizes in found or any(_is_part(other, change) for _, other in found.values()):
                        continue
                    if (time := seconds(load([*itertools.chain(*change), *last]), number)) is not None:
                        found[sizes] = time, change
            if found:
                limit = 1.05 * min(time for time, _ in found.values())
                fast = [change for time, change in found.values() if time <= limit]
                return [*itertools.chain(*min(fast, key=lambda change: sum(map(bool, change)))), *last], number
    return None


def _is_part(one: _Change, other: _Change) -> bool:
    """Whether the second does what the first does, and perhaps more."""
    return all(not mine or mine == its for mine, its in zip(one, other, strict=True))
