"""Streams: windows of a source by iteration, exact at a restart, shuffled by blocks, in memory that does not grow."""

import json
import subprocess
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.core.errors import ConfigError, DataError
from spin.data import PromptStream, prompt_dataset
from spin.data.rows import Row
from spin.data.sources import read_rows
from spin.data.stream import shuffled_rows
from tests.data.test_read import Letters, pair, text


def stream(path, limit, **options):
    return prompt_dataset(Letters(), source=path, streaming=True, limit=limit, max_seq_len=2000, **options)


def ids(data, *iterations):
    return [data.window(iteration).sample_ids for iteration in iterations]


def test_each_iteration_plays_the_next_samples_and_a_restart_the_same(source):
    path = source(*[pair(id=f"s{i}") for i in range(10)])
    data = stream(path, 4)
    assert isinstance(data, PromptStream) and data.samples_per_iteration == 4
    windows = ids(data, 0, 1)
    assert windows == [["s0", "s1", "s2", "s3"], ["s4", "s5", "s6", "s7"]]
    assert ids(stream(path, 4), 1) == windows[1:]  # a restart at iteration 1
    assert ids(data, 0, 1) == windows  # back to an earlier one
    assert [data.sample_id(0, 3), data.sample_id(1, 0)] == ["s3", "s4"]
    assert sorted(data.iteration_samples(4, 7, 1)) == [0, 1, 2, 3]


def test_behind_the_end_comes_the_beginning_with_no_sample_twice_in_an_iteration(source):
    data = stream(source(*[pair(id=f"s{i}") for i in range(5)]), 4)
    assert ids(data, 0, 1, 2) == [["s0", "s1", "s2", "s3"], ["s4", "s0", "s1", "s2"], ["s3", "s4", "s0", "s1"]]
    exact = stream(source(*[pair(id=f"s{i}") for i in range(4)]), 4)
    assert ids(exact, 0, 1) == [["s0", "s1", "s2", "s3"]] * 2


def test_rows_that_are_left_out_move_no_sample_out_of_its_place(source):
    rows = [pair(id=f"s{i}", response="?" if i % 3 == 0 else "x") for i in range(12)]
    data = stream(source(*rows), 3, on_bad_row="skip")
    assert ids(data, 0, 1) == [["s1", "s2", "s4"], ["s5", "s7", "s8"]]
    assert data.window(1).report.counts == {"bad_row": 1}


@pytest.mark.parametrize(
    ("rows", "limit", "options", "iteration", "message"),
    [
        ([pair(), pair("cd"), pair(response="?")], 3, {"on_bad_row": "skip"}, 0,
            r"has 2 usable samples, dataset\.limit=3 asks .* Set dataset\.limit=2 or less"),
        # named by the iteration that meets it
        ([pair(), pair("cd"), pair("ef", "?"), pair("gh")], 2, {}, 1, r"data\.jsonl:3: the template refuses"),
        # not read to its end
        ([*[pair(response="?")] * 2000, "never reached"], 2, {}, 0, r"^20 samples in 20 rows"),
        ([pair(), pair("cd"), pair("é", "x")], 1, {}, 2, r"sample 'data-3' of iteration 2 has .* 233, .* of 128"),
    ],
)  # fmt: skip
def test_faults_belong_to_the_iteration_that_meets_them(source, rows, limit, options, iteration, message):
    data = stream(source(*rows), limit, **options)
    if iteration:
        assert data.first_outside(128) is None
        assert len(data.window(iteration - 1)) == limit
    with pytest.raises(DataError, match=message):
        data.window(iteration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True, "max_seq_len": 9}, r"streaming=true needs dataset\.limit"),
        ({"shuffle_buffer": 9}, r"shuffle_buffer and shuffle_seed are for dataset\.streaming"),
        ({"streaming": True, "limit": 1, "max_seq_len": 9, "keep_originals": True}, "keep_originals=true keeps every"),
    ],
)
def test_options_that_do_not_go_together(source, options, message):
    with pytest.raises(ConfigError, match=message):
        prompt_dataset(Letters(), source=source(pair()), **options)


