"""How fast the training engine is, step by step, against torchtune's DPO recipe and against the hardware.

    python benchmarks/training_step.py --model tiny                          # on a CPU, in seconds: does it run?
    python benchmarks/training_step.py --out results.json                    # one GPU, Llama 3.2 1B shapes
    torchrun --nproc_per_node 2 benchmarks/training_step.py --model llama3_1_8b --arms long --out results_8b.json
    python benchmarks/scaling.py --out scaling.json                          # all GPUs of a host, one after another
    python benchmarks/training_step.py --table results.json                  # the tables again, from the file

Weights and tokens are random, lengths log-normal (benchmarks/work.py); every arm of the ladder (benchmarks/arms.py)
computes the same loss and gradient, which is checked against fp32 before anything is timed. Times are medians over
rounds in which the arms take turns; every timed run follows an untimed one of the same arm. Weights are fp32 and
computed with in bf16 on a GPU; on a CPU all is fp32, layers not compiled. Under torchrun weights are sharded (HSDP with
--replicas), and pairs/s counts the pairs of all ranks.

What is measured (--what):
    ladder          forward and backward of 64 pairs, from padded to the product, for each mix of lengths
    optimizer_step  the last arm with clipping and AdamW, against its forward and backward alone
    reference       the reference pass against an epoch of whole optimizer steps over the same pairs
    scaling         pairs/s against prompt length and responses per prompt, memory against row length
    head            time and memory of output layer and loss alone
    profile         which kernels the time of an optimizer step goes to
A file that exists keeps the sections that a run does not measure, so that a long benchmark can be run in parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # arms of many shapes share a GPU

import torch
import torch.distributed as dist
from arms import ARMS, FLOAT8, ROW_MULTIPLE, Arm, Layout, objective_of
from omegaconf import OmegaConf
from page import table
from torch import nn
from work import (
    MIXES,
    MODELS,
    WEIGHT_SCALE,
    Sizes,
    bytes_of,
    floor_of_work,
    listed,
    mixed_pairs,
    random_nats,
    random_pairs,
    randomize,
)

from spin.config import SPINConfig
from spin.core.files import write_json
from spin.core.ranks import World, barrier, gather_objects, init_world, shutdown
from spin.data import Pair, pack_row
from spin.model.build import build_model, choose_attention, prepare_model, window_of
from spin.model.sharding import accumulating, clip_grad_norm, materialize, shard_model
from spin.pairs.loader import load_rows
from spin.pairs.packing import RowLayout
from spin.reference.logprobs import pair_objective, response_logps
from spin.reference.stage import score_batches
from spin.training.optim import AdamW8bit

WHAT = ("ladder", "optimizer_step", "reference", "scaling", "head", "profile")
GIB = 2**30
PLAIN_VARIANTS = ("torchtune", "exact")  # models that the product has not touched, the second in fp32
CHECKED_PAIRS = 8  # whose loss and gradient are compared with fp32
MICRO_BATCHES = (4, 8, 16)  # pairs of a padded batch; the fastest that fits stands for the baseline
RESPONSE = 278  # tokens of a response where lengths are all the same


class Bench:
    """The models that arms run, made when first needed, and the clock.

    Args:
        args (argparse.Namespace): of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.preset = MODELS[args.model]
        self.world: World = init_world(args.device, replicas=args.replicas)
        self.on_gpu = self.world.device.type == "cuda"
        self.compute_dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self._models: dict[str, nn.Module] = {}
        shape = self._build()
        self.sizes = Sizes.of(shape)
        self.nats = random_nats(self.sizes, WEIGHT_SCALE)
        row_tokens = args.row_tokens or self.preset.row_tokens
        self.layout = Layout(
            world=self.world,
            flex=choose_attention(shape, self.world, self.compute_dtype),
            row_tokens=row_tokens,
            long_row_tokens=args.long_row_tokens or 2 * row_tokens,
            micro_batch=MICRO_BATCHES[0],
            chunk_tokens=args.chunk_tokens,
            window=window_of(shape),
        )

    # ---- models
    def _build(self) -> nn.Module:
        return build_model(OmegaConf.create(self.preset.builder), torch.float32)

    def model(self, variant: str) -> nn.Module:
        """The model of some arms, with the same weights as all others."""
        if variant not in self._models:
            model = self._build()
            if variant in PLAIN_VARIANTS:
                exact = variant == "exact"
                shard_model(model, self.world, compute_dtype=torch.float32 if exact else self.compute_dtype)
                materialize(model, self.world)
            else:
                if variant in FLOAT8:
                    FLOAT8[variant](model, self.world.device)
                prepare_model(
                    model,
                    self.world,
                    compute_dtype=self.compute_dtype,
                    compile_layers=self.is_compiled(variant),
                    reshard_after_forward=not self.args.keep_gathered,
                )
            randomize(model, self.world)
            self._models[variant] = model
        return self._models[variant]

    def is_compiled(self, variant: str) -> bool:
        """Whether its layers are compiled; on a CPU that takes longer than a smoke test may."""
        return variant in ("compiled", *FLOAT8) and self.on_gpu

    def drop(self, *variants: str) -> None:
        """Gives the memory of models back."""
        for variant in variants:
            self._models.pop(variant, None)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def zero_grads(self) -> None:
        """Frees the gradients of all models."""
        for model in self._models.values():
            model.zero_grad(set_to_none=True)

    # ---- work
    def mixed_pairs(self, mix: str, num: int | None = None, seed: int = 0) -> list[Pair]:
        """Pairs of a mix, as many as the model's preset has."""
        size = self.args.pairs or self.preset.pairs
        return mixed_pairs(mix, num or size, self.sizes.vocab_size, self.nats, self.preset.lengths, seed)

    def equal_pairs(self, num: int, prompt: int, generated: int = 1) -> list[Pair]:
        """Pairs of one length."""
        response = max(1, round(RESPONSE * self.preset.lengths))
        responses = [[response] * (1 + generated)] * num
        return random_pairs([prompt] * num, responses, self.sizes.vocab_size, self.nats)

    def lay_out(self, arm: Arm, pairs: Sequence[Pair], layout: Layout | None = None) -> list[Any]:
        """This rank's share of a global batch, as a loader with workers hands it over."""
        batch = arm.lay_out(pairs, layout or self.layout)
        return [piece.pin_memory() for piece in batch] if self.on_gpu else batch

    def forward_backward(self, arm: Arm, batch: Sequence[Any], num_pairs: int) -> torch.Tensor:
        """Adds up the gradients of a global batch; returns this rank's part of its loss, on the device."""
        model = self.model(arm.variant)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if arm.variant in PLAIN_VARIANTS:  # torchtune gathers weights and reduces gradients for every micro-batch
            pieces: Any = nullcontext(batch)
        else:
            pieces = accumulating(model, batch, unsharded_gradients=self.args.unsharded_gradients)
        with pieces as each_piece:
            for piece in each_piece:
                loss = arm.loss(model, piece.to(self.world.device), self.layout.chunk_tokens) / num_pairs
                (loss * self.world.world_size).backward()  # FSDP2 averages gradients over ranks
                total += loss.detach()
        return total

    def optimizer_step(self, arm: Arm, batch: Sequence[Any], num_pairs: int, optimizer: torch.optim.Optimizer) -> None:
        """Forward and backward of a global batch, clipping, AdamW; the host reads the norm, as recipes do."""
        self.forward_backward(arm, batch, num_pairs)
        clip_grad_norm(self.model(arm.variant), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def optimizer(self, arm: Arm) -> torch.optim.Optimizer:
        """AdamW on fp32 weights. The step is too small to matter: later rounds shall see the same weights."""
        parameters = self.model(arm.variant).parameters()
        if self.args.optimizer == "adamw8bit":
            return AdamW8bit(parameters, lr=1e-12, weight_decay=0.0)
        return torch.optim.AdamW(parameters, lr=1e-12, weight_decay=0.0, fused=True)

    # ---- clock
    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock time of a function on all ranks, its work on the device included."""
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.world.world_size > 1:
            barrier(self.world)

    def race(self, runs: dict[str, tuple[str | None, Callable[[], Any]]]) -> dict[str, dict[str, Any]]:
        """Times functions in interleaved rounds.

        Args:
            runs (dict[str, tuple[str | None, Callable[[], Any]]]): by name, the variant of the model that a function
                uses (None: none, then memory that is held before does not count) and the function.

        Returns:
            dict[str, dict[str, Any]]: for each name the seconds of every round, their median, minimum and maximum, and
            the peak of the allocated memory in GiB (None on a CPU), with the model's weights and gradients, without
            other models and optimizer states; the peak of every rank, with all that it holds; or ``error``.
        """
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        peaks: dict[str, list[float]] = {name: [] for name in runs}
        whole: dict[str, float] = dict.fromkeys(runs, 0.0)
        errors: dict[str, str] = {}
        for name, (variant, function) in runs.items():  # warm-up, compilation
            error = self.warm_up(variant, function)
            if error:
                errors[name] = error
        for _ in range(self.args.rounds):
            for name, (variant, function) in runs.items():
                if name in errors:
                    continue
                self.zero_grads()
                own = bytes_of(self._models[variant]) if variant in self._models else 0
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    others = torch.cuda.memory_allocated() - own
                function()
                self.zero_grads()
                seconds[name].append(self.seconds(function))
                if self.on_gpu:
                    peaks[name].append((torch.cuda.max_memory_allocated() - others) / GIB)
                    whole[name] = max(whole[name], torch.cuda.max_memory_allocated() / GIB)
                self.zero_grads()
        by_rank = gather_objects(whole, self.world)
        return {
            name: {"error": errors[name]}
            if name in errors
            else {
                "seconds": seconds[name],
                "median_seconds": statistics.median(seconds[name]),
                "min_seconds": min(seconds[name]),
                "max_seconds": max(seconds[name]),
                "peak_gib": max(peaks[name]) if peaks[name] else None,
                "peak_gib_by_rank": [each[name] for each in by_rank] if peaks[name] else None,
            }
            for name in runs
        }

    def warm_up(self, variant: str | None, function: Callable[[], Any], times: int = 2) -> str | None:
        """Runs a function as often as asked; None, or what went wrong."""
        try:
            for _ in range(times):
                self.zero_grads()
                function()
        except torch.OutOfMemoryError:
            if self.world.world_size > 1:
                raise  # the other ranks wait in a collective
        else:
            self.zero_grads()
            return None
        self.zero_grads()
        if variant:
            self.drop(variant)  # FSDP2 was interrupted: make it again
        return "out of memory"


# ---------------------------------------------------------------------------------------------------- sections
def ceilings(bench: Bench) -> dict[str, float]:
    """What this device does: a large matrix product on random data in a burst and for seconds, after which a GPU is as
    slow as its power allows, and a copy within its memory."""
    n, many = (8192, 2000) if bench.on_gpu else (512, 10)
    left, right = torch.randn(2, n, n, device=bench.world.device, dtype=bench.compute_dtype)
    source = torch.randn(2**29 if bench.on_gpu else 2**20, device=bench.world.device)
    target = torch.empty_like(source)

    def repeat(function: Callable[[], Any], times: int) -> float:
        def run() -> None:
            for _ in range(times):
                function()

        return bench.seconds(run) / times

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(repeat(function, 10) for _ in range(5))

    return {
        "matmul_tflops": 2 * n**3 / best(lambda: left @ right) / 1e12,
        "sustained_matmul_tflops": 2 * n**3 / repeat(lambda: left @ right, many) / 1e12,
        "copy_gb_per_second": 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source)) / 1e9,
    }


def ladder(bench: Bench, arms: Sequence[str], mix: str) -> dict[str, Any]:
    """Forward and backward of one global batch by every arm."""
    pairs = bench.mixed_pairs(mix)
    layout = replace(bench.layout, micro_batch=best_micro_batch(bench, pairs)) if "padded" in arms else bench.layout
    batches = {name: bench.lay_out(ARMS[name], pairs, layout) for name in arms}
    results = bench.race(
        {
            name: (ARMS[name].variant, lambda name=name: bench.forward_backward(ARMS[name], batches[name], len(pairs)))
            for name in arms
        }
    )
    for name, result in results.items():
        positions = [piece.tokens.numel() for piece in batches[name]]
        fill = sum(piece.used_tokens for piece in batches[name]) / sum(positions)
        result.update(_speed(bench, pairs, result), positions=positions, fill=fill)
    return {
        "pairs": len(pairs),
        "mean_tokens": {
            "prompt": statistics.mean(len(pair.prompt_ids) for pair in pairs),
            "real": statistics.mean(len(pair.real_ids) for pair in pairs),
            "generated": statistics.mean(len(pair.generated[0].token_ids) for pair in pairs),
        },
        "floor_tflop": floor_of_work(bench.sizes, pairs) / 1e12,
        "micro_batch": layout.micro_batch,
        "arms": results,
    }


def _speed(bench: Bench, pairs: Sequence[Pair], result: dict[str, Any]) -> dict[str, float]:
    """Pairs and comparisons per second, and the rate at which the floor of work is done, on each device."""
    if "error" in result:
        return {}
    comparisons = sum(len(pair.generated) for pair in pairs)
    responses = len(pairs) + comparisons
    work = floor_of_work(bench.sizes, pairs) / bench.world.world_size
    return {
        "pairs_per_second": comparisons / result["median_seconds"],
        "min_pairs_per_second": comparisons / result["max_seconds"],
        "max_pairs_per_second": comparisons / result["min_seconds"],
        "responses_per_second": responses / result["median_seconds"],
        "tflops": work / result["median_seconds"] / 1e12,
    }


def best_micro_batch(bench: Bench, pairs: Sequence[Pair]) -> int:
    """The size of a padded batch that is fastest among those that fit."""
    arm, best, fastest = ARMS["padded"], MICRO_BATCHES[0], float("inf")
    for size in MICRO_BATCHES:
        if size > len(pairs) // bench.world.world_size:
            break
        batch = bench.lay_out(arm, pairs, replace(bench.layout, micro_batch=size))

        def run(batch: list[Any] = batch) -> None:
            bench.forward_backward(arm, batch, len(pairs))

        if bench.warm_up(arm.variant, run, times=1):
            break
        bench.zero_grads()
        seconds = bench.seconds(run)
        if seconds < fastest:
            best, fastest = size, seconds
    bench.zero_grads()
    return best


def check(bench: Bench, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Loss and gradient of every arm against the padded arm in fp32, on a few pairs."""
    pairs = bench.mixed_pairs("short", CHECKED_PAIRS)

    def measured(arm: Arm) -> tuple[float, list[torch.Tensor]]:
        bench.zero_grads()
        loss = bench.forward_backward(arm, bench.lay_out(arm, pairs), len(pairs))
        model = bench.model(arm.variant)
        gradients = [parameter.grad.to_local() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        return _sum(bench, loss), gradients

    exact_loss, exact = measured(replace(ARMS["padded"], variant="exact"))
    bench.drop("exact")
    exact_norm = _norm(bench, exact)
    deviations: dict[str, dict[str, float]] = {}
    limit = 1e-5
    for name in dict.fromkeys(("padded", *arms)):
        loss, gradients = measured(ARMS[name])
        deviations[name] = {
            "loss": loss,
            "loss_deviation": abs(loss - exact_loss) / abs(exact_loss),
            "grad_norm_deviation": abs(_norm(bench, gradients) - exact_norm) / exact_norm,
            "gradient_deviation": _norm(bench, (a - b for a, b in zip(gradients, exact, strict=True))) / exact_norm,
        }
        del gradients
        if name == "padded" and bench.compute_dtype == torch.bfloat16:
            # what bf16 costs grows with the depth of a random model; torchtune's own model shows how much it is here
            limit = max(1e-1, 1.5 * deviations[name]["gradient_deviation"])
            if name not in arms:
                bench.drop(ARMS[name].variant)
        if not deviations[name]["gradient_deviation"] < limit:  # NaN is not below it either
            raise SystemExit(f"arm {name} computes something else than fp32 does: {deviations[name]}")
    return deviations


def _sum(bench: Bench, value: torch.Tensor) -> float:
    total = value.double().clone()
    dist.all_reduce(total)
    return total.item()


def _norm(bench: Bench, tensors: Iterable[torch.Tensor]) -> float:
    """Norm of sharded tensors taken together."""
    return _sum(bench, torch.stack([t.double().square().sum() for t in tensors]).sum()) ** 0.5


def optimizer_step(bench: Bench, name: str) -> dict[str, Any]:
    """Whole optimizer steps against forward and backward alone, unless only the steps are asked for."""
    arm, pairs = ARMS[name], bench.mixed_pairs("short")
    batch, optimizer = bench.lay_out(arm, pairs), bench.optimizer(arm)
    runs: dict[str, tuple[str | None, Callable[[], Any]]] = {
        "forward and backward": (arm.variant, lambda: bench.forward_backward(arm, batch, len(pairs))),
        "optimizer step": (arm.variant, lambda: bench.optimizer_step(arm, batch, len(pairs), optimizer)),
    }
    if bench.args.step_alone:
        del runs["forward and backward"]
    results = bench.race(runs)
    for result in results.values():
        result.update(_speed(bench, pairs, result))
    ratio = None
    if not bench.args.step_alone:
        ratio = _ratio(results["optimizer step"], results["forward and backward"])
    rows = [piece.tokens.numel() for piece in batch]
    return {"arm": name, "runs": results, "step_over_forward_backward": ratio, "positions": rows}


def reference(bench: Bench, name: str) -> dict[str, Any]:
    """The reference pass against a training epoch of the same pairs; both pack their rows on the way."""
    arm = ARMS[name]
    batches = [bench.mixed_pairs("short", seed=seed) for seed in range(4)]
    row_tokens = bench.layout.long_row_tokens if name == "long" else bench.layout.row_tokens
    layout = bench.layout.rows(row_tokens)
    optimizer = bench.optimizer(arm)

    def epoch() -> None:
        for batch in load_rows(batches, bench.world, layout):
            bench.optimizer_step(arm, batch.rows, len(batch.pairs), optimizer)

    def score() -> None:
        score_batches(
            bench.model(arm.variant),
            batches,
            bench.world,
            layout=layout,
            chunk_tokens=bench.layout.chunk_tokens,
            as_in_training=bench.is_compiled(arm.variant),  # as the recipe does
        )

    results = bench.race({"epoch": (arm.variant, epoch), "reference pass": (arm.variant, score)})
    pairs = [pair for batch in batches for pair in batch]
    for result in results.values():
        result.update(_speed(bench, pairs, result))
    if "tflops" in results["reference pass"]:
        results["reference pass"]["tflops"] /= 3  # forward alone: one of three products everywhere
    return {"arm": name, "runs": results, "reference_over_epoch": _ratio(results["reference pass"], results["epoch"])}


def _ratio(numerator: dict[str, Any], denominator: dict[str, Any]) -> float | None:
    if "error" in numerator or "error" in denominator:
        return None
    return numerator["median_seconds"] / denominator["median_seconds"]


def scaling(bench: Bench, name: str) -> dict[str, Any]:
    """Speed and memory of forward and backward along one length at a time."""
    arm, preset = ARMS[name], bench.preset
    response = round(RESPONSE * preset.lengths)

    def points(axis: dict[int, tuple[list[Pair], Layout]]) -> dict[str, Any]:
        batches = {at: bench.lay_out(arm, pairs, layout) for at, (pairs, layout) in axis.items()}
        results = bench.race(
            {
                str(at): (arm.variant, lambda at=at: bench.forward_backward(arm, batches[at], len(axis[at][0])))
                for at in axis
            }
        )
        for at, (pairs, _) in axis.items():
            results[str(at)].update(_speed(bench, pairs, results[str(at)]), prompts=len(pairs))
        return results

    def filling(pair_tokens: int) -> int:
        """Pairs of a batch of about the same number of tokens at every point, at least one for each rank."""
        return max(2 * bench.world.world_size, preset.batch_tokens // pair_tokens)

    def rows_of(tokens: int) -> Layout:
        return replace(bench.layout, row_tokens=tokens, long_row_tokens=tokens)

    prompt = round(MIXES["short"][0] * preset.lengths)
    short = bench.mixed_pairs("short")
    return {
        "arm": name,
        "prompt_tokens": points(
            {
                tokens: (bench.equal_pairs(filling(tokens + 2 * response), tokens), bench.layout)
                for tokens in preset.prompt_tokens
            }
        ),
        "responses_per_prompt": points(
            {
                n: (bench.equal_pairs(filling(prompt + (1 + n) * response), prompt, n), bench.layout)
                for n in preset.responses
            }
        ),
        "row_tokens": points({tokens: (short, rows_of(tokens)) for tokens in preset.row_scale}),
    }


class Head(nn.Module):
    """A decoder without layers: hidden states that are there already, and an output layer.

    Args:
        sizes (Sizes): of the model whose head it is.
        tokens (int): hidden states.
        device (torch.device): of everything.
        dtype (torch.dtype): of everything.
    """

    def __init__(self, sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.hidden = nn.Parameter(torch.randn(1, tokens, sizes.dim, **where))
        self.norm = nn.Identity()
        self.output = nn.Linear(sizes.dim, sizes.vocab_size, bias=False, **where)
        nn.init.normal_(self.output.weight, std=WEIGHT_SCALE)

    def forward(self, tokens: torch.Tensor, *, mask: Any = None, input_pos: torch.Tensor | None = None) -> Any:
        """The head alone, whatever the tokens."""
        return self.unembed(self.hidden)

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits of all hidden states, as torchtune has them: (b, s, d) -> (b, s, v)."""
        return self.output(self.norm(hidden)).float()


def head(bench: Bench) -> dict[str, Any]:
    """Output layer and loss of 8192 response tokens (16 pairs of two responses of 256): memory above weights and hidden
    states, gradients included."""
    num, length = 16, max(1, round(256 * bench.preset.lengths))
    pairs = random_pairs([1] * num, [[length, length]] * num, bench.sizes.vocab_size, bench.nats)
    used = sum(pair.num_tokens for pair in pairs)
    # no dense mask, which would count as memory
    row = pack_row(pairs, -(-used // ROW_MULTIPLE) * ROW_MULTIPLE, RowLayout(flex=True)).to(bench.world.device)
    model = Head(bench.sizes, row.tokens.numel(), bench.world.device, bench.compute_dtype)
    chunk = bench.layout.chunk_tokens

    def full() -> None:
        logits = model.unembed(model.hidden[:, row.predictors])[0]  # (1, n, d) -> (n, v)
        token_logps = logits.log_softmax(-1).gather(-1, row.targets[:, None]).squeeze(-1)
        logps = torch.zeros_like(row.reference_logps).index_add(0, row.segments, token_logps.double())
        objective_of(row)(logps).backward()

    def fresh(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            function()
            model.zero_grad(set_to_none=True)

        return run

    results = bench.race(
        {
            "full fp32 logits": (None, fresh(full)),
            "recomputed": (None, fresh(lambda: objective_of(row)(response_logps(model, row, chunk)).backward())),
            "fused": (None, fresh(lambda: pair_objective(model, row, objective_of(row), chunk)[0].backward())),
        }
    )
    return {"response_tokens": row.targets.numel(), "chunk_tokens": chunk, "runs": results}


# First match wins; kernels of a GPU or, without one, operators of the CPU.
GROUPS = {
    "communication": r"nccl",
    "attention": r"flex_attention|flash|fmha|scaled_dot_product|attention",
    "matmul": r"gemm|nvjet|cutlass|xmma|aten::(add)?mm|aten::bmm",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm|clip",
    # torch.compile names a kernel after the operations in it: these are the head's
    "head softmax": r"_target_logps|_logits_to_gradient|softmax|logsumexp|fused.*_(amax|arange|exp|gather)(_|$)",
    "copies": r"memcpy|memset|chunk_cat|split_with_sizes|CatArrayBatched|aten::copy_|aten::fill_|aten::zero_",
    "elementwise, normalization": r"triton_(poi|red|per)|elementwise|reduce|norm|index|embed|::(mul|add|silu|cat|sum)",
    "other": r"",
}


def group_of(kernel: str) -> str:
    """The group of a kernel, by its name."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE))


def profile(bench: Bench, name: str) -> dict[str, Any]:
    """Where the time of one optimizer step goes, by kernel."""
    arm, pairs = ARMS[name], bench.mixed_pairs("short")
    batch, optimizer = bench.lay_out(arm, pairs), bench.optimizer(arm)

    def step() -> None:
        bench.optimizer_step(arm, batch, len(pairs), optimizer)

    for _ in range(3):
        bench.seconds(step)
    wall = statistics.median(bench.seconds(step) for _ in range(3))
    with torch.profiler.profile() as profiler:
        bench.seconds(step)
    device = torch.autograd.DeviceType.CUDA if bench.on_gpu else torch.autograd.DeviceType.CPU
    kernels = [
        {
            "name": event.key,
            "group": group_of(event.key),
            "count": event.count,
            "ms": (event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total) / 1e3,
        }
        for event in profiler.key_averages()
        if event.device_type == device and not event.is_user_annotation
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    total = sum(kernel["ms"] for kernel in kernels)
    groups = {group: sum(k["ms"] for k in kernels if k["group"] == group) for group in GROUPS}
    return {"arm": name, "wall_ms": wall * 1e3, "kernel_ms": total, "groups_ms": groups, "kernels": kernels[:30]}


# ------------------------------------------------------------------------------------------------------- tables
def tables(results: dict[str, Any]) -> str:
    """The results as Markdown.

    Args:
        results (dict[str, Any]): what ``--out`` holds.

    Returns:
        str: a line on the machine, then a table for every section.
    """
    setup, peak = results["setup"], results["setup"]["peak_tflops"]
    ceiling, share = results["ceilings"], f"% of {peak:g} TFLOP/s"
    parts = [
        f"{setup['devices']} x {setup['device']}, torch {setup['torch']}, {setup['model']}, {setup['compute_dtype']}. "
        f"Ceilings in the same run: matmul {ceiling['matmul_tflops']:.3g} TFLOP/s"
        + (f" ({sustained:.3g} sustained)" if (sustained := ceiling.get("sustained_matmul_tflops")) else "")
        + f", copy "
        f"{ceiling['copy_gb_per_second']:.3g} GB/s. Medians of {setup['rounds']} rounds (minimum to maximum)."
    ]
    for mix, section in results.get("ladder", {}).items():
        mean, arms = section["mean_tokens"], section["arms"]
        parts.append(
            f"**Forward and backward** ({mix}), {section['pairs']} pairs, mean tokens {mean['prompt']:.0f} prompt, "
            f"{mean['real']:.0f} real, {mean['generated']:.0f} generated; padded: {section['micro_batch']} pairs a time"
        )
        columns = ["arm", "pairs/s", "x padded", "peak GiB", share, "fill", "gradient's deviation from fp32"]
        rows = [
            [
                ARMS[name].title,
                *_cells(run, peak, arms.get("padded")),
                f"{run['fill']:.2f}",
                f"{results['check'][name]['gradient_deviation']:.1e}",
            ]
            for name, run in arms.items()
        ]
        parts.append(table(columns, rows))
    for key, ratio in (("optimizer_step", "step_over_forward_backward"), ("reference", "reference_over_epoch")):
        if key in results:
            section = results[key]
            parts.append(
                f"**{key.replace('_', ' ').capitalize()}** ({section['arm']}): ratio {_number(section[ratio])}"
            )
            rows = [[name, *_cells(run, peak)] for name, run in section["runs"].items()]
            parts.append(table(["", "pairs/s", "peak GiB", share], rows))
    for axis, points in results.get("scaling", {}).items():
        if axis != "arm":
            rows = [[at, *_cells(run, peak), _number(run.get("responses_per_second"))] for at, run in points.items()]
            columns = [axis.replace("_", " "), "pairs/s", "peak GiB", share, "responses/s"]
            parts.append(f"**Scaling** ({results['scaling']['arm']})\n\n{table(columns, rows)}")
    if "head" in results:
        section = results["head"]
        rows = [
            [
                name,
                _number(run.get("median_seconds"), 1e3),
                _number(run.get("peak_gib"), GIB / 1e9),
                run.get("error", ""),
            ]
            for name, run in section["runs"].items()
        ]
        parts.append(f"**Head and loss alone**, {section['response_tokens']} response tokens")
        parts.append(table(["head", "ms", "peak GB", ""], rows))
    if "profile" in results:
        section = results["profile"]
        total = section["kernel_ms"]
        parts.append(
            f"**Kernels of one optimizer step** ({section['arm']}): {total:.4g} ms of kernels in "
            f"{section['wall_ms']:.4g} ms"
        )
        rows = [[group, f"{ms:.4g}", f"{100 * ms / total:.1f}"] for group, ms in section["groups_ms"].items()]
        parts.append(table(["group", "ms", "%"], rows))
        rows = [[f"`{k['name'][:90]}`", k["group"], str(k["count"]), f"{k['ms']:.4g}"] for k in section["kernels"]]
        parts.append(table(["kernel", "group", "calls", "ms"], rows))
    return "\n\n".join(parts)


def _cells(run: dict[str, Any], peak: float, baseline: dict[str, Any] | None | str = "") -> list[str]:
    """pairs/s, its ratio to a baseline unless that is "", GiB, fraction of the peak."""
    compared = baseline != ""
    if "error" in run:
        return [run["error"], *["-"] * (2 + compared)]
    middle, low, high = (_number(run[f"{which}pairs_per_second"]) for which in ("", "min_", "max_"))
    known = isinstance(baseline, dict) and "error" not in baseline
    ratio = f"{run['pairs_per_second'] / baseline['pairs_per_second']:.2f}" if known else "-"
    share = "-" if run["peak_gib"] is None else f"{100 * run['tflops'] / peak:.1f}"  # a CPU has another peak
    return [f"{middle} ({low} to {high})", *[ratio] * compared, _number(run["peak_gib"]), share]


def _number(value: float | None, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.3g}"


# --------------------------------------------------------------------------------------------------------- main
def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the tables of a results file and measure nothing")
    parser.add_argument("--model", choices=MODELS, default="llama3_2_1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--what", type=listed(WHAT), default=list(WHAT), help=",".join(WHAT))
    parser.add_argument("--arms", type=listed(list(ARMS)), default=list(ARMS), help=",".join(ARMS))
    parser.add_argument("--mixes", type=listed(list(MIXES)), default=["short"], help=",".join(MIXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, help="pairs of a global batch; default: the model's")
    parser.add_argument("--row-tokens", type=int, help="default: the model's in benchmarks/work.py")
    parser.add_argument("--long-row-tokens", type=int, help="of the arm long; default: twice --row-tokens")
    parser.add_argument("--chunk-tokens", type=int, default=SPINConfig.model_fields["logprob_chunk_tokens"].default)
    parser.add_argument("--keep-gathered", action="store_true", help="do not reshard layers after forward: more memory")
    parser.add_argument(
        "--unsharded-gradients", action="store_true", help="reduce gradients once per step: more memory"
    )
    parser.add_argument("--replicas", type=int, default=1, help="HSDP: groups of ranks that hold a whole model each")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: 6 bytes less")
    parser.add_argument("--step-alone", action="store_true", help="optimizer_step without forward and backward")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="the peak of fractions: one H100 or H200, bf16"
    )
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for; what exists is in the file after each section.

    Args:
        args (argparse.Namespace): of the command line.

    Returns:
        dict[str, Any]: the results, those of earlier runs in ``--out`` included.

    Raises:
        SystemExit: If the file holds results of another machine or model, or an arm computes something else.
    """
    bench = Bench(args)
    setup = {
        "device": torch.cuda.get_device_name() if bench.on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "devices": bench.world.world_size,
        "torch": torch.__version__,
        "model": args.model,
        "compute_dtype": str(bench.compute_dtype).removeprefix("torch."),
        "rounds": args.rounds,
        "row_tokens": bench.layout.row_tokens,
        "long_row_tokens": bench.layout.long_row_tokens,
        "chunk_tokens": args.chunk_tokens,
        "keep_gathered": args.keep_gathered,
        "unsharded_gradients": args.unsharded_gradients,
        "replicas": args.replicas,
        "optimizer": args.optimizer,
        "peak_tflops": args.peak_tflops,
    }
    results: dict[str, Any] = {"setup": setup}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
        if results["setup"] != setup:
            raise SystemExit(f"{args.out} was measured with {results['setup']}, not {setup}. Choose another --out.")

    def keep(section: str, values: Any) -> None:
        results[section] = values
        if args.out and bench.world.is_main:
            write_json(args.out, results)

    keep("ceilings", ceilings(bench))
    last = args.arms[-1]
    if "ladder" in args.what:
        keep("check", results.get("check", {}) | check(bench, args.arms))
        for mix in args.mixes:
            keep("ladder", results.get("ladder", {}) | {mix: ladder(bench, args.arms, mix)})
    # the sections below run one arm: the others' models go
    bench.drop(*{arm.variant for arm in ARMS.values()} - {ARMS[last].variant})
    for section, function in (
        ("optimizer_step", optimizer_step), ("reference", reference), ("scaling", scaling), ("profile", profile),
    ):  # fmt: skip
        if section in args.what:
            keep(section, function(bench, last))
    if "head" in args.what:
        bench.drop(ARMS[last].variant)
        keep("head", head(bench))
    return results if bench.world.is_main else {}


def main() -> None:
    """Measures or reads, and prints."""
    args = parse_args()
    results = json.loads(args.table.read_text(encoding="utf-8")) if args.table else measure(args)
    if results:
        print(tables(results), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
