"""Tools in conversations: what may be called, the calls, and what came back, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spin.core.errors import DataError

BAD_ROW = "Fix the row or set dataset.on_bad_row=skip."


def tool_definitions(value: object) -> list[dict[str, Any]]:
    """A row's tools, each with ``type`` and ``function``: of OpenAI's function descriptions, with their wrapper or
    without, as a list or as JSON text; None is no tools."""
    value = parse_json(value, "tools")
    if value is None:
        return []
    found = []
    for index, tool in enumerate(value if isinstance(value, list) else [value]):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"tools: entry {index} is {tool!r:.60}, expected a function with its name. {BAD_ROW} A column that "
                "is called tools but holds none is left out with dataset.column_map={tools: unused}."
            )
        found.append({"type": "function", "function": dict(function)})
    return found


def parse_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Calls of functions, each with ``type``, ``function`` (``name`` and ``arguments``, a dictionary) and, where there
    is one, ``id``: of one call, a list of calls, or either as JSON text."""
    value = parse_json(value, where)
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where} calls {call!r:.60}, expected a function with name and arguments. {BAD_ROW}")
        name = function["name"]
        arguments = parse_json(function.get("arguments", {}), f"{where}, arguments of {name}")
        if not isinstance(arguments, Mapping):
            raise DataError(f"{where} calls {name} with arguments {arguments!r:.60}, expected a JSON object. {BAD_ROW}")
        made = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            made["id"] = call["id"]
        found.append(made)
    return found


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
            raise DataError(
                f"message {index} (role 'tool') answers call {message['tool_call_id']!r}, expected "
                f"{' or '.join(map(repr, known))}. {BAD_ROW}"
            )


def parse_json(value: object, where: str) -> Any:
    """A text as the JSON that it must be, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {value[:40]!r} is not valid JSON ({error}). {BAD_ROW}") from error
