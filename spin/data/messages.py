"""From a row of any supervised data set to one conversation that ends in the real response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spin.core.errors import ConfigError, DataError
from spin.data.rows import bad_row
from spin.data.tools import check_results, parse_calls, parse_json, tool_definitions, without_nulls

# role and content; an assistant's tool_calls, reasoning_content and train (False: not to be trained on), a tool's name
# and tool_call_id; in a row's first message also its tools and chat_template_kwargs
ChatMessage = dict[str, Any]
MessageTransform = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Turns = Literal["last", "all"]

# Columns of each format: required ones, then optional ones. The order is the order of detection.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ALWAYS = ("system", "tools", "functions", "chat_template_kwargs", "mask", "kto_tag", *_MEDIA)
_SINGLE = ("history", "reasoning_content", "thinking")
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), _ALWAYS),
    "sharegpt": (("conversations",), _ALWAYS),
    "alpaca": (("instruction", "output"), ("input", *_SINGLE, *_ALWAYS)),
    "prompt_response": (("prompt", "response"), ("label", *_SINGLE, *_ALWAYS)),
}
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
}
# Names in dumps of other programs; rows that have them are counted.
_OTHER_ROLES = {
    "prompter": "user",
    **dict.fromkeys(("model", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "claude"), "assistant"),
    "tool_call": "assistant",
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
}
_ALL_ROLES = _ROLES | _OTHER_ROLES
_CALL_ROLES = ("function_call", "tool_call")
_CALL_KEYS = ("tool_calls", "function_call")
# Keys of an assistant's message: what it thought, whether it is trained on, and training of parts of it.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_TRAIN_KEYS = ("weight", "train", "loss", "train_on_turn", "training", "trainable")
_PART_KEYS = ("train_detail", "training_detail")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_PREDECESSORS = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# What a foreign transform raises on a row that does not fit it.
_TRANSFORM_FAULTS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, NameError, RuntimeError)


@dataclass(slots=True)
class RowNotes:
    """What became of a row besides its conversation: names of what was changed, columns that were looked at, and those
    with a value that were not (``messages[].key`` for keys of messages), each once, in order; and the format that it is
    read in, None by a message transform."""

    changes: dict[str, None] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    row_format: str | None = None


@dataclass(slots=True)
class _Row:
    """A row whose columns go by the format's names."""

    data: Mapping[str, Any]
    names: dict[str, str]  # of the format's columns in the data set, where they differ
    notes: RowNotes
    from_arrow: bool
    masked_roles: frozenset[str] = frozenset()  # lower case

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def get(self, column: str) -> Any:
        return self.data.get(self.name(column))

    def needed(self, column: str) -> Any:
        value, name = self.get(column), self.name(column)
        if value is None:
            state = "null" if name in self.data else "missing"
            found = ", ".join(map(str, self.data)) or "none"
            raise DataError(
                f"column {name!r} is {state}; found columns {found}. Fix the row or set dataset.column_map."
            )
        return value

    def changed(self, what: str) -> None:
        self.notes.changes[what] = None

    def from_json(self, value: object, accepts: Callable[[Any], bool] = lambda parsed: True) -> Any:
        """A list or object that is stored as JSON text, parsed, if ``accepts`` takes it; anything else as it is."""
        if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if not accepts(parsed):
            return value
        self.changed("json_text_parsed")
        return parsed

    def pruned(self, value: Any) -> Any:
        """Tools or calls without the nulls that Arrow gave them."""
        pruned = without_nulls(value) if self.from_arrow else value
        if pruned != value:
            self.changed("null_arguments_removed")
        return pruned

    def turns(self, column: str, value: object = None) -> list[ChatMessage]:
        """The messages in a column, or in the value that was made of it."""
        value = self.from_json(self.needed(column)) if value is None else value
        if not isinstance(value, list):
            or_text = "a text or " if column == "prompt" else ""
            as_text = ", also as valid JSON text" if isinstance(value, str) else ""
            raise DataError(
                f"{self.name(column)} is {_kind(value)}, expected {or_text}a list of messages{as_text}. Fix the row or "
                "set dataset.format."
            )
        return [_turn(self, each, index) for index, each in enumerate(value)]


