"""What an iteration takes, stage by stage, from the rates of :mod:`spin.cli.rates`.

Compute counts the least work that the pairs need: every prompt once, no padding, nothing made twice, except for
activations that are made again in backward. Traffic hides behind the compute of the same row; what is left over adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from spin.cli.rates import (
    BUS_GB_PER_SECOND,
    CPU_OPTIMIZER_GB_PER_SECOND,
    DECODE_GB_PER_SECOND,
    DENSE,
    DISK_GB_PER_SECOND,
    FLOAT8_SPEEDUP,
    GATHER_GB_PER_SECOND,
    GPUS,
    LINK_FRACTION,
    REDUCE_GB_PER_SECOND,
    SCORE_FRACTION,
    TRAIN_FRACTION,
    TRAIN_FRACTION_ADAPTERS,
    Rate,
)
from spin.config import SPINConfig
from spin.core.terminal import clock, counted


class PairTokens(NamedTuple):
    """Mean tokens of a pair, part by part."""

    prompt: float
    real: float
    generated: float  # all responses together

    @property
    def total(self) -> int:
        """What the pair takes in a row."""
        return round(sum(self))


MEASURED_PAIR = PairTokens(199, 278, 278)  # that rates were measured with
_SEQUENCES = 256  # of an engine of vLLM at once, and of the embedded one with ``batch_size: auto``


@dataclass(frozen=True)
class Cluster:
    """Where a run is to go."""

    gpus: int
    hosts: int
    gpu: str  # of GPUS
    links: int  # network cards of a host
    gigabits: float  # a second, of each


@dataclass(frozen=True)
class Work:
    """The sizes of a model and its traffic that times follow from; bytes are of the whole model."""

    layer_weights: int  # that multiply a token
    head_weights: int
    layers: int
    attention_dim: int  # of all heads of queries
    trained: int
    frozen: bool
    sparse: bool  # has experts, with which no rate was measured
    weight_bytes: float  # of bf16 weights, as generation reads them
    cache_bytes: float  # for each token of a sequence
    gathered_bytes: float
    checkpoint_bytes: float
    export_bytes: float


@dataclass(frozen=True)
class Stage:
    """Seconds of a stage of an iteration."""

    name: str
    compute: float
    exposed: float  # traffic that does not hide
    rates: tuple[Rate, ...]

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.compute + self.exposed


def forward_flops(work: Work, prompt: float, responses: list[float]) -> tuple[float, float, float]:
    """FLOPs of a pair's forward in layers, head and attention; a product and its addition are two."""
    visible = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
    return (
        2 * work.layer_weights * (prompt + sum(responses)),
        2 * work.head_weights * sum(responses),
        4 * work.layers * work.attention_dim * visible,
    )


