"""Pairs on disk and in packed rows."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.pairs.loader import RowBatch, load_rows
    from spin.pairs.lookup import share_lookup
    from spin.pairs.packing import PackedRow, RowLayout, fit_lengths
    from spin.pairs.store import PairStore
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = ["PackedRow", "PairStore", "RowBatch", "RowLayout", "fit_lengths", "load_rows", "share_lookup"]
