"""Tests VLLMGenerator in a process of its own, and writes what it saw as JSON: `vllm_engine.py OUT MODEL_DIR`.

An engine changes its process for good, so pytest does not run it; tests/generators/test_vllm.py reads the report.
"""

import json
import logging
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

from transformers import AutoModelForCausalLM  # noqa: E402

from spin.core.errors import SpinError  # noqa: E402
from spin.core.ranks import init_world, shutdown  # noqa: E402
from spin.data import PromptDataset  # noqa: E402
from spin.generators import GeneratorContext, SamplingParams, TorchtuneGenerator, VLLMGenerator  # noqa: E402
from spin.model.build import build_model, prepare_model  # noqa: E402
from spin.model.hf import load_hf_weights  # noqa: E402
from spin.model.sharding import named_full_tensors  # noqa: E402
from spin.pairs.packing import RowLayout  # noqa: E402
from spin.reference.generator_check import check_generator_logprobs  # noqa: E402
from spin.types import Prompt  # noqa: E402
from tests.recipes.helpers import tiny_config  # noqa: E402

ENGINE = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32}
GREEDY = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=(2,), logprobs=True)
RANDOM = SamplingParams(max_new_tokens=24, stop_token_ids=(2,))


def error_of(function):
    try:
        function()
    except SpinError as error:
        return f"{type(error).__name__}: {error}"
    return None


def tokens(responses):
    return [[list(c.token_ids), c.finish_reason] for c in responses]


def dataset(prompts):
    return PromptDataset(Prompt(str(i), ids, [2]) for i, ids in enumerate(prompts))


