"""Which of two models is better: verdicts of a judge or of exact match, and win rates. Works on texts alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from spin.core.errors import ConfigError, DataError
from spin.core.terminal import cells, counted, fill, printable
from spin.data.dataset import Original
from spin.data.messages import ChatMessage

Place = Literal["first", "second", "tie"]  # what a judge says of two responses in the order in which it saw them
Outcome = Literal["win", "tie", "loss"]  # for the candidate

_Z95 = 1.959963984540054  # standard normal quantile of 0.975
_PLACES: dict[str, Place] = {"A": "first", "B": "second", "C": "tie"}
_FIELDS = ("prompt", "first", "second", "reference")
_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


# --- A judge's questions and verdicts ---


def check_template(template: str) -> None:
    """Checks a judge's template."""
    found = _FIELD.findall(template)
    unknown = sorted(set(found) - set(_FIELDS))
    missing = [f"{{{name}}}" for name in ("first", "second") if name not in found]
    if missing:
        raise ConfigError(f"judge.template: has no {' and no '.join(missing)}, where the responses belong.")
    if unknown:
        raise ConfigError(
            f"judge.template: {', '.join(f'{{{name}}}' for name in unknown)} is no field; known are "
            f"{', '.join(f'{{{name}}}' for name in _FIELDS)}."
        )


def check_pattern(name: str, pattern: str) -> None:
    """Checks a regular expression that takes something out of a text."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"{name}={pattern!r}: not a regular expression ({error}).") from error
    if groups != 1:
        raise ConfigError(
            f"{name}={pattern!r}: has {groups} groups, expected one, whose text is taken. Write (?:...) for others."
        )


def fill_template(template: str, **fields: str) -> str:
    """Puts texts into a judge's template, in one pass: braces inside a text stay as they are."""
    return _FIELD.sub(lambda match: fields[match[1]], template)


def conversation_text(messages: Sequence[ChatMessage]) -> str:
    """A prompt as a judge reads it: the user's text where it is alone, else the tools and every turn under its role."""
    if [message["role"] for message in messages] == ["user"] and "tools" not in messages[0]:
        return messages[0]["content"]
    tools = messages[0].get("tools") if messages else None
    parts = [f"Tools: {json.dumps([tool['function'] for tool in tools], ensure_ascii=False)}"] if tools else []
    parts += [f"{message['role'].capitalize()}: {message_text(message)}" for message in messages]
    return "\n\n".join(parts)


def message_text(message: ChatMessage) -> str:
    """What a message says, and the tools that it calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(([message["content"]] if message["content"] else []) + calls)


def read_verdict(text: str, pattern: str) -> Place | None:
    """A judge's verdict by the last match of ``pattern``, since a judge reasons first; None if it has no A, B or C."""
    found = re.findall(pattern, text)
    return _PLACES.get(found[-1].upper()) if found else None


def outcome_of(candidate_first: Place | None, baseline_first: Place | None) -> Outcome | None:
    """The outcome of two verdicts on one pair of responses, shown in both orders; None if one is unreadable.

    A win or a loss takes both: a judge that goes by the place names another winner in the other order, which is a tie.
    """
    if candidate_first is None or baseline_first is None:
        return None
    if (candidate_first, baseline_first) == ("first", "second"):
        return "win"
    return "loss" if (candidate_first, baseline_first) == ("second", "first") else "tie"


# --- Exact match ---


def extract(text: str, pattern: str | None) -> str | None:
    """The last match of ``pattern`` (None: the whole text) in canonical form; None if there is none."""
    found = [text] if pattern is None else re.findall(pattern, text)
    return canonical(found[-1]) if found else None


def canonical(text: str) -> str:
    """A text without what does not matter: case, white space, punctuation at its ends, the form of a number."""
    text = " ".join(text.split()).casefold().strip(" .,;:!?\"'`*$")
    if not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text.replace(",", ""))
    return format(number.normalize() + 0, "f")  # + 0 makes -0 to 0


def outcome_of_match(candidate: bool, baseline: bool) -> Outcome:
    """The outcome for the candidate where responses are right or wrong."""
    return "tie" if candidate == baseline else "win" if candidate else "loss"


def right_answers(
    originals: Mapping[str, Original], column: str | None, reference_pattern: str | None
) -> dict[str, str]:
    """The right answer to each sample, from the real response or a column of the row; DataError if one is missing."""
    if column is not None and not any(column in original.row for original in originals.values()):
        names = ", ".join(map(str, next(iter(originals.values())).row))
        raise DataError(f"exact_match.column={column}: no row has it; found the columns {names}.")
    found, faults = {}, []
    for sample_id, original in originals.items():
        text = message_text(original.messages[-1]) if column is None else original.row.get(column)
        answer = None if text is None else extract(str(text), reference_pattern)
        if answer is None:
            faults.append(f"{sample_id!r} has {text!r:.60}")
        else:
            found[sample_id] = answer
    if faults:
        where = "the real response" if column is None else f"the column {column!r}"
        raise DataError(
            f"{counted(len(faults), 'sample')} without a right answer in {where} that "
            f"reference_pattern={reference_pattern!r} finds: {'; '.join(faults[:5])}. Change exact_match.column or "
            "exact_match.reference_pattern."
        )
    return found


