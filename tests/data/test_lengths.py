"""Sizes and lengths without encoding all samples: those of what a data set reads of the same rows."""

from random import Random

import pytest

from spin.data import prompt_dataset
from spin.data.lengths import LengthTokenizer
from spin.data.survey import MOST_ENCODED
from tests.data.test_read import Letters, pair


def rows(number):
    """Rows of two kinds in turns, of any length to 200 characters; the tokenizer refuses a tenth."""
    chance = Random(0)
    sizes = [(chance.randrange(1, 100) + 100 * (i % 2), chance.randrange(1, 200)) for i in range(number)]
    return [pair("a" * prompt, "y" * real + "?" * (chance.random() < 0.1)) for prompt, real in sizes]


def test_of_few_samples_all_lengths_are_exact(source):
    path, lengths = source(*rows(200)), LengthTokenizer(Letters())
    found, read = (prompt_dataset(each, source=path, on_bad_row="skip") for each in (lengths, Letters()))
    assert found.fingerprint() == read.fingerprint() and 160 < len(read) < 195
    assert (lengths.encoded, lengths.is_sampled) == (200, False)


def test_of_many_samples_some_stand_for_the_others(source):
    """A tenth is refused, of the others one of ten is too long: 0.81 of 12,000 are kept."""
    path, lengths = source(*rows(6 * MOST_ENCODED)), LengthTokenizer(Letters())
    options = {"source": path, "on_bad_row": "skip", "max_response_tokens": 180, "on_long_response": "drop"}
    found, read = (prompt_dataset(each, **options) for each in (lengths, Letters()))
    assert lengths.is_sampled and MOST_ENCODED < lengths.encoded < 1.25 * MOST_ENCODED
    assert len(read) == pytest.approx(0.81 * 6 * MOST_ENCODED, rel=0.02)
    assert len(found) == pytest.approx(len(read), rel=0.05)
    assert found.prompt_lengths.mean() == pytest.approx(read.prompt_lengths.mean(), rel=0.05)
    assert found.real_lengths.mean() == pytest.approx(read.real_lengths.mean(), rel=0.05)


def test_without_a_tokenizer_samples_are_counted(source):
    found = prompt_dataset(LengthTokenizer(None), source=source(*rows(30)), limit=20, max_prompt_tokens=1)
    assert len(found) == 20 and set(found.lengths.tolist()) == {2}
