"""Rows of every kind of source, and what is said of those that cannot be read."""

import bz2
import gzip
import json
import lzma
import pickle
import time
from contextlib import suppress
from itertools import count
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.core.errors import DataError
from spin.data import prompt_dataset
from spin.data.sources import missing, read_rows
from tests.data.test_read import Letters


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# where each row stands, and its columns
READ = [
    ("x.jsonl", '{"a": 1}\n\n{"a": 2}\n', {"x.jsonl:1": {"a": 1}, "x.jsonl:3": {"a": 2}}),  # blank lines count
    ("x.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}', {"x.jsonl:1": {"a": 1}, "x.jsonl:2": {"a": 2}}),
    ("x.json", '[{"a": 1}, {"a": 2}]', {"x.json:item 0": {"a": 1}, "x.json:item 1": {"a": 2}}),
    ("x.json", '{"a": 1}\n{"a": 2}', {"x.json:1": {"a": 1}, "x.json:2": {"a": 2}}),  # one object per line
    ("x.json", '{"data": [{"a": 1}]}', {"x.json:item 0": {"a": 1}}),
    (
        "x.json",
        '{"version": "1", "data": [{"a": 1}, {"a": 2}]}',
        {"x.json:item 0": {"a": 1}, "x.json:item 1": {"a": 2}},
    ),
    ("x.json", '{\n "train": [{"a": 1}]}', {"x.json:item 0": {"a": 1}}),
    ("x.json", '{"a": 1}', {"x.json:item 0": {"a": 1}}),
    ("x.json", '{\n "a": 1\n}', {"x.json:item 0": {"a": 1}}),
    ("x.csv", '\ufeffa,b\n"1\n2",3\n\n4,\n', {"x.csv:2": {"a": "1\n2", "b": "3"}, "x.csv:5": {"a": "4", "b": None}}),
]


@pytest.mark.parametrize(("name", "content", "rows"), READ)
def test_rows_and_their_places(tmp_path, name, content, rows):
    found = list(read_rows(written(tmp_path / name, content)))
    assert {row.where: row.data for row in found} == rows
    assert all(row.default_id == row.where.replace(f"{name}:", "x-").replace("item ", "") for row in found)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        *(
            ("x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n', f"x.jsonl:2: {reason}")
            for line, reason in (
                (b'{"a": 1', "not valid JSON"),
                (b'{"a": "\xff"}', "byte 0xff at position 7 is not UTF-8"),
                (b"[1, 2]", "found a list, expected an object"),
                (b"7", "found a int, expected an object"),
                (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON"),
                (b"[" * 100_000, "not "),
            )
        ),
        ("x.json", '[{"a": 1}, 5, {"a": 3}]', "x.json:item 1: found a int"),
        ("x.json", '[{"a": 1},\n{"a": }]', "x.json:2: not valid JSON"),
        ("x.json", b'[{"a": 1},\n\n{"a": "\xfe"}]', "x.json:3: byte 0xfe at position 7 is not UTF-8"),
        ("x.json", '{\n  "rows": []\n}', "starts with '{', expected a JSON list"),
        ("x.json", '{\n "data": {"a": 1}}', "expected a JSON list"),
        ("x.json", '{\n "data": [1]}', "expected a JSON list"),
        ("x.json", '{"train": [{"a": 1}], "rows": [{"a": 2}]}', "holds several lists: rows, train"),
        ("x.csv", "prompt,response\nQ\n", "x.csv:2: found 1 columns, expected 2"),
        ("x.csv", "prompt,prompt\nQ,A\n", "x.csv:1: columns ['prompt', 'prompt'], expected a header"),
        ("x.csv", 'prompt,response\nQ,"A\n', "x.csv:2: not valid CSV"),
        ("x.csv", b"prompt,response\nQ,\xff\n", "x.csv:2: a byte is not UTF-8"),
        ("x.parquet", "not parquet at all", "cannot be read as parquet after 0 rows"),
        ("x.jsonl", "", "x.jsonl has no rows"),
        ("x.json", "", "x.json has no rows"),
        ("x.jsonl", "\n \n", "x.jsonl has no rows"),
    ],
)
def test_faults_of_files_name_the_place_and_cost_one_row_where_rows_are_separate(tmp_path, name, content, reason):
    try:
        rows = list(read_rows(written(tmp_path / name, content)))
        bad = next(row for row in rows if row.error is not None)
        found = f"{bad.where}: {bad.error}"
        if len(rows) > 1:
            assert bad.data == {} and [row.data for row in rows if row.error is None] == [{"a": 1}, {"a": 3}]
    except DataError as error:
        found = str(error)
    assert reason in found


def test_a_null_byte_in_csv_breaks_nothing(tmp_path):
    with suppress(DataError):
        list(read_rows(written(tmp_path / "x.csv", "prompt,response\nQ,\0\n")))


def test_parquet_rows_are_numbered_over_batches(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"a": list(range(2500)), "b": [[{"role": "user"}]] * 2500}), path)
    rows = list(read_rows(path))
    assert len(rows) == 2500
    assert (rows[2400].where, rows[2400].data) == ("data.parquet:row 2400", {"a": 2400, "b": [{"role": "user"}]})


