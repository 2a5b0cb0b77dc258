"""Peak memory of a config on this GPU, against its estimate.

    python benchmarks/memory.py --config benchmarks/configs/llama3_1_8B_lora.yaml

Random weights and tokens, nothing is read but the config: two optimizer steps over the rows of a batch of pairs of a
given mean length, then responses to as many prompts of the greatest length as the generator takes at once. Prints both
peaks of torch's allocator next to :func:`spin.cli.memory.estimate`, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchtune import training

from spin import config
from spin.cli.memory import estimate
from spin.config import SPINConfig
from spin.core.ranks import init_world, shutdown
from spin.data import Pair
from spin.generators import GeneratorContext, TorchtuneGenerator, sampling_params
from spin.model.adapters import as_nf4, fill_nf4
from spin.model.build import choose_attention, prepare_model, row_layout, training_options
from spin.model.lora import build_policy, init_adapters, trainable
from spin.model.sharding import accumulating, clip_grad_norm
from spin.pairs.packing import pack_batch
from spin.reference.logprobs import pair_objective
from spin.types import Response

GIB = 2**30


def fill(model: nn.Module) -> None:
    """Random weights; NF4 ones as the quantized form of such."""
    with torch.no_grad():
        for parameter in model.parameters():
            nf4 = as_nf4(parameter)
            if nf4 is not None:
                fill_nf4(nf4, torch.randn(parameter.shape, dtype=nf4.dtype, device=nf4.device) * 0.02, 0)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)


def make_pairs(count: int, pair_tokens: int, vocab: int) -> list[Pair]:
    """Pairs whose lengths spread as those of conversations; a quarter of each is the prompt."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(count):
        total = pair_tokens * math.exp(rng.normal() * 0.5 - 0.125)
        lengths = [max(1, round(total * share)) for share in (0.26, 0.37, 0.37)]
        prompt, real, generated = (rng.integers(5, vocab, length) for length in lengths)
        pairs.append(Pair(str(i), 0, prompt, real, [Response(generated, "stop", -1.0)], -1.0))
    return pairs


def margin_loss(row: Any, logps: torch.Tensor) -> torch.Tensor:
    """SPIN's loss with beta 0.1, summed over a row's pairs."""
    drift = logps - row.reference_logps
    return -torch.nn.functional.logsigmoid(0.1 * (drift[row.real] - drift[row.generated])).sum()


def measure(cfg: Any, pair_tokens: int) -> dict[str, float]:
    """Peaks of a step and of playing, in GiB; 0 where there is no GPU."""
    world = init_world(cfg.device)
    on_gpu = world.device.type == "cuda"
    compute = training.get_dtype(cfg.compute_dtype, world.device)
    model: Any = build_policy(cfg, world)
    context = model.max_seq_len
    flex = choose_attention(model, world, compute, cfg.attention)
    layout = row_layout(model, cfg, flex)
    model.max_seq_len = max(context, 2 * cfg.pairs.row_tokens)
    prepare_model(model, world, compute_dtype=compute, **training_options(cfg))
    fill(model)
    init_adapters(model, cfg.seed)
    optimizer = config.instantiate(cfg.optimizer, trainable(model), lr=1e-6)
    vocab = model.tok_embeddings.weight.shape[0]
    rows = pack_batch(make_pairs(cfg.global_batch_size, pair_tokens, vocab), layout)

    def peak() -> float:
        if not on_gpu:
            return 0.0
        found = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        return found

    peak()
    for _ in range(2):  # in the second the optimizer's state is there from the start
        with accumulating(model, rows, unsharded_gradients=cfg.fsdp_accumulate_unsharded) as each_row:
            for row in (row.to(world.device) for row in each_row):
                total, _ = pair_objective(model, row, partial(margin_loss, row), cfg.logprob_chunk_tokens)
                total.backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    results = {"training": peak(), "row_tokens": max(row.tokens.numel() for row in rows), "rows": len(rows)}

    model.max_seq_len = context
    generator = TorchtuneGenerator(
        GeneratorContext(model, world.device, context, lambda ids: "", world), cfg.generator.get("batch_size", 32)
    )
    longest = min(cfg.dataset.get("max_prompt_tokens") or context, context - cfg.sampling.max_new_tokens)
    prompts = [np.random.default_rng(i).integers(5, vocab, longest).tolist() for i in range(generator.batch_size)]
    generator.generate(prompts, sampling_params(cfg.sampling, ()), list(range(len(prompts))))
    results["playing"] = peak()
    shutdown()
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--pair-tokens", type=int, default=755, help="mean tokens of a pair")
    parser.add_argument("--out", help="a JSON file")
    arguments, overrides = parser.parse_known_args()
    raw = config.load_config(arguments.config, overrides)
    cfg = config.complete(raw, SPINConfig)
    expected = estimate(cfg, pair_tokens=arguments.pair_tokens)
    measured = measure(cfg, arguments.pair_tokens)
    print(f"{arguments.config}: {measured['rows']} rows, the longest of {measured['row_tokens']} tokens")
    results: dict[str, Any] = {"config": arguments.config, "overrides": overrides, "torch": torch.__version__}
    for phase in ("training", "playing"):
        found, estimated = measured[phase], getattr(expected, phase)
        off = f" ({estimated / found - 1:+.0%})" if found else " (not measured: no GPU)"
        print(f"{phase:<10} measured {found:6.1f} GiB   estimated {estimated:6.1f} GiB{off}")
        results[phase] = {"measured_gib": found, "estimated_gib": estimated}
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(results | {"row_tokens": measured["row_tokens"]}, file, indent=2)


if __name__ == "__main__":
    main()
