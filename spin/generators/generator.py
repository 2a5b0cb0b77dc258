"""The generator interface: whoever answers prompts with token ids can play the opponent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from spin.core.errors import ConfigError, GeneratorError
from spin.core.ranks import World
from spin.types import Response

_NUMBERS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "min_new_tokens": int,
    "max_new_tokens": int,
}


@dataclass(frozen=True)
class SamplingParams:
    """How the opponent answers. The defaults are the model's own distribution, unaltered.

    Args:
        temperature (float): 0 is greedy.
        top_k (int): keep the k most probable tokens; 0 keeps all.
        top_p (float): keep the smallest set of tokens with at least this probability, in (0, 1].
        repetition_penalty (float): divides positive and multiplies negative logits of tokens that stand in the prompt
            or the response so far (CTRL, arXiv 1909.05858); 1 is off.
        min_new_tokens (int): no stop token, and no end by a stop string, before this many tokens.
        max_new_tokens (int): the response is cut here, finish reason ``length``.
        stop_token_ids (tuple[int, ...]): end the response; the stop token is part of it.
        stop_strings (tuple[str, ...]): end the response where the text first contains one; its tokens are part of it.
        logprobs (bool): also return the log-prob of each token under the unaltered distribution.
        banned_token_ids (tuple[int, ...]): never chosen; what the model's vocabulary has beyond the tokenizer's.

    Raises:
        ConfigError: If a value is of another kind or outside its range.
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
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        object.__setattr__(self, "banned_token_ids", tuple(self.banned_token_ids))
        faults = [
            f"sampling.{name}={getattr(self, name)!r}: expected a {'whole number' if kind is int else 'number'}."
            for name, kind in _NUMBERS.items()
            if not isinstance(getattr(self, name), int if kind is int else (int, float))
            or isinstance(getattr(self, name), bool)
        ]
        if any(type(token) is not int for token in self.stop_token_ids):
            faults.append(f"sampling.stop_token_ids={list(self.stop_token_ids)}: expected token ids, whole numbers.")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            faults.append(
                f"sampling.stop_strings={list(self.stop_strings)}: expected texts that are not empty; every answer "
                "holds an empty one. Quote numbers."
            )
        if faults:
            raise ConfigError("\n".join(faults))
        faults = [
            f"sampling.{name}={getattr(self, name)}: expected {expected}."
            for name, ok, expected in (
                ("temperature", self.temperature >= 0, "0 (greedy) or more"),
                ("top_k", self.top_k >= 0, "0 (off) or more"),
                ("top_p", 0 < self.top_p <= 1, "a share in (0, 1]"),
                ("repetition_penalty", self.repetition_penalty > 0, "more than 0; 1 is off"),
                ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
                ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            )
            if not ok
        ]
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def greedy_by(self) -> str | None:
        """The argument, if any, that leaves nothing to chance: all answers to a prompt are then the same."""
        for name, is_greedy in (
            ("temperature", self.temperature < 1e-5),  # from there on vLLM takes the most probable token
            ("top_k", self.top_k == 1),
            ("top_p", self.top_p <= 1e-6),  # below the largest probability of any distribution over a vocabulary
        ):
            if is_greedy:
                return name
        return None


def sampling_params(
    section: Mapping[str, Any], eos_ids: Sequence[int], unknown_ids: Sequence[int] = ()
) -> SamplingParams:
    """The config's ``sampling`` with the model's own stop tokens added.

    Args:
        section (Mapping[str, Any]): arguments of :class:`SamplingParams`.
        eos_ids (Sequence[int]): the tokenizer's end-of-turn tokens.
        unknown_ids (Sequence[int]): ids that the tokenizer lacks, see :func:`spin.data.read.unknown_ids`; banned,
            unless they are stop tokens.

    Returns:
        SamplingParams: how the opponent answers.
    """
    stops = (*eos_ids, *section.get("stop_token_ids", ()))
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
    """Answers prompts. A recipe calls ``generate`` once per shard of prompts, and ``update_weights`` before an
    iteration unless ``shares_policy_weights`` says that the generator runs the policy itself."""

    shares_policy_weights: bool

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        """Answers prompts. A response depends on its prompt, ``sampling`` and its seed only.

        Args:
            prompts (list[list[int]]): token ids.
            sampling (SamplingParams): how to answer.
            seeds (list[int]): one for each prompt, in [0, 2**63).

        Returns:
            list[Response]: one for each prompt, in order.

        Raises:
            GeneratorError: If the engine fails, or a prompt leaves no room for a response.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the policy's weights, by torchtune parameter name, one tensor at a time."""
        ...

    def sleep(self) -> None:
        """Gives device memory back while the policy trains."""
        ...

    def wake(self) -> None:
        """Makes ready for ``generate`` again."""
        ...

    def close(self) -> None:
        """Ends the engine."""
        ...


@runtime_checkable
class StreamingGenerator(Generator, Protocol):
    """A generator that takes all of a rank's prompts at once and hands out answers as they are finished.

    Its engine then never runs empty between shards of prompts. A recipe prefers ``stream`` where there is one.
    """

    def stream(
        self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams
    ) -> Iterator[tuple[int, Response]]:
        """Answers prompts in bulk.

        Args:
            requests (Iterable[tuple[Sequence[int], int]]): token ids of a prompt and its seed; read as far ahead as
                the engine is busy.
            sampling (SamplingParams): how to answer.

        Returns:
            Iterator[tuple[int, Response]]: number of the request and its answer, in the order in which they are
            finished; a Python generator, which the caller closes to give up what runs.

        Raises:
            GeneratorError: As ``generate``.
        """
        ...


def generate_in_order(
    generator: StreamingGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
) -> list[Response]:
    """What ``generate`` is where there is ``stream``.

    Args:
        generator (StreamingGenerator): answers.
        prompts (Sequence[Sequence[int]]): token ids.
        sampling (SamplingParams): how to answer.
        seeds (Sequence[int]): one for each prompt.

    Returns:
        list[Response]: one for each prompt, in order.

    Raises:
        GeneratorError: If the numbers of prompts and seeds differ, or as ``stream``.
    """
    if len(prompts) != len(seeds):
        raise GeneratorError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed per prompt.")
    done = dict(generator.stream(zip(prompts, seeds, strict=True), sampling))
    return [done[index] for index in range(len(prompts))]


def max_response_tokens(prompt: Sequence[int], index: int, sampling: SamplingParams, max_seq_len: int) -> int:
    """How many tokens the answer to a prompt may have.

    Args:
        prompt (Sequence[int]): token ids.
        index (int): number of the request, for the message.
        sampling (SamplingParams): gives ``max_new_tokens``.
        max_seq_len (int): of prompt and answer together.

    Returns:
        int: 1 or more; ``max_new_tokens`` unless the context ends before.

    Raises:
        GeneratorError: If the prompt is empty or leaves no room.
    """
    if not len(prompt):
        raise GeneratorError(f"prompt {index} is empty. A prompt needs at least one token.")
    if len(prompt) >= max_seq_len:
        raise GeneratorError(
            f"prompt {index} has {len(prompt)} tokens and leaves no room for a response, expected at most "
            f"{max_seq_len - 1} (max_seq_len {max_seq_len} - 1). Lower dataset.max_prompt_tokens, or raise the limit."
        )
    return min(sampling.max_new_tokens, max_seq_len - len(prompt))
