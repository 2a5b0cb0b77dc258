"""Packed rows: whole pairs side by side, every prompt computed once for all of its responses.

A row is ``[prompt | real | generated ...] [prompt | real | generated ...] ... padding``. The positions of every
response start at the length of its prompt. A token attends causally to its own segment and, in a response, to the whole
prompt; so two responses never see each other, nor do two pairs. The first token of a response is predicted by the last
prompt token, whose hidden state is therefore used once per response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, combinations, pairwise
from typing import Any

import numpy as np
import torch

from spin.pairs.row_mask import FlexMask, RowBlocks, Segment, is_hopper, row_block_mask, row_blocks
from spin.types import Pair

# Until lengths are fitted, rows come in these fractions of row_tokens, so that compiled layers meet few shapes: dense
# near 1, where rows are that share a batch evenly: n full rows and a bit more become n + 1 rows of n / (n + 1).
ROW_FRACTIONS = (1, 15 / 16, 7 / 8, 13 / 16, 3 / 4, 11 / 16, 5 / 8, 1 / 2)
MAX_FITTED = 3
_STEPS = 32  # fitted lengths are multiples of this part of row_tokens
_LEAST_GAIN = 0.03  # of an epoch's tokens: less is by chance, and the next iteration's pairs want other lengths


@dataclass(frozen=True)
class RowLayout:
    """How pairs are packed into rows. Log-probs depend on it by rounding, so a pair store's fingerprint has it."""

    row_tokens: int = 8192  # of a row at most; a longer pair gets a row of its own
    row_multiple: int = 1  # every row's length is a multiple of this; FlexAttention needs one of 128
    truncated: str = "keep"  # mask gives comparisons with a truncated response the weight 0
    right_weight: float = 1.0  # of comparisons with a response that the checker calls right
    unknown_weight: float = 1.0  # with one that it does not know
    flex: bool = False  # rows describe their mask in blocks, for FlexAttention; else it is dense
    window: int | None = None  # sliding window of some of the model's layers, in positions
    compiling_tokens: int = 0  # what a length must save in an epoch, on each rank, to be worth its compilation
    fitted: tuple[int, ...] = ()  # lengths that suit the pairs, ascending, see fit_lengths; empty: ROW_FRACTIONS

    def lengths(self) -> list[int]:
        """The lengths in tokens that rows are padded to, ascending: those that were fitted and ``row_tokens``, which
        few rows need then; else at most eight."""
        if self.fitted:
            return sorted({*self.fitted, self._rounded(self.row_tokens)})
        return sorted({self._rounded(self.row_tokens * fraction) for fraction in ROW_FRACTIONS})

    def padded_length(self, used: int) -> int:
        """The length of a row that holds this many tokens: the next of :meth:`lengths`; above them, for a pair that is
        longer than a row, the next quarter of ``row_tokens``."""
        quarter = self._rounded(self.row_tokens / 4)
        return next((length for length in self.lengths() if used <= length), math.ceil(used / quarter) * quarter)

    def longest_row(self, longest_pair: int) -> int:
        """The length of the longest row that there can be if no pair has more tokens than this."""
        return self.padded_length(max(self.row_tokens, longest_pair))

    def _rounded(self, tokens: float) -> int:
        return math.ceil(tokens / self.row_multiple) * self.row_multiple


_DEFAULT_LAYOUT = RowLayout()


