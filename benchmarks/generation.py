"""How fast the opponent generates: the embedded generator against transformers and vLLM.

    python benchmarks/generation.py --model tiny                       # on a CPU, in seconds: does it run?
    python benchmarks/generation.py --out results.json                 # one GPU, Llama 3.2 1B shapes; some minutes
    python benchmarks/generation.py --arms embedded,transformers,vllm,vllm_bare --rounds 5    # needs vLLM
    python benchmarks/generation.py --table results.json               # the tables again, from the file

Weights and prompts are random, and the same for every arm. A random model never ends a response on purpose, so each
request has a length of its own (log-normal, cut at --max-new-tokens), no token stops it, and tokens are drawn from the
model's own distribution. What counts is useful tokens per second: those that were asked for, over the time from
handing in all prompts to having all responses. transformers.generate gets prompts sorted by length in batches of 64 and
must continue until the last response of a batch is complete; it is slow, so it runs on every fourth request.

Before anything is timed, greedy tokens of every arm are compared with those of whole forwards in fp32: in fp32, where
arms should agree token for token, and in the compute dtype, where rounding makes responses part sooner or later.

Rounds are interleaved. `tokens/s` is the median over rounds of a run whose engine is ready (graphs recorded, as for
all shards of prompts after the first one); `first` is the same work right after waking up. `GiB` is the peak of what is
allocated beyond the stored weights (fp32 masters for the embedded generator, bf16 for transformers).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from page import table
from rounds import free
from torch import nn
from vllm_arms import close_engines, engines_of, vllm_arms
from work import MODELS, hf_twin, listed, log_normal_lengths, randomize

from spin.core.files import write_json
from spin.core.ranks import World, init_world, shutdown
from spin.generators import GeneratorContext, SamplingParams, TorchtuneGenerator, shortest_last
from spin.generators.engines import policy_loaded
from spin.model.build import build_model, prepare_model
from spin.model.sharding import materialize, shard_model

GIB = 2**30
PROMPT_TOKENS = (50, 350)  # shortest and longest
MEAN_NEW_TOKENS = 128
CHECKED = (8, 24)  # prompts and greedy tokens that are compared with fp32
HF_BATCH = 64
LENGTH_NOISE = 0.4  # standard deviation of the logarithm of a response's length over the expected one

Tokens = list[list[int]]


class Bench:
    """The weights that all arms share, the work, and the clock.

    Args:
        args (argparse.Namespace): of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.world: World = init_world(args.device)
        self.device = self.world.device
        self.on_gpu = self.device.type == "cuda"
        self.compute_dtype = torch.bfloat16 if self.on_gpu else torch.float32
        preset = MODELS[args.model]
        self.builder = preset.builder
        self.model = self._build()
        prepare_model(self.model, self.world, compute_dtype=self.compute_dtype)
        randomize(self.model, self.world)
        self.vocab_size = self.model.tok_embeddings.num_embeddings
        self.busy_cpus: float | None = None  # once all have warmed up
        rng = np.random.default_rng(0)
        low, high = (max(1, round(tokens * preset.lengths)) for tokens in PROMPT_TOKENS)
        self.max_new_tokens = max(2, round(args.max_new_tokens * preset.lengths))
        lengths = log_normal_lengths(MEAN_NEW_TOKENS * preset.lengths, args.requests, rng)
        self.limits: list[int] = lengths.clip(1, self.max_new_tokens).tolist()
        self.prompts: Tokens = [
            rng.integers(1, self.vocab_size, n).tolist() for n in rng.integers(low, high + 1, args.requests)
        ]

    def _build(self) -> nn.Module:
        return build_model(OmegaConf.create(self.builder), torch.float32)

    def exact_model(self) -> nn.Module:
        """A second model with the same weights that computes in fp32."""
        model = self._build()
        shard_model(model, self.world, compute_dtype=torch.float32)
        materialize(model, self.world)
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return model

    def hf_model(self, dtype: torch.dtype) -> nn.Module:
        """transformers' Llama with the same weights."""
        return hf_twin(self.model, dtype, self.device).eval()

    def share(self, one_in: int) -> list[int]:
        """Every so many requests, by index."""
        return list(range(0, len(self.prompts), one_in))

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall-clock time of a function, its work on the device included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------- arms
class Arm:
    """A way to generate for prompts.

    Args:
        bench (Bench): gives weights and device.
    """

    title = ""
    one_in = 1  # runs on every so many requests
    exact = True  # can compute in fp32 as well
    starts = False  # the first run after waking up differs from later ones

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def ready(self) -> AbstractContextManager[Any]:
        """Around the runs of a round: what is started before the first run, and given back after the last one."""
        return nullcontext()

    def run(self, prompts: Tokens, limits: Sequence[int]) -> Tokens:
        """Draws as many tokens for each prompt as its limit says."""
        raise NotImplementedError

    def greedy(self, prompts: Tokens, new_tokens: int, dtype: torch.dtype) -> Tokens:
        """The most probable tokens, computed in a dtype: the one that is timed, or fp32."""
        raise NotImplementedError


