"""vLLM in the generation benchmark: the product's generator, and vLLM's own ``LLM.generate`` with the same engine.

An engine is started once and shared by the arms that run in this process. Arms whose name ends in a number have one
that is set up for so many requests at a time; a process has one engine that sleeps, so a run takes arms of one number.
``vllm_process`` is a second engine, started as ``vllm.LLM`` starts it by default: in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rounds import free
from work import llama_config

from spin.generators import GeneratorContext, SamplingParams, VLLMGenerator
from spin.generators.engines import policy_loaded
from spin.model.sharding import named_full_tensors

GIB = 2**30
MAX_MODEL_LEN = 2048
SHARE = 0.45  # of the GPU's memory
PROCESS_SHARE, PROCESS_CACHE = 0.25, 24 << 30  # of an engine in another process: free at its start; bytes of its cache
_GOODBYE_SECONDS = 60.0
TOKENIZER = Path(__file__).parents[1] / "tests" / "assets" / "tiny_lm"  # never asked: prompts are token ids


class LimitedVLLM(VLLMGenerator):
    """The product's generator; responses have the lengths that the benchmark asks for."""

    limits: Sequence[int] = ()

    def _params(self, prompt: Sequence[int], seed: int, index: int, sampling: SamplingParams, ban: bool) -> Any:
        return super()._params(prompt, seed, index, replace(sampling, max_new_tokens=self.limits[index]), ban)


def at_its_best(sequences: int) -> dict[str, Any]:
    """An engine's arguments for many short requests on one GPU: so many at a time, CUDA graphs up to them, the host a
    step ahead; every prompt is another one, so that looking for common beginnings cannot help."""
    sizes = [1, 2, 4, 8, 16, *range(32, sequences + 1, 32)]
    return {
        "max_num_seqs": sequences, "max_num_batched_tokens": 16384, "cudagraph_capture_sizes": sizes,
        "async_scheduling": True, "enable_prefix_caching": False,
    }  # fmt: skip


class Engines:
    """The engines, made when first needed, and what starting them took.

    Args:
        bench (Any): the benchmark's weights and device.
        engine (dict[str, Any] | None): arguments of vLLM's; None: its own choices, for ``--batch-size`` at a time.
    """

    def __init__(self, bench: Any, engine: dict[str, Any] | None = None) -> None:
        self.bench, self.engine = bench, engine or {"max_num_seqs": bench.args.batch_size}
        self.folder = Path(tempfile.mkdtemp(prefix="spin-vllm-"))
        llama_config(bench.model).save_pretrained(self.folder)
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, self.folder)
        self._generator: LimitedVLLM | None = None
        self._connection: Any = None  # to the worker
        self._worker: Any = None
        self.notes: dict[str, float] = {}

    @property
    def generator(self) -> LimitedVLLM:
        """The product's."""
        if self._generator is None:
            free()
            before = _used()
            start = time.perf_counter()
            context = GeneratorContext(self.bench.model, self.bench.device, MAX_MODEL_LEN, str, self.bench.world)
            cpu = {} if self.bench.on_gpu else {"enforce_eager": True, "dtype": "fp32"}
            engine = dict(self.engine)
            if not self.bench.on_gpu:
                engine |= {"kv_cache_memory_bytes": 64 << 20, "block_size": 32}
            self._generator = LimitedVLLM(
                context, str(self.folder), "LLAMA3_2", gpu_memory_utilization=SHARE, max_model_len=MAX_MODEL_LEN,
                max_logprob_gap=None, engine=engine, **cpu,
            )  # fmt: skip
            self.notes["start_seconds"] = time.perf_counter() - start
            self.notes["asleep_gib"] = (_used() - before) / GIB
        return self._generator

    def start_process(self) -> None:
        """Starts a process that has an engine in yet another one, as ``vllm.LLM`` is by default; does not wait."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            # vLLM remembers its environment: whoever has an engine in process cannot start one outside
            arguments = (theirs, str(self.folder), self.engine, self.bench.on_gpu)
            self._worker = context.Process(target=_separate_engine, args=arguments)
            self._worker.start()

    def ask(self, work: Any) -> Any:
        """Sends work to the engine's process, which it starts if need be, and waits for what it says."""
        self.start_process()
        self._connection.send(work)
        response = self._connection.recv()
        if isinstance(response, str):
            raise RuntimeError(response)
        return response

    def sync(self, rounds: int) -> dict[str, Any]:
        """Seconds to wake, to take the weights and to sleep, and what sleeping gives back."""
        generator, before = self.generator, _used()
        kept = before - self.notes["asleep_gib"] * GIB  # what the trainer holds
        times: dict[str, list[float]] = {"wake": [], "update_weights": [], "sleep": []}
        for _ in range(rounds):
            times["wake"].append(self.bench.seconds(generator.wake))
            tensors = list(named_full_tensors(self.bench.model))  # gathering is the trainer's time
            times["update_weights"].append(self.bench.seconds(partial(generator.update_weights, tensors)))
            del tensors
            awake_bytes = _used() - kept
            times["sleep"].append(self.bench.seconds(generator.sleep))
        free()
        asleep_bytes = _used() - kept
        return {
            **{f"{name}_seconds": statistics.median(values) for name, values in times.items()},
            "awake_gib": awake_bytes / GIB,
            "asleep_gib": asleep_bytes / GIB,
            "given_back": 1 - asleep_bytes / awake_bytes if awake_bytes else None,
            "start_seconds": self.notes["start_seconds"],
        }

    def close(self) -> None:
        """Ends the engines; before the process group, which they use."""
        if self._generator is not None:
            self._generator.close()
        if self._connection is not None:
            self._connection.close()
            self._worker.join(_GOODBYE_SECONDS)  # then its memory is free
            self._worker.kill()
        shutil.rmtree(self.folder)


