"""Tools in conversations: what may be called, the calls, and what came back, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spin.data.rows import bad_row


def tool_definitions(value: object) -> list[dict[str, Any]]:
    """A row's tools, each with ``type`` and ``function``: of OpenAI's function descriptions, with their wrapper or
    without, as a list or as JSON text; None is no tools."""
    value = parse_json(value, "tools")
    found = []
    for index, tool in enumerate(value if isinstance(value, list) else [] if value is None else [value]):
        function = _function(tool)
        if function is None:
            raise bad_row(f"tools: entry {index} is {tool!r:.60}, expected a function with its name.", "tools")
        found.append({"type": "function", "function": dict(function)})
    return found


def parse_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions, each with ``type``, ``function`` (``name`` and ``arguments``, a dictionary) and, where there
    is one, ``id``: of one call, a list of calls, or either as JSON text."""
    value = parse_json(value, where)
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = _function(call)
        if function is None or not function["name"]:
            raise bad_row(f"{where} calls {call!r:.60}, expected a function with name and arguments.")
        name = function["name"]
        arguments = parse_json(function.get("arguments", {}), f"{where}, arguments of {name}")
        if not isinstance(arguments, Mapping):
            raise bad_row(f"{where} calls {name} with arguments {arguments!r:.60}, expected a JSON object.")
        made = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        found.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _function(value: object) -> Mapping[str, Any] | None:
    """A function with a name, out of its wrapper."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    return function if isinstance(function, Mapping) and isinstance(function.get("name"), str) else None


def without_nulls(value: object) -> Any:
    """A value without the keys that are null, at any depth; nulls in lists stay. Arrow gives each row's struct the keys
    of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that every result belongs to a call of the assistant's turn before it, where both have ids."""
    known: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            known = [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        elif message["role"] == "tool" and known and message.get("tool_call_id", known[0]) not in known:
            raise bad_row(
                f"message {index} (role 'tool') is the result of call {message['tool_call_id']!r}, expected "
                f"{' or '.join(map(repr, known))}."
            )


def parse_json(value: object, where: str) -> Any:
    """A text as the JSON that it must be, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise bad_row(f"{where}: {value[:40]!r} is not valid JSON ({error}).") from error
