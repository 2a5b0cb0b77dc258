"""Pairs on disk and in packed rows."""

from spin.pairs.loader import RowBatch, load_rows
from spin.pairs.lookup import share_lookup
from spin.pairs.packing import PackedRow, RowLayout
from spin.pairs.store import PairStore

__all__ = ["PackedRow", "PairStore", "RowBatch", "RowLayout", "load_rows", "share_lookup"]
