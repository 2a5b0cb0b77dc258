"""A pair store's shards are taken for what is in them: other weights, sampling or data, and edited rows, are named."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.cli import pairs as spin_pairs
from spin.core.errors import StoreError
from spin.data import Pair, PairStore, Response
from tests.recipes.helpers import flip_bit, generate, metrics_of, run

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "generator.batch_size=20")


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The stores of two workers on machines of their own, each with its half of the shards, and of strangers."""
    folder = tmp_path_factory.mktemp("workers")
    two = [generate(folder / f"worker_{i}", *SHORT, f"worker={i}", "num_workers=2") for i in (0, 1)]
    second = (*SHORT, "worker=1", "num_workers=2")
    changes = ("sampling.temperature=0.5", "seed=5", "dataset.limit=19")
    strangers = {change: generate(folder / change, *second, change) for change in changes}
    strangers["number"] = generate(folder / "number", *SHORT, "pairs.prompts_per_shard=3")
    return two, strangers


def shards(store):
    return sorted(path.name for path in store.glob("shard-*.parquet"))


def copied(store, folder):
    """A copy of a worker's run to work on; its store."""
    run_folder = store.parents[1]
    shutil.copytree(run_folder, folder)
    return folder / store.relative_to(run_folder)


def test_the_shards_of_two_workers_in_one_folder_are_a_whole_store(workers, tmp_path, capsys):
    (first, second), _ = workers
    assert (shards(first), shards(second)) == (
        ["shard-00000.parquet", "shard-00002.parquet"], ["shard-00001.parquet", "shard-00003.parquet"]
    )  # fmt: skip
    store = copied(first, tmp_path / "run")
    for name in shards(second):
        shutil.copyfile(second / name, store / name)
    spin_pairs.main([str(store), "--check"])
    assert "4 shards (not sealed), complete, unchanged, and of this store" in capsys.readouterr().out
    made = {name: (store / name).stat().st_mtime_ns for name in shards(store)}
    run(tmp_path / "run", *SHORT)
    assert PairStore.open(store).is_sealed
    assert {name: (store / name).stat().st_mtime_ns for name in shards(store)} == made
    run(tmp_path / "alone", *SHORT)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "alone")


def test_a_folder_of_nothing_but_copied_shards_is_a_store_too(workers, tmp_path):
    (first, second), _ = workers
    store = tmp_path / "run" / "iteration_000" / "responses"
    store.mkdir(parents=True)
    for folder in (first, second):
        for name in shards(folder):
            shutil.copyfile(folder / name, store / name)
    made = {name: (store / name).stat().st_mtime_ns for name in shards(store)}
    generate(tmp_path / "run", *SHORT)
    assert {name: (store / name).stat().st_mtime_ns for name in shards(store)} == made
    assert PairStore.open(store).is_sealed and not list(store.parent.glob("*.stale-*"))


@pytest.mark.parametrize("name", ["sampling.temperature=0.5", "seed=5", "dataset.limit=19", "number"])
def test_shards_made_from_something_else_are_named_and_made_again(workers, tmp_path, capsys, caplog, name):
    (first, _), strangers = workers
    store = copied(first, tmp_path / "run")
    for shard in ("shard-00001.parquet", "shard-00003.parquet"):
        shutil.copyfile(strangers[name] / shard, store / shard)
    message = "of another store" + ("|out of place" if name == "number" else "")
    with pytest.raises(StoreError, match=rf"shard-00001\.parquet: ({message})") as refused:
        spin_pairs.main([str(store), "--check"])
    assert str(refused.value).count("\n") == 1 and "shard-00003.parquet" in str(refused.value)
    with pytest.raises(StoreError, match=r"cannot be sealed, shards \[1, 3\] of 4 are missing"):
        PairStore.open(store).seal()
    assert f"{store}/shard-00001.parquet is not used: " in caplog.text
    generate(tmp_path / "run", *SHORT)
    spin_pairs.main([str(store), "--check"])
    kept = {path.name.split(".stale")[0] for path in store.glob("*.stale-*")}
    assert kept == {"shard-00001.parquet", "shard-00003.parquet"}


# ---- what a shard may be turned into, on a store without a model


INTS = pa.list_(pa.int32())
FINGERPRINT = {"opponent": "w0", "seed": 1, "iteration": 1}


def pairs(n, iteration=1):
    return [
        Pair(f"s{i}", iteration, [1, i], [3, 4], [Response([6, 7, k], "stop", -1.0) for k in range(2)], -2.0)
        for i in range(n)
    ]


