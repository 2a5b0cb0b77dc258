"""NeMo-Aligner's collate contract, against a recording of its own function."""

import json
from pathlib import Path

import pytest
import torch

from spin.core.errors import DataError
from spin.data.collate import spin_custom_collate

ORACLES = json.loads((Path(__file__).parents[1] / "oracles" / "spin_oracles.json").read_text())
ORACLE = ORACLES["nemo_spin_custom_collate"]


@pytest.mark.parametrize("as_tensors", [False, True])
def test_recorded_batch(as_tensors):
    batch = ORACLE["input"]
    if as_tensors:
        batch = [{key: torch.tensor(value) for key, value in sample.items()} for sample in batch]
    out = spin_custom_collate(batch, eos_id=ORACLE["eos_id"])
    assert {key: value.tolist() for key, value in out.items()} == ORACLE["output"]
    dtypes = {key: value.dtype for key, value in out.items()}
    assert dtypes.pop("masks") == torch.bool
    assert set(dtypes.values()) == {torch.int64}


def test_empty_responses():
    sample = {"input_ids": [1, 3], "mask": [False, False], "context_ids": [1, 3], "answer_ids": []}
    out = spin_custom_collate([sample, sample], eos_id=2)
    assert out["answers_only"].shape == (2, 0) and out["answers_only"].dtype == torch.int64
    assert out["prompt_lengths"].tolist() == out["combined_lengths"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_ids": [1], "answer_ids": [1]}, "sample 0 .* has no mask, context_ids; it has input_ids, answer_ids"),
        ({"input_ids": [1, 2], "mask": [True], "context_ids": [1], "answer_ids": [2]}, "mask of 1 for 2 input_ids"),
        (None, "the batch is empty"),
    ],
)
def test_samples_that_do_not_fit(sample, message):
    with pytest.raises(DataError, match=message):
        spin_custom_collate([sample] if sample else [], eos_id=2)
