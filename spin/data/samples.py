"""From conversations to the samples of a data set: which are kept, left out or truncated, and what is reported."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from spin.core.errors import DataError
from spin.data.dataset import DatasetReport
from spin.data.messages import ChatMessage, RowNotes
from spin.data.tokenizer import Encoded
from spin.types import Prompt

log = logging.getLogger(__name__)

LongAction = Literal["error", "drop", "cut"]
MAX_FINDINGS = 20  # different messages of a report
_FINDINGS_IN_WARNING = 5  # the report has more
_SHOWN_PLACES = 3


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation of a row, the real response last, or the fault in its place."""

    where: str
    sample_id: str
    messages: list[ChatMessage] = field(default_factory=list)
    fault: DataError | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    notes: RowNotes = field(default_factory=RowNotes)  # the row's


EncodedRow = list[tuple[Conversation, "Encoded | DataError"]]


@dataclass(frozen=True)
class SampleRules:
    """Options of ``prompt_dataset`` that decide about a sample."""

    max_seq_len: int | None
    max_prompt_tokens: int | None
    max_response_tokens: int | None
    on_long_prompt: LongAction
    on_long_response: LongAction
    on_bad_row: Literal["error", "skip"]


@contextmanager
def unlogged() -> Iterator[None]:
    """Within it, data sets log nothing of what they leave out, truncate or change; their reports say it all."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class Findings:
    """Messages, equal ones once, with the first places where they hold."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, where: str, message: str) -> None:
        self.total += 1
        if message not in self._places and len(self._places) == MAX_FINDINGS:
            return
        self._counts[message] += 1
        places = self._places.setdefault(message, [])
        if len(places) < _SHOWN_PLACES:
            places.append(where)

    def lines(self) -> list[str]:
        """One for each message, in the order in which they came up."""
        more = {message: self._counts[message] - len(places) for message, places in self._places.items()}
        return [
            ", ".join(places) + (f" and {more[message]} more" if more[message] else "") + f": {message}"
            for message, places in self._places.items()
        ]

    def text(self, limit: int = MAX_FINDINGS) -> str:
        """The first lines, and how many findings are not among them."""
        rest = self.total - sum(list(self._counts.values())[:limit])
        return "\n".join([f"  {line}" for line in self.lines()[:limit]] + ([f"  ... and {rest} more"] if rest else []))