def filled(path, fingerprint=None, iteration=1, num_shards=2):
    store = PairStore.open_or_create(path, fingerprint or FINGERPRINT, num_shards)
    for index in range(num_shards):
        store.write_shard(index, pairs(3, iteration))
    return store


def rewrite(change):
    """Reads a shard as anyone would, changes it, and writes it back, its metadata with it."""

    def apply(file, tmp_path):
        pq.write_table(change(pq.read_table(file)), file)

    return apply


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), table.schema.field(name), [values])


def of_another_iteration(file, tmp_path):
    other = filled(tmp_path / "other", FINGERPRINT | {"iteration": 2}, iteration=2)
    shutil.copyfile(other.path / file.name, file)


def of_a_store_of_three(file, tmp_path):
    shutil.copyfile(filled(tmp_path / "other", num_shards=3).path / file.name, file)


EDITS = {
    "another iteration": of_another_iteration,
    "another shard": lambda file, tmp_path: shutil.copyfile(file.with_name("shard-00000.parquet"), file),
    "of three": of_a_store_of_three,
    "no rows": rewrite(lambda table: table.slice(0, 0)),
    "a row less": rewrite(lambda table: table.slice(1)),
    "an edited response": rewrite(
        lambda t: with_column(t, "generated_ids", pa.array([[6, 7, 9]] + [[6, 7, 1]] * 5, INTS))
    ),
    "token ids moved between rows": rewrite(
        lambda t: with_column(t, "prompt_ids", pa.array([[1], [0, 1, 0], [1, 1], [1, 1], [1, 2], [1, 2]], INTS))
    ),
    "an edited log-prob": rewrite(lambda t: with_column(t, "reference_real_logp", pa.array([-1.5] * 6))),
    "a log-prob less": rewrite(lambda t: with_column(t, "reference_real_logp", pa.array([None] + [-2.0] * 5))),
    "an edited id": rewrite(lambda t: with_column(t, "sample_id", pa.array(["s0", "s0", "s", "1s1", "s2", "s2"]))),
    "truncated responses that ended": rewrite(lambda t: with_column(t, "finish_reason", pa.array(["length"] * 6))),
    "no metadata": rewrite(lambda table: table.replace_schema_metadata(None)),
    "nonsense as metadata": rewrite(lambda table: table.replace_schema_metadata({b"spin": b'{"store": [[['})),
    "another file": lambda file, tmp_path: pq.write_table(pa.table({"a": [1]}), file),
    "no parquet": lambda file, tmp_path: file.write_bytes(b"PAR1"),
    "a flipped bit": lambda file, tmp_path: flip_bit(file, 1 / 3),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "open"])
def test_a_shard_that_is_not_what_was_written_is_found_everywhere(tmp_path, is_sealed, edit):
    store = filled(tmp_path / "p")
    if is_sealed:
        store.seal()
    file = store.path / "shard-00001.parquet"
    EDITS[edit](file, tmp_path)
    content = file.read_bytes()
    opened = PairStore.open(store.path)
    with pytest.raises(StoreError, match=r"shard-00001\.parquet: "):
        list(opened.pairs())
    with pytest.raises(StoreError, match=r"shard-00001\.parquet: ") as refused:
        spin_pairs.main([str(store.path), "--check"])
    assert "shard-00000" not in str(refused.value) and file.read_bytes() == content
    if edit == "an edited response":
        assert f"damaged (its {'bytes' if is_sealed else 'rows'} are not those that were" in str(refused.value)
    again = PairStore.open_or_create(store.path, FINGERPRINT, 2)
    assert again.missing_shards() == [1] and not again.is_sealed
    assert (store.path / "shard-00001.parquet.stale-0").read_bytes() == content
    again.write_shard(1, pairs(1))  # it may come out otherwise
    again.seal()
    assert [pair.sample_id for pair in PairStore.open(store.path).pairs()] == ["s0", "s1", "s2", "s0"]
    spin_pairs.main([str(store.path), "--check"])


def test_a_shard_written_by_another_library_version_is_the_same_rows(tmp_path):
    """Only values count: other compression, row groups and encodings of the same rows are taken."""
    store = filled(tmp_path / "p")
    file = store.path / "shard-00001.parquet"
    pq.write_table(pq.read_table(file), file, compression="gzip", row_group_size=2, use_dictionary=False)
    assert store.missing_shards() == [] and store.faults() == []
