"""From a row of any supervised data set to one conversation that ends in the real response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from spin.data.tools import check_results, parse_calls, tool_calls, tool_definitions
from spin.errors import ConfigError, DataError

# role and content; an assistant's tool_calls, a tool's name and tool_call_id; in a row's first message also its tools
ChatMessage = dict[str, Any]
MessageTransform = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Turns = Literal["last", "all"]

# Columns of each format: required ones, then optional ones. The order is the order of detection.
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input",)),
    "prompt_response": (("prompt", "response"), ("system", "tools")),
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_PREDECESSORS = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# What a foreign transform raises on a row that does not fit it.
_TRANSFORM_FAULTS = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    NameError,
    RuntimeError,
)


def check_row_format(row_format: str, column_map: Mapping[str, str] | None) -> None:
    """Check the two options that name columns, before any row is read.

    Args:
        row_format (str): name of a format.
        column_map (Mapping[str, str] | None): column name of the format to column name of the data set.

    Raises:
        ConfigError: If the format is unknown, or if ``column_map`` is no mapping or names a column that the format does
            not have.
    """
    if row_format != "auto" and row_format not in _COLUMNS:
        raise ConfigError(f"dataset.format={row_format}: expected one of auto, {', '.join(_COLUMNS)}.")
    if column_map is not None and not isinstance(column_map, Mapping):
        raise ConfigError(
            f"dataset.column_map={column_map!r}: expected the format's columns with the data set's, such as "
            "{prompt: question, response: answer}."
        )
    chosen = _COLUMNS.values() if row_format == "auto" else (_COLUMNS[row_format],)
    known = {column for required, optional in chosen for column in (*required, *optional)}
    unknown = [column for column in column_map or {} if column not in known]
    if unknown:
        glued = any(":" in column for column in unknown)
        hint = ", with a space behind the colon: '{prompt: question}'" if glued else ""
        raise ConfigError(
            f"dataset.column_map has the key {', '.join(map(repr, unknown))}; format {row_format} knows "
            f"{', '.join(sorted(known))}. Keys are the format's columns, values are the data set's{hint}."
        )


def detect_format(data: Mapping[str, Any], column_map: Mapping[str, str] | None = None) -> str:
    """The format whose columns a row has.

    A column that is null counts as missing. Where several formats fit, conversations win over single turns.

    Args:
        data (Mapping[str, Any]): the row.
        column_map (Mapping[str, str] | None): column name of the format to column name of the data set.

    Returns:
        str: ``messages``, ``sharegpt``, ``alpaca`` or ``prompt_response``.

    Raises:
        DataError: If no format fits.
    """
    names = dict(column_map or {})
    for row_format, (required, _) in _COLUMNS.items():
        if all(data.get(names.get(column, column)) is not None for column in required):
            return row_format
    if data.get(names.get("prompt", "prompt")) is not None and data.get("completion") is not None:
        return "prompt_response"
    found = ", ".join(str(column) for column, value in data.items() if value is not None) or "none"
    empty = ", ".join(str(column) for column, value in data.items() if value is None)
    found += f" (null: {empty})" if empty else ""
    expected = "; ".join(f"{' + '.join(required)} ({row_format})" for row_format, (required, _) in _COLUMNS.items())
    lost = [f"{column}: {name}" for column, name in names.items() if data.get(name) is None]
    if lost:
        remedy = f"dataset.column_map has {{{', '.join(lost)}}}, which is not among them: its values are your columns."
    else:
        remedy = "Map your columns with dataset.column_map, or give a dataset.message_transform."
    raise DataError(f"columns {found}; expected {expected}. {remedy}")


def row_to_messages(
    data: Mapping[str, Any],
    *,
    row_format: str = "auto",
    column_map: Mapping[str, str] | None = None,
    message_transform: MessageTransform | None = None,
    system_prompt: str | None = None,
) -> list[ChatMessage]:
    """Turn a row into a checked conversation that ends with an assistant turn.

    Args:
        data (Mapping[str, Any]): the row.
        row_format (str): ``messages`` (list of role and content), ``sharegpt`` (``conversations``: list of from and
            value; optional ``system``), ``prompt_response`` (``prompt`` is a text or the list of messages so far;
            ``response`` or ``completion`` is a text or one assistant message; optional ``system``), ``alpaca``
            (``instruction``, optional ``input``, ``output``; instruction and input become one user turn with an empty
            line between them), or ``auto``. All but ``alpaca`` may have ``tools``.
        column_map (Mapping[str, str] | None): column name of the format to column name of the data set, as torchtune
            writes it: ``{"prompt": "question", "response": "answer"}``.
        message_transform (MessageTransform | None): instead of a format: any torchtune transform, from a sample to
            ``{"messages": [torchtune.data.Message, ...]}``. Lists of role and content dictionaries are accepted too.
        system_prompt (str | None): put before conversations that have no system message.

    Returns:
        list[ChatMessage]: ``{"role", "content"}`` with roles system (first only), user, assistant, tool. The texts are
        those of the row, unchanged. Where tools are used: an assistant's ``tool_calls``, a tool's ``name`` and
        ``tool_call_id``, and in the first message the row's ``tools``, all in the form that chat templates take.

    Raises:
        DataError: If the row is not such a conversation. The message does not name the row: the caller knows it.
    """
    tools: list[dict[str, Any]] = []
    if message_transform is not None:
        messages = _transformed(data, message_transform)
    else:
        chosen = detect_format(data, column_map) if row_format == "auto" else row_format
        messages = _PARSERS[chosen](data, dict(column_map or {}))
        if "tools" in _COLUMNS[chosen][1]:
            tools = tool_definitions(data.get((column_map or {}).get("tools", "tools")))
    if system_prompt is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    check_messages(messages)
    if tools:
        messages[0]["tools"] = tools
    return messages


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Check that a conversation is one SPIN can learn from.

    An empty system message is allowed: it is how a data set says "no system prompt" to a template that has a default
    one. So are a tool's empty result, and no text beside a call.

    Args:
        messages (Sequence[ChatMessage]): dictionaries of role and content.

    Raises:
        DataError: If there is no message, no assistant turn, a wrong order of roles, a last turn that is not the
            assistant's, a content that is empty or no valid text, or a tool's result without its call.
    """
    remedy = "Fix the row or set dataset.on_bad_row=skip."
    if not messages:
        raise DataError(f"the conversation is empty, expected at least a user and an assistant message. {remedy}")
    last = messages[-1]["role"]
    if last != "assistant":
        raise DataError(
            f"last message has role {last!r}, expected 'assistant'. SPIN needs a real response to learn from. {remedy}"
        )
    previous: str | None = None
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if previous not in _PREDECESSORS[role]:
            after = "first" if previous is None else f"after {previous!r}"
            allowed = " or ".join("first" if each is None else f"after {each!r}" for each in _PREDECESSORS[role])
            raise DataError(f"message {index} has role {role!r} and stands {after}, expected {allowed}. {remedy}")
        may_be_empty = role in ("system", "tool") or message.get("tool_calls")
        if not content.strip() and not may_be_empty:
            raise DataError(f"message {index} (role {role!r}) has empty content, expected text. {remedy}")
        if not content.isascii():
            _check_encodable(content, index)
        previous = role
    check_results(messages)


