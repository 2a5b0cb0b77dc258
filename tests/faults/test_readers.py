"""Damaged input to every reader: whatever the bytes are, it works or refuses them, in bounded time."""

import random
from collections import Counter

import pytest

from tests.faults.readers import attempt, planned, readers


@pytest.mark.parametrize(("inputs", "first_seed"), [(400, 0), pytest.param(4000, 1000, marks=pytest.mark.slow)])
def test_every_reader_works_or_refuses(tmp_path, inputs, first_seed):
    (tmp_path / "whole").mkdir()
    known = readers(tmp_path / "whole")
    ends = Counter()
    for name, number in planned(known, inputs).items():
        for seed in range(first_seed, first_seed + number):
            ends[attempt(known[name], tmp_path / "input", seed)] += 1
    assert min(ends["fine"], ends["refused"]) > inputs / 10  # neither all harmless nor all beyond reading


def test_undamaged_input_is_read(tmp_path):
    """Else a reader that refuses everything would pass."""
    (tmp_path / "whole").mkdir()
    for name, reader in readers(tmp_path / "whole").items():
        if name == "override":
            continue
        folder = tmp_path / name
        folder.mkdir()
        for file, content in reader.files.items():
            (folder / file).write_bytes(content)
        reader.read(folder, random.Random(1))
