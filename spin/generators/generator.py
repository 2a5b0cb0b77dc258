"""The generator interface: whatever responds to prompts with token ids can be the opponent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from spin.config.schema import Sampling
from spin.core.errors import GeneratorError
from spin.core.ranks import World
from spin.types import Response


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. The defaults are the model's own distribution, unaltered; a config's values have
    passed the ranges of :class:`spin.config.schema.Sampling`.

    Args:
        temperature (float): 0 is greedy.
        top_k (int): keep the k most probable tokens; 0 keeps all.
        top_p (float): keep the smallest set of tokens with at least this probability, in (0, 1].
        repetition_penalty (float): divides positive and multiplies negative logits of tokens that stand in the prompt
            or the response so far (CTRL, arXiv 1909.05858); 1 is off.
        min_new_tokens (int): no stop token, and no end by a stop string, before this many tokens.
        max_new_tokens (int): the response is truncated here, finish reason ``length``.
        stop_token_ids (tuple[int, ...]): end the response; the stop token is part of it.
        stop_strings (tuple[str, ...]): end the response where the text first contains one; its tokens are part of it.
        logprobs (bool): also return the log-prob of each token under the unaltered distribution.
        banned_token_ids (tuple[int, ...]): never chosen; what the model's vocabulary has beyond the tokenizer's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    banned_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop_strings", "banned_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


def sampling_params(section: Sampling, eos_ids: Sequence[int], unknown_ids: Sequence[int] = ()) -> SamplingParams:
    """The config's ``sampling``: the tokenizer's end-of-turn tokens stop a response too, and ids that it lacks, see
    :func:`spin.data.read.unknown_ids`, are banned unless they are stop tokens."""
    stops = (*eos_ids, *section.stop_token_ids)
    banned = tuple(token for token in unknown_ids if token not in stops)
    return SamplingParams(**{**section, "stop_token_ids": stops, "banned_token_ids": banned})


@dataclass(frozen=True)
class GeneratorContext:
    """What a recipe hands to the generator that the config names.

    Args:
        model (nn.Module | None): the policy, for generators that run it in place.
        device (torch.device): where the policy lives.
        max_seq_len (int): longest prompt plus response that the model takes, in tokens.
        decode (Callable[[Sequence[int]], str]): token ids to text, for stop strings.
        world (World | None): the ranks, for generators that act on several of them; None stands for one rank.
    """

    model: nn.Module | None
    device: torch.device
    max_seq_len: int
    decode: Callable[[Sequence[int]], str]
    world: World | None = None


@runtime_checkable
class Generator(Protocol):
    """Responds to prompts. A recipe calls ``generate`` once per shard of prompts, and ``update_weights`` before an
    iteration unless ``shares_policy_weights`` says that the generator runs the policy itself."""

    shares_policy_weights: bool

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        """Responds to prompts. A response depends on its prompt, ``sampling`` and its seed only.

        Args:
            prompts (list[list[int]]): token ids.
            sampling (SamplingParams): how to choose tokens and when to stop.
            seeds (list[int]): one for each prompt, in [0, 2**63).

        Returns:
            list[Response]: one for each prompt, in order.

        Raises:
            GeneratorError: If the engine fails, or a prompt leaves no room for a response.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the policy's weights: every parameter once, by torchtune name, one full tensor at a time.

        Args:
            named_tensors (Iterable[tuple[str, torch.Tensor]]): reading it is collective.

        Raises:
            GeneratorError: If a tensor is missing, unknown or of another shape, or the engine does not take it.
        """
        ...

    def sleep(self) -> None:
        """Frees device memory while the policy trains."""
        ...

    def wake(self) -> None:
        """Prepares for ``generate`` after :meth:`sleep`."""
        ...

    def close(self) -> None:
        """Shuts the engine down."""
        ...


@runtime_checkable
class StreamingGenerator(Generator, Protocol):
    """A generator that takes all of a rank's prompts at once and yields responses as they are finished.

    Its engine then never runs empty between shards of prompts. A recipe prefers ``stream`` where there is one.
    """

    def stream(
        self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams
    ) -> Iterator[tuple[int, Response] | None]:
        """Responds to prompts in bulk.

        Args:
            requests (Iterable[tuple[Sequence[int], int]]): token ids of a prompt and its seed; read as far ahead as
                the engine is busy.
            sampling (SamplingParams): how to choose tokens and when to stop.

        Returns:
            Iterator[tuple[int, Response] | None]: number of the request and its response, in the order in which they
            are finished, and None between the engine's steps, or twice a second, so that the caller can stop; its
            ``close``, if it has one as Python's generators do, is called to abort what runs.

        Raises:
            GeneratorError: As ``generate``.
        """
        ...


def generate_in_order(
    generator: StreamingGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
) -> list[Response]:
    """``generate`` by ``stream``: responses in the order of the prompts."""
    if len(prompts) != len(seeds):
        raise GeneratorError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed per prompt.")
    done = dict(filter(None, generator.stream(zip(prompts, seeds, strict=True), sampling)))
    return [done[index] for index in range(len(prompts))]


def max_response_tokens(prompt: Sequence[int], index: int, sampling: SamplingParams, max_seq_len: int) -> int:
    """How many tokens the response to a prompt may have: ``max_new_tokens`` unless the context ends before.

    Raises GeneratorError if the prompt is empty or leaves no room; ``index`` names it in the message.
    """
    if not len(prompt):
        raise GeneratorError(f"prompt {index} is empty. A prompt needs at least one token.")
    if len(prompt) >= max_seq_len:
        raise GeneratorError(
            f"prompt {index} has {len(prompt)} tokens and leaves no room for a response, expected at most "
            f"{max_seq_len - 1} (max_seq_len {max_seq_len} - 1). Lower dataset.max_prompt_tokens, or raise the limit."
        )
    return min(sampling.max_new_tokens, max_seq_len - len(prompt))
