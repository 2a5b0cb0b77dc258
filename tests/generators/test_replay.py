"""Responses from a file, looked up by the ids of the prompt."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spin.core.errors import ConfigError, GeneratorError
from spin.generators.generator import Generator, GeneratorContext, SamplingParams
from spin.generators.replay import ReplayGenerator

CONTEXT = GeneratorContext(None, torch.device("cpu"), 16, lambda ids: "".join(chr(97 + i % 26) for i in ids))
SAMPLING = SamplingParams(max_new_tokens=8, stop_token_ids=(2,))
ROWS = [
    {"prompt_ids": [5, 6], "generated_ids": [9, 2], "finish_reason": "stop", "k": 1},
    {"prompt_ids": [7], "generated_ids": [1, 1, 1]},
    {"prompt_ids": [5, 6], "generated_ids": [8, 2], "finish_reason": "stop", "k": 0},
    {"prompt_ids": [5], "generated_ids": [6, 2]},
]


@pytest.fixture(params=["jsonl", "parquet", "folder"])
def path(request, tmp_path):
    if request.param == "jsonl":
        return _jsonl(tmp_path, *ROWS, between="\n\n")
    names = ("prompt_ids", "generated_ids", "finish_reason", "k")
    for shard in (0, 1):
        columns = {name: [row.get(name) for row in ROWS[2 * shard : 2 * shard + 2]] for name in names}
        pq.write_table(pa.table(columns), tmp_path / f"shard-{shard}.parquet")
    if request.param == "folder":
        return tmp_path
    table = pa.concat_tables([pq.read_table(tmp_path / f"shard-{shard}.parquet") for shard in (0, 1)])
    pq.write_table(table, tmp_path / "all.parquet")
    return tmp_path / "all.parquet"


def _jsonl(tmp_path, *rows, between="\n"):
    file = tmp_path / "responses.jsonl"
    file.write_text(between.join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def _ids(responses):
    return [response.token_ids for response in responses]


def test_responses_by_prompt_in_order_of_k(path):
    def never():
        raise AssertionError
        yield

    generator = ReplayGenerator(CONTEXT, path)
    assert isinstance(generator, Generator) and not generator.shares_policy_weights
    generator.update_weights(never())  # not iterated
    for does_nothing in (generator.sleep, generator.wake, generator.close):
        does_nothing()
    for _ in range(2):  # a second call, or a restart, starts from k = 0 again
        responses = generator.generate([[5, 6], [7], [5, 6], [5]], SAMPLING, [4, 3, 2, 1])
        assert _ids(responses) == [[8, 2], [1, 1, 1], [9, 2], [6, 2]]
        # the last two finish reasons are not in the file: no stop token, stop token
        assert [c.finish_reason for c in responses] == ["stop", "length", "stop", "stop"]
        assert [c.logprobs for c in responses] == [None] * 4


def test_missing_prompts_are_counted_and_shown_or_get_empty_responses(path, caplog):
    with pytest.raises(
        GeneratorError, match=r"2 of 4 requests .* prompt 0 \(2 tokens, 'ab'\) has 0; prompt 3 .* has 1"
    ):
        ReplayGenerator(CONTEXT, path).generate([[0, 1], [5, 6], [7], [7]], SAMPLING, [0] * 4)
    generator = ReplayGenerator(CONTEXT, path, on_missing="empty")
    with caplog.at_level(logging.WARNING):
        assert _ids(generator.generate([[0, 1], [7]], SAMPLING, [0, 0])) == [[], [1, 1, 1]]
    assert "1 of 2 prompts got an empty response" in caplog.text
    with pytest.raises(GeneratorError, match="no log-probs"):
        generator.generate([[7]], SamplingParams(logprobs=True), [0])


def test_long_responses_are_truncated_at_the_limits(tmp_path):
    rows = [{"prompt_ids": [1] * n, "generated_ids": [*range(5, 10), 2], "finish_reason": "stop"} for n in (2, 12)]
    generator = ReplayGenerator(CONTEXT, _jsonl(tmp_path, *rows))
    responses = generator.generate([[1] * 2, [1] * 12], SamplingParams(max_new_tokens=5, stop_token_ids=(2,)), [0, 0])
    # 12 + 4 = max_seq_len
    assert _ids(responses) == [[5, 6, 7, 8, 9], [5, 6, 7, 8]]
    assert [c.finish_reason for c in responses] == ["length", "length"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r":2: not a JSON object"),
        ("[1]", r":2: has list, expected prompt_ids"),
        ({"prompt": "hello", "response": "you"}, r":2: has the fields \['prompt', 'response'\].*Text is not taken"),
        ({"prompt_ids": [1], "generated_ids": "2"}, r":2: generated_ids is 2, expected a list"),
        ({"prompt_ids": [1.5], "generated_ids": [2]}, r":2: prompt_ids is \[1.5\]"),
        ({"prompt_ids": [True], "generated_ids": [2]}, r":2: prompt_ids is \[True\]"),
        ({"prompt_ids": [1], "generated_ids": [-1]}, r":2: generated_ids is \[-1\]"),
        (
            {"prompt_ids": [1], "generated_ids": [2], "finish_reason": "eos"},
            r":2: finish_reason is 'eos', expected one",
        ),
        ({"prompt_ids": [1], "generated_ids": [2], "k": "a"}, r":2: k is 'a'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(GeneratorError, match=message):
        ReplayGenerator(CONTEXT, _jsonl(tmp_path, ROWS[0], row))


def test_bad_files_are_named(tmp_path):
    def refused(name, message):
        with pytest.raises(GeneratorError, match=message):
            ReplayGenerator(CONTEXT, tmp_path / name)

    refused("nowhere.jsonl", "nowhere.jsonl: no such file")
    refused("", r"no \*\.parquet file in this folder")
    (tmp_path / "x.parquet").write_text("no parquet")
    refused("x.parquet", "x.parquet: not a readable parquet file")
    rows = {"prompt_ids": [[1]], "generated_ids": [[2]], "finish_reason": ["stop"]}
    pq.write_table(pa.table(rows), tmp_path / "y.parquet", use_dictionary=False, compression="none")
    content = (tmp_path / "y.parquet").read_bytes().replace(b"stop", b"\xf2top")
    (tmp_path / "y.parquet").write_bytes(content)
    refused("y.parquet", "y.parquet: not a readable parquet file .*utf-8")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("empty.jsonl", "no responses in it")
    with pytest.raises(ConfigError, match="on_missing='skip'"):
        ReplayGenerator(CONTEXT, tmp_path / "empty.jsonl", on_missing="skip")
