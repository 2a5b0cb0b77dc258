"""Arms that take turns, and the errors of those that cannot."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Figures = dict[str, float]


def attempt(failed: dict[str, str], name: str, function: Callable[[], Any]) -> Any:
    """What a function returns; None where the arm failed, now or before. An error becomes part of the results."""
    if name in failed:
        return None
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - whatever another library raises is its result
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        failed[name] = lines[0][:300]
    free()
    return None


def free() -> None:
    """Gives unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def race(
    turns: dict[str, Callable[[bool], Figures]],
    rounds: int,
    failed: dict[str, str],
    until: float = math.inf,
    on_round: Callable[[dict[str, dict[str, Any]]], None] = lambda runs: None,
) -> dict[str, dict[str, Any]]:
    """Lets arms take turns.

    Args:
        turns (dict[str, Callable[[bool], Figures]]): by name; a turn gets whether it is the first, gives seconds of
            what it timed and ``peak_gib``.
        rounds (int): how often each takes its turn, after a first one that does not count; with 0 all is compiled, for
            the next process too, and nothing measured.
        failed (dict[str, str]): errors by name; gets more.
        until (float): once ``time.monotonic()`` says so, no further round but the first that counts begins.
        on_round (Callable[[dict[str, dict[str, Any]]], None]): gets what is returned, as it is after each round that
            counts: a run that is killed has its rounds.

    Returns:
        dict[str, dict[str, Any]]: for each name and figure the values of all rounds, their median, minimum and maximum;
        or ``error``.
    """
    rows: dict[str, list[Figures]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            break
        for name, turn in turns.items():
            figures = attempt(failed, name, lambda turn=turn, first=number == 0: turn(first))  # type: ignore[misc]
            print(f"round {number}, {name}: {figures}", file=sys.stderr, flush=True)
            if number > 0 and figures is not None:
                rows[name].append(figures)
        if number > 0:
            on_round(_summary(rows, failed))
    return _summary(rows, failed)


def _summary(rows: dict[str, list[Figures]], failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        name: {"error": failed[name]}
        if name in failed
        else {key: spread([row[key] for row in found]) for key in found[0]}
        for name, found in rows.items()
        if found or name in failed
    }


def spread(values: list[float]) -> dict[str, Any]:
    """All values with their median, minimum and maximum."""
    return {"values": values, "median": statistics.median(values), "min": min(values), "max": max(values)}
