"""What a run reads its samples from, and the one that holds all of them in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spin.core.errors import DataError
from spin.data.messages import ChatMessage
from spin.data.order import iteration_samples
from spin.types import Prompt


@runtime_checkable
class PromptSource(Protocol):
    """Prompts with real responses, of which each iteration plays some: what a config's ``dataset`` section makes.

    Attributes:
        settings (Mapping[str, Any]): what else decides which samples are played, by config key; JSON values.
        samples_per_iteration (int): samples that an iteration can play at most.
        longest (int): greatest length of prompt and real response together, in tokens.
    """

    settings: Mapping[str, Any]

    @property
    def samples_per_iteration(self) -> int: ...

    @property
    def longest(self) -> int: ...

    def window(self, iteration: int) -> PromptDataset:
        """The samples that an iteration may play; a DataError if they are read only now and cannot be used."""

    def iteration_samples(self, num_needed: int, seed: int, iteration: int) -> list[int]:
        """The samples that an iteration plays: ``num_needed`` (steps of an epoch times the global batch size) indices
        into the iteration's window."""

    def sample_id(self, iteration: int, index: int) -> str:
        """Id of a sample of an iteration's window."""

    def count_sources(self, sample_ids: Iterable[str]) -> dict[str, float]:
        """How many samples come from each source of a mixture, by its name; empty if there are no names."""

    def first_outside(self, vocab_size: int) -> tuple[str, int] | None:
        """Id and token of the first sample with a token id that is not in ``range(vocab_size)``. Where samples are read
        later, :meth:`window` checks these."""

    def content_fingerprint(self) -> str:
        """Hash of the samples without what :attr:`settings` says."""


@dataclass(frozen=True)
class DatasetReport:
    """What became of the rows of a data set. Reasons are ``bad_row``, ``duplicate_id``, ``long_prompt_drop``,
    ``long_prompt_cut``, ``long_response_drop`` and ``long_response_cut``."""

    rows: int  # that were read
    samples: int  # that were kept; with ``turns=all`` a row can make several
    counts: dict[str, int] = field(default_factory=dict)  # of samples left out or shortened, by reason
    examples: list[str] = field(default_factory=list)  # place and reason of the first 20
    changes: dict[str, int] = field(default_factory=dict)  # rows that were read with a change, by its name
    # columns that no row's conversation was made from, and ``messages[].key`` for keys of messages
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Original:
    """What a sample was before it became token ids: the conversation, the real response last, and its row."""

    messages: list[ChatMessage]
    row: Mapping[str, Any]


