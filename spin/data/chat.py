"""Conversations to token ids: what the opponent is asked, and what the real response is.

Two adapters with one interface, :class:`PromptTokenizer`: :class:`ChatTokenizer` renders the chat template of a Hugging
Face folder, :class:`TorchtuneTokenizer` wraps any of torchtune's model tokenizers. Both promise the same three things:

- The prompt ids of :meth:`~PromptTokenizer.encode_pair` are those of :meth:`~PromptTokenizer.encode_prompt`, so that
  training scores the response after exactly the tokens that the opponent saw.
- The real response ends with one stop token, the one that the model itself writes at the end of a turn, and holds no
  other. Nothing that a template puts behind it (ChatML's newline) is part of the response.
- Nothing is truncated or masked here, by value or otherwise: a pad token that equals EOS never hides an EOS.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from spin.data.messages import ChatMessage
from spin.errors import DataError
from spin.files import read_json

log = logging.getLogger(__name__)

# Vocabulary files, in the order in which one is enough to tell tokenizers apart.
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_ANY_VOCABULARY = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_PROBE_ANSWER = "Probe"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # the text of an id that the tokenizer lacks
# What a template or a foreign tokenizer raises on a conversation that it was not made for.
_TOKENIZER_FAULTS = (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError)


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
        """Ids of a conversation up to the place where the assistant answers."""
        ...

    def encode_pair(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Prompt ids and real response ids of a conversation that ends with an assistant turn."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        ...


class ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    Special tokens come from the template alone (``add_special_tokens=False``, the convention of transformers): a
    template that writes a BOS text (Llama 3, Gemma, Mistral) gets one BOS, a template that writes none gets none. As in
    transformers, a special token that is spelled out in a message becomes that token; in a real response this is an
    error where it would end the response early.

    Config: ``tokenizer: {_component_: spin.data.ChatTokenizer, path: /models/Llama-3.2-1B-Instruct}``.

    Args:
        path (str | Path): folder with the tokenizer files.
        chat_template (str | None): Jinja text, or a file that holds it, in place of the folder's own template.
        max_seq_len (int | None): the longest prompt and response together, in tokens; None leaves it to the data set.

    Raises:
        DataError: If the folder is missing or broken, if there is no chat template or it fails on a user and an
            assistant turn, or if no stop token can be found.

    Source: https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, path: str | Path, chat_template: str | None = None, max_seq_len: int | None = None) -> None:
        self.path = Path(path).expanduser()
        self.max_seq_len = max_seq_len
        self._tokenizer = _load_tokenizer(self.path)
        self.chat_template = None if chat_template is None else _read_template(chat_template)  # not the folder's own
        if self.chat_template is not None:
            self._tokenizer.chat_template = self.chat_template
        if not self._tokenizer.chat_template:
            raise DataError(
                f"The tokenizer in {self.path} has no chat template, so turns cannot be told apart. Set "
                "tokenizer.chat_template to a Jinja file (that of the model's instruct version), or use a torchtune "
                "tokenizer."
            )
        self._special_ids = frozenset(
            index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(self._tokenizer.all_special_ids)
        self.eos_ids = self._find_eos_ids()
        self._stop_ids = frozenset(self.eos_ids)
        if self._tokenizer.pad_token_id is not None:
            self.pad_id = int(self._tokenizer.pad_token_id)
        else:
            self.pad_id = self.eos_ids[0]
            log.warning(
                "The tokenizer in %s has no pad token; batches are filled with its stop token %r (id %d). Padding is "
                "masked by position, never by value: the stop token of a response stays in the loss.",
                self.path,
                self._tokenizer.convert_ids_to_tokens(self.pad_id),
                self.pad_id,
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """The ids that have a token; a model may have more rows, and a vocabulary holes."""
        return frozenset(self._tokenizer.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, special tokens, stop tokens and chat template."""
        digest = hashlib.sha256()
        present = [self.path / name for names in _VOCABULARY_FILES for name in names if (self.path / name).is_file()]
        for file in present:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
        if not present:
            digest.update(_canonical(self._tokenizer.get_vocab()))
        specials = {index: str(token) for index, token in self._tokenizer.added_tokens_decoder.items()}
        digest.update(_canonical([specials, self.eos_ids, self.pad_id, self._tokenizer.chat_template]))
        return digest.hexdigest()

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation up to the place where the assistant answers.

        Args:
            messages (Sequence[ChatMessage]): the conversation without the answer.

        Returns:
            list[int]: token ids, the assistant's header last.

        Raises:
            DataError: If the template refuses the conversation.
        """
        return self._encode(self._render(messages, add_generation_prompt=True))

    def encode_pair(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Prompt ids and real response ids of a conversation that ends with an assistant turn.

        The response ids are the rest of the whole conversation's ids where these begin with the prompt's ids, and the
        ids of the response text alone where a token would reach across the border. The response is cut behind its
        first stop token; where the template writes none, one is appended.

        Args:
            messages (Sequence[ChatMessage]): the conversation, the real response last.

        Returns:
            tuple[list[int], list[int]]: prompt ids and response ids, the latter closed by a stop token.

        Raises:
            DataError: If the template refuses the conversation, if the rendered conversation does not begin with the
                rendered prompt, if the response holds a stop token before its end, or if it is empty.
        """
        pair = self.encode_pairs([messages])[0]
        if isinstance(pair, DataError):
            raise pair
        return pair

    def encode_pairs(
        self, conversations: Sequence[Sequence[ChatMessage]]
    ) -> list[tuple[list[int], list[int]] | DataError]:
        """Many conversations at once, on all cores: :meth:`encode_pair` for each, with errors returned, not raised.

        Args:
            conversations (Sequence[Sequence[ChatMessage]]): each with the real response last.

        Returns:
            list[tuple[list[int], list[int]] | DataError]: one entry per conversation, in order.
        """
        rendered = [self._render_pair(messages) for messages in conversations]
        texts = [text for pair in rendered if not isinstance(pair, DataError) for text in pair]
        ids = iter(self._encode_all(texts))
        return [
            pair if isinstance(pair, DataError) else self._split(*pair, prompt_ids=next(ids), full_ids=next(ids))
            for pair in rendered
        ]

    def _render_pair(self, messages: Sequence[ChatMessage]) -> tuple[str, str] | DataError:
        try:
            prompt = self._render(messages[:-1], add_generation_prompt=True)
            full = self._render(messages, add_generation_prompt=False)
        except DataError as error:
            return error
        if not full.startswith(prompt):
            return DataError(_no_prefix(prompt, full))
        reasoning = messages[-1].get("reasoning_content", "").strip()
        if reasoning not in full[len(prompt) :]:
            return DataError(
                "the real response has reasoning_content (or thinking), and the chat template does not show it: the "
                "response would be trained without it. Set tokenizer.chat_template to one that does, write it into "
                "the content, or remove it from the row."
            )
        return prompt, full

    def _split(
        self, prompt: str, full: str, *, prompt_ids: list[int], full_ids: list[int]
    ) -> tuple[list[int], list[int]] | DataError:
        if full_ids[: len(prompt_ids)] == prompt_ids:
            rest = full_ids[len(prompt_ids) :]
        else:
            rest = self._encode(full[len(prompt) :])
        end = next((index for index, token in enumerate(rest) if token in self._stop_ids), None)
        if end is None:
            response_ids = [*rest, self.eos_ids[0]]
        else:
            response_ids = rest[: end + 1]
            behind = self.decode(rest[end + 1 :], skip_special_tokens=True).strip()
            if behind:
                return DataError(_stop_inside(self.decode([rest[end]]), behind))
        return (prompt_ids, response_ids) if len(response_ids) > 1 else DataError(_NO_RESPONSE)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Args:
            ids (Sequence[int]): token ids.
            skip_special_tokens (bool): leave out special tokens.

        Returns:
            str: the text, with nothing cleaned up; an id that the tokenizer lacks is U+FFFD.
        """
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return _decode_known(ids, self.known_ids, lambda known: self._tokenizer.decode(known, **options))

    def _encode(self, text: str) -> list[int]:
        return self._encode_all([text])[0]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        # verbose: no warning about model_max_length, which is not the limit here.
        return self._tokenizer(texts, **options, verbose=False)["input_ids"]

    def _render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        self._check_shown(messages)
        tools = messages[0].get("tools") if messages else None
        options = self._row_options(messages[0]) if messages else {}
        of_row = ("tools", "chat_template_kwargs")
        plain = [{key: value for key, value in message.items() if key not in of_row} for message in messages]
        for message in plain:
            if "reasoning_content" in message:  # which templates read by one of three names
                message |= dict.fromkeys(("thinking", "reasoning"), message["reasoning_content"])
        try:
            return self._tokenizer.apply_chat_template(
                plain, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja, line {error.lineno}: {str(error.message).rstrip('.')}. "
                "Mend tokenizer.chat_template, or the folder's own."
            ) from error
        except (TemplateError, *_TOKENIZER_FAULTS) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template refuses the roles {roles or 'none'}: {str(error).rstrip('.')}. Fix the row, or set "
                "tokenizer.chat_template to one that knows them."
            ) from error

    def _row_options(self, message: ChatMessage) -> dict[str, Any]:
        """The row's options of the template. Those that it does not read would be lost without a word."""
        options = message.get("chat_template_kwargs") or {}
        own = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"}
        unread = [
            key
            for key in options
            if key in own or not re.search(rf"\b{re.escape(key)}\b", str(self._tokenizer.chat_template))
        ]
        if unread:
            raise DataError(
                f"chat_template_kwargs has {', '.join(unread)}, which the chat template does not read. Set "
                "tokenizer.chat_template to one that does, or leave the column out with "
                "dataset.column_map={chat_template_kwargs: unused}."
            )
        return options

    def _check_shown(self, messages: Sequence[ChatMessage]) -> None:
        """Refuses what the template would leave out of the prompt without a word."""
        used = {
            "tools": any("tools" in message for message in messages),
            "calls": any("tool_calls" in message for message in messages),
            "results": any(message["role"] == "tool" for message in messages),
        }
        lost = [what for what, is_used in used.items() if is_used and what not in self._shown]
        if lost:
            raise DataError(
                f"the conversation has tools, and the chat template does not show their {' and '.join(lost)}: the "
                "model would not see them. Set tokenizer.chat_template to one that does, or remove the row."
            )
        is_told = any(message["role"] == "system" and message["content"].strip() for message in messages)
        if is_told and "system" not in self._shown:
            raise DataError(
                "the conversation has a system message, and the chat template does not show it: the model would not "
                "see it. Set tokenizer.chat_template to one that does, write it into the user's message, or remove "
                "dataset.system_prompt or the row."
            )

    @cached_property
    def _shown(self) -> frozenset[str]:
        """What the template writes: ``system`` messages; of tools ``tools`` themselves, ``calls``, ``results``. A
        system message that it refuses counts as written: what it says then tells more."""
        from jinja2.exceptions import TemplateError

        function: dict[str, Any] = {"name": "probe_of_a_call", "arguments": {"x": 1}}
        call: dict[str, Any] = {
            "id": "probe1234",
            "type": "function",
            "function": function,
        }  # nine characters, as Mistral wants it
        description: dict[str, Any] = {
            "name": "probe_of_tools",
            "description": "A probe.",
            "parameters": {"type": "object"},
        }
        system = {"role": "system", "content": "probe_of_a_system_message"}
        question = {"role": "user", "content": "Hello"}
        result = {"role": "tool", "content": "probe_of_a_result", "name": function["name"], "tool_call_id": call["id"]}
        answer = {"role": "assistant", "content": _PROBE_ANSWER}
        with_call = [question, {"role": "assistant", "content": "", "tool_calls": [call]}, result, answer]
        marks = {
            "system": system["content"],
            "tools": description["name"],
            "calls": function["name"],
            "results": result["content"],
        }
        text = ""
        for messages, tools in (
            ([system, question], None),
            ([question, answer], [{"type": "function", "function": description}]),
            (with_call, None),
            ([question, answer, result, answer], None),
        ):
            try:
                text += self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            except (TemplateError, *_TOKENIZER_FAULTS):  # it knows no such conversation
                text += marks["system"] if system in messages else ""
        return frozenset(what for what, mark in marks.items() if mark in text)

    def _find_eos_ids(self) -> tuple[int, ...]:
        """The token that closes a turn, the tokenizer's EOS, and what the model's generation settings stop at."""
        configured = [self._tokenizer.eos_token_id]
        for file in ("generation_config.json", "config.json"):
            stop = _read_json(self.path / file).get("eos_token_id")
            if stop is not None:
                configured += stop if isinstance(stop, list) else [stop]
                break
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE_ANSWER}]
        conversation, asked = (
            self._render(probe, add_generation_prompt=False),
            self._render(probe[:1], add_generation_prompt=True),
        )
        closing = conversation.rpartition(_PROBE_ANSWER)[2]
        header = conversation.removeprefix(asked).rpartition(_PROBE_ANSWER)[0] if conversation.startswith(asked) else ""
        if header.strip():
            log.warning(
                "The chat template of %s writes no generation prompt: prompts end before %r, which becomes the "
                "beginning of every answer, of the real ones too. Set tokenizer.chat_template to one that has it.",
                self.path,
                header,
            )
        closing_special = [token for token in self._encode(closing) if token in self._special_ids][:1]
        found = tuple(dict.fromkeys(int(token) for token in (*closing_special, *configured) if token is not None))
        if not found:
            raise DataError(
                f"No stop token: the tokenizer in {self.path} has no eos_token, generation_config.json names none, and "
                "the chat template closes a turn with no special token. Set eos_token in tokenizer_config.json."
            )
        if closing_special and closing_special[0] not in configured:
            log.warning(
                "%s does not list %r as a stop token, but its chat template closes a turn with it; it is taken as one.",
                self.path,
                self._tokenizer.convert_ids_to_tokens(closing_special[0]),
            )
        return found


