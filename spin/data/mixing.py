"""Which rows take part in an iteration: data sets mixed by fraction, and the pairs of earlier iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spin.errors import ConfigError


def mix_datasets(
    datasets: Mapping[str, Sequence[Any]], fractions: Mapping[str, float], seed: int | None = None
) -> list[Any]:
    """The first ``int(fraction * len)`` rows of each data set, one after the other, then shuffled.

    Rows are taken from the front, not drawn: the mix of the SPIN authors' scripts, and with their seed (42) its very
    order.

    Args:
        datasets (Mapping[str, Sequence[Any]]): name to rows.
        fractions (Mapping[str, float]): name to fraction of the data set's rows, in the order in which they are joined.
            More than 1 takes all rows, once.
        seed (int | None): shuffles the joined rows; None leaves them in order.

    Returns:
        list[Any]: the rows.

    Raises:
        ConfigError: If a fraction is negative, or if a name has no data set.

    Source: uclaml/SPIN, spin/alignment/data.py, mix_datasets.
    """
    if any(fraction < 0 for fraction in fractions.values()):
        raise ConfigError("Dataset fractions cannot be negative.")
    unknown = [name for name in fractions if name not in datasets]
    if unknown:
        raise ConfigError(
            f"No data set is named {', '.join(map(repr, unknown))}; found {', '.join(datasets) or 'none'}."
        )
    rows: list[Any] = []
    for name, fraction in fractions.items():
        source = datasets[name]
        rows.extend(source[index] for index in range(min(int(fraction * len(source)), len(source))))
    if seed is None:
        return rows
    # The permutation of datasets.Dataset.shuffle(seed).
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def history_window(iteration: int, history: int) -> list[int]:
    """Iterations whose pairs are trained on, the oldest first.

    The SPIN authors train iteration t on the pairs of iterations t - 1 and t: ``history=1``.

    Args:
        iteration (int): the current iteration, counted from 0.
        history (int): how many earlier iterations take part; 0 is the current one alone.

    Returns:
        list[int]: ``iteration - history`` to ``iteration``, none below 0.

    Raises:
        ConfigError: If either number is negative.
    """
    if iteration < 0 or history < 0:
        raise ConfigError(f"iteration={iteration}, history={history}: expected 0 or more for both.")
    return list(range(max(0, iteration - history), iteration + 1))
