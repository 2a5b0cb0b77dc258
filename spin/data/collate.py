"""Batches in NeMo-Aligner's layout, for code that was written against its SPIN trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from spin.core.errors import DataError

_KEYS = ("input_ids", "mask", "context_ids", "answer_ids")


def spin_custom_collate(batch: Sequence[Mapping[str, Any]], eos_id: int) -> dict[str, torch.Tensor]:
    """Pad samples on the right with ``eos_id``.

    Nothing is truncated. The padding is False in ``masks`` and not counted in the lengths, so an EOS that belongs to a
    response stays apart from one that fills a row.

    Args:
        batch (Sequence[Mapping[str, Any]]): b samples; each with ``input_ids`` (prompt and real response), ``mask``
            (True on response tokens), ``context_ids`` (prompt) and ``answer_ids`` (real response), as lists or 1-D
            tensors.
        eos_id (int): the padding token.

    Returns:
        dict[str, torch.Tensor]: ``prompts_and_answers`` (b, s) int64, ``masks`` (b, s) bool, ``prompts_only`` (b, p)
        int64, ``answers_only`` (b, a) int64, ``prompt_lengths`` (b,) int64 and ``combined_lengths`` (b,) int64, with
        s, p and a the greatest lengths in the batch, in tokens.

    Raises:
        DataError: If the batch is empty, a sample lacks a key, or its mask and tokens differ in length.

    Source: NeMo-Aligner, nemo_aligner/algorithms/spin.py, spin_custom_collate.
    """
    if not batch:
        raise DataError("the batch is empty, expected at least one sample.")
    for index, sample in enumerate(batch):
        if missing := [key for key in _KEYS if key not in sample]:
            found = ", ".join(map(str, sample)) or "nothing"
            raise DataError(
                f"sample {index} of the batch has no {', '.join(missing)}; it has {found}. Expected {', '.join(_KEYS)}."
            )
        mask, ids = len(sample["mask"]), len(sample["input_ids"])
        if mask != ids:
            raise DataError(f"sample {index} of the batch has a mask of {mask} for {ids} input_ids; expected as many.")

    def padded(key: str, dtype: torch.dtype, fill: int | bool) -> torch.Tensor:
        rows = [torch.as_tensor(sample[key], dtype=dtype) for sample in batch]
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    def lengths(key: str) -> torch.Tensor:
        return torch.tensor([len(sample[key]) for sample in batch], dtype=torch.int64)

    return {
        "prompts_and_answers": padded("input_ids", torch.int64, eos_id),
        "masks": padded("mask", torch.bool, False),
        "prompts_only": padded("context_ids", torch.int64, eos_id),
        "answers_only": padded("answer_ids", torch.int64, eos_id),
        "prompt_lengths": lengths("context_ids"),
        "combined_lengths": lengths("input_ids"),
    }