@dataclass(frozen=True)
class PackedRow:
    """Whole pairs in one sequence of s tokens: m responses, n response tokens and c comparisons of two responses."""

    tokens: torch.Tensor  # token ids, int64, shape (s,); 0 in padding
    positions: torch.Tensor  # int32, shape (s,)
    own_start: torch.Tensor  # where the segment of each token starts, int32, shape (s,); padding tokens stand alone
    prompt_start: torch.Tensor  # where the prompt of each response token starts, int32, shape (s,)
    prompt_end: torch.Tensor  # one after its end, int32, shape (s,); equals prompt_start where there is none
    predictors: torch.Tensor  # the token whose hidden state predicts each response token, int64, shape (n,)
    targets: torch.Tensor  # the response tokens, int64, shape (n,)
    segments: torch.Tensor  # the response that each of them belongs to, int64, shape (n,)
    response_lengths: torch.Tensor  # tokens of each response, int64, shape (m,)
    reference_logps: torch.Tensor  # the opponent's summed log-probs in nats, float64, shape (m,); NaN until scored
    real: torch.Tensor  # the response that is real in each comparison, int64, shape (c,)
    generated: torch.Tensor  # the one that is generated, int64, shape (c,); the real one where they are equal
    truncated: torch.Tensor  # the length limit ended the generated response, bool, shape (c,)
    equal: torch.Tensor  # the generated response is the real one, bool, shape (c,)
    # of each comparison in the loss, float32, shape (c,); a pair's sum to 1, or less where truncated ones are masked or
    # a checker's verdict has less weight
    weights: torch.Tensor
    used_tokens: int  # tokens of the row that are not padding
    pair_responses: list[tuple[tuple[int, str], int, int]]  # key, first response, number of responses of each pair
    bounds: list[int]  # m + 1 numbers: where each response's tokens start among the n, and where the last one's stop
    blocks: RowBlocks | None = None  # structure of the mask for FlexAttention; None: the mask is dense
    window_blocks: RowBlocks | None = None  # the same within the sliding window
    window: int | None = None  # sliding window of some of the model's layers, in positions

    @property
    def num_responses(self) -> int:
        """Responses in the row, real and generated."""
        return self.response_lengths.numel()

    def to(self, device: torch.device) -> PackedRow:
        """The row with its tensors on a device; from pinned memory nobody waits for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedRow:
        """The row with its tensors in pinned memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedRow:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
        changed |= {name: RowBlocks(*map(change, v)) for name, v in values.items() if isinstance(v, RowBlocks)}
        return replace(self, **changed)

    def attention_mask(self) -> torch.Tensor | FlexMask:
        """What a model patched by :func:`spin.model.attention.patch_attention` takes as ``mask`` for this row: for
        FlexAttention if the row has blocks, else :meth:`dense_mask` as (1, s, s)."""
        if self.blocks is None:
            return self.dense_mask()[None]
        bounds = (self.own_start, self.prompt_start, self.prompt_end)
        windowed = None
        if self.window_blocks is not None:
            windowed = row_block_mask(self.window_blocks, *bounds, self.positions, self.window)
        return FlexMask(row_block_mask(self.blocks, *bounds), windowed, is_hopper(self.tokens.device))

    def dense_mask(self) -> torch.Tensor:
        """Which token attends to which: bool, shape (s, s), True where row attends to column."""
        index = torch.arange(self.tokens.numel(), device=self.tokens.device, dtype=torch.int32)
        query, key = index[:, None], index[None, :]
        own = (key >= self.own_start[:, None]) & (key <= query)
        prompt = (key >= self.prompt_start[:, None]) & (key < self.prompt_end[:, None])
        return own | prompt