class _Limited(TorchtuneGenerator):
    """The product's generator; responses have the lengths that the benchmark asks for."""

    limits: Sequence[int] = ()

    def _in_order(self, *arguments: Any) -> Any:
        requests = super()._in_order(*arguments)
        return {index: replace(request, limit=self.limits[index]) for index, request in requests.items()}


class Embedded(Arm):
    """``spin.generators.TorchtuneGenerator`` on the policy, sharded and gathered as recipes do it."""

    title = "embedded"
    starts = True
    batch_size: int | Literal["auto"] | None = None  # None: --batch-size
    cuda_graphs = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.generator = self._generator(bench.model)

    def _generator(self, model: nn.Module) -> _Limited:
        bench = self.bench
        context = GeneratorContext(model, bench.device, 8192, str)
        batch_size = self.batch_size or bench.args.batch_size
        prefill_batch = bench.args.prefill_batch
        return _Limited(context, batch_size, prefill_batch=prefill_batch, cuda_graphs=self.cuda_graphs)

    def ready(self) -> AbstractContextManager[Any]:
        return policy_loaded(self.generator, self.bench.model)

    def run(self, prompts: Tokens, limits: Sequence[int]) -> Tokens:
        sampling = SamplingParams(max_new_tokens=self.bench.max_new_tokens)
        return self._answers(self.generator, prompts, limits, sampling)

    def greedy(self, prompts: Tokens, new_tokens: int, dtype: torch.dtype) -> Tokens:
        exact = dtype != self.bench.compute_dtype
        generator = self._generator(self.bench.exact_model()) if exact else self.generator
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        return self._answers(generator, prompts, [new_tokens] * len(prompts), sampling)

    def _answers(self, generator: _Limited, prompts: Tokens, limits: Sequence[int], sampling: SamplingParams) -> Tokens:
        generator.limits = limits
        seeds = list(range(len(prompts)))
        return [response.token_ids for response in generator.generate(prompts, sampling, seeds)]


class Embedded64(Embedded):
    """The batch of transformers.generate."""

    title = "embedded, 64 at a time"
    batch_size = HF_BATCH


class Embedded512(Embedded):
    """Two times the default of the benchmark."""

    title = "embedded, 512 at a time"
    batch_size = 512


class Embedded1024(Embedded):
    """Four times."""

    title = "embedded, 1,024 at a time"
    batch_size = 1024


class EmbeddedAuto(Embedded):
    """As many at a time as the free memory allows."""

    title = "embedded, batch_size: auto"
    batch_size = "auto"


class EmbeddedShortestLast(EmbeddedAuto):
    """The responses that are expected to be the shortest are started last, as ``spin.generators.stage`` does it."""

    title = "embedded, batch_size: auto, the shortest started last"

    def run(self, prompts: Tokens, limits: Sequence[int]) -> Tokens:
        # of the logarithm; what a response of the iteration before says of the next is no better
        noise = np.random.default_rng(1).normal(0, LENGTH_NOISE, len(limits))
        order = shortest_last(range(len(prompts)), (np.array(limits) * np.exp(noise)).round().tolist())
        responses = super().run([prompts[i] for i in order], [limits[i] for i in order])
        by_request = dict(zip(order, responses, strict=True))
        return [by_request[i] for i in range(len(prompts))]


class EmbeddedEager(Embedded):
    """Every kernel launched by the host."""

    title = "embedded without CUDA graphs"
    cuda_graphs = False


