"""The tokenizer and chat template of a Hugging Face folder."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from spin.core.errors import DataError
from spin.data.hf_tokenizer import folder_templates, load_tokenizer, read_template, read_tokenizer_json
from spin.data.messages import ChatMessage
from spin.data.templates import ChatTemplate, TemplateFault
from spin.data.tokenizer import NO_RESPONSE, Encoded, canonical_json, decode_known, early_stop, prompt_mismatch

log = logging.getLogger(__name__)

# Vocabulary files, in the order in which one is enough to tell tokenizers apart.
_VOCABULARY_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_THINK_END = "</think>"
# Variables by which templates switch reasoning off, and what only this class may give a template.
_THINKING_OPTIONS = ("enable_thinking", "thinking")
_NO_OPTIONS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")

# A conversation, and whether a generation prompt is written behind it.
_Asked = tuple[Sequence[ChatMessage], bool]

# What shows how a template writes things.
_SYSTEM: ChatMessage = {"role": "system", "content": "probe_of_a_system_message"}
_QUESTION: ChatMessage = {"role": "user", "content": "probe_of_a_user_message"}
_REPLY: ChatMessage = {"role": "assistant", "content": "Probe"}
_TOOL: ChatMessage = {
    "type": "function",
    "function": {"name": "probe_of_tools", "description": "A probe.", "parameters": {"type": "object"}},
}
_CALL: ChatMessage = {  # its id has nine characters, as Mistral wants it
    "id": "probe1234",
    "type": "function",
    "function": {"name": "probe_of_a_call", "arguments": {"x": 1}},
}
_RESULT: ChatMessage = {
    "role": "tool",
    "content": "probe_of_a_result",
    "name": "probe_of_a_call",
    "tool_call_id": "probe1234",
}


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
        chat_template (str | None): Jinja text, a file that holds it, or the name of one of the folder's several
            templates, in place of the folder's own template.
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
        origin = self._origin(chat_template)
        if chat_template in own:
            self.chat_template: str | None = own[chat_template]
        else:
            self.chat_template = None if chat_template is None else read_template(chat_template, own)
        if self.chat_template is not None:  # not the folder's own
            own = {"default": self.chat_template}
        if not own:
            raise DataError(
                f"The tokenizer in {self.path} has no chat template, so turns cannot be told apart. Set "
                "tokenizer.chat_template to a Jinja file (that of the model's instruct version), or use a torchtune "
                "tokenizer."
            )
        if "default" not in own:
            raise DataError(
                f"{origin}: several chat templates, none of them called default. Choose one: "
                f"tokenizer.chat_template={' or '.join(own)}."
            )
        # transformers' rule: of several templates, tool_use is for conversations with tools
        self._template = ChatTemplate(own["default"], origin)
        self._tool_template = ChatTemplate(own["tool_use"], origin) if "tool_use" in own else self._template
        self.date = _iso_date(date)
        self._options = dict(template_options or {})
        self._special_ids = frozenset(
            index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(self._tokenizer.all_special_ids)
        self._opened, self._empty_reasoning, closing = self._probe_response()
        self._check_options()
        self._shown = self._probe_shown()
        self.eos_ids = self._find_eos_ids(closing)
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
        return digest.hexdigest() + (f" on {self._today()}" if self.reads_date else "")

    @property
    def asks_reasoning(self) -> bool:
        """Whether real responses must have reasoning, because the template has the model reason."""
        return self._empty_reasoning is not None

    @property
    def reads_date(self) -> bool:
        """Whether the template writes the day on which it is rendered."""
        return self._template.reads_date or self._tool_template.reads_date

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        text = self._render([(messages, True)])[0]
        if isinstance(text, DataError):
            raise text
        return self._encode([text])[0]

    def encode_pair(self, messages: Sequence[ChatMessage]) -> Encoded:
        pair = self.encode_pairs([messages])[0]
        if isinstance(pair, DataError):
            raise pair
        return pair

    def encode_pairs(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[Encoded | DataError]:
        """Many conversations at once, on all cores: :meth:`encode_pair` for each, with errors returned, not raised."""
        rendered = self._render_pairs(conversations)
        ids = iter(self._encode([text for pair in rendered if not isinstance(pair, DataError) for text in pair]))
        return [pair if isinstance(pair, DataError) else self._split(*pair, next(ids), next(ids)) for pair in rendered]

    def _render_pairs(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[tuple[str, str] | DataError]:
        """Prompt, and prompt with response, as texts."""
        pairs = self._prompts_and_wholes(conversations)
        responses = [None if isinstance(pair, DataError) else self._response(*pair) for pair in pairs]
        # Mistral writes the system message into the last user turn, and nowhere if a response stands behind that
        late = [
            number
            for number, (messages, pair) in enumerate(zip(conversations, pairs, strict=True))
            if responses[number] is None and not isinstance(pair, DataError) and messages[0]["role"] == "system"
        ]
        again = self._prompts_and_wholes([_without_system(conversations[number]) for number in late])
        for number, pair in zip(late, again, strict=True):
            responses[number] = None if isinstance(pair, DataError) else self._response(*pair)
        found: list[tuple[str, str] | DataError] = []
        for messages, pair, response in zip(conversations, pairs, responses, strict=True):
            if isinstance(pair, DataError) or response is None:
                found.append(pair if isinstance(pair, DataError) else DataError(prompt_mismatch(*pair)))
                continue
            try:
                found.append((pair[0], pair[0] + self._with_reasoning(messages, pair[0], response)))
            except DataError as error:
                found.append(error)
        return found

    def _prompts_and_wholes(self, conversations: Sequence[Sequence[ChatMessage]]) -> list[tuple[str, str] | DataError]:
        texts = self._render([each for talk in conversations for each in ((talk[:-1], True), (talk, False))])
        return [
            next((each for each in pair if isinstance(each, DataError)), None) or pair  # type: ignore[misc]
            for pair in zip(texts[::2], texts[1::2], strict=True)
        ]

    def _response(self, prompt: str, whole: str) -> str | None:
        """What a conversation has behind its prompt, or None if it does not begin with it."""
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        begin = prompt.removesuffix(self._opened)
        return whole[len(begin) :] if begin != prompt and whole.startswith(begin) else None

    def _with_reasoning(self, messages: Sequence[ChatMessage], prompt: str, response: str) -> str:
        """The response's text with the reasoning that the row has and the template may have left out."""
        if not self.checks_reasoning:
            return response
        message, content = messages[-1], messages[-1]["content"]
        inline = content.rpartition(_THINK_END)[0].replace("<think>", "").strip()
        separate = str(message.get("reasoning_content") or "").strip()
        reasoning = inline or separate
        truncated = inline not in response and content.strip() not in response  # tags may be part of a plain text
        if truncated or separate not in response:
            text = content.rpartition(_THINK_END)[2].strip()
            if not (inline and text and text in response) or prompt.rstrip().endswith(_THINK_END):
                raise DataError(
                    f"the real response has reasoning ({reasoning[:40]!r}), and the chat template does not show it: "
                    f"the response would be trained without it. {self._thinking_remedy('true')}, write it into the "
                    "content as <think>...</think>, or remove it from the row."
                )
            closing = response.rpartition(text)[2]
            opening = "<think>" if prompt.rstrip().endswith("<think>") else ""
            own = content.strip().removeprefix(opening)
            return (own.lstrip("\n") if prompt.endswith("\n") else own) + closing
        empty, row_options = self._empty_reasoning, messages[0].get("chat_template_kwargs") or {}
        if not empty and any(row_options.get(name) is False for name in _THINKING_OPTIONS):
            return response
        if not reasoning and empty is not None and response.startswith(empty):
            raise DataError(
                "the chat template lets the model reason before it answers, and the real response has no reasoning: "
                f"pairs would be told apart by that alone. {self._thinking_remedy('false')}, or give the real "
                "responses with their reasoning (<think>...</think> in the content)."
            )
        return response

    def _thinking_remedy(self, value: str) -> str:
        name = next((each for each in _THINKING_OPTIONS if each in self._template.names), None)
        if name is None:
            return "Set tokenizer.chat_template to a template that goes with the data"
        return f"Set tokenizer.template_options.{name}={value}"

    def _split(self, prompt: str, full: str, prompt_ids: list[int], full_ids: list[int]) -> Encoded | DataError:
        # The response is the rest of the conversation's ids where these begin with the prompt's ids, and the ids of
        # the response text alone where a token would reach across the border. It ends with its first stop token; where
        # the template writes none, one is appended.
        if full_ids[: len(prompt_ids)] == prompt_ids:
            rest = full_ids[len(prompt_ids) :]
        else:
            rest = self._encode([full[len(prompt) :]])[0]
        end = next((index for index, token in enumerate(rest) if token in self._stop_ids), None)
        if end is None:
            response_ids = [*rest, self.eos_ids[0]]
        else:
            response_ids = rest[: end + 1]
            behind = self.decode(rest[end + 1 :], skip_special_tokens=True).strip()
            if behind:
                return DataError(early_stop(self.decode([rest[end]]), behind))
        return (prompt_ids, response_ids) if len(response_ids) > 1 else DataError(NO_RESPONSE)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
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

    def _render(self, asked: Sequence[_Asked]) -> list[str | DataError]:
        """Texts of conversations, or what is wrong with them."""
        found: dict[int, str | DataError] = {
            number: lost for number, (messages, _) in enumerate(asked) if (lost := self._lost(messages)) is not None
        }
        left = [number for number in range(len(asked)) if number not in found]
        for template, has_tools in ((self._template, False), (self._tool_template, True)):
            numbers = [number for number in left if bool(asked[number][0][0].get("tools")) is has_tools]
            texts = self._rendered(template, [asked[number] for number in numbers])
            found |= {
                number: self._checked(text, asked[number][0]) for number, text in zip(numbers, texts, strict=True)
            }
        return [found[number] for number in range(len(asked))]

    def _rendered(self, template: ChatTemplate, asked: Sequence[_Asked], **options: Any) -> list[str | TemplateFault]:
        conversations = (
            {
                "messages": [_for_template(message) for message in messages],
                "tools": messages[0].get("tools"),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._row_options(messages),
            }
            for messages, add_generation_prompt in asked
        )
        variables = {**self._tokenizer.special_tokens_map, **self._options, **options}
        return template.render(conversations, variables, self._today())

    def _checked(self, text: str | TemplateFault, messages: Sequence[ChatMessage]) -> str | DataError:
        where = self._template.origin
        if isinstance(text, TemplateFault):
            said = text.message.rstrip(".")
            if text.kind == "syntax":
                return DataError(
                    f"{where}: the chat template is not valid Jinja, line {text.line}: {said}. Fix "
                    "tokenizer.chat_template, or the folder's own."
                )
            roles = ", ".join(message["role"] for message in messages)
            what = "refuses" if text.kind == "refused" else "fails on"
            return DataError(
                f"{where}: the chat template {what} the roles {roles}: {said}. Fix the row, or set "
                "tokenizer.chat_template to one that knows them."
            )
        if not text.isascii() and (surrogate := next((char for char in text if "\ud800" <= char <= "\udfff"), None)):
            return DataError(
                f"{where}: the chat template writes the lone surrogate {surrogate!r}, which is no valid text. Fix it, "
                "or set tokenizer.chat_template to another one."
            )
        return text

    def _row_options(self, messages: Sequence[ChatMessage]) -> dict[str, Any]:
        """Those of the row's own options that the template reads."""
        names = (self._template.names | self._tool_template.names).difference(_NO_OPTIONS)
        given = messages[0].get("chat_template_kwargs") or {}
        return {key: value for key, value in given.items() if key in names}

    def _lost(self, messages: Sequence[ChatMessage]) -> DataError | None:
        """An error if the template silently leaves a part of the conversation out of the prompt."""
        if not messages:
            return DataError("the conversation has no messages before the response. Fix the row.")
        roles = [message["role"] for message in messages]
        given, read = messages[0].get("chat_template_kwargs") or {}, self._row_options(messages)
        unread = [key for key, value in given.items() if key not in read and value not in (None, False, "", [], {})]
        if unread:
            return DataError(
                f"chat_template_kwargs has {', '.join(unread)}, which the chat template does not read. Set "
                "tokenizer.chat_template to one that does, or leave the column out with "
                "dataset.column_map={chat_template_kwargs: unused}."
            )
        used = {
            "tools": any("tools" in message for message in messages),
            "calls": any("tool_calls" in message for message in messages),
            "results": "tool" in roles,
        }
        lost = [what for what, is_used in used.items() if is_used and what not in self._shown]
        if lost:
            return DataError(
                f"the conversation has tools, and the chat template does not show their {' and '.join(lost)}: the "
                "model would not see them. Set tokenizer.chat_template to one that does, or remove the row."
            )
        has_system = any(message["role"] == "system" and message["content"].strip() for message in messages)
        if has_system and "system" not in self._shown:
            return DataError(
                "the conversation has a system message, and the chat template does not show it: the model would not "
                "see it. Set tokenizer.chat_template to one that does, write it into the user's message, or remove "
                "dataset.system_prompt or the row."
            )
        if roles.count("user") > 1 and not {"user", "assistant"} <= self._shown:
            return DataError(
                "the conversation has several turns, and the chat template does not show the earlier ones: the model "
                "would not see them. Set tokenizer.chat_template to one that does, or remove the row."
            )
        return None

    def _probe_shown(self) -> frozenset[str]:
        """What the template writes: ``system`` messages, ``user`` and ``assistant`` turns before the response; of tools
        ``tools`` themselves, ``calls``, ``results``. What it refuses counts as written, but for tools: what it says
        then tells more."""
        # long enough for templates that shorten messages, or show the last few only
        earlier = [
            {"role": role, "content": f"probe_{number} {'word ' * 400}of_{role}"}
            for number in range(8)
            for role in ("user", "assistant")
        ]
        talks = [[_SYSTEM, _QUESTION], [*earlier, _QUESTION], [_SYSTEM, *earlier, _QUESTION]]
        texts = self._rendered(self._template, [(messages, True) for messages in talks])
        lost = {
            message["role"]
            for text, messages in zip(texts, talks, strict=True)
            for message in messages
            if isinstance(text, str) and message["content"] not in text
        }
        calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        with_results = [[_QUESTION, calling, _RESULT, _REPLY], [_QUESTION, _REPLY, _RESULT, _REPLY]]
        texts = [
            *self._rendered(self._tool_template, [([{**_QUESTION, "tools": [_TOOL]}, _REPLY], False)]),
            *self._rendered(self._template, [(messages, False) for messages in with_results]),
        ]
        written = "".join(text for text in texts if isinstance(text, str))
        marks = {"tools": _TOOL["function"]["name"], "calls": _CALL["function"]["name"], "results": _RESULT["content"]}
        shown = {what for what, mark in marks.items() if mark in written}
        return frozenset(shown | {"system", "user", "assistant"} - lost)

    def _probe_response(self) -> tuple[str, str | None, str]:
        """How a response stands in the conversation: the end of the generation prompt that the conversation lacks; the
        beginning of responses without reasoning, if these would give a real response away; what closes it."""
        probe = [_QUESTION, _REPLY]
        asked: list[_Asked] = [(probe[:1], True), (probe, False), (probe[:1], False)]
        texts = self._rendered(self._template, asked)
        whole, prompt = self._checked(texts[1], probe), self._checked(texts[0], probe[:1])
        for text, mark, role in ((whole, _REPLY["content"], "assistant"), (prompt, _QUESTION["content"], "user")):
            if isinstance(text, DataError):
                raise text
            if mark not in text:
                raise DataError(
                    f"{self._template.origin}: the chat template does not show what the {role} says: it would not "
                    "reach the model. Set tokenizer.chat_template to one that does."
                )
        assert isinstance(prompt, str) and isinstance(whole, str)
        common = os.path.commonprefix([prompt, whole])
        if len(common) < len(prompt) and common.rfind("<") > common.rfind(">"):  # within a tag
            common = common[: common.rfind("<")]
        begin, _, closing = whole[len(common) :].rpartition(_REPLY["content"])
        opened = prompt[len(common) :]
        if opened and ((begin.strip() and "think" not in begin) or _QUESTION["content"] in opened):
            return "", None, closing
        if texts[2] == texts[0] and begin.strip():
            log.warning(
                "The chat template of %s writes no generation prompt: prompts end before %r, which becomes the "
                "beginning of every response, of the real ones too. Set tokenizer.chat_template to one that has it.",
                self.path,
                begin,
            )
            return opened, None, closing
        if "think" in begin:
            return opened, begin, closing
        if begin.strip():  # gpt-oss: the channel that the model chooses
            log.warning(
                "The chat template of %s begins every real response with %r, behind its generation prompt. Where the "
                "model begins otherwise (in another channel, say), pairs may be told apart by that alone.",
                self.path,
                begin,
            )
        # with reasoning switched off it asks otherwise: so now the model may reason
        for name in _THINKING_OPTIONS:
            if name in self._template.names and name not in self._options:
                without = self._rendered(self._template, asked[:2], **{name: False})
                if without != texts[:2]:
                    return opened, begin, closing
        if "<think>" in opened and _THINK_END not in opened:
            log.warning(
                "The chat template of %s opens a thinking block in every prompt (%r). Real responses without "
                "reasoning are trained right behind it, and pairs may be told apart by that alone.",
                self.path,
                opened,
            )
        return opened, None, closing

    def _check_options(self) -> None:
        names = self._template.names | self._tool_template.names
        known = sorted(names - {*_NO_OPTIONS, *self._tokenizer.special_tokens_map})
        unknown = [str(name) for name in self._options if name not in known]
        reads = f"; it reads {', '.join(known)}" if known else "; it reads none"
        if unknown:
            raise DataError(
                f"tokenizer.template_options.{unknown[0]}: the chat template of {self.path} never reads it{reads}. "
                "Remove it, or correct its name."
            )
        if self.date is not None and not self.reads_date:
            remedy = "Set tokenizer.template_options.date_string" if "date_string" in names else "Remove it"
            raise DataError(
                f"tokenizer.date={self.date}: the chat template of {self.path} never asks for the date. {remedy}."
            )

    def _today(self) -> str:
        return self.date or datetime.date.today().isoformat()

    def _origin(self, chat_template: str | None) -> str:
        """Where the template stands."""
        if chat_template is not None:
            return "tokenizer.chat_template" + ("" if "{" in chat_template else f"={chat_template}")
        file = self.path / "chat_template.jinja"
        return str(file) if file.is_file() else f"{self.path / 'tokenizer_config.json'}: chat_template"

    def _find_eos_ids(self, closing: str) -> tuple[int, ...]:
        """The token that closes a turn, the tokenizer's EOS, and what the model's generation settings stop at."""
        configured = [self._tokenizer.eos_token_id]
        for file in ("generation_config.json", "config.json"):
            stop = read_tokenizer_json(self.path / file).get("eos_token_id")
            if stop is not None:
                stops = stop if isinstance(stop, list) else [stop]
                if not all(type(each) is int and each >= 0 for each in stops):
                    raise DataError(
                        f"{self.path / file}: eos_token_id is {stop!r:.60}, expected a token id or a list of them."
                    )
                configured += stops
                break
        closing_special = [token for token in self._encode([closing])[0] if token in self._special_ids][:1]
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


def _iso_date(date: str | datetime.date | None) -> str | None:
    if date is None:
        return None
    try:
        return datetime.date.fromisoformat(str(date)).isoformat()
    except ValueError as error:
        raise DataError(
            f"tokenizer.date={date!r}: expected a day as YYYY-MM-DD, or null for that of the run's first start."
        ) from error


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """A message as transformers hands it to a template: without nulls, reasoning under each of its names."""
    of_row = ("tools", "chat_template_kwargs")
    plain = {key: value for key, value in message.items() if key not in of_row and value is not None}
    reasoning = plain.get("reasoning_content")
    return plain if reasoning is None else dict.fromkeys(("thinking", "reasoning"), reasoning) | plain


def _without_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    system, first, *rest = messages
    of_row: ChatMessage = {key: system[key] for key in ("tools", "chat_template_kwargs") if key in system}
    return [{**first, **of_row}, *rest]