def test_turns_of_a_row_go_on_in_the_next_iteration(source):
    roles = ["user", "assistant"] * 3
    turns = [{"role": role, "content": content} for role, content in zip(roles, "abcdef", strict=True)]
    data = stream(source({"id": "m", "messages": turns}, pair(id="n")), 2, turns="all")
    assert ids(data, 0, 1, 2) == [["m#turn0", "m#turn1"], ["m#turn2", "n#turn0"], ["m#turn0", "m#turn1"]]
    data.window(1)
    assert text(data.window(1)[0].prompt_ids) == "abcde<"


def test_a_block_is_shuffled_alike_wherever_reading_began():
    rows = [Row(f"r{i}", {}, str(i)) for i in range(10)]

    def order(first_block, pass_number=0, seed=1):
        found = shuffled_rows(rows, 4, seed, pass_number)
        return [int(row.default_id) for row in islice(found, 4 * first_block, None)]

    assert sorted(order(0)) == list(range(10))
    assert [sorted(order(0)[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert order(1) == order(0)[4:]
    assert len({tuple(order(0)), tuple(order(0, pass_number=1)), tuple(order(0, seed=2))}) == 3
    assert list(shuffled_rows(rows, 0, 1, 0)) == rows


def test_shuffled_windows_repeat_and_differ_by_pass(source):
    path = source(*[pair(id=f"s{i}") for i in range(8)])
    one, two = (stream(path, 4, shuffle_buffer=8, shuffle_seed=3) for _ in range(2))
    first = ids(one, 0, 1, 2, 3)
    assert ids(two, 3, 2, 1, 0) == first[::-1]
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == [f"s{i}" for i in range(8)]
    assert first[:2] != first[2:]


def test_settings_name_what_decides_the_samples(source):
    path = source(*[pair(id=f"s{i}") for i in range(8)])
    base = stream(path, 4).settings
    assert base["limit"] == 4 and base["source"][0][0] == "data.jsonl" and base["source"][0][1] > 0
    for changes in ({"shuffle_buffer": 2}, {"turns": "all"}, {"shuffle_seed": 1}):
        assert stream(path, 4, **changes).settings != base
    source(*[pair(id=f"s{i}") for i in range(9)])  # the file has grown
    assert stream(path, 4).settings["source"] != base["source"]
    json.dumps(base)


def test_a_hugging_face_data_set_streams_without_being_loaded(tmp_path):
    """A folder with data files is what the library takes for a data set; it stands for one of the hub."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for shard in range(2):
        rows = [json.dumps(pair(id=f"s{shard}{i}")) for i in range(3)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(rows))
    data = stream(f"hf:{folder}", 4, split="train")
    assert ids(data, 0, 1) == [["s00", "s01", "s02", "s10"], ["s11", "s12", "s00", "s01"]]
    rows = read_rows(f"hf:{folder}", streaming=True)  # the only split there is
    assert next(rows).where == f"hf:{folder}[train]:0"


def test_memory_does_not_grow_with_the_source(tmp_path):
    """Three iterations of 400 samples from 14 MB need no more than from 1.4 MB, but for 7 MB of what libraries keep."""
    program = (
        "import resource, sys\n"
        "from tests.data.test_stream import stream\n"
        "for path in sys.argv[1:]:\n"
        "    data = stream(path, 400, shuffle_buffer=800)\n"
        "    last = int(path.rpartition('-')[2].partition('.')[0]) // 400 - 1\n"
        "    assert [len(data.window(i)) for i in (0, 1, last)] == [400] * 3\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    paths = []
    for kind in ("jsonl", "parquet"):
        for count in (1600, 16000):
            path = tmp_path / f"rows-{count}.{kind}"
            rows = ({"prompt": f"{i:5} " * 50, "response": "y" * 600} for i in range(count))
            if kind == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=1000, compression="none")
            paths.append(str(path))
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines, more_lines, parquet, more_parquet = map(float, done.stdout.split())
    assert more_lines < lines + 7 and more_parquet < parquet + 7, done.stdout
