"""How items are dealt to shards."""

from spin.pairs.shards import split_evenly


def test_split_evenly():
    assert [list(part) for part in split_evenly(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(part) for part in split_evenly(2, 4)] == [0, 1, 0, 1]
