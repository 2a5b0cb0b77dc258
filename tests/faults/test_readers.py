"""A few hundred of the inputs of attack_counts.py: whatever the bytes are, a reader works or refuses them, in time."""

from collections import Counter

import pytest

from tests.faults.readers import attempt, planned, readers
from tests.faults.soak import leaks, soak

INPUTS = 400


def test_every_reader_works_or_refuses(tmp_path):
    (tmp_path / "whole").mkdir()
    known = readers(tmp_path / "whole")
    ends = Counter()
    for name, number in planned(known, INPUTS).items():
        for seed in range(number):
            ends[attempt(known[name], tmp_path / "input", seed)] += 1
    assert min(ends["fine"], ends["refused"]) > INPUTS / 10  # neither all harmless nor all beyond reading


def test_undamaged_input_is_read(tmp_path):
    """Else a reader that refuses everything would pass."""
    import random

    (tmp_path / "whole").mkdir()
    for name, reader in readers(tmp_path / "whole").items():
        if name == "override":
            continue
        folder = tmp_path / name
        folder.mkdir()
        for file, content in reader.files.items():
            (folder / file).write_bytes(content)
        reader.read(folder, random.Random(1))


@pytest.mark.slow
def test_a_long_run_stays_flat(tmp_path):
    """30 iterations: no file, thread or object is kept; resident memory grows by less than 10 MiB."""
    assert not leaks(soak(tmp_path / "run", 30))
