"""What is found of a data set before there is a config: columns by their names, lengths of a sample, faults, parts."""

import pytest

from spin.core.errors import DataError
from spin.data import prompt_dataset
from spin.data.survey import MOST_ENCODED, survey
from tests.data.test_read import Letters, pair

TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xy"}]


@pytest.mark.parametrize(
    ("row", "row_format", "column_map"),
    [
        (pair("ab", "xy"), "prompt_response", {}),
        ({"messages": TALK, "prompt": "ab"}, "messages", {}),
        ({"dialogue": TALK}, "messages", {"messages": "dialogue"}),
        ({"chosen": TALK, "rejected": TALK}, "messages", {"messages": "chosen"}),
        ({"prompt": "ab", "chosen": "xy", "rejected": "z"}, "prompt_response", {"response": "chosen"}),
        ({"Question": "ab", "Answer": "xy", "input": None}, "prompt_response",
         {"prompt": "Question", "response": "Answer"}),
        ({"query": "ab", "output": "xy"}, "prompt_response", {"prompt": "query", "response": "output"}),
        ({"instruction": "ab", "context": None, "response": "xy"}, "alpaca",
         {"output": "response", "input": "context"}),
    ],
)  # fmt: skip
def test_columns_are_found_and_are_those_that_a_data_set_reads(source, row, row_format, column_map):
    path = source("broken", row)
    found = survey(Letters(), {"source": path})
    assert (found.formats, found.column_map, found.faults.total) == ({row_format: 1}, column_map, 1)
    read = prompt_dataset(Letters(), source=path, column_map=column_map, on_bad_row="skip")
    assert (found.prompt_lengths.tolist(), found.real_lengths.tolist()) == ([3], [3])
    assert read.lengths.tolist() == [6] and found.sample_ids == read.sample_ids


def test_rows_of_several_formats_are_counted_by_format(source):
    """As a data set reads them: columns are those of the first row that has a format, a row without one is a fault."""
    alpaca = {"instruction": "ab", "output": "xy"}
    path = source({"question": "ab", "answer": "xy"}, alpaca, {"messages": TALK}, alpaca, pair("ab", "xy"))
    found = survey(Letters(), {"source": path})
    assert list(found.formats.items()) == [("alpaca", 2), ("prompt_response", 1), ("messages", 1)]
    assert found.rows == 5 and found.faults.total == 1
    read = prompt_dataset(Letters(), source=path, column_map=found.column_map, on_bad_row="skip")
    assert found.sample_ids == read.sample_ids and len(read) == 4
    given = survey(Letters(), {"source": path, "format": "alpaca"})
    assert given.formats == {"alpaca": 2} and given.faults.total == 3


def test_columns_that_mean_nothing_are_an_error_with_their_names(source):
    with pytest.raises(DataError, match=r"data\.jsonl:1: columns q, foo; expected messages .*column_map"):
        survey(Letters(), {"source": source({"q": "ab", "foo": "xy"})})
    with pytest.raises(DataError, match=r"none of its 2 rows can be used; .* columns prompt, response\.\n .*question"):
        survey(Letters(), {"source": source(pair(response="?"), pair(response="?"))})
    with pytest.raises(DataError, match=r"data\.jsonl:1: (?!.*column_map)"):  # no names of columns help
        survey(Letters(), {"source": source("broken", "broken")})


def test_of_many_rows_a_sample_is_tokenized_and_every_one_is_counted(source):
    """Every tenth response of 3,000 is longer than 5 tokens, so of 25 % for validation nine tenths are left."""
    rows = [pair("ab", "x" * (9 if i % 10 == 0 else 2), id=f"row {i}") for i in range(3000)]
    path = source(*rows, pair(id="row 7"), pair(response=""))
    found = survey(Letters(), {"source": path})
    assert found.rows == 3002 and found.faults.total == 2 and not found.is_complete
    assert len(found.prompt_lengths) == MOST_ENCODED < len(found.sample_ids) == 3000
    fit = found.within(3, 5, 100)
    assert 0.88 < fit.mean() < 0.92 and not found.within(3, 100, 5).any()
    options = {"max_response_tokens": 5, "on_long_response": "drop", "on_bad_row": "skip"}
    read = prompt_dataset(Letters(), source=path, validation_fraction=0.25, **options)
    estimated, exact = found.split(0.25, fit), (len(read), len(read.held_out))
    assert estimated == pytest.approx(exact, rel=0.05)
    few = survey(Letters(), {"source": path, "limit": 100})
    read = prompt_dataset(Letters(), source=path, validation_fraction=0.25, limit=100)
    assert few.split(0.25, few.within(3, 100, 100)) == (len(read), len(read.held_out))