def stages(cfg: SPINConfig, work: Work, cluster: Cluster, prompts: int, pair: PairTokens, rows: int) -> list[Stage]:
    """The times of an iteration over ``prompts``, whose pairs have the means of ``pair``; ``rows`` are those that a GPU
    takes in an optimizer step."""
    gpu, shards = GPUS[cluster.gpu], cluster.gpus // cfg.replicas
    answers = cfg.pairs.responses_per_prompt
    prompt, real, generated = pair.prompt, pair.real, pair.generated / answers
    flops = forward_flops(work, prompt, [real, *[generated] * answers])

    def share(table: dict[str, Rate]) -> Rate:
        return table.get(cluster.gpu) or next(iter(table.values()))

    # --- play ---
    kind = cfg.generator.component.rsplit(".", 1)[-1]
    method = "full" if not work.frozen else "qlora" if cfg.model.get("quantize_base") else "lora"
    is_vllm = kind != "TorchtuneGenerator"
    decode = DECODE_GB_PER_SECOND["vllm" if is_vllm else method]
    bandwidth = decode.value * 1e9 * gpu.memory_gb_per_second / GPUS[decode.gpu].memory_gb_per_second
    together = cfg.generator.get("tensor_parallel_size", 1) if is_vllm else 1
    for_each = prompts * answers * together / cluster.gpus  # responses of an engine
    size = cfg.generator.get("batch_size", "auto")
    batch = min(_SEQUENCES if is_vllm or size == "auto" else size, max(1, math.ceil(for_each)))
    steps = for_each / batch * generated + max(0.0, cfg.sampling.max_new_tokens - generated)  # the last ones are alone
    step = (work.weight_bytes + batch * (prompt + generated / 2) * work.cache_bytes) / together / bandwidth
    scoring = share(SCORE_FRACTION)
    score_rate = scoring.value * gpu.tflops * 1e12 * cluster.gpus
    prefill = prompts * answers * 2 * work.layer_weights * prompt / score_rate
    gather_all = _gather(cluster, shards, work.gathered_bytes, GATHER_GB_PER_SECOND)
    between_hosts = [LINK_FRACTION] if cluster.hosts > 1 else []
    links = [GATHER_GB_PER_SECOND, *between_hosts] if shards > 1 else []
    play = Stage("generate", steps * step + prefill, gather_all, (decode, scoring, *links))

    # --- score ---
    offload = work.gathered_bytes / shards / (BUS_GB_PER_SECOND.value * 1e9) if cfg.fsdp_cpu_offload else 0.0
    steps_of_epoch = math.ceil(prompts / cfg.global_batch_size)
    compute = prompts * sum(flops) / score_rate
    gathers = rows if cfg.fsdp_reshard_after_forward else 1
    traffic = steps_of_epoch * gathers * (gather_all + offload)
    score = Stage("score", compute, max(0.0, traffic - compute), (scoring, *links))

    # --- train ---
    training = share(TRAIN_FRACTION_ADAPTERS if work.frozen else TRAIN_FRACTION)
    layers, head, attention = flops
    own = 0 if work.frozen else 1  # products for the weights' own gradients
    needed = (2 + own) * (layers + head) + 3 * attention
    if cfg.checkpointed_every:
        needed += (layers + attention) / cfg.checkpointed_every
    steps_in_all = cfg.max_epochs * steps_of_epoch
    measured = [each for size, each in FLOAT8_SPEEDUP.items() if work.layer_weights >= size * work.layers]
    in_float8 = measured[-1:] if cfg.enable_float8_training else []
    speedup = math.prod(each.value for each in in_float8)
    compute = cfg.max_epochs * prompts * needed / (training.value * speedup * gpu.tflops * 1e12 * cluster.gpus)
    gathers = 2 * rows if cfg.fsdp_reshard_after_forward else 1
    reduces = 1 if cfg.fsdp_accumulate_unsharded else rows
    reduce = _gather(cluster, shards, 4.0 * work.trained, REDUCE_GB_PER_SECOND)
    if cfg.replicas > 1:  # an all-reduce of the shards' gradients, in the step's last row
        card = cluster.links * cluster.gigabits / 8 * 1e9 * LINK_FRACTION.value / (cluster.gpus / cluster.hosts)
        reduce += 8.0 * work.trained / shards * (1 - 1 / cfg.replicas) / card / reduces
    exposed = max(0.0, steps_in_all * (gathers * (gather_all + offload) + reduces * reduce) - compute)
    used = [training, *in_float8, *links, *([REDUCE_GB_PER_SECOND] if links else [])]
    if cfg.fsdp_cpu_offload:  # gradients down, and AdamW where nothing hides it: it reads 16 bytes and writes 12
        exposed += steps_in_all * work.trained / shards * 4 / (BUS_GB_PER_SECOND.value * 1e9)
        exposed += steps_in_all * work.trained / shards * 28 / (CPU_OPTIMIZER_GB_PER_SECOND.value * 1e9)
        used += [BUS_GB_PER_SECOND, CPU_OPTIMIZER_GB_PER_SECOND]
    train = Stage("train", compute, exposed, tuple(used))

    # --- save and export ---
    # written by all hosts; the export is waited for, and a checkpoint too unless it is saved in the background
    is_waited_for = not cfg.checkpointer.get("async_save", True)
    written = work.export_bytes + (work.checkpoint_bytes if is_waited_for else 0.0)
    save = Stage("save, export", written / cluster.hosts / (DISK_GB_PER_SECOND.value * 1e9), 0.0, (DISK_GB_PER_SECOND,))
    found = [play, score, train]
    if work.sparse:
        found = [replace(stage, rates=(*stage.rates, DENSE)) for stage in found]
    return [*found, save]


def _gather(cluster: Cluster, shards: int, whole_bytes: float, rate: Rate) -> float:
    """Seconds in which every GPU of a group of shards receives the others', or reduces its own; rings use every link of
    every host."""
    bandwidth = rate.value
    if shards > cluster.gpus // cluster.hosts:
        bandwidth = min(bandwidth, cluster.links * cluster.gigabits / 8 * LINK_FRACTION.value)
    return whole_bytes * (1 - 1 / shards) / (bandwidth * 1e9)


def is_extrapolated(stage: Stage, gpu: str) -> bool:
    """Whether a rate of a stage was assumed, or measured on another kind of GPU."""
    return any(not rate.is_measured or rate.gpu != gpu for rate in stage.rates)


def table(found: list[Stage], cluster: Cluster, prompts: int, pair_tokens: int, iterations: int = 1) -> str:
    """The stages, a line each, and what the figures rest on."""
    total = sum(stage.seconds for stage in found)
    title = f"time of an iteration of {counted(prompts, 'prompt')}"
    lines = [f"{title:<40}{'compute':>12}{'traffic':>12}{'in all':>12}{'part':>7}"]
    for stage in found:
        mark = " *" if is_extrapolated(stage, cluster.gpu) else ""
        cells = "".join(f"{clock(seconds):>12}" for seconds in (stage.compute, stage.exposed, stage.seconds))
        lines.append(f"{stage.name + mark:<40}{cells}{stage.seconds / total:>7.0%}")
    lines.append(f"{'iteration':<64}{clock(total):>12}")
    if iterations > 1:
        lines.append(f"{counted(iterations, 'iteration'):<64}{clock(iterations * total):>12}")
    rates = {rate for stage in found for rate in stage.rates}
    measured = sorted({f"{rate.source} ({rate.gpu}, {rate.date})" for rate in rates if rate.is_measured})
    starred = [f"it is assumed that {rate.source.removeprefix('assumed: ')}" for rate in rates if not rate.is_measured]
    if others := sorted({rate.gpu for rate in rates if rate.is_measured and rate.gpu != cluster.gpu}):
        starred.append(f"a rate was measured on {' and '.join(others)}, not on {cluster.gpu}")
    legend = f"\n* extrapolated: {'; '.join(sorted(starred))}" if starred else ""
    links = f"; between hosts {cluster.links} x {cluster.gigabits:g} Gb/s each" if cluster.hosts > 1 else ""
    return "\n".join(lines) + (
        f"\npairs of {pair_tokens:,} tokens on average; traffic is what does not hide behind compute{links}"
        f"\nmeasured: {', '.join(measured)}{legend}"
    )
