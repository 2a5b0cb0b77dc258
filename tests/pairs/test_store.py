"""The pair store: round trip, restart, damage, and what makes it stale."""

import math
import multiprocessing
import time
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from spin.core.errors import StoreError
from spin.data import Pair, PairStore, Response
from spin.pairs import store as store_module
from spin.pairs.shards import split_evenly
from spin.pairs.store import differences
from tests.pairs.plain import plain

FINGERPRINT = {"opponent": "w0", "seed": 1, "sampling": {"top_k": 0}}


def pairs(n, start=0):
    responses = [Response([6], "length", -1.25), Response([6, 6], "stop", -2.25)]
    return [Pair(f"s{i}", 2, [1, i], [3, 4, 5], responses, -7.5) for i in range(start, start + n)]


def read(path):
    """All pairs of a store, to be compared."""
    return [plain(pair) for pair in PairStore.open(path).pairs()]


def sealed(path):
    store = PairStore.open_or_create(path, FINGERPRINT, 2)
    store.write_shard(0, pairs(3))
    store.write_shard(1, pairs(2, start=3))
    store.seal({"truncated": 5})
    return store


def test_round_trip(tmp_path):
    sealed(tmp_path / "p")
    store = PairStore.open(tmp_path / "p")
    assert store.is_sealed
    assert store.opponent == "w0"
    assert store.manifest["report"] == {"truncated": 5}
    assert read(store.path) == [plain(pair) for pair in pairs(5)]
    table = pq.read_table(tmp_path / "p" / "shard-00000.parquet")
    assert table.column_names == [
        "sample_id", "iteration", "k", "prompt_ids", "real_ids", "generated_ids", "finish_reason",
        "reference_real_logp", "reference_generated_logp", "opponent",
    ]  # fmt: skip
    assert table["k"].to_pylist() == [0, 1] * 3
    shards = [("shard-00000.parquet", 6), ("shard-00001.parquet", 4)]
    assert [(shard["name"], shard["rows"]) for shard in store.manifest["shards"]] == shards


def test_unscored_pairs_and_shards_without_pairs(tmp_path):
    store = PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 2)
    unscored = [Pair("a", 0, [1], [2], [Response([3], "stop")])]
    store.write_shard(0, unscored)
    store.write_shard(1, [])
    store.seal()
    assert read(tmp_path / "p") == [plain(pair) for pair in unscored]


def test_resumes_where_it_stopped(tmp_path):
    store = PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 3)
    store.write_shard(1, pairs(1))
    (tmp_path / "p" / ".shard-00002.parquet.77.tmp").write_bytes(b"half a shard")
    again = PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 3)
    assert again.missing_shards() == [0, 2]
    with pytest.raises(StoreError, match=r"\[0, 2\] of 3"):
        again.seal()
    again.write_shard(0, pairs(1))
    again.write_shard(2, pairs(1))
    again.seal()
    assert sorted(path.name for path in again.path.iterdir()) == [
        "manifest.json", "shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet",
    ]  # fmt: skip


def test_a_worker_of_another_config_does_not_mix_its_shards_with_those_of_the_others(tmp_path):
    """The first one's store is moved aside while it is at work: its next shard, and its seal, are refused by name."""
    first = PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 2)
    first.write_shard(0, pairs(1))
    second = PairStore.open_or_create(tmp_path / "p", FINGERPRINT | {"seed": 2}, 2)
    with pytest.raises(StoreError, match=r"begun this store again, from something else \(seed is 2, was 1\)"):
        first.write_shard(1, pairs(1))
    assert second.missing_shards() == [0, 1]
    assert not list(second.path.glob(".*.tmp"))
    for shard in (0, 1):
        second.write_shard(shard, pairs(1))
    with pytest.raises(StoreError, match="same config"):
        first.seal()
    assert not PairStore.open(tmp_path / "p").is_sealed
    assert (tmp_path / "p.stale-0" / "shard-00000.parquet").exists()