# --- Over all samples ---


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a fraction (1927), for 95 %: its ends, within [0, 1].

    With ties as half a success it is too wide rather than too narrow: values between 0 and 1 vary at most as much as
    zeros and ones of the same mean.
    """
    p, z = successes / n, _Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test (with right and wrong responses: McNemar's); ties say nothing."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def win_summary(outcomes: Sequence[Outcome | None]) -> dict[str, Any]:
    """Counts, win rate (a tie is half a win, unreadable samples are left out), its 95 % interval, the sign test."""
    counts = Counter(outcomes)
    wins, ties, losses = counts["win"], counts["tie"], counts["loss"]
    n = wins + ties + losses
    return {
        "samples": len(outcomes), "wins": wins, "ties": ties, "losses": losses, "unreadable": counts[None],
        "win_rate": (wins + ties / 2) / n if n else None,
        "win_rate_interval": list(wilson_interval(wins + ties / 2, n)) if n else None,
        "sign_test_p": sign_test(wins, losses) if n else None,
    }  # fmt: skip


def bias_summary(verdicts: Sequence[tuple[Place | None, Place | None]]) -> dict[str, Any]:
    """How far a judge goes by the place of a response.

    ``first_fraction``: of the verdicts that name a winner, those that name the first response (0.5 without bias);
    ``same_place_fraction``: of the pairs with two readable verdicts, those in which one place won in both orders;
    ``agreement_fraction``: those in which one response won, or both verdicts are ties.
    """
    said = Counter(place for pair in verdicts for place in pair)
    named = said["first"] + said["second"]
    both = [pair for pair in verdicts if None not in pair]
    same_place = sum(a == b != "tie" for a, b in both)
    agree = sum(outcome_of(a, b) != "tie" or a == b == "tie" for a, b in both)
    return {
        "asked": 2 * len(verdicts),
        "unreadable": said[None],
        "first_fraction": said["first"] / named if named else None,
        "same_place_fraction": same_place / len(both) if both else None,
        "agreement_fraction": agree / len(both) if both else None,
    }


def accuracy_summary(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy of one model."""
    n = len(right)
    return {"accuracy": sum(right) / n, "accuracy_interval": list(wilson_interval(sum(right), n))}


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary as a person reads it."""
    candidate, baseline = summary["candidate"], summary["baseline"]
    width = max(cells(candidate["name"]), cells(baseline["name"]))
    lines = [f"\n=== {candidate['name']} against {baseline['name']}, {counted(summary['samples'], 'prompt')} ==="]
    for model in (candidate, baseline):
        tokens, truncated = model["mean_tokens"], model["truncated_fraction"]
        line = f"{fill(model['name'], width)}  {tokens:8.1f} tokens on average, {truncated:.1%} truncated"
        if "accuracy" in model:
            line += f"; accuracy {_percent(model['accuracy'], model['accuracy_interval'])}"
        lines.append(line)
    outcomes = f"{summary['wins']} wins, {summary['ties']} ties, {summary['losses']} losses"
    lines += ["", f"{candidate['name']}: {outcomes}" + _unreadable(summary["unreadable"], "prompts")]
    if summary["win_rate"] is not None:
        rate = _percent(summary["win_rate"], summary["win_rate_interval"])
        lines.append(f"win rate, a tie as half: {rate}; sign test p = {summary['sign_test_p']:.3g}")
    judge = summary.get("judge")
    if judge is not None:
        lines.append(
            f"judge {judge['name']}: {judge['asked']} verdicts{_unreadable(judge['unreadable'], 'verdicts')}, "
            f"{counted(judge['equal_responses'], 'prompt')} with equal responses not asked"
        )
        if judge["first_fraction"] is not None:
            first = judge["first_fraction"]
            lines.append(f"position bias: {first:.1%} of the verdicts that name a winner name the first")
        if judge["agreement_fraction"] is not None:
            lines.append(
                f"both orders agree on {judge['agreement_fraction']:.1%} of the prompts; one place wins in both on "
                f"{judge['same_place_fraction']:.1%}"
            )
    return printable("\n".join(lines))


def _percent(fraction: float, interval: Sequence[float]) -> str:
    return f"{fraction:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _unreadable(count: int, what: str) -> str:
    return f", {count} {what} without a readable verdict" if count else ""
