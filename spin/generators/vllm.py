"""vLLM in the trainer's own process: one engine for each rank, or for ranks that share a model by tensor parallelism.

The engine starts once, with dummy weights. Before every iteration it wakes, gets the policy's weights in place and then
its cache; afterwards it sleeps, and its memory is the trainer's.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spin.core.dtypes import DTYPES
from spin.core.errors import ConfigError, GeneratorError
from spin.core.packages import installed_vllm
from spin.generators.generator import GeneratorContext, SamplingParams, generate_in_order, max_response_tokens
from spin.model.hf import HFStream
from spin.types import Response

log = logging.getLogger(__name__)

_OLDEST, _NEWEST = (0, 20), (0, 32)  # minor versions that this adapter was written for
KNOWN = f"{_OLDEST[0]}.{_OLDEST[1]} to {_NEWEST[0]}.{_NEWEST[1]}"
INSTALL = (
    "pip install 'spin-torchtune[vllm]' (vllm 0.20.2 to 0.26.0 with torch 2.11, 0.27 to 0.31 with torch 2.13), or on a "
    "CPU see docs/vllm.md"
)
_MOST_BIASED = 1024  # tokens for which vLLM takes a bias in a request
# What may stand under `engine`. Others are decided by this class, or name code that vLLM imports (worker_cls,
# logits_processors, plugins, connectors, the backend of compilation_config), models and files, or are of no use here.
_ENGINE_ARGUMENTS = {
    "async_scheduling", "attention_backend", "block_size", "calculate_kv_scales", "cpu_offload_gb", "cuda_graph_sizes",
    "cudagraph_capture_sizes", "disable_cascade_attn", "disable_custom_all_reduce", "disable_log_stats",
    "enable_chunked_prefill", "enable_expert_parallel", "enable_prefix_caching", "kv_cache_dtype",
    "kv_cache_memory_bytes", "kv_sharing_fast_prefill", "long_prefill_token_threshold", "max_cudagraph_capture_size",
    "max_long_partial_prefills", "max_num_batched_tokens", "max_num_partial_prefills", "max_num_seqs",
    "max_parallel_loading_workers", "num_gpu_blocks_override", "prefix_caching_hash_algo", "quantization",
    "scheduling_policy", "stream_interval", "swap_space",
}  # fmt: skip
_QUEUE = 4  # requests in the engine's hands, in multiples of the sequences that it runs at a time


def vllm_version() -> str:
    """The installed vLLM's version; ConfigError if there is none, or it is too old."""
    _, found = installed_vllm() or (None, None)
    if found is None:
        raise ConfigError(f"the generator needs vLLM, which is not installed. Versions {KNOWN} are known: {INSTALL}.")
    if is_too_old(found):
        raise ConfigError(f"vLLM {found} is installed, expected {KNOWN}. Install another: {INSTALL}.")
    return found


def is_too_old(version: str) -> bool:
    """Whether a vLLM is older than this adapter knows; warns if it is newer. A version without numbers is known."""
    match = re.match(r"(\d+)\.(\d+)", version)
    minor = (int(match[1]), int(match[2])) if match else _NEWEST
    if minor > _NEWEST:
        log.warning(f"vLLM {version} is newer than what this adapter was written for ({KNOWN}).")
    return minor < _OLDEST


