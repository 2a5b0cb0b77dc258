"""Which of the opponent's answers are worth learning from: policies by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from spin.core.errors import ConfigError, StoreError
from spin.types import Pair

# what may be done with responses that may not be worth learning from, by their kind
POLICIES = {"truncated": ("keep", "mask", "drop"), "equal_to_real": ("keep", "drop"), "empty": ("keep", "drop")}


def filter_pairs(
    pairs: Iterable[Pair],
    counts: Counter[str],
    *,
    truncated: str = "keep",
    equal_to_real: str = "keep",
    empty: str = "drop",
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
