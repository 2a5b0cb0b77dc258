"""Log-probabilities of response tokens without a ``[tokens, vocabulary]`` tensor that outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from spin.model.gemma2 import final_softcap
from spin.pairs.packing import PackedRow


def response_logps(model: nn.Module, row: PackedRow, chunk_tokens: int = 2048) -> torch.Tensor:
    """Summed log-probs of every response of a packed row in nats, shape (m,), fp64, for reference and validation;
    differentiable. Takes what :func:`pair_objective` takes.

    Only hidden states of tokens that predict a response token reach the output projection, which runs inside the
    model's forward, where FSDP2 has gathered its weight. The chunks are those of :func:`pair_objective`, so that policy
    and reference go through products of the same shapes.
    """
    pieces = tuple(piece for chunk in _pair_chunks(row, chunk_tokens) for piece in chunk.pieces)

    def unembed(hidden: torch.Tensor) -> torch.Tensor:
        predicting = model.norm(hidden)[0, row.predictors]  # (1, s, d) -> (n, d)
        return _LinearLogprob.apply(predicting, output_weight(model), row.targets, pieces, final_softcap(model))

    with replaced_unembed(model, unembed):
        token_logps = model(row.tokens[None], mask=row.attention_mask(), input_pos=row.positions[None])
    return segment_sums(token_logps, row.segments, row.num_responses)


def pair_objective(
    model: nn.Module, row: PackedRow, objective: Callable[[torch.Tensor], torch.Tensor], chunk_tokens: int = 2048
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training objective of a packed row and its gradient, both in one pass over the output layer.

    The output layer works on chunks of whole pairs. Once the log-probs of a chunk's responses are known, so is the
    gradient of the objective by them, and with it that of the logits, while they still exist: three products (logits,
    gradient of the hidden states, gradient of the weight), where making the logits again in backward takes four.

    Args:
        model (nn.Module): a torchtune ``TransformerDecoder`` after :func:`spin.model.attention.patch_attention`,
            sharded or not.
        row (PackedRow): on the model's device.
        objective (Callable[[torch.Tensor], torch.Tensor]): takes the summed log-probs of the row's responses, fp64,
            shape (m,), and gives a scalar: a sum of terms each of which looks at one pair only. It is called for every
            chunk, with the reference's log-probs standing in for those that are not known yet.
        chunk_tokens (int): response tokens whose logits exist at a time; more speeds up the products and increases
            memory. A pair with more tokens than this is split, and its logits are made twice.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: the objective, a scalar with a gradient; and the summed log-probs in nats,
        shape (m,), fp64, detached.

    Raises:
        ValueError: If ``chunk_tokens`` is not positive.
    """
    chunks = _pair_chunks(row, chunk_tokens)

    def unembed(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        predicting = model.norm(hidden)[0, row.predictors]  # (1, s, d) -> (n, d)
        return _PairObjective.apply(predicting, output_weight(model), row, objective, chunks, final_softcap(model))

    with replaced_unembed(model, unembed):
        return model(row.tokens[None], mask=row.attention_mask(), input_pos=row.positions[None])


@dataclass(frozen=True)
class _Chunk:
    """Whole pairs of a row whose response tokens go through the output layer together."""

    responses: slice
    pieces: tuple[slice, ...]  # their tokens among the row's response tokens; several for one pair that is too long


def _pair_chunks(row: PackedRow, chunk_tokens: int) -> list[_Chunk]:
    """As many whole pairs as fit into each chunk, in order."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: expected 1 or more tokens.")
    chunks: list[_Chunk] = []
    first = stop = 0
    for _, begin, count in [*row.pair_responses, (None, row.num_responses, 0)]:
        too_long = row.bounds[begin + count] - row.bounds[first] > chunk_tokens
        if stop > first and (too_long or count == 0):
            start, end = row.bounds[first], row.bounds[stop]
            pieces = (slice(at, min(at + chunk_tokens, end)) for at in range(start, end, chunk_tokens))
            chunks.append(_Chunk(slice(first, stop), tuple(pieces)))
            first = begin
        stop = begin + count
    return chunks


@contextmanager
def replaced_unembed(model: nn.Module, unembed: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Within the block a model's forward ends in ``unembed(hidden)`` instead of logits for every token; ``hidden`` is
    the last layer's output before the final norm, shape (b, s, d)."""
    before = vars(model).get("unembed")
    model.unembed = unembed  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.unembed
        if before is not None:
            model.unembed = before


def output_weight(model: nn.Module) -> torch.Tensor:
    """The output projection's weight, shape (v, d): the embedding's where the two are tied. No family has a bias."""
    output = model.output
    if getattr(output, "bias", None) is not None:
        raise ValueError("The model's output projection has a bias; expected none.")
    return output.tied_module.weight if hasattr(output, "tied_module") else output.weight


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_size: int = 2048,
    softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Log-probs of ``targets``, int64, shape (n,), under ``softmax(hidden @ weight.T)``, in nats, shape (n,), a chunk
    of tokens at a time. ``hidden``, shape (n, d), PREDICTS the targets, ``weight``, shape (v, d), is the output
    projection, ``softcap`` the ``c`` of ``c * tanh(logits / c)`` (Gemma 2).

    The logits of a chunk are made again in backward, so the peak is one chunk of logits whatever n. Products run in the
    inputs' precision, the softmax and the sum over chunks of the weight's gradient in fp32 (fp64 for fp64 inputs).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected 1 or more tokens.")
    pieces = tuple(slice(at, at + chunk_size) for at in range(0, hidden.shape[0], chunk_size))
    return _LinearLogprob.apply(hidden, weight, targets, pieces, softcap)


def segment_sums(values: torch.Tensor, segments: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sums values, shape (n,), by their segments, int64, shape (n,); gives fp64, shape (num_segments,).

    In fp64, because the order in which a GPU adds must not show in the sums.
    """
    return values.new_zeros(num_segments, dtype=torch.float64).index_add(0, segments, values.double())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, pieces: tuple[slice, ...],
        softcap: float | None,
    ) -> torch.Tensor:  # fmt: skip
        logps = hidden.new_zeros(hidden.shape[0], dtype=_wide(hidden.dtype))
        log_normalizers = torch.zeros_like(logps)
        for piece in pieces:
            logits = hidden[piece] @ weight.t()  # (c, d) x (d, v) -> (c, v)
            logps[piece], log_normalizers[piece] = target_logps(logits, targets[piece], softcap)
        ctx.save_for_backward(hidden, weight, targets, log_normalizers)
        ctx.pieces, ctx.softcap = pieces, softcap
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, log_normalizers = ctx.saved_tensors
        gradient = _HeadGradient(hidden, weight, *ctx.needs_input_grad[:2])
        for piece in ctx.pieces:
            logits = hidden[piece] @ weight.t()
            gradient.add(piece, logits, targets[piece], log_normalizers[piece], grad[piece], ctx.softcap)
        return gradient.hidden, gradient.of_weight(), None, None, None


class _PairObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, row: PackedRow,
        objective: Callable[[torch.Tensor], torch.Tensor], chunks: list[_Chunk], softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        logps = row.reference_logps.clone()  # (m,)
        gradient = _HeadGradient(hidden, weight, *ctx.needs_input_grad[:2])
        for chunk in chunks:
            kept = []
            for piece in chunk.pieces:
                logits = hidden[piece] @ weight.t()  # (c, d) x (d, v) -> (c, v)
                found = target_logps(logits, row.targets[piece], softcap)
                kept.append((logits if len(chunk.pieces) == 1 else None, *found))
            tokens = slice(chunk.pieces[0].start, chunk.pieces[-1].stop)
            first, stop = chunk.responses.start, chunk.responses.stop
            token_logps = torch.cat([of_piece for _, of_piece, _ in kept])
            logps[chunk.responses] = segment_sums(token_logps, row.segments[tokens] - first, stop - first)
            with torch.enable_grad():
                leaf = logps.detach().requires_grad_()
                (by_logps,) = torch.autograd.grad(objective(leaf), leaf)
            by_token = by_logps[row.segments[tokens]]  # (m,) -> (tokens,)
            for piece, (logits, _, log_normalizers) in zip(chunk.pieces, kept, strict=True):
                logits = hidden[piece] @ weight.t() if logits is None else logits
                grad = by_token[piece.start - tokens.start : piece.stop - tokens.start]
                gradient.add(piece, logits, row.targets[piece], log_normalizers, grad, softcap)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(logps)
        return objective(logps), logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient.hidden is not None:
            gradient.hidden.mul_(grad)
        return gradient.hidden, gradient.of_weight(grad), None, None, None, None


class _HeadGradient:
    """Gradients of the output layer by hidden states (n, d) and weight (v, d), as far as they are needed, added up over
    chunks: that of the weight in the wide dtype."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, need_hidden: bool, need_weight: bool) -> None:
        self._inputs = (hidden, weight)
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        wide = _wide(hidden.dtype)
        self._weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None

    def add(
        self, piece: slice, logits: torch.Tensor, targets: torch.Tensor, log_normalizers: torch.Tensor,
        by_token: torch.Tensor, softcap: float | None,
    ) -> None:  # fmt: skip
        """Adds a chunk, given the gradient by its tokens' log-probs, shape (c,). Overwrites the logits."""
        hidden, weight = self._inputs
        logits_to_gradient(logits, targets, log_normalizers, by_token.to(log_normalizers.dtype), softcap)
        if self.hidden is not None:
            self.hidden[piece] = logits @ weight
        if self._weight is not None:
            add_product(self._weight, logits.t(), hidden[piece])

    def of_weight(self, scale: torch.Tensor | None = None) -> torch.Tensor | None:
        """The weight's gradient in the weight's dtype, times ``scale``."""
        if self._weight is None:
            return None
        total, self._weight, weight = self._weight, None, self._inputs[1]
        if scale is None:
            return total.to(weight.dtype)
        if total.dtype == weight.dtype:
            return total.mul_(scale)
        return torch.mul(total, scale, out=torch.empty_like(weight))  # no wide product in between


def target_logps(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the targets and log-normalizers of the softmax, both of shape (c,), in the wide dtype."""
    if _takes_kernels(logits):
        return _kernels().target_logps(logits, targets, softcap)  # type: ignore[union-attr]
    wide = logits.to(_wide(logits.dtype))
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    log_normalizers = torch.logsumexp(wide, -1)
    return wide.gather(-1, targets[:, None]).squeeze(-1) - log_normalizers, log_normalizers


def logits_to_gradient(
    logits: torch.Tensor, targets: torch.Tensor, log_normalizers: torch.Tensor, by_token: torch.Tensor,
    softcap: float | None,
) -> None:  # fmt: skip
    """Overwrites logits, shape (c, v), with the gradient by them: ``by_token * (onehot(target) - softmax(logits))``."""
    if _takes_kernels(logits):
        _kernels().logits_to_gradient(logits, targets, log_normalizers, by_token, softcap)  # type: ignore[union-attr]
        return
    columns, shift, scale = targets[:, None], log_normalizers[:, None], -by_token[:, None]
    # The target's own is made before anything is rounded: softmax - 1 cancels where the model is sure.
    at_target = _by_logits(logits.gather(1, columns), 1, shift, scale, softcap)
    logits.copy_(_by_logits(logits, 0, shift, scale, softcap))
    logits.scatter_(1, columns, at_target.to(logits.dtype))


def _by_logits(
    logits: torch.Tensor, onehot: int, shift: torch.Tensor, scale: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """``scale * (softmax - onehot)``, in the wide dtype; arguments are (c, v) or (c, 1)."""
    wide = logits.to(_wide(logits.dtype))
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    grad = torch.exp(capped - shift).sub_(onehot).mul_(scale)
    if softcap is not None:
        grad.mul_(1 - (capped / softcap) ** 2)  # d c*tanh(x/c) / dx = 1 - tanh(x/c)^2
    return grad


def _takes_kernels(logits: torch.Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and _kernels() is not None


@cache
def _kernels() -> ModuleType | None:
    """:mod:`spin.reference.kernels`, or None where there is no Triton."""
    return import_module("spin.reference.kernels") if find_spec("triton") else None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``; on CUDA the product of narrow inputs is never rounded to their precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # CPU has no product of bf16 inputs with fp32 output: one rounding a chunk, as the result has in any case
        total.add_(left @ right)