def split_turns(messages: Sequence[ChatMessage], turns: str) -> list[tuple[str, list[ChatMessage]]]:
    """The conversations to play: one per real response.

    Args:
        messages (Sequence[ChatMessage]): a checked conversation.
        turns (str): ``last``: the last assistant turn is the real response. ``all``: every assistant turn is the real
            response of a conversation of its own, whose prompt is everything before it.

    Returns:
        list[tuple[str, list[ChatMessage]]]: suffix of the sample id and the conversation up to its real response. The
        suffix is empty for ``last``, and ``#turn0``, ``#turn1``, ... for ``all``.
    """
    if turns == "last":
        return [("", list(messages))]
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [(f"#turn{number}", list(messages[: end + 1])) for number, end in enumerate(ends)]


# --- One parser per format ---


def _column(data: Mapping[str, Any], names: Mapping[str, str], column: str) -> Any:
    name = names.get(column, column)
    if data.get(name) is None:
        state = "null" if name in data else "missing"
        found = ", ".join(str(each) for each in data) or "none"
        raise DataError(f"column {name!r} is {state}; found columns {found}. Fix the row or set dataset.column_map.")
    return data[name]


def _text(value: object, label: str) -> str:
    """A text, or the joined text parts of an OpenAI content list."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value}
        texts = [part.get("text", part.get("content")) for part in value]
        if kinds == {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
        raise DataError(
            f"{label} has parts of type {', '.join(sorted(kinds))}; only text is supported. Remove the row."
        )
    raise DataError(f"{label} is {_kind(value)}, expected a text. Fix the row or set dataset.on_bad_row=skip.")


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _turn(value: object, index: int) -> ChatMessage:
    if not isinstance(value, Mapping):
        raise DataError(f"message {index} is {_kind(value)}, expected an object with role and content. Fix the row.")
    role_key = next((key for key in _ROLE_KEYS if value.get(key) is not None), None)
    content_key = next((key for key in _CONTENT_KEYS if key in value), None)
    if role_key is not None and content_key is None and (value.get("tool_calls") or value.get("function_call")):
        content_key = "content"
    if role_key is None or content_key is None:
        found = ", ".join(str(key) for key in value) or "none"
        raise DataError(
            f"message {index} has the keys {found}; expected role and content, or from and value. Fix the row."
        )
    role = value[role_key]
    if not isinstance(role, str) or role.lower() not in _ROLES:  # NeMo writes User and Assistant
        raise DataError(f"message {index} has role {role!r}; expected one of {', '.join(_ROLES)}. Fix the row.")
    role = role.lower()
    label, content = f"message {index} (role {role!r})", value.get(content_key)
    calls = parse_calls(content, label) if role == "function_call" else tool_calls(value, index)
    if calls and _ROLES[role] != "assistant":
        raise DataError(f"{label} calls tools, which only the assistant does. Fix the row.")
    if calls:
        text = "" if content is None or role == "function_call" else content
        return {"role": "assistant", "content": _text(text, f"{label}: content"), "tool_calls": calls}
    turn = {"role": _ROLES[role], "content": _text(content, f"{label}: content")}
    if turn["role"] == "tool":
        turn |= {key: value[key] for key in ("name", "tool_call_id") if isinstance(value.get(key), str)}
    return turn


def _turns(value: object, label: str) -> list[ChatMessage]:
    if not isinstance(value, list):
        raise DataError(f"{label} is {_kind(value)}, expected a list of messages. Fix the row or set dataset.format.")
    return [_turn(each, index) for index, each in enumerate(value)]


def _with_system(messages: list[ChatMessage], data: Mapping[str, Any], names: Mapping[str, str]) -> list[ChatMessage]:
    """The messages after the row's system column, if it has one and they do not begin with a system message."""
    system = data.get(names.get("system", "system"))
    if system is None or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(system, "column 'system'")}, *messages]