class Transformers(Arm):
    """``transformers.generate``, dynamic cache, SDPA."""

    title = f"transformers.generate, batch {HF_BATCH}"
    one_in = 4
    _shared: dict[tuple[int, torch.dtype], nn.Module] = {}

    def model(self, dtype: torch.dtype) -> Any:
        """One model for all arms of transformers and each dtype."""
        key = (id(self.bench), dtype)
        if key not in self._shared:
            self._shared[key] = self.bench.hf_model(dtype)
        return self._shared[key]

    def run(self, prompts: Tokens, limits: Sequence[int]) -> Tokens:
        return self._generate(prompts, limits, self.model(self.bench.compute_dtype), do_sample=True)

    def greedy(self, prompts: Tokens, new_tokens: int, dtype: torch.dtype) -> Tokens:
        tokens = self._generate(prompts, [new_tokens] * len(prompts), self.model(dtype), do_sample=False)
        if dtype != self.bench.compute_dtype:
            del self._shared[id(self.bench), dtype]
        return tokens

    def _generate(self, prompts: Tokens, limits: Sequence[int], model: Any, do_sample: bool) -> Tokens:
        return generate_in_batches(model, prompts, limits, do_sample)


def generate_in_batches(model: Any, prompts: Tokens, limits: Sequence[int], do_sample: bool) -> Tokens:
    """Responses of ``transformers.generate``, the longest prompts first, ``HF_BATCH`` at a time.

    Args:
        model (Any): of transformers.
        prompts (Tokens): token ids.
        limits (Sequence[int]): tokens that each response has; a batch continues to the longest.
        do_sample (bool): draw from the model's own distribution; otherwise greedy.

    Returns:
        Tokens: the responses, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    responses: Tokens = [[] for _ in prompts]
    for start in range(0, len(order), HF_BATCH):
        batch = order[start : start + HF_BATCH]
        longest = max(len(prompts[index]) for index in batch)
        padding = [longest - len(prompts[index]) for index in batch]
        rows = [[0] * pad + prompts[index] for pad, index in zip(padding, batch, strict=True)]
        tokens = torch.tensor(rows, device=model.device)
        mask = torch.arange(longest, device=model.device) >= torch.tensor(padding, device=model.device)[:, None]
        out = model.generate(
            tokens,
            attention_mask=mask.long(),
            max_new_tokens=max(limits[index] for index in batch),
            do_sample=do_sample,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}),
            pad_token_id=0,
        )[:, longest:].tolist()
        for index, row in zip(batch, out, strict=True):
            responses[index] = row[: limits[index]]
    return responses


class TransformersContinuous(Transformers):
    """transformers' continuous batching: a paged cache, requests come and go; its manager is started untimed."""

    title = "transformers, continuous batching"
    one_in = 1  # it fills places as they become free: the more requests, the better

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self._manager(do_sample=True):
            yield

    @contextmanager
    def _manager(self, do_sample: bool, dtype: torch.dtype | None = None) -> Iterator[None]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        model = self.model(dtype or self.bench.compute_dtype)
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
        config = GenerationConfig(
            do_sample=do_sample, eos_token_id=-1, pad_token_id=0, max_new_tokens=self.bench.max_new_tokens, **drawn
        )
        options = ContinuousBatchingConfig(max_memory_percent=0.5, allow_block_sharing=False)
        try:
            with model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=options, timeout=30
            ) as self.manager:
                yield
        finally:
            model.set_attn_implementation("sdpa")

    def run(self, prompts: Tokens, limits: Sequence[int]) -> Tokens:
        names = [
            self.manager.add_request(prompt, max_new_tokens=limit, eos_token_id=-1)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        responses: dict[str, list[int]] = {}
        news = time.perf_counter()
        while len(responses) < len(names):
            result = self.manager.get_result(timeout=1)
            if time.perf_counter() - news > PATIENCE:
                raise RuntimeError(f"no response for {PATIENCE} seconds, {len(responses)} of {len(names)} so far")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                responses[result.request_id] = list(result.generated_tokens)
                news = time.perf_counter()
            elif result is None and not self.manager.is_running():
                raise RuntimeError("the manager's thread ended")
        return [responses[name] for name in names]

    def greedy(self, prompts: Tokens, new_tokens: int, dtype: torch.dtype) -> Tokens:
        try:
            with self._manager(do_sample=False, dtype=dtype):
                return self.run(prompts, [new_tokens] * len(prompts))
        finally:
            if dtype != self.bench.compute_dtype:
                self._shared.pop((id(self.bench), dtype), None)


# Another engine is another class here: how it starts (`ready`), generates (`run`) and generates greedily (`greedy`).
ARMS: dict[str, type[Arm]] = {
    "embedded": Embedded,
    "embedded_64": Embedded64,
    "embedded_512": Embedded512,
    "embedded_1024": Embedded1024,
    "embedded_auto": EmbeddedAuto,
    "embedded_shortest_last": EmbeddedShortestLast,
    "embedded_eager": EmbeddedEager,
    "transformers": Transformers,
    "transformers_cb": TransformersContinuous,
    **vllm_arms(Arm),
}
BASELINE = "transformers"
DEFAULT_ARMS = ["embedded", "embedded_64", "embedded_eager", "transformers"]  # transformers_cb starts slowly
PATIENCE = 120  # seconds that another library's engine may take for a response


def skip_reason(name: str, bench: Bench) -> str | None:
    """Why an arm cannot run here, or None."""
    if name == "transformers_cb" and not bench.on_gpu:
        return "needs a GPU"
    if name.startswith("vllm") and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None


# ------------------------------------------------------------------------------------------------------ sections
def check(bench: Bench, arms: dict[str, Arm], failed: dict[str, str]) -> dict[str, dict[str, float]]:
    """The fraction of greedy tokens, up to where a response parts, that are those of whole forwards in fp32."""
    num, new_tokens = CHECKED
    prompts = bench.prompts[:num]
    exact = _forwards(bench.exact_model(), prompts, new_tokens)
    free()
    shares = {}
    for name, arm in arms.items():
        if name not in ("embedded", "transformers", "transformers_cb", "vllm"):
            continue  # the same code as another arm, or other weights
        try:
            shares[name] = {
                str(dtype).removeprefix("torch."): _agreement(arm.greedy(prompts, new_tokens, dtype), exact)
                for dtype in dict.fromkeys((*([torch.float32] if arm.exact else []), bench.compute_dtype))
            }
        except Exception as error:
            if isinstance(arm, Embedded):
                raise
            failed[name] = _reason(error)  # another library's engine: its failure is a result
        free()
    if "embedded" in shares and shares["embedded"]["float32"] < 1:
        raise SystemExit(f"The embedded generator's greedy tokens are not those of whole forwards in fp32: {shares}")
    return shares


def _forwards(model: nn.Module, prompts: Tokens, new_tokens: int) -> Tokens:
    """Greedy tokens without a cache, one sequence at a time."""
    responses = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(new_tokens):
                tokens.append(
                    int(model(torch.tensor([tokens], device=next(model.parameters()).device))[0, -1].argmax())
                )
            responses.append(tokens[len(prompt) :])
    return responses


def _agreement(got: Tokens, expected: Tokens) -> float:
    agreed = 0
    for left, right in zip(got, expected, strict=True):
        agreed += next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(right))
    return agreed / sum(map(len, expected))