class TorchtuneTokenizer:
    """Any of torchtune's model tokenizers (``tokenize_messages``), with its prompt template.

    Checked with Llama 2, Llama 3, Qwen 2.5, Mistral, Gemma, Phi 3 and Phi 4. Around their differences:

    - They are always asked to close turns, because Mistral, Gemma, Llama 2 and Phi 4 otherwise leave out the EOS of
      *earlier* assistant turns too; what they put behind the last answer is learned from a probe and taken off.
    - ``max_seq_len`` would overwrite the last token by EOS; it is lifted, and long rows are the data set's to handle.
    - Phi 3 closes a turn with ``<|end|>``, which its ``stop_tokens`` lack; it is a stop token here.
    - Without ``prompt_template``, Gemma's turns are bare text; for a chat model prefer :class:`ChatTokenizer`. The same
      holds where a family's official template adds a default system prompt (Qwen) or a date (Llama 3.1 and later), and
      for Phi 4, whose vocabulary torchtune splits by another pattern, so that ids differ from the model's own.

    Args:
        tokenizer (Any): a torchtune ``ModelTokenizer``.

    Raises:
        DataError: If the object is no such tokenizer, if its tokens of a conversation do not begin with those of its
            prompt, or if it has no stop token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "tokenize_messages", None)):
            raise DataError(
                f"tokenizer is a {type(tokenizer).__name__} without tokenize_messages, expected a torchtune model "
                "tokenizer or spin.data.ChatTokenizer. For a Hugging Face folder use spin.data.ChatTokenizer."
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
        self._stop_ids = frozenset(self.eos_ids)
        pad_id = getattr(tokenizer, "pad_id", None)
        self.pad_id = self.eos_ids[0] if pad_id is None or pad_id < 0 else int(pad_id)
        # Written behind the real response: the closing up to its stop token, or a stop token if there is none in it.
        stop = next((index for index, token in enumerate(self._closing) if token in self._stop_ids), None)
        self._written_closing = self._closing[: stop + 1] if stop is not None else [*self._closing, self.eos_ids[0]]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        encoder = getattr(self._tokenizer, "encoder", None) or {}
        known = (*self._special_names, *encoder.values(), int(getattr(self._tokenizer, "vocab_size", 0)) - 1)
        return max(known) + 1

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """The ids that have a token; a model may have more rows, and a vocabulary holes."""
        base = self._tokenizer
        model = getattr(base, "tokenizer_model", base)
        found: Iterable[int] = range(self.vocab_size)
        if hasattr(base, "_spm_model"):
            found = range(base._spm_model.spm_model.vocab_size())
        elif hasattr(base, "tt_model"):
            found = base.tt_model.tt_model._mergeable_ranks.values()
        elif hasattr(model, "encoder"):
            found = model.encoder.values()
        return frozenset((*found, *self._special_names, *self._unnamed_specials()))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the class, the vocabulary, special and stop tokens, and the prompt template."""
        template = getattr(self._tokenizer, "prompt_template", None)
        shown = [type(template).__qualname__, getattr(template, "template", None)]
        digest = hashlib.sha256(
            _canonical([type(self._tokenizer).__qualname__, self._special_names, self.eos_ids, self._closing, shown])
        )
        for part in self._vocabulary():
            digest.update(part)
        return digest.hexdigest()

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a conversation up to the place where the assistant answers.

        Args:
            messages (Sequence[ChatMessage]): the conversation without the answer.

        Returns:
            list[int]: token ids, the assistant's header last.

        Raises:
            DataError: If the tokenizer refuses the conversation.
        """
        return self._open(self._tokens([*messages, {"role": "assistant", "content": ""}]))

    def encode_pair(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Prompt ids and real response ids of a conversation that ends with an assistant turn.

        Args:
            messages (Sequence[ChatMessage]): the conversation, the real response last.

        Returns:
            tuple[list[int], list[int]]: prompt ids and response ids, the latter closed by a stop token.

        Raises:
            DataError: If the tokenizer refuses the conversation, if the tokens of the conversation do not begin with
                those of the prompt, if the response holds a stop token before its end, or if it is empty.
        """
        prompt_ids = self.encode_prompt(messages[:-1])
        full_ids = self._open(self._tokens(messages))
        if full_ids[: len(prompt_ids)] != prompt_ids:
            raise DataError(_no_prefix(self.decode(prompt_ids), self.decode(full_ids)))
        body = full_ids[len(prompt_ids) :]
        end = next((index for index, token in enumerate(body) if token in self._stop_ids), None)
        if end is not None:
            raise DataError(_stop_inside(self.decode([body[end]]), self.decode(body[end + 1 :])))
        if not body:
            raise DataError(_NO_RESPONSE)
        return prompt_ids, [*body, *self._written_closing]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Args:
            ids (Sequence[int]): token ids.
            skip_special_tokens (bool): leave out special tokens.

        Returns:
            str: the text; special tokens by name, an id that the tokenizer lacks as U+FFFD.
        """
        names = dict.fromkeys(self._unnamed_specials(), "") | self._special_names
        pieces: list[str] = []
        run: list[int] = []
        for token in ids:
            if token not in names:
                run.append(int(token))
                continue
            pieces += [self._decode_run(run), "" if skip_special_tokens else names[token]]
            run = []
        return "".join([*pieces, self._decode_run(run)])

    def _unnamed_specials(self) -> Iterable[int]:
        found = (getattr(self._tokenizer, name, None) for name in ("bos_id", "eos_id"))
        return [int(token) for token in found if token is not None and token >= 0]

    def _decode_run(self, ids: list[int]) -> str:
        return _decode_known(ids, self.known_ids, self._decode_text)

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

        if any("tool_calls" in message or "tools" in message for message in messages):
            raise DataError(
                f"the conversation has tools, which {type(self._tokenizer).__name__} cannot write. Use "
                "spin.data.ChatTokenizer with the model's chat template, or write calls into the text."
            )
        for key in ("reasoning_content", "chat_template_kwargs"):
            if any(key in message for message in messages):
                raise DataError(
                    f"the conversation has {key}, which {type(self._tokenizer).__name__} cannot write. Use "
                    "spin.data.ChatTokenizer with the model's chat template, or remove it from the row."
                )
        turns = [
            Message(
                role="ipython" if message["role"] == "tool" else message["role"],
                content=message["content"],
                masked=message["role"] != "assistant",
            )
            for message in messages
        ]
        try:
            ids, _ = self._tokenizer.tokenize_messages(turns, **self._close_turns)
        except _TOKENIZER_FAULTS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{type(self._tokenizer).__name__} refuses the roles {roles}: {error}. Fix the row or set another "
                "tokenizer.prompt_template."
            ) from error
        if any(token is None for token in ids):
            raise DataError(
                f"{type(self._tokenizer).__name__} has no id for a part of the text. Use spin.data.ChatTokenizer for "
                "this model."
            )
        return ids

    def _open(self, ids: list[int]) -> list[int]:
        """Take off what stands behind the last answer."""
        count = len(self._closing)
        if count and ids[-count:] != self._closing:
            raise DataError(
                f"{type(self._tokenizer).__name__} closes this conversation with {self.decode(ids[-count:])!r}, "
                f"expected {self.decode(self._closing)!r}. Use spin.data.ChatTokenizer for this model."
            )
        return ids[: len(ids) - count]

    def _probe_closing(self) -> list[int]:
        """The tokens behind an answer: the longest common end of a conversation with an empty answer and two others."""
        question = {"role": "user", "content": "Hello"}
        tails = [
            self._tokens([question, {"role": "assistant", "content": answer}])[::-1] for answer in ("", "A", "be 7")
        ]
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
            raise DataError(
                f"{type(self._tokenizer).__name__} has neither stop_tokens nor eos_id. SPIN must score where answers "
                "end."
            )
        return found

    def _vocabulary(self) -> list[bytes]:
        """The vocabulary of each of torchtune's base tokenizers, or the ids of a probe text."""
        base = self._tokenizer
        if hasattr(base, "_spm_model"):
            return [base._spm_model.spm_model.serialized_model_proto()]
        if hasattr(base, "tt_model"):
            ranks = base.tt_model.tt_model._mergeable_ranks
            return [b"%d:%b" % (rank, token) for token, rank in sorted(ranks.items(), key=lambda item: item[1])]
        base = getattr(base, "tokenizer_model", base)
        if hasattr(base, "encoder") and hasattr(base, "bpe_ranks"):
            return [_canonical(base.encoder), _canonical([" ".join(merge) for merge in base.bpe_ranks])]
        return [_canonical(self._tokens([{"role": "user", "content": "".join(map(chr, range(32, 1024)))}]))]


