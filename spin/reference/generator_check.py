"""Checks that a generator samples from the weights it was given, by the log-probs of its responses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from spin.core.errors import GeneratorError
from spin.core.ranks import World, gather_objects, raise_on_all_ranks
from spin.data.dataset import PromptDataset
from spin.generators.engines import name_of
from spin.generators.generator import Generator, SamplingParams
from spin.generators.stage import Limits, check_response, generate_each
from spin.pairs.packing import RowLayout
from spin.reference.stage import score_batches
from spin.types import Pair

PROBE_PROMPTS, PROBE_TOKENS = 8, 32  # responses, and tokens of each, that are compared


def check_generator_logprobs(
    generator: Generator,
    model: nn.Module,
    world: World,
    prompts: PromptDataset,
    sampling: SamplingParams,
    *,
    layout: RowLayout,
    chunk_tokens: int,
    as_in_training: bool = False,
) -> float | None:
    """Compares a generator's log-probs of its own responses with the policy's. Collective; call it in
    :func:`policy_loaded`.

    A wrong name map, a tensor that did not arrive, or a cache that was made under other weights shows here and nowhere
    else. The first few prompts are used, the same in every iteration, so that a stale cache would be met.

    Returns the mean gap in nats per token over all engines, or None for a generator without ``max_logprob_gap``;
    GeneratorError if an engine's mean gap exceeds that. ``layout``, ``chunk_tokens`` and ``as_in_training`` are those
    of :func:`spin.reference.stage.score_batches`.
    """
    limit = getattr(generator, "max_logprob_gap", None)
    if limit is None:
        return None
    asked = [prompts[i] for i in range(min(PROBE_PROMPTS, len(prompts)))]
    tokens = min(PROBE_TOKENS, sampling.max_new_tokens)
    least = max(1, min(tokens, sampling.min_new_tokens))
    sampling = replace(sampling, max_new_tokens=tokens, min_new_tokens=least, stop_strings=(), logprobs=True)
    limits = Limits(model.tok_embeddings.weight.shape[0])  # type: ignore[union-attr, index]
    mine = []
    with raise_on_all_ranks(world, GeneratorError):
        responses = generate_each(generator, [(prompt.prompt_ids, i) for i, prompt in enumerate(asked)], sampling)
        for i, (prompt, given) in enumerate(zip(asked, responses, strict=True)):
            response = check_response(given, prompt, generator, sampling, limits)
            if not len(response.token_ids):
                raise GeneratorError(f"{name_of(generator)} gave sample {prompt.sample_id} an empty response.")
            pair = Pair(f"{world.rank} {i}", 0, prompt.prompt_ids, response.token_ids)
            mine.append((pair, sum(response.logprobs or ())))
    by_rank = gather_objects(mine, world)
    batches = [[pair for part in by_rank for pair, _ in part]]
    score = partial(score_batches, layout=layout, chunk_tokens=chunk_tokens, as_in_training=as_in_training)
    with torch.no_grad():
        scored = iter(score(model, batches, world))
    gaps = []
    for part in by_rank:
        own = [abs(logp - (next(scored).reference_real_logp or 0.0)) / len(pair.real_ids) for pair, logp in part]
        gaps.append(sum(own) / len(own))
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    if not gaps[worst] <= limit:  # NaN is not below it either
        raise GeneratorError(
            f"{type(generator).__name__} on rank {worst}: its log-probs differ from the policy's by {gaps[worst]:.4g} "
            f"nats per token on average, expected at most {limit:g} (generator.max_logprob_gap). It does not have the "
            "policy's weights, or computes in another precision. Nothing was generated."
        )
    return sum(gaps) / len(gaps)
