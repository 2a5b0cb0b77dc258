"""Rows packed ahead by threads: the same rows, in order, and no thread left behind."""

import threading
import time

import pytest
import torch

from spin.core.ranks import World
from spin.data import pack_batch
from spin.pairs.loader import load_rows
from spin.pairs.packing import RowLayout
from tests.pairs.test_packing import make_pairs

LAYOUT = RowLayout(128, 32, truncated="mask")


def world(rank=0, world_size=1):
    return World(rank, world_size, rank, torch.device("cpu"), mesh=None)


def batches(num):
    return [make_pairs(6, 1, seed=i) for i in range(num)]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_rows_are_those_of_pack_batch_in_order(num_workers):
    given = batches(8)
    for rank in range(2):
        got = list(load_rows(iter(given), world(rank, 2), LAYOUT, num_workers))
        assert [batch.pairs for batch in got] == given
        for batch, pairs in zip(got, given, strict=True):
            rows = pack_batch(pairs, LAYOUT, rank, 2)
            assert len(batch.rows) == len(rows)
            for row, expected in zip(batch.rows, rows, strict=True):
                assert torch.equal(row.tokens, expected.tokens)
                assert row.pair_responses == expected.pair_responses
            assert batch.weight == sum(pair.generated[0].finish_reason == "stop" for pair in pairs)


def test_workers_pack_while_the_caller_is_busy():
    """Whatever the caller's pace, the next batches are ready: they were read before they were asked for."""
    read = []

    def watched():
        for i, pairs in enumerate(batches(6)):
            read.append(i)
            yield pairs

    loader = load_rows(watched(), world(), LAYOUT, num_workers=1)
    next(loader)
    deadline = time.monotonic() + 20
    while len(read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) >= 2
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_threads_end_when_the_caller_stops_early(num_workers):
    before = threading.active_count()
    for _ in load_rows(batches(20), world(), LAYOUT, num_workers):
        break
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_packing_reaches_the_caller(num_workers):
    def broken():
        yield from batches(1)
        raise ValueError("row 7 of the store is damaged")

    with pytest.raises(ValueError, match="row 7 of the store is damaged"):
        list(load_rows(broken(), world(), LAYOUT, num_workers))