def main(out, model_dir):
    logging.basicConfig(level=logging.WARNING)
    report = {}
    world = init_world("cpu")
    model = build_model(tiny_config("unused").model, torch.float32)
    prepare_model(model, world, compute_dtype=torch.float32)
    load_hf_weights(model, model_dir, "LLAMA3_2", world=world)
    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)
    torch.set_num_threads(2)

    def process():
        threads = [torch.get_num_threads(), torch.set_num_threads]
        seeds = {"torch": torch.get_rng_state().tolist(), "numpy": np.random.get_state()[1].tolist()}
        return {**seeds, "python": random.getstate(), "threads": threads}

    before, environment = process(), dict(os.environ)
    context = GeneratorContext(model, world.device, 512, lambda ids: "", world)
    arguments = {"model_dir": model_dir, "model_type": "LLAMA3_2", "dtype": "fp32", "enforce_eager": True}
    vllm = VLLMGenerator(context, **arguments, engine=ENGINE)
    changed = [name for name, value in os.environ.items() if environment.get(name) != value]
    report["undisturbed"] = {
        **{name: value == before[name] for name, value in process().items()},
        "environment": [name for name in changed if not name.startswith("VLLM_")],
    }
    embedded = TorchtuneGenerator(context, batch_size=4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 1000, rng.integers(40, 90)).tolist() for _ in range(10)]
    seeds = list(range(100, 110))

    def both(sampling):
        return [tokens(g.generate(prompts, sampling, seeds)) for g in (vllm, embedded)]

    def sync():
        vllm.sleep()
        vllm.wake()
        vllm.update_weights(named_full_tensors(model))

    def gap(limit=0.02):
        vllm.max_logprob_gap = limit
        return check_generator_logprobs(
            vllm, model, world, dataset(prompts), RANDOM, layout=RowLayout(512), chunk_tokens=512
        )

    report["before weights"] = error_of(lambda: vllm.generate(prompts, GREEDY, seeds))
    sync()

    # ---- the same responses as others give
    hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        how = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 2, "pad_token_id": 0}
        report["transformers"] = [hf.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in prompts]
    report["greedy"] = both(GREEDY)
    ours, theirs = (g.generate(prompts, GREEDY, seeds) for g in (vllm, embedded))
    pairs = zip(ours, theirs, strict=True)
    report["logprob difference"] = max(
        abs(a - b) for x, y in pairs for a, b in zip(x.logprobs, y.logprobs, strict=True)
    )
    first = report["greedy"][1]
    longest = max(range(len(first)), key=lambda i: len(first[i][0]))
    a_token = report["a token"] = first[longest][0][5]
    for name, sampling in {
        "truncated": replace(GREEDY, max_new_tokens=3),
        "stopped": replace(GREEDY, stop_token_ids=(2, a_token)),
        "no early stop": replace(GREEDY, stop_token_ids=(2, a_token), min_new_tokens=12),
        "penalty": replace(GREEDY, repetition_penalty=1.5),
    }.items():
        report[name] = both(sampling)
    report["one of one"] = [
        tokens(vllm.generate(prompts, s, seeds)) for s in (replace(RANDOM, top_k=1), replace(RANDOM, top_p=1e-6))
    ]

    banned = {first[longest][0][3], first[0][0][0]}
    for name, sampling in {"banned": GREEDY, "banned at random": RANDOM}.items():
        report[name] = both(replace(sampling, banned_token_ids=tuple(banned)))
    report["banned"].append(sorted(banned))

    # ---- stop strings: the text of its own greedy response
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = tokenizer.decode(first[longest][0])
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = vllm.generate([prompts[longest]], replace(GREEDY, logprobs=False, stop_strings=(stop,)), [0])[0]
    report["stop string"] = {
        "stop": stop, "text": tokenizer.decode(cut.token_ids), "reason": cut.finish_reason,
        "whole": text, "before": tokenizer.decode(cut.token_ids[:-1]),
    }  # fmt: skip

    # ---- random responses
    samples = vllm.generate(prompts, RANDOM, seeds)
    backwards = vllm.generate(prompts[::-1], RANDOM, seeds[::-1])[::-1]
    alone = [vllm.generate([p], RANDOM, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    other = vllm.generate(prompts, RANDOM, [seed + 1 for seed in seeds])
    step, cached = vllm.llm.llm_engine.step, []

    def watched_step():
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    vllm.llm.llm_engine.step = watched_step
    fresh = rng.integers(5, 1000, 80).tolist()
    same_prompt = vllm.generate([fresh] * 4, RANDOM, seeds[:4])
    vllm.llm.llm_engine.step = step
    report["random"] = {
        "any order": tokens(samples) == tokens(backwards),
        "any batch": tokens(samples) == tokens(alone),
        "other seeds": tokens(samples) != tokens(other),
        "responses to one prompt": len({tuple(c.token_ids) for c in same_prompt}),
        "cached prompt tokens": sorted(cached),
    }

    # ---- new weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    sync()
    report["new weights"] = both(GREEDY)
    report["gap"] = gap()

    # ---- what the proof must find
    forget, update = vllm.llm.reset_prefix_cache, vllm.update_weights
    vllm.generate(prompts, GREEDY, seeds)  # fills the cache
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.85)
    vllm.llm.reset_prefix_cache = lambda: True
    sync()
    vllm.llm.reset_prefix_cache = forget
    report["stale cache"] = [gap(limit=100.0), error_of(gap)]
    sync()
    report["no stale cache"] = gap()

    def swapped(named):
        names = ["layers.0.mlp.w1.weight", "layers.0.mlp.w3.weight"]
        other = dict(zip(names, names[::-1], strict=True))
        yield from {other.get(name, name): tensor for name, tensor in named}.items()

    update(swapped(named_full_tensors(model)))
    report["swapped tensors"] = error_of(gap)
    report["missing tensor"] = error_of(lambda: update(list(named_full_tensors(model))[:-1]))
    report["after a failed update"] = error_of(lambda: vllm.generate(prompts, GREEDY, seeds))
    sync()

    # ---- refusals and faults, after which it goes on
    long = [*prompts[:2], [5] * 512]
    report["too long"] = error_of(lambda: vllm.generate(long, GREEDY, seeds[:3]))
    report["empty"] = error_of(lambda: vllm.generate([[]], GREEDY, seeds[:1]))
    report["one seed"] = error_of(lambda: vllm.generate(prompts, GREEDY, seeds[:1]))
    stream = vllm.stream(zip(prompts, seeds, strict=True), GREEDY)
    next(stream)
    stream.close()
    report["after an early end"] = [vllm.llm.llm_engine.has_unfinished_requests(), error_of(gap)]
    calls = []

    def failing_step():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the GPU is gone")
        return step()

    vllm.llm.llm_engine.step = failing_step
    report["engine failure"] = error_of(lambda: vllm.generate(prompts, GREEDY, seeds))
    vllm.llm.llm_engine.step = step
    report["after an engine failure"] = error_of(lambda: vllm.generate(prompts, GREEDY, seeds))
    vllm.close()
    shutdown()
    Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