def _used() -> int:
    """Bytes of the GPU that are taken, by whomever."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


_engines: dict[tuple[int, int | None], Engines] = {}


def engines_of(bench: Any, sequences: int | None = None) -> Engines:
    """The engines of a benchmark: as they come, or :func:`at_its_best` for so many sequences."""
    key = id(bench), sequences
    if key not in _engines:
        _engines[key] = Engines(bench, None if sequences is None else at_its_best(sequences))
    return _engines[key]


def _separate_engine(connection: Any, folder: str, engine: dict[str, Any], on_gpu: bool) -> None:
    """Serves lists of prompts and limits until the other side is gone. Dummy weights draw as many tokens as others."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ.pop("PYTORCH_ALLOC_CONF", None)  # of the other arms
    try:
        from vllm import LLM

        place = (
            {"dtype": "bfloat16", "gpu_memory_utilization": PROCESS_SHARE, "kv_cache_memory_bytes": PROCESS_CACHE}
            if on_gpu
            else {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
        )
        llm = LLM(
            model=folder, load_format="dummy", generation_config="vllm", max_model_len=MAX_MODEL_LEN, seed=0,
            **engine, **place,
        )  # fmt: skip
        try:
            while True:
                work = connection.recv()
                connection.send([] if work is None else _generate(llm, *work))
        except EOFError:
            llm.llm_engine.engine_core.shutdown()  # its processes would keep this one, and outlive it
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _generate(llm: Any, prompts: list[list[int]], limits: Sequence[int], seeded: bool) -> list[list[int]]:
    from vllm import SamplingParams as VLLMSamplingParams

    params = [
        VLLMSamplingParams(max_tokens=limit, ignore_eos=True, detokenize=False, seed=index if seeded else None)
        for index, limit in enumerate(limits)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def close_engines() -> None:
    """Ends all engines."""
    while _engines:
        _engines.popitem()[1].close()


def vllm_arms(arm_class: type) -> dict[str, type]:
    """The arms, as subclasses of the benchmark's ``Arm``."""

    class VLLM(arm_class):  # type: ignore[misc,valid-type]
        """``spin.generators.VLLMGenerator``."""

        title = "vLLM by VLLMGenerator, a seed for each answer"
        starts = True
        exact = False
        sequences: int | None = None  # of an engine at its best

        @property
        def engines(self) -> Engines:
            return engines_of(self.bench, self.sequences)

        def ready(self) -> AbstractContextManager[Any]:
            return policy_loaded(self.engines.generator, self.bench.model)

        def run(self, prompts: list[list[int]], limits: Sequence[int]) -> list[list[int]]:
            generator = self.engines.generator
            generator.limits = limits
            sampling = SamplingParams(max_new_tokens=self.bench.max_new_tokens)
            return [c.token_ids for c in generator.generate(prompts, sampling, list(range(len(prompts))))]

        def greedy(self, prompts: list[list[int]], new_tokens: int, dtype: torch.dtype) -> list[list[int]]:
            generator = self.engines.generator
            generator.limits = [new_tokens] * len(prompts)
            with self.ready():
                sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
                return [c.token_ids for c in generator.generate(prompts, sampling, [0] * len(prompts))]

    class Bare(VLLM):
        """``vllm.LLM.generate`` with the same engine."""

        title = "vLLM by LLM.generate, no seeds"
        seeded = False

        def run(self, prompts: list[list[int]], limits: Sequence[int]) -> list[list[int]]:
            return _generate(self.engines.generator.llm, prompts, limits, self.seeded)

    class BareSeeded(Bare):
        """The same with a seed for each response."""

        title = "vLLM by LLM.generate, a seed for each answer"
        seeded = True

    class Process(Bare):
        """vLLM's engine in a process of its own; it sends token ids to and fro."""

        title = "vLLM by LLM.generate, engine in another process, no seeds"

        def __init__(self, bench: Any) -> None:
            super().__init__(bench)
            self.engines.start_process()  # all at the same time, while other arms warm up

        def ready(self) -> AbstractContextManager[Any]:
            return nullcontext()

        def run(self, prompts: list[list[int]], limits: Sequence[int]) -> list[list[int]]:
            return self.engines.ask((prompts, list(limits), self.seeded))

    arms: dict[str, type] = {
        "vllm": VLLM, "vllm_bare": Bare, "vllm_bare_seeded": BareSeeded, "vllm_process": Process
    }  # fmt: skip
    for name, kind in list(arms.items()):
        for sequences in (512, 1024):
            title = f"{kind.title}, {sequences:,} at a time"
            arms[f"{name}_{sequences}"] = type(kind.__name__, (kind,), {"sequences": sequences, "title": title})
    return arms