def test_files_of_a_folder_are_sorted_those_of_a_list_are_not(tmp_path):
    for name in "ba":
        write_lines(tmp_path / f"{name}.jsonl", {"a": name})
    assert [row.data["a"] for row in read_rows(tmp_path)] == ["a", "b"]
    assert [row.data["a"] for row in read_rows([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])] == ["b", "a"]


def test_rows_in_memory():
    rows = list(read_rows([{"a": 1}, "no row"]))
    assert rows[0].where == "dataset.source[0]" and rows[0].data == {"a": 1}
    assert "found a str" in rows[1].error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.jsonl", r"does not exist. Did you mean .*train\.jsonl\?"),
        ("elsewhere.parquet", r"holds: data\.xlsx, train\.jsonl\."),
        ("*.parquet", r"No file matches .*holds: data\.xlsx, train\.jsonl\."),
        ("no/such/folder/data.jsonl", r"holds: data\.xlsx, empty/, train\.jsonl\."),
        ("data.xlsx", r"has the suffix '\.xlsx'"),
        ("empty", r"holds no \.jsonl.* is empty"),
        (5, "is a int"),
        ([], "empty list"),
        ([5], "entry of type int"),
    ],
)
def test_a_source_that_is_none(tmp_path, source, message):
    write_lines(tmp_path / "train.jsonl", {"a": 1})
    (tmp_path / "data.xlsx").write_text("a,b\n")
    if "empty" in message:
        (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / source) if isinstance(source, str) else source)


def test_options_of_the_hub_are_refused_for_a_file(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"a": 1})
    for option in ({"name": "x"}, {"data_dir": "x"}, {"revision": "x"}):
        with pytest.raises(DataError, match=rf"dataset\.{next(iter(option))}=x has no meaning for"):
            read_rows(path, **option)
    with pytest.raises(DataError, match=r"dataset\.split=5: expected a text"):
        read_rows(path, split=5)


def test_saved_data_set_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"a": [1, 2]}).save_to_disk(str(tmp_path / "one"))
    rows = list(read_rows(tmp_path / "one"))
    assert [(row.where, row.data) for row in rows] == [("hf:one[all]:0", {"a": 1}), ("hf:one[all]:1", {"a": 2})]

    parts = {"train": datasets.Dataset.from_dict({"a": [3]}), "test": datasets.Dataset.from_dict({"a": [4]})}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    assert [(row.where, row.default_id) for row in read_rows(tmp_path / "two")] == [("hf:two[train]:0", "two-train-0")]
    assert [row.data["a"] for row in read_rows(tmp_path / "two", split="test")] == [4]
    with pytest.raises(DataError, match=r"has the splits train, test; found dataset\.split=dev"):
        list(read_rows(tmp_path / "two", split="dev"))


def test_hub_data_set_goes_to_the_datasets_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        if name == "org/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/missing' doesn't exist on the Hub")
        return datasets.Dataset.from_dict({"a": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("hf:org/name", split="train", data_dir="part"))
    assert asked == [("org/name", {"split": "train", "data_dir": "part"})]
    assert rows[0].where == "hf:org/name[train]:0"
    with pytest.raises(DataError, match="org/missing is no file here.*doesn't exist on the Hub"):
        list(read_rows("org/missing"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0, -800_000], pa.date32()), ([0, 10**15], pa.timestamp("ms")), ([0, 2**62], pa.duration("s"))],
    ids=["date", "timestamp", "duration"],
)
@pytest.mark.parametrize("saved", [False, True], ids=["parquet", "save_to_disk"])
def test_a_value_that_python_has_none_for_names_file_and_column(tmp_path, values, kind, saved):
    table = pa.table({"prompt": ["Q", "Q"], "made": pa.array(values, kind)})
    if saved:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset(table).save_to_disk(str(tmp_path / "rows"))
        where = r"hf:rows\[all\]:1: cannot be read: column 'made'"
    else:
        pq.write_table(table, tmp_path / "rows")
        (tmp_path / "rows").rename(tmp_path / "rows.parquet")
        where = r"rows\.parquet: column 'made' \(.*\) has a value that cannot be read"
    with pytest.raises(DataError, match=where):
        list(read_rows(tmp_path / ("rows" if saved else "rows.parquet")))