def test_reading_a_damaged_shard_names_it(tmp_path):
    store = sealed(tmp_path / "p")
    (store.path / "shard-00001.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(StoreError, match="shard-00001.parquet: damaged"):
        store.read_shard(1)
    (store.path / "shard-00001.parquet").unlink()
    with pytest.raises(StoreError, match="shard-00001.parquet: missing"):
        store.read_shard(1)


def test_another_fingerprint_moves_the_old_store_aside_and_names_the_field(tmp_path, caplog):
    sealed(tmp_path / "p")
    changed = {**FINGERPRINT, "sampling": {"top_k": 5}}
    store = PairStore.open_or_create(tmp_path / "p", changed, 2)
    assert store.missing_shards() == [0, 1]
    said = "p was made from something else (sampling.top_k is 5, was 0): kept as p.stale-0."
    assert [record.message for record in caplog.records] == [f"{tmp_path}/{said}"]
    assert read(tmp_path / "p.stale-0") == [plain(pair) for pair in pairs(5)]
    # the same fingerprint again is the same store
    assert PairStore.open_or_create(tmp_path / "p", changed, 2).missing_shards() == [0, 1]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("logp", [math.nan, math.inf, -math.inf])
def test_refuses_log_probs_that_are_not_finite(tmp_path, logp):
    store = PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 1)
    bad = Pair("poor", 0, [1], [2], [Response([3], "stop", logp)], -1.0)
    with pytest.raises(StoreError, match="poor"):
        store.write_shard(0, [*pairs(1), bad])
    assert store.missing_shards() == [0]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"format_version": 99}', b"\xff\xfe", b'{"format_version": 1, "fingerprint": 3, "num_shards": 1}'],
)
def test_refuses_a_damaged_manifest(tmp_path, content):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        PairStore.open(tmp_path / "p")


def test_no_store_here(tmp_path):
    PairStore.open_or_create(tmp_path / "run" / "iteration_000" / "pairs", {"opponent": "0" * 64}, 1)
    with pytest.raises(StoreError, match=r"no pair store here.*Below it there are iteration_000/pairs\."):
        PairStore.open(tmp_path / "run")
    with pytest.raises(StoreError, match=r"no pair store here \(manifest.json is missing\)\.$"):
        PairStore.open(tmp_path / "elsewhere")


def test_split_evenly():
    assert split_evenly(7, 3) == [range(2), range(2, 4), range(4, 7)]
    assert [len(part) for part in split_evenly(2, 4)] == [0, 1, 0, 1]


def test_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b is 3, was 2", "c is 4, was 'absent'"]
    old, new = {"s": {"a": 1, "b": 2}}, {"s": {"a": 1, "b": 3, "c": {}}}
    assert differences(old, new) == ["s.b is 3, was 2", "s.c is {}, was 'absent'"]
    assert differences({"s": {"a": 1}}, {"s": None}) == ["s is None, was {'a': 1}"]


def test_a_store_keeps_its_number_of_shards(tmp_path):
    """A run that resumes with another number of ranks would begin with another number."""
    PairStore.open_or_create(tmp_path / "s", {"opponent": "w"}, 3).write_shard(0, [])
    again = PairStore.open_or_create(tmp_path / "s", {"opponent": "w"}, 8)
    assert again.num_shards == 3 and again.missing_shards() == [1, 2]


def in_processes(number, work, *args):
    """What the work says, in several processes that start at once."""
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(number), context.SimpleQueue()
    workers = [context.Process(target=work, args=(*args, start, said)) for _ in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [said.get() for _ in workers]


def begin_slowly(path, start, said):
    write = store_module.write_json
    store_module.write_json = lambda *args: (time.sleep(0.3), write(*args))
    said.put(PairStore.open_or_create(path, FINGERPRINT, 2).num_shards)


def test_machines_that_begin_a_store_at_once_share_it(tmp_path):
    """The folder is there for a while before its manifest; nobody takes it for a damaged store."""
    assert in_processes(3, begin_slowly, tmp_path / "p") == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["p"]


def open_and_seal(path, fingerprint, start, said):
    start.wait()
    try:
        store = PairStore.open_or_create(path, fingerprint, 1)
        start.wait()
        if not store.is_sealed:
            store.write_shard(0, pairs(1))
        start.wait()
        store.seal()
        said.put("sealed" if PairStore.open(path).is_sealed else "not sealed")
    except Exception as error:
        start.abort()
        said.put(repr(error))


def test_workers_that_start_and_finish_at_once_share_a_store(tmp_path):
    """The first round finds nothing there, every later one a store of other weights, which one of them moves aside."""
    for number in range(12):
        fingerprint = FINGERPRINT | {"opponent": f"w{number}"}
        assert in_processes(5, open_and_seal, tmp_path / "p", fingerprint) == ["sealed"] * 5
    asides = [PairStore.open(path) for path in tmp_path.glob("p.stale-*")]
    assert sorted(store.opponent for store in asides) == sorted(f"w{number}" for number in range(11))


def test_a_kill_between_a_store_and_its_manifest_leaves_no_trace(tmp_path, monkeypatch, caplog):
    """No empty folder is kept as a stale store, and nothing is said of one."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module, "write_json", Mock(side_effect=KeyboardInterrupt))
        PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 2)
    assert not list((tmp_path / "p").iterdir())
    assert PairStore.open_or_create(tmp_path / "p", FINGERPRINT, 2).missing_shards() == [0, 1]
    assert not caplog.text and not list(tmp_path.glob("p.stale-*"))
