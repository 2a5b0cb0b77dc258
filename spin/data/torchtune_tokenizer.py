"""torchtune's own tokenizers as prompt tokenizers."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from spin.core.errors import DataError
from spin.data.messages import ChatMessage
from spin.data.tokenizer import Encoded, PromptTokenizer, canonical_json, closed_response, decode_known, prompt_mismatch

_USE_CHAT = "Use spin.data.ChatTokenizer for this model."
# What a foreign tokenizer raises on a conversation that it was not made for.
_TOKENIZER_FAULTS = (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError)


class TorchtuneTokenizer:
    """Any of torchtune's model tokenizers (``tokenize_messages``), with its prompt template.

    Checked with Llama 2, Llama 3, Qwen 2.5, Mistral, Gemma, Phi 3 and Phi 4. Around their differences:

    - They are always asked to close turns, because Mistral, Gemma, Llama 2 and Phi 4 otherwise leave out the EOS of
      *earlier* assistant turns too; what they put behind the last response is learned from a probe and taken off.
    - ``max_seq_len`` would overwrite the last token by EOS; it is lifted, and long rows are the data set's to handle.
    - Phi 3 closes a turn with ``<|end|>``, which its ``stop_tokens`` lack; it is a stop token here.
    - Without ``prompt_template``, Gemma's turns are bare text; for chat models prefer :class:`spin.data.ChatTokenizer`.
      The same holds where a family's official template adds a default system prompt (Qwen) or a date (Llama 3.1 and
      later), and for Phi 4, whose vocabulary torchtune splits by another pattern, so that ids differ from the model's.

    Args:
        tokenizer (Any): a torchtune ``ModelTokenizer``.

    Raises:
        DataError: If the object is no such tokenizer, if its tokens of a conversation do not begin with those of its
            prompt, or if it has no stop token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._name = type(tokenizer).__name__
        if not callable(getattr(tokenizer, "tokenize_messages", None)):
            raise DataError(
                f"tokenizer is a {self._name} without tokenize_messages, expected a torchtune model tokenizer or, for "
                "a Hugging Face folder, spin.data.ChatTokenizer."
            )
        self.max_seq_len = getattr(tokenizer, "max_seq_len", None)
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.max_seq_len = None
        parameters = inspect.signature(tokenizer.tokenize_messages).parameters
        self._close_turns = {name: True for name in ("add_end_tokens", "add_eos") if name in parameters}
        self._special_names = {
            int(index): text for text, index in (getattr(tokenizer, "special_tokens", None) or {}).items()
        }
        self._closing = self._probe_closing()
        self.eos_ids = self._find_eos_ids()
        pad_id = getattr(tokenizer, "pad_id", None)
        self.pad_id = self.eos_ids[0] if pad_id is None or pad_id < 0 else int(pad_id)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        encoder = getattr(self._tokenizer, "encoder", None) or {}
        known = (*self._special_names, *encoder.values(), int(getattr(self._tokenizer, "vocab_size", 0)) - 1)
        return max(known) + 1

    @cached_property
    def _vocabulary(self) -> tuple[Iterable[int], list[bytes]]:
        """The ids in the vocabulary of each of torchtune's base tokenizers, and what identifies it."""
        base = self._tokenizer
        if hasattr(base, "_spm_model"):
            model = base._spm_model.spm_model
            return range(model.vocab_size()), [model.serialized_model_proto()]
        if hasattr(base, "tt_model"):
            ranks = base.tt_model.tt_model._mergeable_ranks
            by_rank = sorted(ranks.items(), key=lambda item: item[1])
            return ranks.values(), [b"%d:%b" % (rank, token) for token, rank in by_rank]
        base = getattr(base, "tokenizer_model", base)
        if hasattr(base, "encoder") and hasattr(base, "bpe_ranks"):
            merges = [" ".join(merge) for merge in base.bpe_ranks]
            return base.encoder.values(), [canonical_json(base.encoder), canonical_json(merges)]
        probe = self._tokens([{"role": "user", "content": "".join(map(chr, range(32, 1024)))}])
        return range(self.vocab_size), [canonical_json(probe)]

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """The ids that have a token; a model may have more rows, and a vocabulary holes."""
        return frozenset((*self._vocabulary[0], *self._special_names, *self._unnamed_specials()))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the class, the vocabulary, special and stop tokens, and the prompt template."""
        template = getattr(self._tokenizer, "prompt_template", None)
        shown = [type(template).__qualname__, getattr(template, "template", None)]
        kind = type(self._tokenizer).__qualname__
        parts = [canonical_json([kind, self._special_names, self.eos_ids, self._closing, shown]), *self._vocabulary[1]]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._open(self._tokens([*messages, {"role": "assistant", "content": ""}]))

    def encode_pair(self, messages: Sequence[ChatMessage]) -> Encoded:
        prompt_ids, body = self.encode_prompt(messages[:-1]), self._open(self._tokens(messages))
        if body[: len(prompt_ids)] != prompt_ids:
            raise DataError(prompt_mismatch(self.decode(prompt_ids), self.decode(body)))
        response = body[len(prompt_ids) :]
        # what a template writes behind the stop token is no part of the response
        stop = next((index for index, token in enumerate(self._closing, 1) if token in self.eos_ids), None)
        return prompt_ids, closed_response([*response, *self._closing[:stop]] if response else [], self)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        names = dict.fromkeys(self._unnamed_specials(), "") | self._special_names

        def text(run: list[int]) -> str:
            return decode_known(run, self.known_ids, self._decode_text)

        return "".join(
            ("" if skip_special_tokens else "".join(names[token] for token in run)) if special else text(list(run))
            for special, run in groupby(map(int, ids), names.__contains__)
        )

    def _unnamed_specials(self) -> Iterable[int]:
        found = (getattr(self._tokenizer, name, None) for name in ("bos_id", "eos_id"))
        return [int(token) for token in found if token is not None and token >= 0]

    def _decode_text(self, ids: list[int]) -> str:
        options = {"truncate_at_eos": False, "skip_special_tokens": False}
        accepted = inspect.signature(self._tokenizer.decode).parameters
        text = self._tokenizer.decode(ids, **{key: value for key, value in options.items() if key in accepted})
        if isinstance(text, str):
            return text
        # torchtune's GPT-2 base (Phi 4) returns the vocabulary's spelling of each token instead of text.
        to_byte = self._tokenizer.tokenizer_model.byte_decoder
        return bytes(to_byte[char] for piece in text if piece for char in piece).decode("utf-8", errors="replace")

    def _tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        from torchtune.data import Message

        for key in ("tools", "tool_calls", "reasoning_content", "chat_template_kwargs"):
            if any(key in message for message in messages):
                raise DataError(
                    f"the conversation has {key.replace('tool_calls', 'tools')}, which {self._name} cannot write. Use "
                    "spin.data.ChatTokenizer with the model's chat template, or remove it from the row."
                )
        roles = [message["role"] for message in messages]
        turns = [
            Message(role="ipython" if role == "tool" else role, content=message["content"], masked=role != "assistant")
            for role, message in zip(roles, messages, strict=True)
        ]
        try:
            ids, _ = self._tokenizer.tokenize_messages(turns, **self._close_turns)
        except _TOKENIZER_FAULTS as error:
            raise DataError(
                f"{self._name} refuses the roles {', '.join(roles)}: {error}. Fix the row or set another "
                "tokenizer.prompt_template."
            ) from error
        if any(token is None for token in ids):
            raise DataError(f"{self._name} has no id for a part of the text. {_USE_CHAT}")
        return ids

    def _open(self, ids: list[int]) -> list[int]:
        """Take off what stands behind the last response."""
        end = len(ids) - len(self._closing)
        if ids[end:] != self._closing:
            found, expected = self.decode(ids[end:]), self.decode(self._closing)
            raise DataError(f"{self._name} closes this conversation with {found!r}, expected {expected!r}. {_USE_CHAT}")
        return ids[:end]

    def _probe_closing(self) -> list[int]:
        """The tokens behind a response: the longest common end of a conversation with an empty one and two others."""
        question = {"role": "user", "content": "Hello"}
        tails = [self._tokens([question, {"role": "assistant", "content": text}])[::-1] for text in ("", "A", "be 7")]
        count = 0
        for tokens in zip(*tails, strict=False):
            if len(set(tokens)) > 1:
                break
            count += 1
        return tails[0][:count][::-1]

    def _find_eos_ids(self) -> tuple[int, ...]:
        stop = [*(getattr(self._tokenizer, "stop_tokens", None) or []), getattr(self._tokenizer, "eos_id", None)]
        turn_end = [token for token in self._closing if token in self._special_names or token in stop][:1]
        found = tuple(dict.fromkeys(int(token) for token in (*turn_end, *stop) if token is not None and token >= 0))
        if not found:
            raise DataError(f"{self._name} has neither stop_tokens nor eos_id. SPIN must score where responses end.")
        return found


def adapt_tokenizer(tokenizer: Any) -> PromptTokenizer:
    """A :class:`PromptTokenizer` as it is, a torchtune tokenizer in its adapter; a DataError for anything else."""
    if callable(getattr(tokenizer, "encode_pair", None)):
        return tokenizer
    return TorchtuneTokenizer(tokenizer)