def check_row_format(row_format: str, column_map: Mapping[str, str] | None) -> None:
    """Check the two options that name columns, before any row is read; a ConfigError says what they may be."""
    if row_format != "auto" and row_format not in _COLUMNS:
        raise ConfigError(f"dataset.format={row_format}: expected one of auto, {', '.join(_COLUMNS)}.")
    chosen = _COLUMNS.values() if row_format == "auto" else (_COLUMNS[row_format],)
    known = list(dict.fromkeys(column for part in zip(*chosen, strict=True) for columns in part for column in columns))
    given = {} if column_map is None else column_map
    unknown = [column for column in given if column not in known] if isinstance(given, Mapping) else []
    if unknown:
        is_glued = any(":" in str(column) for column in unknown)
        hint = ", with a space behind the colon: '{prompt: question}'" if is_glued else ""
        raise ConfigError(
            f"dataset.column_map has the key {', '.join(map(repr, unknown))}; format {row_format} knows "
            f"{', '.join(column for column in known if column not in _MEDIA)}. Keys are the format's columns, values "
            f"are the data set's{hint}."
        )
    if not isinstance(given, Mapping) or not all(isinstance(column, str) for column in given.values()):
        raise ConfigError(
            f"dataset.column_map={column_map!r}: expected the format's columns with the data set's, such as "
            "{prompt: question, response: answer}."
        )


def detect_format(data: Mapping[str, Any], column_map: Mapping[str, str] | None = None) -> str:
    """The format whose columns a row has. A column that is null counts as missing; where several formats fit,
    conversations win over single turns. A DataError if none fits."""
    names = dict(column_map or {})
    for row_format, (required, _) in _COLUMNS.items():
        if all(data.get(names.get(column, column)) is not None for column in required):
            return row_format
    if data.get(names.get("prompt", "prompt")) is not None and data.get("completion") is not None:
        return "prompt_response"
    found = ", ".join(str(column) for column, value in data.items() if value is not None) or "none"
    empty = ", ".join(str(column) for column, value in data.items() if value is None)
    expected = "; ".join(f"{' + '.join(required)} ({row_format})" for row_format, (required, _) in _COLUMNS.items())
    lost = [f"{column}: {name}" for column, name in names.items() if data.get(name) is None]
    remedy = "Map your columns with dataset.column_map, or give a dataset.message_transform."
    if lost:
        remedy = f"dataset.column_map has {{{', '.join(lost)}}}, which is not among them: its values are your columns."
    elif data.get("chosen") is not None:
        response = "output" if data.get("instruction") is not None else "response"
        mapping = f"{response}: chosen" if "prompt" in data or response == "output" else "prompt: ..., response: chosen"
        if isinstance(data["chosen"], list) and len(data["chosen"]) > 1:
            mapping = "messages: chosen"
        remedy = f"These are preferences: dataset.column_map={{{mapping}}} takes the chosen response for the real one."
    elif data.get("text") is not None:
        remedy = "A text does not say where the prompt ends: use the data set before its template was applied."
    raise DataError(f"columns {found}{f' (null: {empty})' if empty else ''}; expected {expected}. {remedy}")