def pack_row(pairs: Sequence[Pair], length: int | None = None, layout: RowLayout = _DEFAULT_LAYOUT) -> PackedRow:
    """Lays pairs, or none, out in a row of ``length`` tokens on the CPU; None is as many as they need (at least 1).

    ValueError if the pairs do not fit, a prompt or response is empty, or the length does not suit ``flex``. The
    layout's ``row_tokens`` and ``row_multiple`` do not matter here.
    """
    segments = _segments(pairs)
    used = segments[-1].stop if segments else 0
    length = max(1, used) if length is None else length
    if used > length:
        raise ValueError(f"{len(pairs)} pairs of {used} tokens do not fit into a row of {length} tokens.")
    sizes = [segment.stop - segment.start for segment in segments]
    index = np.arange(length, dtype=np.int32)

    def per_token(values: list[int], padding: np.ndarray) -> np.ndarray:
        return np.concatenate((np.repeat(np.array(values, np.int32), sizes), padding[used:]))

    own_start = per_token([segment.start for segment in segments], index)
    prompt_start = per_token([segment.prompt_start for segment in segments], np.zeros_like(index))
    prompt_end = per_token([segment.prompt_stop for segment in segments], np.zeros_like(index))
    tokens = np.zeros(length, np.int64)
    tokens[:used] = np.concatenate([np.zeros(0, np.int64), *(ids for pair in pairs for ids in pair.parts)])
    is_response = prompt_end > prompt_start
    # what stands before a response's first token is the prompt's last one
    predictors = np.where(index == own_start, prompt_end, index)[is_response] - 1
    lengths = torch.tensor([len(ids) for pair in pairs for ids in pair.parts[1:]], dtype=torch.int64)
    references = [logp for pair in pairs for logp in pair.reference_logps]
    counts = [1 + len(pair.generated) for pair in pairs]
    firsts = list(accumulate(counts[:-1], initial=0))
    comparisons = [(first, first + k) for first, count in zip(firsts, counts, strict=False) for k in range(1, count)]
    real, generated = torch.tensor(comparisons, dtype=torch.int64).reshape(len(comparisons), 2).T.contiguous()
    equal = torch.tensor([is_equal for pair in pairs for is_equal in pair.equal_to_real], dtype=torch.bool)
    # d l(z) / d log p(real) + d l(z) / d log p(gen) = 0 where both are one response; of two copies in a row rounding
    # would leave a gradient, which Adam scales to full steps
    generated = torch.where(equal, real, generated)
    weights = [weight for pair in pairs for weight in _comparison_weights(pair, layout)]
    by_window = layout.flex and layout.window is not None
    return PackedRow(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(index - own_start + prompt_end - prompt_start),
        own_start=torch.from_numpy(own_start),
        prompt_start=torch.from_numpy(prompt_start),
        prompt_end=torch.from_numpy(prompt_end),
        predictors=torch.from_numpy(predictors.astype(np.int64)),
        targets=torch.from_numpy(tokens[is_response]),
        segments=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        response_lengths=lengths,
        reference_logps=torch.from_numpy(np.array(references, np.float64)),  # None becomes NaN
        real=real,
        generated=generated,
        truncated=torch.tensor([each.truncated for pair in pairs for each in pair.generated], dtype=torch.bool),
        equal=equal,
        weights=torch.tensor(weights, dtype=torch.float32),
        used_tokens=used,
        pair_responses=list(zip((pair.key for pair in pairs), firsts, counts, strict=False)),
        bounds=[0, *lengths.cumsum(0).tolist()],
        blocks=row_blocks(segments, length) if layout.flex else None,
        window_blocks=row_blocks(segments, length, layout.window) if by_window else None,
        window=layout.window,
    )


def _segments(pairs: Sequence[Pair]) -> list[Segment]:
    """Prompts and responses side by side."""
    segments: list[Segment] = []
    stop = 0
    for pair in pairs:
        prompt: tuple[int, int] = (0, 0)  # a prompt has no prompt of its own
        for ids in pair.parts:
            if len(ids) == 0:
                what = "the prompt" if prompt == (0, 0) else "a response"
                raise ValueError(f"sample {pair.sample_id}: {what} has no tokens.")
            start, stop = stop, stop + len(ids)
            segments.append(Segment(start, stop, *prompt))
            if prompt == (0, 0):
                prompt = (start, stop)
    return segments


def plan_rows(lengths: Sequence[int], layout: RowLayout, num_ranks: int = 1) -> list[list[list[int]]]:
    """Which pair goes into which row of which rank.

    Fills rows evenly (longest pair first, into the emptiest row), and deals them so that the n-th rows of all ranks are
    about equally long. Every rank gets the same number of rows, as sharded forwards need: the fewest that hold the
    pairs, or one or two more if that leaves less padding; rows may be empty when there are fewer pairs than rows. A
    pair longer than ``row_tokens`` gets a row of its own. The plan depends on the arguments only: ``plan[rank][row]``
    holds indices into ``lengths``, the pairs' tokens, ascending.
    """
    plan = _fewest_rows(lengths, layout.row_tokens, num_ranks)
    others = (spread(lengths, len(plan[0]) + more * num_ranks) for more in (1, 2))
    plans = [plan, *(other for other in others if _fits(*other, layout.row_tokens))]
    rows, loads = min(plans, key=lambda plan: sum(layout.padded_length(max(1, load)) for load in plan[1]))
    by_load = sorted(range(len(rows)), key=lambda row: (-loads[row], row))
    return [[sorted(rows[row]) for row in by_load[rank::num_ranks]] for rank in range(num_ranks)]


