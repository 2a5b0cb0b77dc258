"""Conversations to token ids: the interface that the two adapters share, and what both of them need.

:class:`~spin.data.ChatTokenizer` renders the chat template of a Hugging Face folder,
:class:`~spin.data.TorchtuneTokenizer` wraps any of torchtune's model tokenizers. Both promise the same three things:

- The prompt ids of :meth:`~PromptTokenizer.encode_pair` are those of :meth:`~PromptTokenizer.encode_prompt`, so that
  training scores the response after exactly the tokens that the opponent saw.
- The real response ends with one stop token, the one that the model itself writes at the end of a turn, and holds no
  other. Nothing that a template puts behind it (ChatML's newline) is part of the response.
- Nothing is truncated or masked here, by value or otherwise: a pad token that equals EOS never hides an EOS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

from spin.core.errors import DataError
from spin.data.messages import ChatMessage
from spin.data.rows import bad_row

T = TypeVar("T")
Encoded = tuple[list[int], list[int]]  # ids of a prompt and of its real response


@runtime_checkable
class PromptTokenizer(Protocol):
    """From a conversation to token ids and back.

    Attributes:
        eos_ids (tuple[int, ...]): every token that ends a response, the one that closes a turn first.
        pad_id (int): fills a batch; may equal a stop token.
        vocab_size (int): one more than the largest id that this tokenizer knows; a model may have more rows.
        max_seq_len (int | None): the length of prompt and response together that a data set must keep to, in tokens.
        fingerprint (str): changes whenever the same conversation could get other ids.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    max_seq_len: int | None

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation without its response, the assistant's header last. A DataError if the template or the
        tokenizer refuses the conversation."""

    def encode_pair(self, messages: Sequence[ChatMessage]) -> Encoded:
        """Prompt ids and real response ids of a conversation, the latter closed by a stop token. A DataError if the
        template or the tokenizer refuses the conversation, if it does not begin with its own prompt, if the response
        holds a stop token before its end, or if it is empty."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids, with nothing cleaned up; an id that the tokenizer lacks is U+FFFD."""


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Where two texts, or lists of token ids, begin to differ; the length of the shorter if it is where one ends."""
    places = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(places, min(len(one), len(other)))


def prompt_mismatch(prompt: str, full: str) -> str:
    """The message for a conversation that does not begin with its own prompt."""
    at = first_difference(prompt, full)
    return (
        f"the conversation does not begin with its own prompt: from character {at} on, the prompt has "
        f"{prompt[at : at + 40]!r}, the conversation {full[at : at + 40]!r}. The template writes something into the "
        "prompt that training would not see (a closed thinking block before a response with reasoning, for example). "
        "Set tokenizer.template_options, or tokenizer.chat_template to one that does not."
    )


def closed_response(ids: list[int], tokenizer: PromptTokenizer) -> list[int]:
    """The ids behind a prompt up to their first stop token, one where there is none; a DataError if text stands behind
    that or none before it."""
    end = next((index for index, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    if behind := tokenizer.decode(ids[end + 1 :], skip_special_tokens=True).strip():
        raise bad_row(
            f"the real response holds the stop token {tokenizer.decode([ids[end]])!r} before its end, followed by "
            f"{behind[:40]!r}. Generation would end there."
        )
    if not end:
        raise bad_row("the real response has no tokens but its stop token.")
    return ids[: end + 1] if end < len(ids) else [*ids, tokenizer.eos_ids[0]]


def decode_known(ids: Iterable[int], known: Collection[int], decode: Callable[[list[int]], str]) -> str:
    """Text of ids of which some may not exist: some tokenizers raise an error for these, others leave them out."""
    parts = groupby(ids, known.__contains__)
    return "".join(
        decode(list(part)) if exists else "\N{REPLACEMENT CHARACTER}" * len(list(part)) for exists, part in parts
    )


def or_error(function: Callable[..., T], *arguments: Any) -> T | DataError:
    """What a function returns, or the DataError that it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def value_of(found: T | DataError) -> T:
    """What :func:`or_error` found, or raises the error."""
    if isinstance(found, DataError):
        raise found
    return found


def canonical_json(value: object) -> bytes:
    """Equal bytes for equal values, for hashes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