def adapt_tokenizer(tokenizer: Any) -> PromptTokenizer:
    """The interface of this module for whatever a config's ``tokenizer`` section made.

    Args:
        tokenizer (Any): a :class:`PromptTokenizer`, which is returned as it is, or a torchtune model tokenizer.

    Returns:
        PromptTokenizer: the tokenizer itself or a :class:`TorchtuneTokenizer` around it.

    Raises:
        DataError: If it is neither.
    """
    if callable(getattr(tokenizer, "encode_pair", None)):
        return tokenizer
    return TorchtuneTokenizer(tokenizer)


# --- Messages of errors that both adapters raise ---

_NO_RESPONSE = "the real response has no tokens but its stop token. Fix the row or set dataset.on_bad_row=skip."


def _no_prefix(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return (
        f"the conversation does not begin with its own prompt: from character {at} on, the prompt has "
        f"{prompt[at : at + 40]!r}, the conversation {full[at : at + 40]!r}. The template writes something into the "
        "prompt that training would not see (a thinking tag, for example). Set tokenizer.chat_template to one that "
        "does not."
    )


def _stop_inside(stop: str, behind: str) -> str:
    return (
        f"the real response holds the stop token {stop!r} before its end, followed by {behind[:40]!r}. Generation "
        "would end there. Fix the row or set dataset.on_bad_row=skip."
    )


def _decode_known(ids: Iterable[int], known: Collection[int], decode: Callable[[list[int]], str]) -> str:
    """Text of ids of which some may not exist: some tokenizers raise an error for these, others leave them out."""
    parts = groupby(ids, known.__contains__)
    return "".join(decode(list(part)) if exists else _UNKNOWN * len(list(part)) for exists, part in parts)


# --- Files ---


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return read_json(path, DataError, "Download the model again.")


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise DataError(
            f"tokenizer.path={path} is no folder. Download the model first (tune download org/name --output-dir ...) "
            "and name the folder with tokenizer.json or tokenizer.model."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _read_json(path / name)  # the tokenizers library says only that "data did not match"
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not any(each for pattern in _ANY_VOCABULARY for each in path.glob(pattern)):
            raise DataError(
                f"tokenizer.path={path}: no tokenizer is here. Name the model's folder, with tokenizer.json or "
                "tokenizer.model; of a run that is iteration_NNN/hf_model."
            ) from error
        raise DataError(f"No tokenizer can be loaded from {path}: {error}") from error


def _read_template(template: str) -> str:
    # A template is recognised by its braces, since a path hardly has two in a row.
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise DataError(
            f"tokenizer.chat_template={template} is neither a file nor a Jinja template (no '{{{{' or '{{%' in it)."
        )
    return path.read_text(encoding="utf-8")