class VLLMGenerator:
    """Generates with vLLM in this process.

    Every rank has its own engine, or ``tensor_parallel_size`` ranks share one. All ranks must construct it, wake it and
    update its weights together; after that engines do not wait for each other.

    Args:
        context (GeneratorContext): gives the policy, its device and the ranks.
        model_dir (str): Hugging Face folder with config.json and tokenizer; its weights are not read.
        model_type (str | None): as the checkpointer's.
        tensor_parallel_size (int): ranks that share an engine, for models larger than one GPU.
        gpu_memory_utilization (float): fraction of a GPU's memory that weights and cache take while awake.
        max_model_len (int | None): longest prompt plus response in tokens; None is the model's context. The cache
            must have room for it.
        dtype (str): of weights and arithmetic: ``bf16``, ``fp16`` or ``fp32``.
        max_logprob_gap (float | None): nats per token by which its log-probs may differ from the trainer's; None asks
            for no proof. They are compared after each update of the weights.
        enforce_eager (bool): no CUDA graphs and no compilation: starts sooner, generates slower.
        engine (Mapping[str, Any] | None): further arguments of vLLM's ``LLM``: sizes and switches.

    Raises:
        ConfigError: If vLLM is missing or too old, or an argument cannot be.
        GeneratorError: If the engine does not start.
    """

    shares_policy_weights = False

    def __init__(
        self,
        context: GeneratorContext,
        model_dir: str,
        model_type: str | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.5,
        max_model_len: int | None = None,
        dtype: str = "bf16",
        max_logprob_gap: float | None = 0.02,
        enforce_eager: bool = False,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        version = vllm_version()
        if context.model is None:
            raise ConfigError("VLLMGenerator takes the policy's weights and was given no model.")
        if dtype not in DTYPES:
            raise ConfigError(f"generator.dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
        world_size = context.world.world_size if context.world else 1
        if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
            expected = f"expected a number that divides the {world_size} ranks"
            raise ConfigError(f"generator.tensor_parallel_size={tensor_parallel_size}: {expected}.")
        if unknown := ", ".join(sorted(set(map(str, engine or {})) - _ENGINE_ARGUMENTS)):
            raise ConfigError(
                f"generator.engine may not set {unknown}: expected {', '.join(sorted(_ENGINE_ARGUMENTS))}."
            )
        self.ranks_per_engine = tensor_parallel_size
        self.max_logprob_gap = max_logprob_gap
        self.max_seq_len = min(max_model_len or context.max_seq_len, context.max_seq_len)
        self._on_gpu, self._stream = context.device.type == "cuda", HFStream(context.model, model_dir, model_type)
        self._is_whole, self._requests = False, 0  # the engine holds the policy's weights; requests so far
        arguments = {
            "dtype": str(DTYPES[dtype]).removeprefix("torch."), "max_model_len": self.max_seq_len,
            "tensor_parallel_size": tensor_parallel_size, "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager, **(engine or {}),
        }  # fmt: skip
        if world_size > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
        started = time.perf_counter()
        self.llm = _start(Path(model_dir), arguments, self._on_gpu)
        log.info(f"vLLM {version} started in {time.perf_counter() - started:.1f} s (dtype {dtype}).")
        self._queue = _QUEUE * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.sleep()

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        for index, prompt in enumerate(prompts):
            max_response_tokens(prompt, index, sampling, self.max_seq_len)  # before anything is asked
        return generate_in_order(self, prompts, sampling, seeds)

    def stream(
        self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams
    ) -> Iterator[tuple[int, Response] | None]:
        """See ``StreamingGenerator``; prompts that share a beginning share its computation."""
        if not self._is_whole:
            raise GeneratorError("vLLM has no weights: wake it and update its weights before it generates.")
        engine = self.llm.llm_engine
        waiting = enumerate(requests)
        running: dict[str, tuple[int, Sequence[int], int, frozenset[int]]] = {}

        def ask(index: int, prompt: Sequence[int], seed: int, ban: frozenset[int] = frozenset()) -> None:
            params = self._params(prompt, seed, index, sampling, ban)
            self._requests += 1
            name, asked = str(self._requests), {"type": "token", "prompt_token_ids": list(map(int, prompt))}
            engine.add_request(name, asked, params)
            running[name] = index, prompt, seed, ban

        try:
            while True:
                if len(running) <= self._queue // 2:
                    for index, (prompt, seed) in islice(waiting, self._queue - len(running)):
                        ask(index, prompt, seed)
                if not running:
                    return
                for output in engine.step():
                    if not output.finished:
                        continue
                    index, prompt, seed, ban = running.pop(output.request_id)
                    response = _response(output, sampling)
                    if more := tokens_to_ban(response, sampling, ban):
                        ask(index, prompt, seed, more)
                    else:
                        yield index, response
                yield None
        except GeneratorError:
            raise
        except Exception as error:
            self._is_whole = False
            raise GeneratorError(
                f"vLLM failed with {len(running)} responses unfinished: {type(error).__name__}: {error} Finished "
                "responses are on disk; run the same command again to resume. If memory ran out, lower "
                "generator.gpu_memory_utilization or generator.engine.max_num_seqs."
            ) from error
        finally:
            if running and self._is_whole:  # the caller stopped, or a prompt was refused
                engine.abort_request(list(running))
                while engine.has_unfinished_requests():
                    engine.step()

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads the policy's weights in place, and drops what was cached under the old ones."""
        self._is_whole = False
        started = time.perf_counter()
        try:
            tensors = self._stream.convert(named_tensors)
            if self._on_gpu:
                self.llm.apply_model(_Load(tensors))
                self.llm.wake_up(tags=["kv_cache"])
            else:  # its weights are packed for the processor, which only vLLM's own reload undoes
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
                self.llm.apply_model(_pack_tied_head)
        except Exception as error:
            raise GeneratorError(f"vLLM did not take the policy's weights: {type(error).__name__}: {error}") from error
        if not self.llm.reset_prefix_cache():
            raise GeneratorError("vLLM did not reset its prefix cache, whose entries are of other weights.")
        self._is_whole = True
        log.info(f"vLLM has the policy's weights ({time.perf_counter() - started:.2f} s).")

    def sleep(self) -> None:
        """Frees the GPU memory of weights and cache; on a CPU there is none to free."""
        if not self._on_gpu:
            return
        self._is_whole = False
        before, started = torch.cuda.mem_get_info()[0], time.perf_counter()
        with _short_collections():
            self.llm.sleep(level=2)  # level 1 would keep a copy of the weights in CPU memory
        gib = (torch.cuda.mem_get_info()[0] - before) / 2**30
        log.info(f"vLLM sleeps: {gib:.1f} GiB freed ({time.perf_counter() - started:.2f} s).")

    def wake(self) -> None:
        """Allocates the weights; the cache comes with :meth:`update_weights`."""
        if not self._on_gpu:
            return
        started = time.perf_counter()
        gc.collect(1)
        torch.cuda.empty_cache()  # vLLM's memory does not come from torch's pool
        try:
            self.llm.wake_up(tags=["weights"])
        except Exception as error:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
            raise GeneratorError(
                f"vLLM cannot wake ({error}): {free:.1f} of {total:.1f} GiB are free. Lower "
                "generator.gpu_memory_utilization."
            ) from error
        log.info(f"vLLM is awake ({time.perf_counter() - started:.2f} s).")

    def close(self) -> None:
        """Ends the engine and frees its memory. vLLM destroys all process groups with it: close all else before."""
        if getattr(self, "llm", None) is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

    def _params(
        self, prompt: Sequence[int], seed: int, index: int, sampling: SamplingParams, ban: frozenset[int]
    ) -> Any:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        named = vllm_sampling(sampling, seed, max_response_tokens(prompt, index, sampling, self.max_seq_len), ban)
        logprobs, reads_text = 0 if sampling.logprobs else None, bool(sampling.stop_strings)
        kind = RequestOutputKind.FINAL_ONLY
        return VLLMSamplingParams(**named, logprobs=logprobs, detokenize=reads_text, output_kind=kind)


def tokens_to_ban(response: Response, sampling: SamplingParams, banned: frozenset[int]) -> frozenset[int]:
    """What a response is requested again without, because it holds a banned token; empty: it holds none but ``banned``.

    A trained model hardly ever writes one. Banning some hundred in every request would cost vLLM as much as a decode
    step each time that a request starts or ends, and a list of the others that are allowed far more. The same seed
    gives the same tokens up to the banned one. vLLM takes a bias for 1,024 tokens at most: of more banned ones, those
    are named that were written.
    """
    written = frozenset(response.token_ids) & frozenset(sampling.banned_token_ids)
    if written <= banned or len(banned | written) > _MOST_BIASED:
        return frozenset()
    every = frozenset(sampling.banned_token_ids)
    return every if len(every) <= _MOST_BIASED else banned | written


def vllm_sampling(sampling: SamplingParams, seed: int, limit: int, ban: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Sampling parameters under vLLM's names, for its engine and its server alike."""
    return {
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")},
        "min_tokens": min(sampling.min_new_tokens, limit),
        "max_tokens": limit,
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be one, and the embedded generator's text has them too
        "ignore_eos": True,  # the stop tokens say where a response ends, as for every other generator
        "seed": seed,
        **({"logit_bias": dict.fromkeys(sorted(ban), -100.0)} if ban else {}),  # the server's lowest
    }


def vllm_response(
    tokens: Sequence[int] | None, reason: str | None, logprobs: Sequence[float] | None, sampling: SamplingParams
) -> Response:
    """A response of vLLM's engine or server; it has stopped if its last token is a stop token, even at the limit."""
    if tokens is None or reason not in ("stop", "length"):
        raise GeneratorError(
            f"vLLM ended a response with reason {reason!r} and {'no' if tokens is None else len(tokens)} token ids, "
            "expected stop or length, with token ids."
        )
    stopped = reason == "stop" or (len(tokens) > 0 and tokens[-1] in sampling.stop_token_ids)
    values = None if logprobs is None else list(logprobs)
    return Response(list(tokens), "stop" if stopped else "length", logprobs=values)


def _response(output: Any, sampling: SamplingParams) -> Response:
    found = output.outputs[0]
    entries = zip(found.token_ids, found.logprobs, strict=True) if sampling.logprobs else ()
    logprobs = [entry[token].logprob for token, entry in entries] if sampling.logprobs else None
    return vllm_response(found.token_ids, found.finish_reason, logprobs, sampling)


class _Load:
    """Loads tensors, by Hugging Face name, into vLLM's model, and raises if one is left out. Runs in this process."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.tensors = tensors

    def __call__(self, model: Any) -> None:
        loaded = model.load_weights(self.tensors)
        left = sorted({name for name, _ in model.named_parameters()} - set(loaded)) if loaded is not None else []
        if left:
            raise GeneratorError(f"{', '.join(left[:5])} of vLLM's model were given no weights ({len(left)} in all).")


def _pack_tied_head(model: nn.Module) -> None:
    """On a CPU the head has a packed copy of its own, which a reload leaves as it was where the embeddings are tied."""
    head: Any = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "quant_method") and getattr(head, "weight", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def _start(model_dir: Path, arguments: dict[str, Any], on_gpu: bool) -> Any:
    """An engine in this process, with dummy weights."""
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    if on_gpu and "expandable_segments:True" in allocator:
        raise ConfigError(
            "PYTORCH_ALLOC_CONF has expandable_segments:True, with which vLLM cannot free its memory. Unset it."
        )
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()  # vLLM measures what is free, and fails if that grows meanwhile
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for functions that never leave this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        with _undisturbed():
            from vllm import LLM

            return LLM(
                model=str(model_dir), load_format="dummy", trust_remote_code=False, enable_sleep_mode=on_gpu,
                generation_config="vllm",  # not the model's own sampling defaults
                logprobs_mode="raw_logprobs", seed=0, disable_log_stats=True, **arguments,
            )  # fmt: skip
    except ImportError as error:
        raise ConfigError(f"vLLM is installed but cannot be imported ({error}). {INSTALL}.") from error
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise GeneratorError(
            f"vLLM does not start: {error}\nIf memory is short, lower generator.gpu_memory_utilization or "
            f"generator.max_model_len. Arguments: {arguments}"
        ) from error


@contextmanager
def _short_collections() -> Iterator[None]:
    """Garbage collections inside look at new objects only.

    vLLM asks for a full one when it goes to sleep, and that walks the 700,000 objects of torch, transformers and vLLM:
    0.3 to 0.4 of the 0.5 seconds that this took on an H100's host.
    """
    already_frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not already_frozen:
            gc.unfreeze()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores what starting an engine changes in the process: seeds, threads, compiler, garbage collection,
    environment."""
    states = random.getstate(), np.random.get_state()
    set_num_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    environment = dict(os.environ)
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    compile_threads, recompile_limit = inductor.compile_threads, dynamo.recompile_limit
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        inductor.compile_threads, dynamo.recompile_limit = compile_threads, recompile_limit
        gc.unfreeze()
        for name in set(os.environ) - set(environment):
            if not name.startswith("VLLM_"):  # its own it may read again
                del os.environ[name]
        os.environ.update(environment)
