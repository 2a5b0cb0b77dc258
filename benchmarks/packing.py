"""Forward and backward of a batch of pairs: packed rows that share prompts, against concatenated and padded sequences.

    python benchmarks/packing.py                    # a small Llama on the CPU, a minute
    python benchmarks/packing.py --device cuda --layers 16 --dim 2048 --heads 32 --kv-heads 8 --vocab 128256 --pairs 64

The baseline is what torchtune's DPO recipe does: real and generated responses as one batch padded to the longest, the
prompt twice, fp32 logits of every token. Both arms run the same model, loss and pairs, in interleaved rounds; before
that their losses and gradients are compared. Prints one JSON object: seconds (medians), spreads, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2

from spin.attention import patch_attention
from spin.data import Pair, Response, pack_batch
from spin.logprobs import response_logps
from spin.loss import SPINLoss


def random_pairs(num: int, prompt: int, response: int, vocab: int, seed: int = 0) -> list[Pair]:
    """Pairs of random tokens with log-normal lengths (sigma 0.6) around the given means, and reference log-probs."""
    rng = np.random.default_rng(seed)

    def tokens(mean: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6), 4, 8 * mean))
        return rng.integers(1, vocab, length).astype(np.int32)

    return [
        Pair(f"s{i}", 0, tokens(prompt), tokens(response), [Response(tokens(response), "stop", -1.0)], -1.0)
        for i in range(num)
    ]


def packed_loss(model: nn.Module, pairs: list[Pair], loss: SPINLoss, row_tokens: int, device: torch.device) -> float:
    """Forward and backward over packed rows; returns the batch's loss."""
    total = 0.0
    for row in pack_batch(pairs, row_tokens=row_tokens, row_multiple=128):
        row = row.to(device)
        logps = response_logps(model, row)
        reference = row.reference_logps
        losses, _, _ = loss(logps[row.real], logps[row.generated], reference[row.real], reference[row.generated])
        part = losses.sum() / len(pairs)
        part.backward()
        total += part.item()
    return total


def padded_loss(model: nn.Module, pairs: list[Pair], loss: SPINLoss, batch: int, device: torch.device) -> float:
    """Forward and backward over concatenated, right-padded sequences with fp32 logits; returns the loss."""
    total = 0.0
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        sequences = [(pair.prompt_ids, pair.real_ids) for pair in chunk]
        sequences += [(pair.prompt_ids, pair.generated[0].token_ids) for pair in chunk]
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        labels = torch.full((len(sequences), longest), -100)
        for i, (prompt, response) in enumerate(sequences):
            tokens[i, : len(prompt) + len(response)] = torch.from_numpy(np.concatenate((prompt, response)))
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.from_numpy(response)
        tokens, labels = tokens.to(device), labels[:, 1:].to(device)
        logits = model(tokens)[:, :-1].float()  # (2 b, s, v)
        token_logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        logps = (token_logps * (labels != -100)).sum(-1)
        real, generated = logps.chunk(2)
        reference = torch.full_like(real, -1.0)
        part = loss(real, generated, reference, reference)[0].sum() / len(pairs)
        part.backward()
        total += part.item()
    return total


def measure(arm: Callable[[], float], model: nn.Module, device: torch.device) -> float:
    """Seconds of one forward and backward of the whole batch."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Reads the arguments, checks that the arms agree, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("layers", 4), ("dim", 256), ("heads", 8), ("kv-heads", 4), ("vocab", 32000), ("pairs", 16), ("prompt", 199),
        ("response", 278), ("row-tokens", 2048), ("padded-batch", 4), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=args.vocab, num_layers=args.layers, num_heads=args.heads, num_kv_heads=args.kv_heads,
        embed_dim=args.dim, intermediate_dim=4 * args.dim, max_seq_len=131072, tie_word_embeddings=True,
    ).to(device=device, dtype=dtype)  # fmt: skip
    patch_attention(model)
    pairs = random_pairs(args.pairs, args.prompt, args.response, args.vocab)
    loss = SPINLoss(beta=0.1)
    arms: dict[str, Callable[[], float]] = {
        "packed": lambda: packed_loss(model, pairs, loss, args.row_tokens, device),
        "padded": lambda: padded_loss(model, pairs, loss, args.padded_batch, device),
    }

    losses, gradients = {}, {}
    for name, arm in arms.items():  # also the warm-up
        model.zero_grad(set_to_none=True)
        losses[name] = arm()
        gradients[name] = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    difference = (gradients["packed"] - gradients["padded"]).norm() / gradients["padded"].norm()
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-3
    if not difference < tolerance:
        raise SystemExit(f"the arms disagree: losses {losses}, gradients differ by {difference:.2e}")
    del gradients

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            seconds[name].append(measure(arm, model, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "arguments": vars(args),
                "losses": losses,
                "gradient_difference": difference.item(),
                "median_seconds": medians,
                "spread": {name: (max(values) - min(values)) / medians[name] for name, values in seconds.items()},
                "padded_over_packed": medians["padded"] / medians["packed"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