def race(
    bench: Bench, arms: dict[str, Arm], failed: dict[str, str], on_round: Callable[[dict[str, dict[str, Any]]], None]
) -> dict[str, dict[str, Any]]:
    """Interleaved rounds of all arms; what there is by then goes to ``on_round`` after each."""

    def summary() -> dict[str, dict[str, Any]]:
        return {
            name: {"title": arms[name].title, "error": failed[name]} if name in failed else _speed(result)
            for name, result in results.items()
        }

    until = time.monotonic() + bench.args.seconds
    results: dict[str, dict[str, Any]] = {
        name: {"title": arm.title, "first_seconds": [], "seconds": [], "peak_gib": []} for name, arm in arms.items()
    }
    for turn in range(bench.args.rounds + 1):  # the first one is a warm-up
        if turn > 1 and time.monotonic() > until:
            break
        for name, arm in arms.items():
            if name in failed:
                continue
            try:
                if turn == 0:
                    _warm_up(bench, arm)
                else:
                    _measure(bench, arm, results[name])
            except Exception as error:
                if isinstance(arm, Embedded):
                    raise
                traceback.print_exc()
                failed[name] = _reason(error)  # another library's engine: its failure is a result
        if turn == 0:
            bench.busy_cpus = busy_cpus()
        else:
            on_round(summary())
    return summary()


def busy_cpus(seconds: float = 1.0) -> float | None:
    """How many of the host's CPUs others keep busy, other guests of the machine included; None where the system does
    not say."""

    def times() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle, and waiting for a disk

    try:
        before = times()
        time.sleep(seconds)
        whole, idle = (now - then for now, then in zip(times(), before, strict=True))
    except OSError:
        return None
    return (os.cpu_count() or 1) * (1 - idle / whole) if whole else None


