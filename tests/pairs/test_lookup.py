"""Pairs by key from a scratch file: what was written, in any order, and in little memory."""

import numpy as np
import pytest

from spin.core.errors import OutputError, StoreError
from spin.core.ranks import init_world
from spin.data import Pair, Response
from spin.pairs.lookup import LazySequence, PairLookup, share_lookup
from tests.pairs.plain import plain


def pairs(n):
    """Pairs of 0 to 2 responses, unscored ones among them; ids that are not ASCII."""
    return [
        Pair(
            f"ü{i % 7}" if i < 7 else f"s{i}",
            i % 3,
            np.arange(i % 5 + 1, dtype=np.int32),
            np.arange(3, dtype=np.int32) + i,
            [
                Response(np.full(k + 1, i, np.int32), "length" if (i + k) % 2 else "stop", None if i % 4 else -k - 0.1)
                for k in range(i % 3)
            ],
            None if i % 4 else -1.5 * i,
        )
        for i in range(n)
    ]


@pytest.fixture
def lookup_of(tmp_path):
    """Writes pairs to the scratch file and opens it."""

    def written(expected):
        PairLookup.write(tmp_path / "rows", iter(expected))
        return PairLookup(tmp_path / "rows")

    return written


@pytest.mark.parametrize("with_equal_hashes", [False, True])
def test_pairs_come_back_in_any_order(tmp_path, monkeypatch, with_equal_hashes):
    if with_equal_hashes:
        monkeypatch.setattr("spin.pairs.lookup.hash_of", lambda key: len(key[1]))
    expected = pairs(50)
    lookup = share_lookup(tmp_path / "rows", iter(expected), init_world("cpu"))
    assert list(lookup) == [pair.key for pair in expected] and len(lookup) == 50
    for i in np.random.default_rng(0).permutation(50):
        assert plain(lookup[expected[i].key]) == plain(expected[i])
    assert (0, "nobody") not in lookup and (1, "ü0") not in lookup and (0, "ü0") in lookup
    with pytest.raises(KeyError):
        lookup[5, "s5"]
    with pytest.raises(
        OutputError, match="rows/no: cannot write .*[Nn]ot a directory|rows/no: cannot write .File exists"
    ):
        PairLookup.write(tmp_path / "rows" / "no", expected)


def test_no_pairs_and_two_of_one_key(lookup_of):
    lookup = lookup_of([])
    assert len(lookup) == 0 and (0, "a") not in lookup
    with pytest.raises(StoreError, match=r"sample \(1, 'ü4'\) is there twice"):
        lookup_of([*pairs(9), pairs(9)[4]])


def test_a_truncated_file_is_named(lookup_of):
    lookup = lookup_of(pairs(9))
    with lookup.path.open("r+b") as stream:
        stream.truncate(20)
    with pytest.raises(StoreError, match="rows: ends too early"):
        lookup[pairs(9)[8].key]


def test_its_own_file_is_replaced_and_still_read_and_one_of_somebody_else_kept_aside(lookup_of, tmp_path):
    (tmp_path / "rows").write_text("mine")
    first, second = lookup_of(pairs(9)), lookup_of(pairs(3))
    assert len(second) == 3
    assert (tmp_path / "rows.stale-0").read_text() == "mine"
    (tmp_path / "rows").unlink()
    assert plain(first[pairs(9)[8].key]) == plain(pairs(9)[8])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.stale-0"]


def test_lazy_sequence_keeps_nothing():
    made = []
    lazy = LazySequence(lambda i: made.append(i) or 10 * i, range(2, 5))
    assert len(lazy) == 3 and lazy[1] == 30 and list(lazy) == [20, 30, 40]
    assert made == [3, 2, 3, 4]
    with pytest.raises(IndexError):
        lazy[3]