@pytest.mark.parametrize("builder", ["pandas", "sql", "webdataset", "generator", "spark"])
def test_builders_that_unpickle_or_run_what_they_read_are_refused(tmp_path, builder):
    """The pickle is one that writes a file where it is read."""

    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_read"), "w"))

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.pkl").write_bytes(pickle.dumps(Touch()))
    for source in (builder, f"hf:{builder}"):
        with pytest.raises(DataError, match=f"dataset.source={builder} is a builder"):
            list(read_rows(source, data_dir=str(tmp_path / "data")))
    assert not (tmp_path / "was_read").exists()


def test_the_index_that_pandas_writes_into_csv_is_a_column_that_is_not_used(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame([{"prompt": "Q", "response": "A"}, {"prompt": "Q2", "response": "A2"}]).to_csv(tmp_path / "x.csv")
    data = prompt_dataset(Letters(), source=str(tmp_path / "x.csv"))
    assert len(data) == 2 and data.report.unused == ["Unnamed: 0"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_was_cut_or_is_none_names_itself(tmp_path, suffix):
    content = "".join(f'{{"a": {i}, "b": "{hash(str(i))}"}}\n' for i in range(20_000)).encode()
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    whole = packed.get(suffix, lambda plain: pa.compress(plain, codec="zstd", asbytes=True))(content)
    path = tmp_path / f"rows.jsonl{suffix}"
    for broken in (whole[: len(whole) // 2], b'{"a": 1}\n', whole[:20] + b"\0" * 40 + whole[60:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}"):
            for row in read_rows(path):
                if row.error is not None:
                    raise DataError(row.where)
    path.write_bytes(whole)
    assert list(read_rows(path))[-1].where == f"rows.jsonl{suffix}:20000"


@pytest.mark.parametrize(
    "split", ["train[", "train[1:2", "train[a:b]", "train[:2]+dev", "train+", "[:2]", "train[:200%]"]
)
def test_parts_that_are_none(tmp_path, split):
    with pytest.raises(DataError, match=r"has the splits train.*; found dataset\.split="):
        list(read_rows(write_lines(tmp_path / "rows.jsonl", {"a": 1}), split=split))


def declared(folder, header):
    """The responses that are read of a folder with this header in its README.md."""
    write_lines(folder / "en" / "deep" / "x.jsonl", {"a": 1})
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Data\n")
    return [row.data["a"] for row in read_rows(folder)]


@pytest.mark.parametrize("path", ["en/**", "**/*", "en/deep/x.jsonl", "en/deep/*", "**/x.jsonl", "**x.jsonl"])
def test_patterns_of_a_data_repository(tmp_path, path):
    (tmp_path / "en" / "deep").mkdir(parents=True)
    if path == "**x.jsonl":
        write_lines(tmp_path / "x.jsonl", {"a": 1})
    assert declared(tmp_path, f"configs: [{{config_name: default, data_files: '{path}'}}]") == [1]
    assert declared(tmp_path, f"configs: [{{data_files: [{{split: train, path: ['{path}']}}]}}]") == [1]


@pytest.mark.parametrize(
    "header",
    [
        "configs: [{data_files: 5}]",
        "configs: [{data_files: {train: null}}]",
        "configs: [{data_files: '.'}]",
        "configs: [{data_files: 'a[.jsonl'}]",
        "configs: [{data_files: '/etc/*'}]",
        "configs: [{data_dir: '../', data_files: x.jsonl}]",
        "configs: [{data_dir: /etc}]",
        "configs: [{data_files: 'http://x/y.jsonl'}]",
        "configs: &x [{data_files: *x}]",
        "configs: !!python/object/apply:os.system ['false']",
        "configs: [",
        "configs: " + "[" * 3000,
    ],
)
def test_a_readme_that_declares_no_file_of_the_folder_is_named(tmp_path, header):
    (tmp_path / "en" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match=r"README\.md"):
        declared(tmp_path, header)


@pytest.mark.parametrize("header", ["configs: 5", "configs: {a: b}", "license: mit", "x: 2026-99-99", ""])
def test_a_readme_that_declares_nothing_is_no_matter(tmp_path, header):
    (tmp_path / "en" / "deep").mkdir(parents=True)
    assert declared(tmp_path, header) == [1]


def test_damaged_arrow_files_are_errors_with_their_name(tmp_path):
    """Offsets of texts that were changed would read memory of others; 300 files with 1 to 8 bytes changed."""
    rows = [{"id": str(i), "messages": [{"role": "user", "content": "Q" * i}]} for i in range(8)]
    table, random = pa.Table.from_pylist(rows), Random(0)
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    whole = (tmp_path / "rows.arrow").read_bytes()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            content[random.randrange(len(content))] = random.randrange(256)
        (tmp_path / "rows.arrow").write_bytes(content)
        try:
            list(read_rows(tmp_path / "rows.arrow"))
        except DataError as error:
            assert "rows.arrow" in str(error)
            refused += 1
    assert refused > 50


def test_what_needs_a_download_is_missing_here(tmp_path, monkeypatch):
    """A file in a place that a data set's name could mean is read, as by a run; ``hf:`` is always the data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_lines(tmp_path / "x[1].jsonl", {"a": 1})
    here = ["x[1].jsonl", "*.jsonl", str(tmp_path), "org/name", tmp_path / "org"]
    absent = ["y.jsonl", "*.csv", "hf:org/name", "org/other", "x" * 300]
    assert missing(here) == [] and missing([{"a": 1}]) == []
    assert missing([*here, *absent]) == absent and missing("y.jsonl") == ["y.jsonl"]


def test_files_and_sets_of_one_name_are_distinguished_by_their_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    for folder in ("en", "de"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "part.jsonl", {"a": folder})
        datasets.Dataset.from_list([{"a": folder}]).save_to_disk(str(tmp_path / folder / "saved"))
    write_lines(tmp_path / "en" / "more.jsonl", {"a": "more"})
    of_pattern = {row.where: row.default_id for row in read_rows(tmp_path / "*" / "*.jsonl")}
    parts = {"de/part.jsonl:1": "de/part-1", "en/part.jsonl:1": "en/part-1"}
    assert of_pattern == parts | {"more.jsonl:1": "more-1"}
    assert {
        row.where: row.default_id for row in read_rows([str(tmp_path / each / "part.jsonl") for each in ("de", "en")])
    } == parts
    # one of them alone goes by its name
    assert [row.default_id for row in read_rows(tmp_path / "en" / "part.jsonl")] == ["part-1"]
    saved = read_rows([str(tmp_path / folder / "saved") for folder in ("en", "de")])
    assert [row.default_id for row in saved] == ["en/saved-all-0", "de/saved-all-0"]


def test_files_of_one_name_in_the_folders_of_two_splits_are_distinguished_where_both_are_read(tmp_path):
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "x.jsonl", {"a": 1}, {"a": 2})
    ids = {split: [row.default_id for row in read_rows(tmp_path, split=split)] for split in ("train", "train+test[:1]")}
    assert ids == {"train": ["x-1", "x-2"], "train+test[:1]": ["train/x-1", "train/x-2", "test/x-1"]}


def test_a_file_that_is_named_twice_is_the_same_rows_twice(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", {"prompt": "Q", "response": "A"})
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"id 'x-1' is taken by x\.jsonl:1"):
        prompt_dataset(tokenizer=Letters(), source=[str(file), str(tmp_path / "none" / ".." / "x.jsonl")])


def test_a_name_with_two_values_is_a_fault_in_every_format(tmp_path):
    twice = '{"a": 1, "a": 2}'
    rows = list(read_rows(written(tmp_path / "x.jsonl", f'{twice}\n{{"a": {twice}}}\n{{"a": 3}}\n')))
    assert [row.data for row in rows] == [{}, {}, {"a": 3}]
    assert all("the key 'a' has two values" in row.error for row in rows[:2])
    with pytest.raises(DataError, match=r"x\.json:1: not usable JSON: the key 'a' has two values"):
        list(read_rows(written(tmp_path / "x.json", f"[{twice}]")))
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: columns \['a', 'a'\], expected different names"):
        list(read_rows(tmp_path / "x.parquet"))


@pytest.mark.parametrize(("rank", "told"), [("0", [5, 10, 20]), ("1", [])])
def test_long_reading_says_how_far_it_is(rank, told, tmp_path, monkeypatch, capsys):
    """By a clock on which every row takes a second: after 5, 10 and 20 of 30."""
    file = write_lines(tmp_path / "x.jsonl", *({"a": number} for number in range(30)))
    monkeypatch.setenv("RANK", rank)
    clock = count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert len(list(read_rows(file))) == 30
    assert capsys.readouterr().err == "".join(f"{file}: {number} rows read\n" for number in told)