def _warm_up(bench: Bench, arm: Arm) -> None:
    """Everything once; for an arm without a slow start a few tokens suffice."""
    chosen = bench.share(arm.one_in)
    prompts, limits = [bench.prompts[i] for i in chosen], [bench.limits[i] for i in chosen]
    if not arm.starts or bench.args.once:
        prompts, limits = prompts[:HF_BATCH], [min(limit, 8) for limit in limits[:HF_BATCH]]
    free()
    with arm.ready():
        _checked(arm.run(prompts, limits), limits)


def _measure(bench: Bench, arm: Arm, result: dict[str, Any]) -> None:
    """One round of an arm."""
    chosen = bench.share(arm.one_in)
    prompts, limits = [bench.prompts[i] for i in chosen], [bench.limits[i] for i in chosen]
    free()
    held = 0
    if bench.on_gpu:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with arm.ready():
        if arm.starts and not bench.args.once:
            result["first_seconds"].append(bench.seconds(lambda: arm.run(prompts, limits)))
        result["seconds"].append(bench.seconds(lambda: _checked(arm.run(prompts, limits), limits)))
        if bench.on_gpu:
            result["peak_gib"].append((torch.cuda.max_memory_allocated() - held) / GIB)
    result.update(requests=len(prompts), useful_tokens=sum(limits))


def _checked(responses: Tokens, limits: Sequence[int]) -> None:
    if list(map(len, responses)) != list(limits):
        raise RuntimeError("responses do not have the lengths that were asked for")


def _speed(result: dict[str, Any]) -> dict[str, Any]:
    tokens, seconds = result["useful_tokens"], result["seconds"]
    first, peaks = result["first_seconds"], result["peak_gib"]
    return result | {
        "tokens_per_second": tokens / statistics.median(seconds),
        "min_tokens_per_second": tokens / max(seconds),
        "max_tokens_per_second": tokens / min(seconds),
        "first_tokens_per_second": tokens / statistics.median(first) if first else None,
        "peak_gib": max(peaks) if peaks else None,
    }