class PromptDataset:
    """A :class:`PromptSource` in memory: token ids in flat arrays, 4 bytes a token and no Python object per token.

    ``originals`` holds what the samples were made of, by id, if ``prompt_dataset`` was asked to keep it; ``held_out``
    the samples that its ``validation_fraction`` took out, if any.

    Args:
        prompts (Iterable[Prompt]): the samples, with unique ids.
        report (DatasetReport | None): how they came about; None writes one that names nothing.

    Raises:
        DataError: If two samples have one id, or one is no :class:`~spin.types.Prompt` with tokens to respond to.
    """

    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, prompts: Iterable[Prompt] = (), report: DatasetReport | None = None) -> None:
        self.sample_ids: list[str] = []
        prompt_tokens, real_tokens = array("i"), array("i")
        prompt_offsets, real_offsets = array("q", [0]), array("q", [0])
        for prompt in prompts:
            if not isinstance(prompt, Prompt) or not isinstance(prompt.sample_id, str):
                problem = f"{prompt!r:.200}, expected a spin.data.Prompt whose sample_id is a text"
                raise DataError(f"sample {len(self.sample_ids)} is {problem}.")
            if not len(prompt.prompt_ids):
                raise DataError(f"sample {prompt.sample_id!r} has no prompt_ids, expected one token at least.")
            self.sample_ids.append(prompt.sample_id)
            prompt_tokens.extend(prompt.prompt_ids)
            prompt_offsets.append(len(prompt_tokens))
            real_tokens.extend(prompt.real_ids)
            real_offsets.append(len(real_tokens))
        self._prompt_tokens = np.frombuffer(prompt_tokens, dtype=np.int32)  # (sum of prompt lengths,)
        self._prompt_offsets = np.frombuffer(prompt_offsets, dtype=np.int64)  # (n + 1,)
        self._real_tokens = np.frombuffer(real_tokens, dtype=np.int32)  # (sum of response lengths,)
        self._real_offsets = np.frombuffer(real_offsets, dtype=np.int64)  # (n + 1,)
        if len(set(self.sample_ids)) != len(self.sample_ids):
            double = next(each for each, count in Counter(self.sample_ids).items() if count > 1)
            raise DataError(f"two samples have the id {double!r}, expected unique ids.")
        self.report = report or DatasetReport(rows=len(self), samples=len(self))
        self.originals: dict[str, Original] = {}
        self.held_out: PromptDataset | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]  # IndexError beyond the end; negative from the end
        begin, end = self._prompt_offsets[index : index + 2]
        real_begin, real_end = self._real_offsets[index : index + 2]
        return Prompt(
            self.sample_ids[index],
            self._prompt_tokens[begin:end].tolist(),
            self._real_tokens[real_begin:real_end].tolist(),
        )

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, shape (n,) int64."""
        return np.diff(self._prompt_offsets)

    @property
    def real_lengths(self) -> np.ndarray:
        """Tokens of each real response, its stop token included, shape (n,) int64."""
        return np.diff(self._real_offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt and real response together, shape (n,) int64."""
        return self.prompt_lengths + self.real_lengths

    @property
    def longest(self) -> int:  # noqa: D102 - see PromptSource, as for what follows
        return int(self.lengths.max(initial=0))

    @property
    def samples_per_iteration(self) -> int:
        return len(self)

    def window(self, iteration: int) -> PromptDataset:
        return self

    def iteration_samples(self, num_needed: int, seed: int, iteration: int) -> list[int]:
        return iteration_samples(len(self), num_needed, seed, iteration)

    def sample_id(self, iteration: int, index: int) -> str:
        return self.sample_ids[index]

    def count_sources(self, sample_ids: Iterable[str]) -> dict[str, float]:
        return {}

    def first_outside(self, vocab_size: int) -> tuple[str, int] | None:
        found = []
        parts = ((self._prompt_tokens, self._prompt_offsets), (self._real_tokens, self._real_offsets))
        for tokens, offsets in parts:
            for position in np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[:1].tolist():
                found.append((int(np.searchsorted(offsets, position, side="right")) - 1, int(tokens[position])))
        if not found:
            return None
        sample, token = min(found, key=lambda each: each[0])  # of equal ones the prompt's
        return self.sample_ids[sample], token

    def fingerprint(self) -> str:
        """sha256 over the ids and tokens of all samples in their order."""
        digest = hashlib.sha256(json.dumps(self.sample_ids).encode())
        for values in (self._prompt_offsets, self._prompt_tokens, self._real_offsets, self._real_tokens):
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        return self.fingerprint()


def check_is_dataset(dataset: object) -> None:
    """Checks what a data set function of the user's own has returned; a DataError if it is no source of prompts, or one
    lacks its real response."""
    if not isinstance(dataset, PromptSource):
        raise DataError(
            f"dataset: its _component_ gave a {type(dataset).__name__}, expected a spin.data.PromptDataset, such as "
            "PromptDataset([Prompt(sample_id, prompt_ids, real_ids), ...])."
        )
    if isinstance(dataset, PromptDataset) and not dataset.real_lengths.all():
        sample = dataset.sample_ids[int(dataset.real_lengths.argmin())]
        raise DataError(f"sample {sample!r} has no real_ids, expected one token at least.")


def evaluated_part(dataset: Any) -> PromptDataset:
    """What an evaluation plays of its data set: the samples that are held out from training, or all if none are."""
    check_is_dataset(dataset)
    whole: PromptDataset = dataset
    return getattr(whole, "held_out", None) or whole
