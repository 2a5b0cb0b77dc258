"""What is wrong with a config: collected, so that one error reports all of it, with the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from spin.core.errors import ConfigError


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
    """The nearest sibling, else the same name in another section, else nothing."""
    nearest = nearest_of(key, known)
    elsewhere = [f"{section}.{key}" for section, names in (sections or {}).items() if key in names]
    return nearest or (f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else "")


def known_keys(known: Sequence[str]) -> str:
    """' Known keys: ...', or nothing."""
    return f" Known keys: {', '.join(known)}." if known else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a part of another sentence."""
    return str(error).split("\n", 1)[0][:500].rstrip(".")
