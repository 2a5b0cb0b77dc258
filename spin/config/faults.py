"""What is wrong with a config: collected, so that one error reports all of it, with the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.core.errors import ConfigError

KIND_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a text",
    type(None): "null",
}


class Faults:
    """Collects what is wrong, so that one error can report all of it."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Notes one fault: what was found, where, what was expected, what to do."""
        self.messages.append(message)

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


def nearest_of(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?', or nothing."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


def did_you_mean(key: str, known: Sequence[str], sections: Mapping[str, Sequence[str]] | None = None) -> str:
    """The same name in another section, else the nearest sibling, else nothing."""
    elsewhere = [f"{section}.{key}" for section, names in (sections or {}).items() if key in names]
    return f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else nearest_of(key, known)


def known_keys(known: Sequence[str]) -> str:
    """' Known keys: ...', or nothing."""
    return f" Known keys: {', '.join(known)}." if known else ""


def yaml_text(value: Any) -> str:
    """A value as it stands in YAML, shortened."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value!r:.100}"


def expected_kinds(kinds: Sequence[type]) -> str:
    """What an argument takes, in the words of the schema."""
    return either(list(dict.fromkeys(KIND_WORDS[kind] for kind in kinds)))


def either(parts: Sequence[str]) -> str:
    """'a, b or c'."""
    return ", ".join(parts[:-1]) + f" or {parts[-1]}" if len(parts) > 1 else parts[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a part of another sentence."""
    return str(error).split("\n", 1)[0][:500].rstrip(".")
