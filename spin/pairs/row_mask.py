"""Which tokens of a packed row see which: block lists and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens; FlexAttention's kernels take whole blocks


@dataclass(frozen=True)
class Segment:
    """Tokens of a row, ``start`` to ``stop - 1``, that attend causally to each other and to all of their prompt."""

    start: int
    stop: int
    prompt_start: int = 0  # equals prompt_stop where the segment is itself a prompt
    prompt_stop: int = 0


class RowBlocks(NamedTuple):
    """Which blocks attend to which: the block tensors of a ``BlockMask``, int32.

    A partial block needs the mask inside, a full one is seen by all of its queries. ``*_num_blocks`` have shape
    (1, 1, nb) and ``*_indices`` (1, 1, nb, nb), of which the first ``num_blocks`` entries of a line count.
    """

    kv_num_blocks: torch.Tensor  # partial key blocks of each query block
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor  # partial query blocks of each key block, for backward
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor


@dataclass(frozen=True)
class FlexMask:
    """What the layers of a model get as ``mask`` for a packed row."""

    causal: BlockMask  # own segment causally, and the prompt
    windowed: BlockMask | None = None  # the same within a sliding window, for layers that have one
    hopper: bool = False  # for an H100, H200 or the like


def row_blocks(segments: Sequence[Segment], length: int, window: int | None = None) -> RowBlocks:
    """Block structure of a packed row. Tokens behind the last segment are padding and attend to themselves.

    The segments are in order, without gaps; with a window a token sees keys less than so many positions before it.
    """
    if length % BLOCK:
        raise ValueError(f"A row of {length} tokens is no multiple of {BLOCK}; FlexAttention needs whole blocks.")
    blocks = length // BLOCK
    seen = np.zeros((blocks, blocks), bool)
    full = np.ones((blocks, blocks), bool)  # until a query is met that does not see the whole block
    reach = length if window is None else window
    for segment in segments:
        for block in range(segment.start // BLOCK, _ceil(segment.stop)):
            first = max(segment.start, block * BLOCK)
            last = min(segment.stop, (block + 1) * BLOCK) - 1
            # Query q sees keys [own, q] and [shared, prompt_stop); own and shared grow with q.
            own, shared = _starts(segment, first, reach)
            seen[block, own // BLOCK : last // BLOCK + 1] = True
            if shared < segment.prompt_stop:
                seen[block, shared // BLOCK : _ceil(segment.prompt_stop)] = True
            # Seen by all queries from first to last: [own of last, first] and [shared of last, prompt_stop).
            own, shared = _starts(segment, last, reach)
            by_all = np.zeros(blocks, bool)
            if segment.prompt_stop == own and shared < own:  # the prompt goes over into the response
                own = shared
            by_all[_ceil(own) : (first + 1) // BLOCK] = True
            by_all[_ceil(shared) : segment.prompt_stop // BLOCK] = True
            full[block] &= by_all
    used = segments[-1].stop if segments else 0
    padded = np.arange(used // BLOCK, blocks)
    seen[padded, padded] = True
    full[padded] = False
    partial = seen & ~full
    return RowBlocks(*_lists(partial), *_lists(full), *_lists(partial.T), *_lists(full.T))


def _starts(segment: Segment, query: int, reach: int) -> tuple[int, int]:
    """The first key of its own segment, and of its prompt, that a query sees."""
    own = max(segment.start, query - reach + 1)
    shared = max(segment.prompt_start, segment.prompt_stop + query - segment.start - reach + 1)
    return own, shared


def _ceil(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _lists(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """How many entries of each line are True, and which, ascending, the others behind them."""
    counts = blocks.sum(1, dtype=np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(indices)[None, None]


def row_block_mask(
    blocks: RowBlocks,
    own_start: torch.Tensor,
    prompt_start: torch.Tensor,
    prompt_stop: torch.Tensor,
    positions: torch.Tensor | None = None,
    window: int | None = None,
) -> BlockMask:
    """The BlockMask of a packed row for any number of heads, on the device of its tensors.

    ``own_start``, ``prompt_start``, ``prompt_stop`` and, needed with a window, ``positions`` are those of
    :class:`spin.pairs.packing.PackedRow`, int32, shape (s,).
    """

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own = (k >= own_start[q]) & (k <= q)
        prompt = (k >= prompt_start[q]) & (k < prompt_stop[q])
        return own | prompt

    def sees_in_window(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return sees(b, h, q, k) & (positions[q] - positions[k] < window)  # type: ignore[index]

    length = own_start.numel()
    return BlockMask(
        seq_lengths=(length, length),
        **blocks._asdict(),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees if window is None else sees_in_window,
    )


def is_hopper(device: torch.device) -> bool:
    """True for an H100, an H200 and their like."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