def fit_lengths(batches: Iterable[Sequence[int]], layout: RowLayout, num_ranks: int = 1) -> RowLayout:
    """The layout with the lengths, three at most, that leave least padding in the rows of global batches, given as the
    tokens of their pairs; each must save more than ``compiling_tokens``. Lengths that were fitted before stay if they
    leave hardly more."""
    step = layout._rounded(layout.row_tokens / _STEPS)
    plans = (_fewest_rows(lengths, layout.row_tokens, num_ranks) for lengths in batches)
    # all ranks wait for the longest of their n-th rows
    loads = [max(1, load) for _, loads in plans for load in sorted(loads, reverse=True)[::num_ranks]]
    units = [math.ceil(load / step) for load in loads if load <= layout.row_tokens]
    if not units:
        return layout
    longest = max(units)
    rows_up_to = np.bincount(units).cumsum().tolist()

    def positions(lengths: tuple[int, ...]) -> int:
        return sum(length * (rows_up_to[length] - rows_up_to[shorter]) for shorter, length in pairwise((0, *lengths)))

    compiling = layout.compiling_tokens
    shorter = (each for number in range(MAX_FITTED) for each in combinations(range(1, longest), number))
    best = min(((*each, longest) for each in shorter), key=lambda each: positions(each) * step + len(each) * compiling)
    fitted = replace(layout, fitted=tuple(min(each * step, layout._rounded(layout.row_tokens)) for each in best))
    before, now = (sum(map(each.padded_length, loads)) for each in (layout, fitted))
    worth = max(_LEAST_GAIN * now, compiling * len({*fitted.fitted} - {*layout.fitted}))
    return layout if layout.fitted and before - now <= worth else fitted


def _fewest_rows(lengths: Sequence[int], row_tokens: int, num_ranks: int) -> tuple[list[list[int]], list[int]]:
    """:func:`spread` over as few rows as hold the pairs, equally many on every rank."""
    # There must be so many: a pair that is longer than a row takes one, and two of more than half a row share none.
    by_tokens = sum(min(length, row_tokens) for length in lengths) / row_tokens
    per_rank = max(1, math.ceil(max(by_tokens, sum(2 * length > row_tokens for length in lengths)) / num_ranks))
    while not _fits(*(plan := spread(lengths, per_rank * num_ranks)), row_tokens):
        per_rank += 1
    return plan


def spread(lengths: Sequence[int], num_rows: int) -> tuple[list[list[int]], list[int]]:
    """Indices and tokens of each row, longest first into the emptiest."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [0] * num_rows
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = loads.index(min(loads))
        rows[emptiest].append(i)
        loads[emptiest] += lengths[i]
    return rows, loads


def _fits(rows: list[list[int]], loads: list[int], row_tokens: int) -> bool:
    return all(load <= row_tokens or len(row) == 1 for row, load in zip(rows, loads, strict=True))


def pack_batch(pairs: Sequence[Pair], layout: RowLayout, rank: int = 0, num_ranks: int = 1) -> list[PackedRow]:
    """The rows of one rank for a global batch of pairs, equally many on every rank."""
    plan = plan_rows([pair.num_tokens for pair in pairs], layout, num_ranks)[rank]
    chosen = [[pairs[i] for i in indices] for indices in plan]
    return [pack_row(row, layout.padded_length(max(1, sum(pair.num_tokens for pair in row))), layout) for row in chosen]


def loss_weight(pairs: Sequence[Pair], layout: RowLayout) -> float:
    """What a global batch's summed loss is divided by: its number of pairs, less the weight that masking and a
    checker's verdicts take."""
    if layout.truncated != "mask" and layout.right_weight == layout.unknown_weight == 1:
        return float(sum(bool(pair.generated) for pair in pairs))
    return sum(sum(_comparison_weights(pair, layout)) for pair in pairs)


def _comparison_weights(pair: Pair, layout: RowLayout) -> list[float]:
    of_verdict = {"right": layout.right_weight, "unknown": layout.unknown_weight}
    return [
        0.0
        if layout.truncated == "mask" and response.truncated
        else of_verdict.get(response.verdict or "", 1.0) / len(pair.generated)
        for response in pair.generated
    ]
