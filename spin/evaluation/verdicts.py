"""Which of two models answers better: verdicts of a judge or of exact match, and what they sum up to.

Everything here works on texts; who answers and who judges is the recipe's business.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from spin.core.errors import ConfigError
from spin.core.terminal import printable
from spin.data.messages import ChatMessage

Place = Literal["first", "second", "tie"]  # what a judge says of two answers in the order in which it saw them
Outcome = Literal["win", "tie", "loss"]  # for the candidate
VERDICTS = ("judge", "exact_match")

_Z95 = 1.959963984540054  # standard normal quantile of 0.975
_PLACES: dict[str, Place] = {"A": "first", "B": "second", "C": "tie"}
_FIELDS = ("prompt", "first", "second", "reference")
_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")

DEFAULT_TEMPLATE = """\
Two assistants answered the same prompt. Decide which answer serves the user better: correct, relevant, complete,
clear. Do not let the order of the answers or their length sway you.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Say briefly what decides, then end with your verdict in this form: [[A]] if answer A is better, [[B]] if answer B is
better, [[C]] if neither is.
"""
DEFAULT_PATTERN = r"\[\[([ABC])\]\]"


# --- A judge's questions and verdicts ---


def check_template(template: object) -> None:
    """Checks a judge's template."""
    if not isinstance(template, str):
        raise ConfigError(f"judge.template={template!r}: expected a text with {{first}} and {{second}}.")
    found = _FIELD.findall(template)
    unknown = sorted(set(found) - set(_FIELDS))
    missing = [f"{{{name}}}" for name in ("first", "second") if name not in found]
    if missing:
        raise ConfigError(f"judge.template: has no {' and no '.join(missing)}, where the answers are to stand.")
    if unknown:
        raise ConfigError(
            f"judge.template: {', '.join(f'{{{name}}}' for name in unknown)} is no field; known are "
            f"{', '.join(f'{{{name}}}' for name in _FIELDS)}."
        )


def check_pattern(name: str, pattern: object) -> None:
    """Checks a regular expression that takes something out of a text."""
    if not isinstance(pattern, str):
        raise ConfigError(f"{name}={pattern!r}: expected a regular expression with one group.")
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
    """A prompt as a judge reads it."""
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
    """What a judge decided."""
    found = re.findall(pattern, text)
    return _PLACES.get(found[-1].upper()) if found else None


def outcome_of(candidate_first: Place | None, baseline_first: Place | None) -> Outcome | None:
    """What two verdicts on one pair of answers, shown in both orders, amount to.

    A win or a loss takes both: a judge that goes by the place names another winner in the other order, which is a tie.
    """
    if candidate_first is None or baseline_first is None:
        return None
    if (candidate_first, baseline_first) == ("first", "second"):
        return "win"
    return "loss" if (candidate_first, baseline_first) == ("second", "first") else "tie"


# --- Exact match ---


def extract(text: str, pattern: str | None) -> str | None:
    """The part of a text that is compared."""
    found = [text] if pattern is None else re.findall(pattern, text)
    return canonical(found[-1]) if found else None


def canonical(text: str) -> str:
    """A text without what does not matter: case, white space, punctuation at its ends, the spelling of a number."""
    text = " ".join(text.split()).casefold().strip(" .,;:!?\"'`*$")
    if not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text.replace(",", ""))
    return format(number.normalize() + 0, "f")  # + 0 makes -0 to 0


def outcome_of_match(candidate: bool, baseline: bool) -> Outcome:
    """The outcome for the candidate where answers are right or wrong."""
    if candidate == baseline:
        return "tie"
    return "win" if candidate else "loss"


# --- What many samples say ---


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share, for 95 %.

    With ties as half a success it is too wide rather than too narrow: values between 0 and 1 vary at most as much as
    zeros and ones of the same mean.

    Args:
        successes (float): 0 to ``n``.
        n (int): how many there were, 1 or more.

    Returns:
        tuple[float, float]: lower and upper end, within [0, 1].

    Source:
        Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    share, z = successes / n, _Z95
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """How likely wins and losses are to differ this much if both models are equally good."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def win_summary(outcomes: Sequence[Outcome | None]) -> dict[str, Any]:
    """Counts, win rate and how sure it is."""
    counts = Counter(outcomes)
    wins, ties, losses = counts["win"], counts["tie"], counts["loss"]
    n = wins + ties + losses
    return {
        "samples": len(outcomes),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "unreadable": counts[None],
        "win_rate": (wins + ties / 2) / n if n else None,
        "win_rate_interval": list(wilson_interval(wins + ties / 2, n)) if n else None,
        "sign_test_p": sign_test(wins, losses) if n else None,
    }


def bias_summary(verdicts: Sequence[tuple[Place | None, Place | None]]) -> dict[str, Any]:
    """How far a judge goes by the place of an answer."""
    said = Counter(place for pair in verdicts for place in pair)
    named = said["first"] + said["second"]
    both = [pair for pair in verdicts if None not in pair]
    same_place = sum(a == b != "tie" for a, b in both)
    agree = sum(outcome_of(a, b) != "tie" or a == b == "tie" for a, b in both)
    return {
        "asked": 2 * len(verdicts),
        "unreadable": said[None],
        "first_share": said["first"] / named if named else None,
        "same_place_share": same_place / len(both) if both else None,
        "agreement_share": agree / len(both) if both else None,
    }


def accuracy_summary(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy of one model."""
    return {
        "accuracy": sum(right) / len(right),
        "accuracy_interval": list(wilson_interval(sum(right), len(right))),
    }


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary as a person reads it."""
    candidate, baseline = summary["candidate"], summary["baseline"]
    width = max(len(candidate["name"]), len(baseline["name"]))
    lines = [f"\n=== {candidate['name']} against {baseline['name']}, {summary['samples']} prompts ==="]
    for player in (candidate, baseline):
        tokens, cut = player["mean_tokens"], player["truncated_share"]
        line = f"{player['name']:{width}}  {tokens:8.1f} tokens on average, {cut:.1%} cut"
        if "accuracy" in player:
            line += f"; accuracy {_share(player['accuracy'], player['accuracy_interval'])}"
        lines.append(line)
    outcomes = f"{summary['wins']} wins, {summary['ties']} ties, {summary['losses']} losses"
    lines += ["", f"{candidate['name']}: {outcomes}" + _unreadable(summary["unreadable"], "prompts")]
    if summary["win_rate"] is not None:
        rate = _share(summary["win_rate"], summary["win_rate_interval"])
        lines.append(f"win rate, a tie as half: {rate}; sign test p = {summary['sign_test_p']:.3g}")
    judge = summary.get("judge")
    if judge is not None:
        lines.append(
            f"judge {judge['name']}: {judge['asked']} verdicts{_unreadable(judge['unreadable'], 'verdicts')}, "
            f"{judge['equal_answers']} prompts with equal answers not asked"
        )
        if judge["first_share"] is not None:
            lines.append(f"position bias: {judge['first_share']:.1%} of the verdicts that name a winner name the first")
        if judge["agreement_share"] is not None:
            lines.append(
                f"both orders agree on {judge['agreement_share']:.1%} of the prompts; one place wins in both on "
                f"{judge['same_place_share']:.1%}"
            )
    return printable("\n".join(lines))


def _share(share: float, interval: Sequence[float]) -> str:
    return f"{share:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _unreadable(count: int, what: str) -> str:
    return f", {count} {what} without a readable verdict" if count else ""
