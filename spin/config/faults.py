"""What is wrong with a config: collected, so that one error reports all of it, with the nearest known name."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from spin.config.schema import COMPONENT, Component, Section, fields_of
from spin.core.errors import ConfigError
from spin.core.terminal import nearest_of

UNIONS = (typing.Union, types.UnionType)
KIND_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


class Faults:
    """Collects what is wrong, so that one error can report all of it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.paths: set[str] = set()  # of the keys that have a fault of their own

    def add(self, message: str) -> None:
        """Notes one fault: what was found, where, what was expected, what to do."""
        self.messages.append(message)

    def at(self, path: str, problem: str) -> None:
        """Notes a fault of one key."""
        self.paths.add(path)
        self.add(f"{path}: {problem}")

    def raise_if_any(self) -> None:
        """Reports everything that was added.

        Raises:
            ConfigError: If anything was added.
        """
        if len(self.messages) == 1:
            raise ConfigError(self.messages[0])
        if self.messages:
            lines = ["\n    ".join(message.splitlines()) for message in self.messages]
            raise ConfigError(f"{len(lines)} faults:\n  - " + "\n  - ".join(lines))


def known_keys(known: Sequence[str]) -> str:
    """' Known keys: ...', or nothing."""
    return f" Known keys: {', '.join(known)}." if known else ""


def nearest_or_known(name: str, known: Sequence[str]) -> str:
    """The nearest name, else all."""
    return nearest_of(name, known) or known_keys(known)


def joined(path: str, key: Any) -> str:
    """The path of a key of a section."""
    return f"{path}.{key}" if path else str(key)


def yaml_text(value: Any) -> str:
    """A value as it stands in YAML, shortened."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value!r:.100}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a part of another sentence."""
    return str(error).split("\n", 1)[0][:500].rstrip(".")


def expected(hint: Any, limits: Sequence[Any] = (), title: str | None = None) -> str:
    """What a type takes, in words, such as 'a whole number from 1 to 10,000, or null'."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        info = next((part for part in parts if isinstance(part, FieldInfo)), None)
        return expected(parts[0], info.metadata if info else (), info.title if info else None)
    if origin in UNIONS:
        texts = [expected(part, limits if part in (int, float) else ()) for part in parts]
        return _either([text.replace(f"list of {texts[0]}", "list of these") for text in texts])
    if origin is Literal:
        return _either([str(part) for part in parts])
    if origin is list and title is None:
        return f"a list of {'texts' if parts[0] is str else expected(parts[0])}"
    if isinstance(hint, type) and issubclass(hint, Section):
        is_component = issubclass(hint, Component)
        return "a section with " + (COMPONENT if is_component else f"keys {', '.join(fields_of(hint))}")
    what = title or KIND_WORDS.get(hint, "another value")
    bounds = {name: getattr(each, name) for each in limits for name in ("ge", "gt", "le", "lt") if hasattr(each, name)}
    numbers = {name: f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for name, bound in bounds.items()}
    if "ge" in numbers and "le" in numbers:
        return f"{what} from {numbers['ge']} to {numbers['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join([what, *(f"{words[name]} {number}" for name, number in numbers.items())])


def _either(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" or {parts[-1]}" if len(parts) > 1 else parts[0]
