"""Tools in conversations: what may be called, the calls, and what came back, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spin.core.errors import DataError

_REMEDY = "Fix the row or set dataset.on_bad_row=skip."


def tool_definitions(value: object) -> list[dict[str, Any]]:
    """The tools of a row, from its column ``tools``, or ``functions`` as older data have it.

    Args:
        value (object): a list of OpenAI's function descriptions, with ``{"type": "function", "function": ...}`` around
            them or not, or such a list as a JSON text; None is no tools.

    Returns:
        list[dict[str, Any]]: each with ``type`` and ``function``.

    Raises:
        DataError: If it is anything else.
    """
    value = _from_json(value, "tools")
    if value is None:
        return []
    tools = value if isinstance(value, list) else [value]
    found = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"tools: entry {index} is {_shown(tool)}, expected a function with its name. {_REMEDY} A column that "
                "is called tools but holds none is left out with dataset.column_map={tools: unused}."
            )
        found.append({"type": "function", "function": dict(function)})
    return found


def tool_calls(message: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    """The calls of an assistant's message, from ``tool_calls``, or from ``function_call`` as older data have it.

    Args:
        message (Mapping[str, Any]): the message.
        index (int): its place in the conversation.

    Returns:
        list[dict[str, Any]]: each with ``type``, ``function`` (``name`` and ``arguments``, a dictionary) and, where the
        message has one, ``id``. Empty if it calls nothing.

    Raises:
        DataError: If a call is no function with a name and arguments that are a JSON object.
    """
    value = message.get("tool_calls") or message.get("function_call")
    return parse_calls(value, f"message {index}") if value else []


def parse_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Calls of functions; see :func:`tool_calls`.

    Args:
        value (object): one call, a list of calls, or either as a JSON text.
        where (str): the place to name in an error.

    Returns:
        list[dict[str, Any]]: the calls.

    Raises:
        DataError: If it is anything else.
    """
    value = _from_json(value, where)
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where} calls {_shown(call)}, expected a function with name and arguments. {_REMEDY}")
        arguments = _from_json(function.get("arguments", {}), f"{where}, arguments of {function['name']}")
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"{where} calls {function['name']} with arguments {_shown(arguments)}, expected a JSON object. "
                f"{_REMEDY}"
            )
        made = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            made["id"] = call["id"]
        found.append(made)
    return found


def without_nulls(value: object) -> Any:
    """A value without the keys that are null, at any depth. Arrow gives each row's struct the keys of all rows.

    Args:
        value (object): dictionaries, lists and scalars; nulls in lists stay.

    Returns:
        Any: the same without them.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that every result belongs to a call, where both have ids.

    Args:
        messages (Sequence[Mapping[str, Any]]): a conversation whose order of roles is right.

    Raises:
        DataError: If a tool's message names a call that the assistant's turn before it did not make.
    """
    known: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            known = [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        elif message["role"] == "tool" and known and message.get("tool_call_id", known[0]) not in known:
            raise DataError(
                f"message {index} (role 'tool') answers call {message['tool_call_id']!r}, expected "
                f"{' or '.join(map(repr, known))}. {_REMEDY}"
            )


def _from_json(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {value[:40]!r} is not valid JSON ({error}). {_REMEDY}") from error


def _shown(value: object) -> str:
    return f"{value!r:.60}"