def row_to_messages(
    data: Mapping[str, Any],
    *,
    row_format: str = "auto",
    column_map: Mapping[str, str] | None = None,
    message_transform: MessageTransform | None = None,
    system_prompt: str | None = None,
    from_arrow: bool = False,
    notes: RowNotes | None = None,
) -> list[ChatMessage]:
    """Turn a row into a checked conversation that ends with an assistant turn.

    Formats are ``messages`` (list of role and content), ``sharegpt`` (``conversations``: list of from and value),
    ``prompt_response`` (``prompt`` is a text or the list of messages so far; ``response`` or ``completion`` is a text
    or one assistant message; optional ``history``), ``alpaca`` (``instruction``, optional ``input``, ``output``,
    optional ``history``; instruction and input become one user turn with an empty line between them), or ``auto``. All
    may have ``system``, ``tools`` or ``functions``, ``chat_template_kwargs`` and NeMo's ``mask``. Lists may be JSON
    texts. ``column_map`` leads from a format's column to the data set's. A ``message_transform`` takes the place of a
    format: any torchtune transform, or one to ``{"messages": [...]}`` with dictionaries of role and content.

    Assistant turns before the first user's and user turns behind the last assistant's are left out; texts are those of
    the row, unchanged. Rows ``from_arrow`` (parquet, ``datasets``) have structs filled up with nulls, which are removed
    from tools and calls. ``notes`` gets what was changed and what was not used. A DataError says what is wrong with the
    row; its caller names it.
    """
    row = _Row(data, dict(column_map or {}), RowNotes() if notes is None else notes, from_arrow)
    of_row: dict[str, Any] = {}
    if message_transform is not None:
        messages = _transformed(row, message_transform)
    else:
        chosen = detect_format(data, column_map) if row_format == "auto" else row_format
        row.notes.row_format = chosen
        if data.get("system") is None and data.get("system_prompt") and "system_prompt" not in row.names.values():
            row.names.setdefault("system", "system_prompt")
        _refuse_columns(row, chosen)
        row.masked_roles = _masked_roles(row.get("mask"))
        messages = _with_system(row, _PARSERS[chosen](row), chosen)
        of_row = {"tools": _tools(row), "chat_template_kwargs": _template_kwargs(row.get("chat_template_kwargs"))}
        known = {row.name(column) for part in _COLUMNS[chosen] for column in part}
        row.notes.used.update(dict.fromkeys(column for column in data if column in known))
        row.notes.unused.update(dict.fromkeys(str(key) for key in data if key not in known and _is_set(data[key])))
    messages = _without_loose_ends(row, messages)
    if system_prompt is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    check_messages(messages)
    untrained = [message.get("train") is False for message in messages if message["role"] == "assistant"]
    if all(untrained):
        keys = ", ".join(_TRAIN_KEYS[:4])
        raise bad_row(f"every assistant turn is marked as not to be trained on ({keys} or mask): no real response.")
    if any(untrained):
        row.changed("untrained_turns_skipped")
    messages[0] |= {key: value for key, value in of_row.items() if value}
    return messages


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Check that a conversation is one SPIN can learn from: roles in order, the assistant last, contents valid texts,
    results after their calls; else a DataError.

    An empty system message is allowed: it is how a data set says "no system prompt" to a template that has a default
    one. So are a tool's empty result, and no text next to a call.
    """
    if not messages:
        raise bad_row("the conversation is empty, expected at least a user and an assistant message.")
    last = messages[-1]["role"]
    if last != "assistant":
        raise bad_row(
            f"last message has role {last!r}, expected 'assistant'. SPIN needs a real response to learn from."
        )
    previous: str | None = None
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if previous not in _PREDECESSORS[role]:
            stands, *allowed = (f"after {each!r}" if each else "first" for each in (previous, *_PREDECESSORS[role]))
            raise bad_row(f"message {index} has role {role!r} and stands {stands}, expected {' or '.join(allowed)}.")
        if not content.strip() and role not in ("system", "tool") and not message.get("tool_calls"):
            raise bad_row(f"message {index} (role {role!r}) has empty content, expected text.")
        for text in (content, message.get("reasoning_content", "")):
            check_text(text, f"message {index}")
        previous = role
    check_results(messages)


def check_text(text: str, where: str) -> None:
    """A DataError for a text with a lone surrogate, which no tokenizer takes."""
    try:
        _ = text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        raise bad_row(f"{where} holds the lone surrogate {text[at]!r} at character {at}, no valid text.") from error


def split_turns(messages: Sequence[ChatMessage], turns: str) -> list[tuple[str, list[ChatMessage]]]:
    """Suffix of the sample id and conversation up to its real response, one per real response.

    With ``last``, the last assistant turn is the real response; with ``all``, every assistant turn is that of a
    conversation of its own, whose prompt is everything before it, and sample ids get a suffix: ``#turn0``, ... Turns
    with ``train: False`` are none in either case; what stands behind the last real response is left out.
    """
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    responses = [
        plain[: index + 1]
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("train") is not False
    ]
    if turns == "last":
        return [("", responses[-1])]
    return [(f"#turn{number}", response) for number, response in enumerate(responses)]


# --- Values of a row ---


def _text(value: object, label: str) -> str:
    """A text, or the joined text parts of an OpenAI content list."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value}
        texts = [part.get("text", part.get("content")) for part in value]
        if kinds == {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
        raise bad_row(f"{label} has parts of type {', '.join(sorted(kinds))}; only text is supported.")
    raise bad_row(f"{label} is {_kind(value)}, expected a text.")


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _is_set(value: object) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def _turn(row: _Row, value: object, index: int) -> ChatMessage:
    if not isinstance(value, Mapping):
        raise bad_row(f"message {index} is {_kind(value)}, expected an object with role and content.")
    called = {key: value[key] for key in _CALL_KEYS if value.get(key)}
    role_key = next((key for key in _ROLE_KEYS if value.get(key) is not None), None)
    content_key = next((key for key in _CONTENT_KEYS if key in value), "content" if called else None)
    if role_key is None or content_key is None:
        keys = ", ".join(map(str, value)) or "none"
        raise bad_row(f"message {index} has the keys {keys}; expected role and content, or from and value.")
    name = value[role_key]
    if not isinstance(name, str) or name.lower() not in _ALL_ROLES:  # NeMo writes User and Assistant
        raise bad_row(f"message {index} has role {name!r}; expected one of {', '.join(_ALL_ROLES)}.")
    name = name.lower()
    role = _ALL_ROLES[name]
    if name in _OTHER_ROLES:
        row.changed(f"role_{name}_read_as_{role}")
    label, content = f"message {index} (role {name!r})", value.get(content_key)
    if name in _CALL_ROLES:
        calls = parse_calls(content, label)
    else:
        called = row.pruned(called)
        found = called.get("tool_calls") or called.get("function_call")
        calls = parse_calls(found, f"message {index}") if found else []
    if calls and role != "assistant":
        raise bad_row(f"{label} calls tools, which only the assistant does.")
    if calls and (content is None or name in _CALL_ROLES):
        content = ""
    turn: ChatMessage = {"role": role, "content": _text(content, f"{label}: content")}
    read = {role_key, content_key, *_CALL_KEYS, *_TRAIN_KEYS}
    if calls:
        turn["tool_calls"] = calls
    if role == "tool":
        turn |= {key: value[key] for key in ("name", "tool_call_id") if isinstance(value.get(key), str)}
        read |= {"name", "tool_call_id"}
    if role == "assistant":
        turn |= _reasoning(value, label, _REASONING_KEYS)
        if {name, role} & row.masked_roles or not _is_trained(value, label):
            turn["train"] = False
        read |= set(_REASONING_KEYS)
    row.notes.unused |= {f"messages[].{key}": None for key in value if key not in read and _is_set(value[key])}
    return turn


def _reasoning(value: Mapping[str, Any], label: str, keys: Sequence[str]) -> dict[str, str]:
    texts = {key: _text(value[key], f"{label}: {key}") for key in keys if value.get(key)}
    if len(set(texts.values())) > 1:
        raise bad_row(f"{label} has different texts in {' and '.join(texts)}, expected one of them.")
    return {"reasoning_content": next(iter(texts.values()))} if any(texts.values()) else {}


def _is_trained(value: Mapping[str, Any], label: str) -> bool:
    for key in _PART_KEYS:
        if value.get(key):
            raise bad_row(f"{label} has {key}: parts of a response cannot be left out of training.")
    flags = {key: value[key] for key in _TRAIN_KEYS if value.get(key) is not None}
    wrong = " and ".join(f"{key} {flag!r:.40}" for key, flag in flags.items() if flag not in (0, 1))
    if wrong:
        raise bad_row(f"{label} has {wrong}, expected 0 or 1, false or true: SPIN does not weigh responses.")
    return all(flags.values())


def _with_system(row: _Row, messages: list[ChatMessage], row_format: str) -> list[ChatMessage]:
    """The messages after the row's system column, if it has one and they do not begin with a system message."""
    system = row.get("system")
    if system is None or not messages:
        return messages
    system = _text(system, f"column {row.name('system')!r}")
    if not system and row_format == "alpaca":  # LLaMA-Factory writes it for none
        return messages
    if messages[0]["role"] == "system":
        if system.strip() not in ("", messages[0]["content"].strip()):
            row.changed("second_system_message_left_out")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _history(row: _Row) -> list[ChatMessage]:
    """The turns before the prompt: pairs of a user's and an assistant's text, or messages."""
    name = row.name("history")
    value = row.from_json(row.get("history"))
    if not _is_set(value):
        return []
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return row.turns("history", value)
    if not isinstance(value, list) or not all(isinstance(each, list | tuple) and len(each) == 2 for each in value):
        raise bad_row(f"column {name!r} is no list of [user, assistant] pairs or of messages.", name)
    return [
        {"role": role, "content": _text(text, f"{name}: pair {index}")}
        for index, pair in enumerate(value)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _response(row: _Row, text: str) -> ChatMessage:
    columns = {column: row.get(column) for column in _SINGLE if column != "history"}
    return {"role": "assistant", "content": text, **_reasoning(columns, "the row", list(columns))}


def _tools(row: _Row) -> list[dict[str, Any]]:
    found = [name for name in map(row.name, ("tools", "functions")) if _is_set(row.data.get(name))]
    if len(found) > 1:
        raise bad_row(f"the row has {' and '.join(found)}, expected one of them.", "functions")
    return tool_definitions(row.pruned(row.data[found[0]])) if found else []


def _template_kwargs(value: object) -> dict[str, Any]:
    column = "chat_template_kwargs"
    value = (parse_json(value, f"column {column!r}") if _is_set(value) else None) or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise bad_row(f"column {column!r} is {_kind(value)}, expected an object of options.", column)
    return {key: each for key, each in value.items() if each is not None}


def _masked_roles(value: object) -> frozenset[str]:
    """Roles that are not trained on, by NeMo's column: a name, several with commas between, or a list."""
    names = value.split(",") if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad_row(f"column 'mask' is {_kind(value)}, expected the role that is not trained on: User, say.", "mask")
    return frozenset(name.strip().lower() for name in names)


def _refuse_columns(row: _Row, row_format: str) -> None:
    """Refuse a row whose conversation is not all of it, or no good example."""
    for key, off in (("weight", 0), ("train", False), ("loss", False)):
        if row.data.get(key) is off and key not in row.names.values() and row_format in ("alpaca", "prompt_response"):
            raise bad_row(f"{key} is {json.dumps(off)}: the response is marked as not to be trained on.")
    for column in _MEDIA:
        if _is_set(row.get(column)):
            raise bad_row(f"the row has {column}; only text is supported.", column)
    for column in ("label", "kto_tag"):
        if column in _COLUMNS[row_format][1] and row.get(column) is False:
            raise bad_row(f"{column} is false: the response is an example of what not to say.", column)


def _without_loose_ends(row: _Row, messages: list[ChatMessage]) -> list[ChatMessage]:
    """The conversation from its first user turn to its last assistant turn, if others stand around them."""
    roles = [message["role"] for message in messages]
    start = int(roles[:1] == ["system"])
    first = roles.index("user") if "user" in roles else 0
    if "assistant" not in roles[first:]:
        return messages
    end = len(roles) - roles[::-1].index("assistant")
    if any(role != "user" for role in roles[end:]):
        end = len(roles)
    if end < len(roles):
        row.changed("trailing_user_dropped")
    if roles[start] == "assistant" and set(roles[start:first]) <= {"assistant", "tool"} and first > start:
        row.changed("leading_assistant_dropped")
        return [*messages[:start], *messages[first:end]]
    return messages[:end]


# --- One parser per format ---


def _parse_prompt_response(row: _Row) -> list[ChatMessage]:
    if "response" not in row.names and row.data.get("response") is None and row.data.get("completion") is not None:
        row.names["response"] = "completion"
    text, response = row.needed("prompt"), row.needed("response")
    prompt = row.from_json(text, _is_message_list)  # a text that is JSON without being messages stays a text
    if prompt is not text:
        response = row.from_json(response)
    is_text = isinstance(prompt, str)
    messages = [{"role": "user", "content": prompt}] if is_text else row.turns("prompt", prompt)
    start = int(bool(messages) and messages[0]["role"] == "system")
    messages[start:start] = _history(row)
    if isinstance(response, list) and response and isinstance(response[0], Mapping) and "type" not in response[0]:
        turns = row.turns("response", response)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise bad_row("the response is a list of messages, expected exactly one, of role 'assistant'.")
        return messages + turns
    return [*messages, _response(row, _text(response, "the response"))]


def _is_message_list(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value)


def _parse_alpaca(row: _Row) -> list[ChatMessage]:
    instruction = _text(row.needed("instruction"), "instruction")
    question = row.get("input")
    if question is not None and (text := _text(question, "input")).strip():
        instruction = f"{instruction}\n\n{text}" if instruction.strip() else text
    output = _text(row.needed("output"), "output")
    return [*_history(row), {"role": "user", "content": instruction}, _response(row, output)]


_PARSERS: dict[str, Callable[[_Row], list[ChatMessage]]] = {
    "messages": lambda row: row.turns("messages"),
    "sharegpt": lambda row: row.turns("conversations"),
    "prompt_response": _parse_prompt_response,
    "alpaca": _parse_alpaca,
}


# --- torchtune's own transforms ---


def _transformed(row: _Row, transform: MessageTransform) -> list[ChatMessage]:
    label = f"dataset.message_transform {getattr(transform, '__name__', type(transform).__name__)}"
    # torchtune's own transforms load an image from wherever the row says: a file of this machine, any address
    columns = getattr(transform, "column_map", None) or getattr(transform, "_column_map", None) or {}
    if type(transform).__module__.startswith("torchtune.") and (
        _is_set(row.data.get(columns.get("image", "image"))) or _has_image(row.data)
    ):
        raise bad_row("the row has an image; only text is supported, and nothing was loaded.")
    try:
        sample = transform(dict(row.data))
    except _TRANSFORM_FAULTS as error:
        found = ", ".join(map(str, row.data)) or "none"
        raise DataError(
            f"{label} failed with {type(error).__name__}: {error}; the row has the columns {found}. Fix the row or the "
            "transform's column_map."
        ) from error
    if not isinstance(sample, Mapping) or not isinstance(sample.get("messages"), list):
        raise DataError(f"{label} returned no list under 'messages'. Use a torchtune transform.")
    return [_turn(row, _from_torchtune(message, index), index) for index, message in enumerate(sample["messages"])]


def _has_image(value: object) -> bool:
    """Whether a content list anywhere in a row has an image, as OpenAI writes it."""
    if isinstance(value, Mapping):
        return value.get("type") == "image_url" or any(map(_has_image, value.values()))
    return isinstance(value, list) and any(map(_has_image, value))


def _from_torchtune(message: Any, index: int) -> Mapping[str, Any]:
    if isinstance(message, Mapping):
        return message
    if not hasattr(message, "role") or not hasattr(message, "text_content"):
        raise DataError(f"message {index} of the transform is {_kind(message)}, expected a torchtune.data.Message.")
    if message.contains_media or message.ipython:
        what = "holds media" if message.contains_media else "calls tools"
        raise bad_row(f"message {index} {what}; only text turns are supported.")
    return {"role": message.role, "content": message.text_content, "train": not getattr(message, "masked", False)}
