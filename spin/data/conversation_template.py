"""What a chat template makes of conversations: texts, or what is wrong with them; and what its ways are, by probes."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.core.errors import DataError
from spin.data.messages import ChatMessage
from spin.data.rows import bad_row
from spin.data.template_worker import CLOCK
from spin.data.templates import ChatTemplate, TemplateFault

log = logging.getLogger(__name__)

THINK_END = "</think>"
# Variables by which templates switch reasoning off, and what only this class may give a template.
THINKING_OPTIONS = ("enable_thinking", "thinking")
_NO_OPTIONS = ("messages", "tools", "documents", "add_generation_prompt", CLOCK)

Asked = tuple[Sequence[ChatMessage], bool]  # a conversation, and whether a generation prompt is written behind it

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
_RESULT: ChatMessage = {"role": "tool", "content": "probe_of_a_result"}
_RESULT |= {"name": "probe_of_a_call", "tool_call_id": "probe1234"}


class ConversationTemplate:
    """A folder's chat template, or its two, with the variables that it gets.

    ``opened`` is the end of the generation prompt that conversations lack there, ``empty_reasoning`` the beginning of
    responses without reasoning if such responses would give a real one away, ``closing`` what closes a response.
    ``own`` holds the template as ``default``, and maybe one for conversations with tools as ``tool_use``.

    Raises a DataError if the template cannot show a user's and an assistant's turn, or never reads an option or date.
    """

    def __init__(
        self,
        own: Mapping[str, str],
        origin: str,
        folder: Path,
        specials: Mapping[str, Any],
        options: Mapping[str, Any],
        date: str | None,
    ) -> None:
        # transformers' rule: of several templates, tool_use is for conversations with tools
        self._template = ChatTemplate(own["default"], origin)
        self._tool_template = ChatTemplate(own["tool_use"], origin) if "tool_use" in own else self._template
        self._names = self._template.names | self._tool_template.names
        self._folder, self._specials, self._options, self.date = folder, specials, options, date
        self.opened, self.empty_reasoning, self.closing = self._probe_response()
        self._check_options()
        self._shown = self._probe_shown()

    @property
    def reads_date(self) -> bool:
        """Whether it writes the day on which it is rendered."""
        return CLOCK in self._names

    def today(self) -> str:
        return self.date or datetime.date.today().isoformat()

    def render(self, asked: Sequence[Asked]) -> list[str | DataError]:
        """Texts of conversations, or what is wrong with them."""
        found: list[Any] = [self._lost(messages) for messages, _ in asked]
        for template, has_tools in ((self._template, False), (self._tool_template, True)):
            numbers = [
                number
                for number, (messages, _) in enumerate(asked)
                if found[number] is None and bool(messages[0].get("tools")) is has_tools
            ]
            for number, text in zip(numbers, self._rendered(template, [asked[n] for n in numbers]), strict=True):
                found[number] = self._checked(text, asked[number][0])
        return found

    def thinking_remedy(self, value: str) -> str:
        name = next((each for each in THINKING_OPTIONS if each in self._template.names), None)
        if name is None:
            return "Set tokenizer.chat_template to a template that goes with the data"
        return f"Set tokenizer.template_options.{name}={value}"

    def _rendered(self, template: ChatTemplate, asked: Sequence[Asked], **options: Any) -> list[str | TemplateFault]:
        conversations = [
            {"messages": [_for_template(message) for message in messages], "tools": messages[0].get("tools")}
            | {"documents": None, "add_generation_prompt": add_generation_prompt, **self._row_options(messages)}
            for messages, add_generation_prompt in asked
        ]
        return template.render(conversations, {**self._specials, **self._options, **options}, self.today())

    def _checked(self, text: str | TemplateFault, messages: Sequence[ChatMessage]) -> str | DataError:
        where, fix = f"{self._template.origin}: the chat template", "or set tokenizer.chat_template to another one."
        if isinstance(text, TemplateFault):
            said = text.message.rstrip(".")
            if text.kind == "syntax":
                remedy = "Fix tokenizer.chat_template, or the folder's own."
                return DataError(f"{where} is not valid Jinja, line {text.line}: {said}. {remedy}")
            roles = ", ".join(message["role"] for message in messages)
            what = "refuses" if text.kind == "refused" else "fails on"
            return DataError(f"{where} {what} the roles {roles}: {said}. Fix the row, {fix}")
        if not text.isascii() and (surrogate := next((char for char in text if "\ud800" <= char <= "\udfff"), None)):
            return DataError(f"{where} writes the lone surrogate {surrogate!r}, which is no valid text. Fix it, {fix}")
        return text

    def _row_options(self, messages: Sequence[ChatMessage]) -> dict[str, Any]:
        """Those of the row's own options that the template reads."""
        given = messages[0].get("chat_template_kwargs") or {}
        return {key: value for key, value in given.items() if key in self._names and key not in _NO_OPTIONS}

    def _lost(self, messages: Sequence[ChatMessage]) -> DataError | None:
        """An error if the template silently leaves a part of the conversation out of the prompt."""
        if not messages:
            return bad_row("the conversation has no messages before the response.")
        given, read = messages[0].get("chat_template_kwargs") or {}, self._row_options(messages)
        unread = [key for key, value in given.items() if key not in read and value not in (None, False, "", [], {})]
        if unread:
            return DataError(
                f"chat_template_kwargs has {', '.join(unread)}, which the chat template does not read. Set "
                "tokenizer.chat_template to one that does, or leave the column out with "
                "dataset.column_map={chat_template_kwargs: unused}."
            )
        roles = [message["role"] for message in messages]
        keys = {key for message in messages for key in message}
        used = {"tools": "tools" in keys, "calls": "tool_calls" in keys, "results": "tool" in roles}
        lost = [what for what, is_used in used.items() if is_used and what not in self._shown]
        has_system = any(message["role"] == "system" and message["content"].strip() for message in messages)
        if lost:
            what, parts = "tools", f"their {' and '.join(lost)}"
        elif has_system and "system" not in self._shown:
            what, parts = "a system message", "it"
        elif roles.count("user") > 1 and not {"user", "assistant"} <= self._shown:
            what, parts = "several turns", "the earlier ones"
        else:
            return None
        return DataError(
            f"the conversation has {what}, and the chat template does not show {parts}: the model would not see them. "
            "Set tokenizer.chat_template to one that does, or remove the row"
            f"{' or dataset.system_prompt' if parts == 'it' else ''}."
        )

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
        asked: list[Asked] = [(probe[:1], True), (probe, False), (probe[:1], False)]
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
            self._warn(
                "writes no generation prompt: prompts end before %r, which becomes the beginning of every response, "
                "of the real ones too. Set tokenizer.chat_template to one that has it.",
                begin,
            )
            return opened, None, closing
        if "think" in begin:
            return opened, begin, closing
        if begin.strip():  # gpt-oss: the channel that the model chooses
            self._warn(
                "begins every real response with %r, behind its generation prompt. Where the model begins "
                "otherwise (in another channel, say), that alone may distinguish the responses of a pair.",
                begin,
            )
        # with reasoning switched off it asks otherwise: so now the model may reason
        for name in THINKING_OPTIONS:
            if name in self._template.names and name not in self._options:
                without = self._rendered(self._template, asked[:2], **{name: False})
                if without != texts[:2]:
                    return opened, begin, closing
        if "<think>" in opened and THINK_END not in opened:
            self._warn(
                "opens a thinking block in every prompt (%r). Real responses without reasoning are trained right "
                "behind it, and that alone may distinguish the responses of a pair.",
                opened,
            )
        return opened, None, closing

    def _warn(self, what: str, text: str) -> None:
        log.warning(f"The chat template of %s {what}", self._folder, text)

    def _check_options(self) -> None:
        known = sorted(self._names - {*_NO_OPTIONS, *self._specials})
        for name in self._options:
            if name not in known:
                raise DataError(
                    f"tokenizer.template_options.{name}: the chat template of {self._folder} never reads it; it reads "
                    f"{', '.join(known) or 'none'}. Remove it, or correct its name."
                )
        if self.date is not None and not self.reads_date:
            remedy = "Set tokenizer.template_options.date_string" if "date_string" in self._names else "Remove it"
            raise DataError(
                f"tokenizer.date={self.date}: the chat template of {self._folder} never asks for the date. {remedy}."
            )


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """A message as transformers hands it to a template: without nulls, reasoning under each of its names."""
    of_row = ("tools", "chat_template_kwargs")
    plain = {key: value for key, value in message.items() if key not in of_row and value is not None}
    reasoning = plain.get("reasoning_content")
    return plain if reasoning is None else dict.fromkeys(("thinking", "reasoning"), reasoning) | plain
