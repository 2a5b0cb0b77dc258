"""Which of the opponent's answers are worth learning from: policies by name, and limits to its own margin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from spin.core.errors import ConfigError, StoreError
from spin.pairs.packing import MASK_TRUNCATED
from spin.pairs.store import PairStore
from spin.types import Pair, Response

# what may be done with responses that may not be worth learning from, by their kind
POLICIES = {"truncated": ("keep", MASK_TRUNCATED, "drop"), "equal_to_real": ("keep", "drop"), "empty": ("keep", "drop")}


def filter_pairs(
    pairs: Iterable[Pair],
    counts: Counter[str],
    *,
    truncated: str = "keep",
    equal_to_real: str = "keep",
    empty: str = "drop",
    whole: bool = False,
) -> Iterator[Pair]:
    """Applies the policies for responses that may not be worth learning from, and counts them.

    Args:
        pairs (Iterable[Pair]): what the opponent answered.
        counts (Counter[str]): filled with counts of responses by name.
        truncated (str): responses cut by the length limit: ``keep`` them as they are (no end token is added), ``mask``
            them (in the store, with no weight in the loss and its metrics), or ``drop`` them.
        equal_to_real (str): responses equal to the real one, which have no gradient: ``keep`` or ``drop``.
        empty (str): responses that consist of a stop token alone: ``keep`` or ``drop``. Responses without any token
            cannot be scored and are always dropped.
        whole (bool): a pair that loses a response loses all of them, as triplets must.

    Yields:
        Pair: the pairs that still have a response.

    Raises:
        ConfigError: If a policy is unknown.
        StoreError: If no pair is left.
    """
    for name, policy in (("truncated", truncated), ("equal_to_real", equal_to_real), ("empty", empty)):
        if policy not in POLICIES[name]:
            raise ConfigError(f"pairs.{name}={policy!r}: expected {', '.join(POLICIES[name])}.")
    counts.update(responses=0, truncated=0, equal_to_real=0, empty=0, dropped=0, dropped_pairs=0)
    is_any_left = False
    for pair in pairs:
        responses = []
        for response in pair.generated:
            is_truncated = response.finish_reason == "length"
            is_equal = np.array_equal(response.token_ids, pair.real_ids)
            is_empty = len(response.token_ids) == 0 or (len(response.token_ids) == 1 and not is_truncated)
            counts.update(responses=1, truncated=is_truncated, equal_to_real=is_equal, empty=is_empty)
            if (
                (is_truncated and truncated == "drop")
                or (is_equal and equal_to_real == "drop")
                or (is_empty and empty == "drop")
                or len(response.token_ids) == 0
            ):
                counts["dropped"] += 1
            else:
                responses.append(response)
        if whole and len(responses) < len(pair.generated):
            counts["dropped"] += len(responses)
            responses = []
        if responses:
            is_any_left = True
            yield replace(pair, generated=responses)
        else:
            counts["dropped_pairs"] += 1
    if not is_any_left:
        raise StoreError(
            f"No pair is left of {counts['dropped_pairs']}: {dict(counts)}. Every response was dropped by "
            "pairs.truncated, pairs.equal_to_real or pairs.empty; relax them, or raise sampling.max_new_tokens."
        )


def filter_margins(
    pairs: Iterable[Pair],
    counts: Counter[str],
    min_margin: float | None = None,
    max_margin: float | None = None,
    whole: bool = False,
) -> Iterator[Pair]:
    """Leaves out responses that the opponent itself tells from the real one too easily, or not at all, and counts them.

    The margin is the opponent's mean log-prob per token of the real response less that of the generated one, in nats.
    Where it is high the opponent finds the real response the likelier one already; where it is very low the real
    response is foreign to it.

    Args:
        pairs (Iterable[Pair]): scored by the opponent.
        counts (Counter[str]): ``margin_dropped`` counts responses, ``margin_dropped_pairs`` pairs without any left.
        min_margin (float | None): responses with less are left out; None is no limit.
        max_margin (float | None): responses with more are left out; None is no limit.
        whole (bool): the first response speaks for all of its pair, as in triplets.

    Yields:
        Pair: the pairs that still have a response.

    Raises:
        StoreError: If no pair is left.
    """
    counts.update(margin_dropped=0, margin_dropped_pairs=0)
    low, high = float("inf"), -float("inf")
    is_any_left = False
    for pair in pairs:
        margins = [_margin(pair, response) for response in pair.generated]
        low, high = min(low, *margins), max(high, *margins)
        if whole:
            margins = margins[:1] * len(margins)
        kept = [
            response
            for response, margin in zip(pair.generated, margins, strict=True)
            if (min_margin is None or margin >= min_margin) and (max_margin is None or margin <= max_margin)
        ]
        counts["margin_dropped"] += len(pair.generated) - len(kept)
        if kept:
            is_any_left = True
            yield replace(pair, generated=kept)
        else:
            counts["margin_dropped_pairs"] += 1
    if not is_any_left:
        raise StoreError(
            f"No pair is left of {counts['margin_dropped_pairs']}: the opponent's margins are {low:.3g} to {high:.3g} "
            f"nats per token, pairs.min_margin is {min_margin} and pairs.max_margin {max_margin}. Widen them."
        )


def left_out_by_margin(store: Path) -> dict[str, int]:
    """The counts of :func:`filter_margins` that were sealed with a store.

    Args:
        store (Path): an iteration's scored pairs.

    Returns:
        dict[str, int]: by name; empty if nothing was filtered by margin.
    """
    report = PairStore.open(store).manifest.get("report", {})
    return {name: count for name, count in report.items() if name.startswith("margin_dropped")}


def _margin(pair: Pair, response: Response) -> float:
    assert pair.reference_real_logp is not None and response.reference_logp is not None  # the store is of scored pairs
    return pair.reference_real_logp / len(pair.real_ids) - response.reference_logp / len(response.token_ids)