class SampleFilter:
    """Decides on each sample of a data set, or of a stream's window, and keeps count. ``label`` names the source in
    messages; ``logged`` are unused columns that were logged for it before, and grows."""

    def __init__(self, label: str, rules: SampleRules, logged: set[str]) -> None:
        self.label, self.rows = label, 0
        self._rules, self._logged = rules, logged
        self._changes: Counter[str] = Counter()
        self._used: set[str] = set()
        self._unused: dict[str, None] = {}
        self._where_of: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._errors, self._left_out = Findings(), Findings()

    def count_row(self, of_row: EncodedRow) -> None:
        """Count a row, and what was changed and not used of it."""
        self.rows += 1
        notes = of_row[0][0].notes
        self._changes.update(list(notes.changes))
        self._used.update(notes.used)
        self._unused.update(notes.unused)

    def accept(self, conversation: Conversation, encoded: Encoded | DataError) -> Prompt | None:
        """The sample as it enters the data set, or None if it does not."""
        taken, reason = self._where_of.get(conversation.sample_id), "bad_row"
        if isinstance(encoded, DataError):
            fault = str(encoded)
        elif not encoded[0]:
            fault = "the prompt has no tokens. Use a chat template that marks turns."
        elif taken is not None:
            reason, remedy = "duplicate_id", "Give each row an id of its own, or name another dataset.id_column."
            fault = f"id {conversation.sample_id!r} is taken by {taken}. {remedy}"
        else:
            return self._fit(conversation, *encoded)
        self._note(conversation.where, reason, self._rules.on_bad_row, fault)
        return None

    def _fit(self, conversation: Conversation, prompt_ids: list[int], real_ids: list[int]) -> Prompt | None:
        """The sample within the limits: the end of the prompt, the beginning of the response."""
        rules, longest = self._rules, self._rules.max_seq_len
        most, origin = rules.max_prompt_tokens, f"dataset.max_prompt_tokens={rules.max_prompt_tokens}"
        if most is None and longest is not None:
            most, origin = longest - 1, f"max_seq_len={longest}, less one for the response"
        if most is not None and len(prompt_ids) > most:
            where = f"{conversation.where} ({len(prompt_ids)} tokens)"  # so that the messages of all rows are equal
            fault = f"the prompt is longer than {most} tokens ({origin})."
            if self._note(where, "long_prompt", rules.on_long_prompt, fault) != "cut":
                return None
            prompt_ids = prompt_ids[-most:]
        most, lengths = rules.max_response_tokens, f"{len(real_ids)} tokens"
        fault = f"the real response is longer than {most} tokens (dataset.max_response_tokens={most})."
        if longest is not None and (most is None or most > longest - len(prompt_ids)):
            most, lengths = longest - len(prompt_ids), f"{len(prompt_ids)} + {len(real_ids)} tokens"
            fault = f"prompt and real response are longer than {longest} tokens (max_seq_len={longest})."
        if most is not None and len(real_ids) > most:
            if self._note(f"{conversation.where} ({lengths})", "long_response", rules.on_long_response, fault) != "cut":
                return None
            real_ids = real_ids[:most]
        self._where_of[conversation.sample_id] = conversation.where
        return Prompt(conversation.sample_id, prompt_ids, real_ids)

    def raise_errors(self, at_least: int = 1) -> None:
        """Raise what must be raised, if it is so many."""
        if (total := self._errors.total) >= at_least:
            found = self._errors.text()
            raise DataError(f"{total} samples in {self.rows} rows of {self.label} cannot be used:\n{found}")

    def report(self, samples: int) -> DatasetReport:
        """Raise what must be raised, warn of what was done, and report."""
        self.raise_errors()
        done = ", ".join(f"{reason} {count}" for reason, count in self._counts.items())
        if not samples:
            raise DataError(f"No sample is left of {self.rows} rows of {self.label} ({done}):\n{self._left_out.text()}")
        unused = [name for name in self._unused if name not in self._used]
        if os.environ.get("RANK", "0") == "0":
            self._log(samples, done, [name for name in unused if name not in self._logged])
        self._logged.update(unused)
        counts, changes = dict(self._counts), dict(self._changes)
        return DatasetReport(self.rows, samples, counts, self._left_out.lines(), changes, unused)

    def _note(self, where: str, reason: str, action: str, fault: str) -> str:
        """Count a sample that is an error, left out or truncated; returns the action."""
        is_long = reason.startswith("long_")
        if action == "error":
            remedy = f" Raise the limit or set dataset.on_{reason}=drop or cut." if is_long else ""
            self._errors.add(where, fault + remedy)
        else:
            self._counts[f"{reason}_{action}" if is_long else reason] += 1
            self._left_out.add(where, fault)
        return action

    def _log(self, samples: int, done: str, unused: list[str]) -> None:
        if done:
            found = self._left_out.text(_FINDINGS_IN_WARNING)
            message = "%s: %d samples from %d rows; left out or truncated: %s\n%s"
            log.warning(message, self.label, samples, self.rows, done, found)
        if self._changes:
            changes = ", ".join(f"{name} {count}" for name, count in self._changes.items())
            log.warning("%s: rows that were read with a change: %s", self.label, changes)
        if "null_arguments_removed" in self._changes and "null_arguments_removed" not in self._logged:
            self._logged.add("null_arguments_removed")
            log.warning(
                "%s: Arrow fills up tools and calls with nulls; they were removed, and with them any null that was "
                "written on purpose, which look the same. JSON Lines keep theirs.",
                self.label,
            )
        if unused:
            log.info("%s: not used, neither in prompts nor in responses: %s", self.label, ", ".join(unused))