def _parse_messages(data: Mapping[str, Any], names: Mapping[str, str]) -> list[ChatMessage]:
    return _turns(_column(data, names, "messages"), names.get("messages", "messages"))


def _parse_sharegpt(data: Mapping[str, Any], names: Mapping[str, str]) -> list[ChatMessage]:
    turns = _turns(_column(data, names, "conversations"), names.get("conversations", "conversations"))
    return _with_system(turns, data, names)


def _parse_prompt_response(data: Mapping[str, Any], names: dict[str, str]) -> list[ChatMessage]:
    if "response" not in names and data.get("response") is None and data.get("completion") is not None:
        names["response"] = "completion"
    prompt, response = _column(data, names, "prompt"), _column(data, names, "response")
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = _turns(prompt, names.get("prompt", "prompt"))
    messages = _with_system(messages, data, names)
    if isinstance(response, list) and response and isinstance(response[0], Mapping) and "type" not in response[0]:
        answer = _turns(response, names.get("response", "response"))
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise DataError(
                "the response is a list of messages, expected exactly one, of role 'assistant'. Fix the row."
            )
    else:
        answer = [{"role": "assistant", "content": _text(response, "the response")}]
    return messages + answer


def _parse_alpaca(data: Mapping[str, Any], names: Mapping[str, str]) -> list[ChatMessage]:
    instruction = _text(_column(data, names, "instruction"), "instruction")
    context = data.get(names.get("input", "input"))
    if context is not None and (text := _text(context, "input")).strip():
        instruction = f"{instruction}\n\n{text}"
    output = _text(_column(data, names, "output"), "output")
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]


_PARSERS: dict[str, Callable[[Mapping[str, Any], dict[str, str]], list[ChatMessage]]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "prompt_response": _parse_prompt_response,
    "alpaca": _parse_alpaca,
}


# --- torchtune's own transforms ---


def _transformed(data: Mapping[str, Any], transform: MessageTransform) -> list[ChatMessage]:
    label = type(transform).__name__ if not hasattr(transform, "__name__") else transform.__name__
    try:
        sample = transform(dict(data))
    except _TRANSFORM_FAULTS as error:
        raise DataError(
            f"dataset.message_transform {label} failed with {type(error).__name__}: {error}; the row has the columns "
            f"{', '.join(map(str, data)) or 'none'}. Fix the row or the transform's column_map."
        ) from error
    if not isinstance(sample, Mapping) or not isinstance(sample.get("messages"), list):
        raise DataError(
            f"dataset.message_transform {label} returned no list under 'messages'. Use a torchtune transform."
        )
    return [_from_torchtune(message, index) for index, message in enumerate(sample["messages"])]


def _from_torchtune(message: Any, index: int) -> ChatMessage:
    if isinstance(message, Mapping):
        return _turn(message, index)
    if not hasattr(message, "role") or not hasattr(message, "text_content"):
        raise DataError(f"message {index} of the transform is {_kind(message)}, expected a torchtune.data.Message.")
    if message.contains_media or message.ipython:
        what = "holds media" if message.contains_media else "calls tools"
        raise DataError(f"message {index} {what}; only text turns are supported. Remove the row.")
    return _turn({"role": message.role, "content": message.text_content}, index)


def _check_encodable(content: str, index: int) -> None:
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"message {index} holds the lone surrogate {content[error.start]!r} at character {error.start}, which is "
            "no valid text. Fix the row or set dataset.on_bad_row=skip."
        ) from error
