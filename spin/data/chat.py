"""The tokenizer and chat template of a Hugging Face folder."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from spin.core.errors import DataError
from spin.data.conversation_template import THINK_END, THINKING_OPTIONS, ConversationTemplate
from spin.data.hf_tokenizer import folder_templates, load_tokenizer, read_template, read_tokenizer_json
from spin.data.messages import ChatMessage
from spin.data.tokenizer import (
    Encoded,
    canonical_json,
    closed_response,
    decode_known,
    or_error,
    prompt_mismatch,
    value_of,
)

log = logging.getLogger(__name__)

# Vocabulary files, in the order in which one alone identifies a tokenizer.
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


class ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    Special tokens come from the template alone (``add_special_tokens=False``, the convention of transformers): a
    template that writes a BOS text (Llama 3, Gemma, Mistral) gets one BOS, a template that writes none gets none. As in
    transformers, a special token that is spelled out in a message becomes that token; in a real response this is an
    error where it would end the response early.

    Where the generation prompt ends in something that the rendered conversation lacks there (``<think>`` of R1's
    distilled models), the response is the row's own text behind the generation prompt: what the model writes there.

    Config: ``tokenizer: {_component_: spin.data.ChatTokenizer, path: /models/Llama-3.2-1B-Instruct}``.

    Args:
        path (str | Path): folder with the tokenizer files.
        chat_template (str | None): Jinja text, its file, or the name of one of the folder's templates. None is the
            folder's own template.
        max_seq_len (int | None): the longest prompt and response together, in tokens; None leaves it to the data set.
        date (str | datetime.date | None): ISO; the day that a template's ``strftime_now`` tells. None is today; a
            recipe fixes it for a run, see :func:`spin.data.dates.fix_date`.
        template_options (Mapping[str, Any] | None): variables for the template, such as ``enable_thinking: false``.

    Attributes:
        date (str | None): as given, or as fixed for the run.
        reads_date (bool): the template calls ``strftime_now``.
        checks_reasoning (bool): refuse real responses without the reasoning that the template asks the model for.
            An evaluation, which does not train on them, sets it to False.

    Raises:
        DataError: If the folder is missing or broken, if there is no chat template or several, if it fails on a user
            and an assistant turn, exceeds the limits of :mod:`spin.data.template_worker` or leaves a turn out, if it
            never reads an option or the date, or if no stop token can be found.

    Source: https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(
        self,
        path: str | Path,
        chat_template: str | None = None,
        max_seq_len: int | None = None,
        date: str | datetime.date | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.max_seq_len = max_seq_len
        self.checks_reasoning = True
        self._tokenizer = load_tokenizer(self.path)
        own = folder_templates(self._tokenizer, self.path)
        file = self.path / "chat_template.jinja"
        origin = str(file) if file.is_file() else f"{self.path / 'tokenizer_config.json'}: chat_template"
        self.chat_template: str | None = None  # None is the folder's own
        if chat_template is not None:
            origin = "tokenizer.chat_template" + ("" if "{" in chat_template else f"={chat_template}")
            self.chat_template = own.get(chat_template) or read_template(chat_template, own)
            own = {"default": self.chat_template}
        if not own:
            raise DataError(
                f"The tokenizer in {self.path} has no chat template, so nothing marks where turns begin and end. Put "
                "that of the model's instruct version there as chat_template.jinja. A config can name the file instead "
                "(tokenizer.chat_template), or a torchtune tokenizer."
            )
        if "default" not in own:
            raise DataError(
                f"{origin}: several chat templates, none of them called default. Choose one: "
                f"tokenizer.chat_template={' or '.join(own)}."
            )
        try:
            day = None if date is None else datetime.date.fromisoformat(str(date)).isoformat()
        except ValueError as error:
            remedy = "expected a day as YYYY-MM-DD, or null for that of the run's first start."
            raise DataError(f"tokenizer.date={date!r}: {remedy}") from error
        self._options, specials = dict(template_options or {}), self._tokenizer.special_tokens_map
        self._template = ConversationTemplate(own, origin, self.path, specials, self._options, day)
        self.eos_ids = self._find_eos_ids(self._template.closing)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad_id is None else int(pad_id)
        if pad_id is None:
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

    def foreign_tokens(self, model_folder: str) -> str | None:
        """A warning, if the ids with which the texts of a model begin or end are no special tokens here."""
        file = Path(model_folder) / "config.json"
        special, model = (
            {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder},
            read_tokenizer_json(file),
        )
        found = [
            f"{key} {token} is {self.decode([token])!r}"
            for key in ("bos_token_id", "eos_token_id")
            for token in (model[key] if isinstance(model.get(key), list) else [model.get(key)])
            if type(token) is int and token not in special
        ]
        if not found:
            return None
        return (
            f"{file}: by the tokenizer in {self.path}, {' and '.join(found)}, which is no special token. "
            "Does the tokenizer belong to this model?"
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, special tokens, stop tokens, chat template and its options; the date in plain text,
        where the template reads it."""
        digest = hashlib.sha256()
        present = [self.path / name for names in _VOCABULARY_FILES for name in names if (self.path / name).is_file()]
        for file in present:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
        if not present:
            digest.update(canonical_json(self._tokenizer.get_vocab()))
        specials = {index: str(token) for index, token in self._tokenizer.added_tokens_decoder.items()}
        template = self.chat_template or self._tokenizer.chat_template
        options = [self._options] if self._options else []
        digest.update(canonical_json([specials, self.eos_ids, self.pad_id, template, *options]))
        return digest.hexdigest() + (f" on {self._template.today()}" if self.reads_date else "")

    @property
    def asks_reasoning(self) -> bool:
        """Whether real responses must have reasoning, because the template has the model reason."""
        return self._template.empty_reasoning is not None

    @property
    def reads_date(self) -> bool:
        """Whether the template writes the day on which it is rendered."""
        return self._template.reads_date

    @property
    def date(self) -> str | None:
        """The day of the template's clock, ISO; None is today."""
        return self._template.date

    @date.setter
    def date(self, date: str | None) -> None:
        self._template.date = date

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return self._encode([value_of(self._template.render([(messages, True)])[0])])[0]

    def encode_pair(self, messages: Sequence[ChatMessage]) -> Encoded:
        return value_of(self.encode_pairs([messages])[0])

    def encode_pairs(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[Encoded | DataError]:
        """Many conversations at once, on all cores: :meth:`encode_pair` for each, with errors returned, not raised."""
        pairs = self._prompts_and_wholes(conversations)
        # Mistral writes the system message into the last user turn, and nowhere if a response stands behind that
        late = [
            number
            for number, pair in enumerate(pairs)
            if not isinstance(pair, DataError)
            and self._response(*pair) is None
            and conversations[number][0]["role"] == "system"
        ]
        of_row = ("tools", "chat_template_kwargs")
        without = [
            [first | {key: system[key] for key in of_row if key in system}, *rest]
            for system, first, *rest in (conversations[number] for number in late)
        ]
        others = dict(zip(late, self._prompts_and_wholes(without), strict=True))
        for number, (messages, pair) in enumerate(zip(conversations, pairs, strict=True)):
            if not isinstance(pair, DataError):
                pairs[number] = or_error(self._with_reasoning, messages, pair, others.get(number, pair))
        ids = iter(self._encode([text for pair in pairs if not isinstance(pair, DataError) for text in pair]))
        return [
            pair if isinstance(pair, DataError) else or_error(self._split, *pair, next(ids), next(ids))
            for pair in pairs
        ]

    def _prompts_and_wholes(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[tuple[str, str] | DataError]:
        texts = self._template.render([each for talk in conversations for each in ((talk[:-1], True), (talk, False))])
        return [
            next((each for each in pair if isinstance(each, DataError)), None) or pair  # type: ignore[misc]
            for pair in zip(texts[::2], texts[1::2], strict=True)
        ]

    def _response(self, prompt: str, whole: str) -> str | None:
        """What a conversation has behind its prompt, or None if it does not begin with it."""
        for begin in (prompt, prompt.removesuffix(self._template.opened)):
            if whole.startswith(begin):
                return whole[len(begin) :]
        return None

    def _with_reasoning(
        self, messages: Sequence[ChatMessage], pair: tuple[str, str], whole: tuple[str, str] | DataError
    ) -> tuple[str, str]:
        """The prompt, and with it the response's text with the reasoning that the row has and the template may have
        left out."""
        prompt, response = pair[0], None if isinstance(whole, DataError) else self._response(*whole)
        if response is None:
            raise DataError(prompt_mismatch(*pair))
        if not self.checks_reasoning:
            return prompt, prompt + response
        message, content = messages[-1], messages[-1]["content"]
        inline = content.rpartition(THINK_END)[0].replace("<think>", "").strip()
        separate = str(message.get("reasoning_content") or "").strip()
        reasoning = inline or separate
        truncated = inline not in response and content.strip() not in response  # tags may be part of a plain text
        if truncated or separate not in response:
            text = content.rpartition(THINK_END)[2].strip()
            if not (inline and text and text in response) or prompt.rstrip().endswith(THINK_END):
                raise DataError(
                    f"the real response has reasoning ({reasoning[:40]!r}), and the chat template does not show it: "
                    f"the response would be trained without it. {self._template.thinking_remedy('true')}, write it "
                    "into the content as <think>...</think>, or remove it from the row."
                )
            own = content.strip().removeprefix("<think>" if prompt.rstrip().endswith("<think>") else "")
            own = own.lstrip("\n") if prompt.endswith("\n") else own
            return prompt, prompt + own + response.rpartition(text)[2]
        empty, row_options = self._template.empty_reasoning, messages[0].get("chat_template_kwargs") or {}
        is_off = not empty and any(row_options.get(name) is False for name in THINKING_OPTIONS)
        if not is_off and not reasoning and empty is not None and response.startswith(empty):
            raise DataError(
                "the chat template lets the model reason before it responds, and the real response has no reasoning: "
                "that alone would distinguish the responses of a pair. "
                f"{self._template.thinking_remedy('false')}, or give the real responses with their "
                "reasoning (<think>...</think> in the content)."
            )
        return prompt, prompt + response

    def _split(self, prompt: str, full: str, prompt_ids: list[int], full_ids: list[int]) -> Encoded:
        # The response is the rest of the conversation's ids where these begin with the prompt's ids, and the ids of
        # the response text alone where a token would reach across the border.
        begins = full_ids[: len(prompt_ids)] == prompt_ids
        rest = full_ids[len(prompt_ids) :] if begins else self._encode([full[len(prompt) :]])[0]
        return prompt_ids, closed_response(rest, self)

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        ids = [ids] if isinstance(ids, int) else ids  # which transformers' streamers have given since 5.24
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return decode_known(ids, self.known_ids, lambda known: self._tokenizer.decode(known, **options))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        try:
            # verbose: no warning about model_max_length, which is not the limit here.
            return self._tokenizer(texts, **options, verbose=False)["input_ids"]
        except Exception as error:  # the tokenizers library raises no narrower one
            raise DataError(
                f"The tokenizer in {self.path} cannot encode a text ({type(error).__name__}: {error}). Correct "
                "tokenizer.json and tokenizer_config.json, or take another tokenizer."
            ) from error

    def _find_eos_ids(self, closing: str) -> tuple[int, ...]:
        """The token that closes a turn, the tokenizer's EOS, and what the model's generation settings stop at."""
        configured = [self._tokenizer.eos_token_id]
        for file in ("generation_config.json", "config.json"):
            stop = read_tokenizer_json(self.path / file).get("eos_token_id")
            if stop is not None:
                configured += stop if isinstance(stop, list) else [stop]
                if not all(type(each) is int and each >= 0 for each in configured[1:]):
                    where = self.path / file
                    raise DataError(f"{where}: eos_token_id is {stop!r:.60}, expected a token id or a list of them.")
                break
        added = self._tokenizer.added_tokens_decoder.items()
        special = {*self._tokenizer.all_special_ids, *(index for index, token in added if token.special)}
        closing_special = [token for token in self._encode([closing])[0] if token in special][:1]
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
