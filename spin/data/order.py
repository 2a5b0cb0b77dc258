"""Which samples an iteration plays, and in which order an epoch visits its pairs: functions of the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of ``range(n)`` that depends on the key only, values with a stable ``repr``: a seed, an epoch."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).permutation(n)


def iteration_samples(num_samples: int, num_needed: int, seed: int, iteration: int) -> list[int]:
    """The samples that an iteration plays, as indices: other ones in every iteration if fewer are needed than there
    are."""
    return permutation(num_samples, seed, "samples", iteration)[:num_needed].tolist()


def history_window(iteration: int, history: int) -> list[int]:
    """Iterations whose pairs are trained on, the oldest first: the current one and ``history`` before it, none below 0.

    The SPIN authors train iteration t on the pairs of iterations t - 1 and t: ``history=1``.
    """
    return list(range(max(0, iteration - history), iteration + 1))


def iteration_items(
    samples_of: Callable[[int], Sequence[int]], iteration: int, history: int = 0, history_fraction: float = 1.0
) -> list[tuple[int, int]]:
    """What an iteration trains on: its own samples, and with history those of the iterations before it.

    Args:
        samples_of (Callable[[int], Sequence[int]]): the samples that an iteration plays, as indices.
        iteration (int): counted from 0.
        history (int): how many earlier iterations take part; the authors of SPIN use 1.
        history_fraction (float): what is taken of each earlier iteration's samples, the first ones.

    Returns:
        list[tuple[int, int]]: (iteration whose opponent responded, index of the sample), oldest iteration first.
    """
    items = []
    for played in history_window(iteration, history):
        samples = samples_of(played)
        fraction = 1.0 if played == iteration else history_fraction
        items += [(played, sample) for sample in samples[: int(fraction * len(samples))]]
    return items


def epoch_order(num_pairs: int, seed: int, iteration: int, epoch: int) -> list[int]:
    """The order in which an epoch of an iteration visits its pairs, as indices; each epoch has its own."""
    return permutation(num_pairs, seed, "order", iteration, epoch).tolist()
