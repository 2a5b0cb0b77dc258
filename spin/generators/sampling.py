"""Choosing tokens. Pure functions: the token of a sample depends on its logits, the sampling parameters and one uniform
number, and that number on the sample's seed and the token's place only. Batch, rank and restarts do not enter.
"""

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spin.generators.generator import SamplingParams
from spin.model.attention import generation_kernels

_BLOCK = 256  # tokens


def sample_seed(seed: int, iteration: int, sample_id: str, k: int) -> int:
    """The seed of response ``k`` to a sample, in [0, 2**63), the same on every machine and Python."""
    name = f"{seed}\x1f{iteration}\x1f{k}\x1f{sample_id}"  # the id comes last: it alone could contain the separator
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, start: int, n: int) -> np.ndarray:
    """Numbers ``start`` to ``start + n - 1`` of the stream of ``seed``: float64 in [0, 1), shape (n,). Any part of a
    stream can be computed without the rest.

    Source:
        Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox); one counter step gives four numbers.
    """
    skipped = start % 4
    bits = np.random.Philox(key=seed, counter=start // 4).random_raw(skipped + n)[skipped:]
    return (bits >> np.uint64(11)) * 2.0**-53


def sample_tokens(
    logits: torch.Tensor,
    sampling: SamplingParams,
    uniforms: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    new_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per row: banned tokens, the repetition penalty, the ban on early stops, temperature, top_k, top_p, then
    the inverse CDF. (n, v) logits -> (n,) token ids, int64.

    ``uniforms`` are float64 in [0, 1), shape (n,). ``seen`` marks tokens of the prompt and the response so far, bool,
    shape (n, v); the repetition penalty needs it. ``new_tokens`` counts the tokens of each response so far, shape (n,);
    ``min_new_tokens`` needs it.
    """
    if sampling.banned_token_ids:  # in a copy: log-probs are of the unaltered distribution
        logits = logits.index_fill(1, _ids(sampling.banned_token_ids, logits.device), -torch.inf)
    is_plain = sampling.top_p == 1 and not 0 < sampling.top_k < logits.shape[-1] and sampling.repetition_penalty == 1
    kernels: Any = generation_kernels(logits.device.type)
    if is_plain and sampling.temperature > 0 and kernels:
        early = (sampling.min_new_tokens, sampling.stop_token_ids) if sampling.stop_token_ids else (0, ())
        counts = torch.zeros_like(uniforms, dtype=torch.int64) if new_tokens is None else new_tokens
        tokens = kernels.draw(logits, uniforms, sampling.temperature, counts, early[0], _ids(early[1], logits.device))
        return tokens.clamp_(0, logits.shape[-1] - 1)
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("repetition_penalty needs seen: the tokens of prompt and response so far.")
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.min_new_tokens and sampling.stop_token_ids:
        if new_tokens is None:
            raise ValueError("min_new_tokens needs new_tokens: the length of each response so far.")
        logits = ban_early_stops(logits, new_tokens, sampling.min_new_tokens, sampling.stop_token_ids)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return invert_cdf(logits, uniforms)


@cache
def _ids(tokens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Made once: a captured step cannot send anything to the device."""
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Positive logits of seen tokens are divided by the penalty, negative ones multiplied (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban_early_stops(
    logits: torch.Tensor, new_tokens: torch.Tensor, min_new_tokens: int, stop_token_ids: tuple[int, ...]
) -> torch.Tensor:
    """Stop tokens get probability 0 in rows that are shorter than the minimum."""
    early = new_tokens < min_new_tokens
    banned = logits.clone()
    for token in stop_token_ids:  # a few columns, rather than a mask of the vocabulary made on the host
        banned[:, token].masked_fill_(early, -torch.inf)
    return banned


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k most probable tokens get probability 0; tokens equal to the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The smallest set of most probable tokens whose probabilities add up to p or more stays (arXiv 1904.09751)."""
    ordered, order = logits.sort(descending=True, dim=-1, stable=True)
    probs = ordered.softmax(-1)
    drop = probs.cumsum(-1) - probs >= p  # those before it are enough already; never true for the first
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def invert_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token, by id, at which the cumulative probability exceeds the uniform number.

    ``logits`` are float32, (n, v), minus infinity for probability 0; ``uniforms`` float64 in [0, 1), (n,).
    """
    n, v = logits.shape
    weights = logits.softmax(-1)
    # float64 sums: in float32 the tail of a large vocabulary is lost. Blocks first, then the tokens of one block: a
    # running sum over all tokens costs five times as much on CPU.
    if v % _BLOCK:
        weights = F.pad(weights, (0, -v % _BLOCK))
    blocks = weights.view(n, -1, _BLOCK)  # (n, v) -> (n, v / block, block)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms * cumulative[:, -1]
    block = _first_above(cumulative, target)
    before = F.pad(cumulative, (1, 0)).gather(1, block)  # (n, 1)
    rows = torch.arange(n, device=logits.device)
    within = before + blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)
    # logits that are not numbers give some token, which the reference pass will refuse to score
    return (block * _BLOCK + _first_above(within, target))[:, 0].clamp(max=v - 1)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the target, (n, m), (n,) -> (n, 1). It is never an entry that adds nothing.

    Rounding can leave the target at or above the last sum, which no entry exceeds; the next smaller float64 is
    exceeded first by the last entry that adds something.
    """
    last = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=cumulative.shape[1] - 1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs of chosen tokens under the unaltered distribution."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