def profile(bench: Bench) -> dict[str, Any]:
    """Which kernels the time of the arm `embedded` goes to, graphs recorded before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    arm = Embedded(bench)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with arm.ready():
        arm.run(bench.prompts, bench.limits)
        with profiled(activities=activities[-1:]) as profiler:
            wall = bench.seconds(lambda: arm.run(bench.prompts, bench.limits))
    kind = torch.autograd.DeviceType.CUDA if bench.on_gpu else torch.autograd.DeviceType.CPU
    kernels = [
        {
            "name": event.key,
            "count": event.count,
            "ms": (event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total) / 1e3,
        }
        for event in profiler.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"wall_ms": wall * 1e3, "kernel_ms": sum(kernel["ms"] for kernel in kernels), "kernels": kernels[:40]}


def _reason(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:200]


# -------------------------------------------------------------------------------------------------------- tables
def tables(results: dict[str, Any]) -> str:
    """The results as Markdown.

    Args:
        results (dict[str, Any]): what ``--out`` holds.

    Returns:
        str: a line on the machine, then a table for every section.
    """
    setup = results["setup"]
    parts = [
        f"{setup['device']}, torch {setup['torch']}, transformers {setup['transformers']}, {setup['model']}, "
        f"{setup['compute_dtype']}; {setup['requests']} requests, prompts of {setup['mean_prompt_tokens']:.0f} and "
        f"responses of {setup['mean_new_tokens']:.0f} tokens on average (at most {setup['max_new_tokens']}), "
        f"--batch-size {setup['batch_size']}. Medians of {setup['rounds']} rounds (minimum to maximum)."
    ]
    if "arms" in results:
        arms = results["arms"]
        base = arms.get(BASELINE, {}).get("tokens_per_second")
        rows = []
        for name, run in arms.items():
            agreed = results["check"].get(name, {})
            cells = [run.get("error") or run.get("skipped") or "", "-", "-", "-"]
            if "tokens_per_second" in run:
                low, high = run["min_tokens_per_second"], run["max_tokens_per_second"]
                cells = [
                    f"{run['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})",
                    f"{run['tokens_per_second'] / base:.2f}" if base else "-",
                    _number(run["first_tokens_per_second"], ".0f"),
                    _number(run["peak_gib"], ".1f"),
                ]
            rows.append([run["title"], *cells, ", ".join(f"{share:.1%} {dtype}" for dtype, share in agreed.items())])
        columns = ["arm", "useful tokens/s", f"x {BASELINE}", "first", "GiB", "greedy tokens as in fp32"]
        parts.append(table(columns, rows))
    if "vllm_sync" in results:
        parts.append("**vLLM next to the trainer**")
        rows = [[name.replace("_", " "), _number(value, ".3g")] for name, value in results["vllm_sync"].items()]
        parts.append(table(["", ""], rows))
    if "profile" in results:
        section = results["profile"]
        total = section["kernel_ms"]
        parts.append(f"**Kernels of one run** (embedded): {total:.0f} ms of kernels in {section['wall_ms']:.0f} ms")
        rows = [
            [f"`{k['name'][:100]}`", str(k["count"]), f"{k['ms']:.2f}", f"{1e3 * k['ms'] / k['count']:.1f}",
             f"{100 * k['ms'] / total:.1f}"]
            for k in section["kernels"]
        ]  # fmt: skip
        parts.append(table(["kernel", "calls", "ms", "us each", "%"], rows))
    return "\n\n".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---------------------------------------------------------------------------------------------------------- main
def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the tables of a results file and measure nothing")
    parser.add_argument("--model", choices=MODELS, default="llama3_2_1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--arms", type=listed(list(ARMS)), default=DEFAULT_ARMS, help=f"of {','.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further round begins after that many")
    parser.add_argument("--once", action="store_true", help="one run each time an engine is woken, instead of two")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256, help="sequences at a time of the embedded generator")
    parser.add_argument("--prefill-batch", type=int, help="its argument of this name")
    parser.add_argument("--profile", action="store_true", help="also which kernels a run's time goes to")
    parser.add_argument("--no-check", action="store_true", help="do not compare greedy tokens first")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything.

    Args:
        args (argparse.Namespace): of the command line.

    Returns:
        dict[str, Any]: the results.
    """
    import transformers

    bench = Bench(args)
    results: dict[str, Any] = {
        "setup": {
            "device": torch.cuda.get_device_name() if bench.on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm": _vllm_version(),
            "model": args.model,
            "compute_dtype": str(bench.compute_dtype).removeprefix("torch."),
            "rounds": args.rounds,
            "once": args.once,
            "requests": args.requests,
            "batch_size": args.batch_size,
            "prefill_batch": args.prefill_batch,
            "mean_prompt_tokens": statistics.mean(map(len, bench.prompts)),
            "mean_new_tokens": statistics.mean(bench.limits),
            "max_new_tokens": bench.max_new_tokens,
            "cpus": os.cpu_count(),
        }
    }

    def keep(section: str, values: Any) -> None:
        results[section] = values
        if args.out:
            write_json(args.out, results)

    skipped = {name: reason for name in args.arms if (reason := skip_reason(name, bench))}
    arms = {name: ARMS[name](bench) for name in args.arms if name not in skipped}
    failed: dict[str, str] = {}
    keep("check", {} if args.no_check else check(bench, arms, failed))
    left_out = {name: {"title": ARMS[name].title, "skipped": reason} for name, reason in skipped.items()}

    def keep_runs(runs: dict[str, dict[str, Any]]) -> None:
        results["setup"]["busy_cpus"] = bench.busy_cpus
        keep("arms", runs | left_out)

    keep_runs(race(bench, arms, failed, keep_runs))
    if "vllm" in arms and "vllm" not in failed:
        keep("vllm_sync", engines_of(bench).sync(max(3, args.rounds)))
    if args.profile:
        keep("profile", profile(bench))
    return results


def _vllm_version() -> str | None:
    from spin.core.errors import ConfigError
    from spin.generators.vllm import vllm_version

    try:
        return vllm_version()
    except ConfigError:
        return None


def main() -> None:
    """Measures or reads, and prints."""
    args = parse_args()
    if not any(name.startswith("vllm") for name in args.arms):  # vLLM could not give its memory back
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    results = json.loads(args.table.read_text(encoding="utf-8")) if args.table else measure(args)
    print(tables(results), flush=True)
    close_engines()
    shutdown()


if __name__ == "__main__":
    main()
