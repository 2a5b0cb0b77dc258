"""Log-probabilities of response tokens without a ``[tokens, vocabulary]`` tensor that outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from spin.data.packing import PackedRow
from spin.gemma2 import final_softcap


def response_logps(model: nn.Module, row: PackedRow, chunk_size: int = 2048) -> torch.Tensor:
    """Summed log-probs of every response of a packed row: one forward, one formula, for policy, reference and
    validation.

    Only hidden states of tokens that predict a response token reach the output projection, which runs inside the
    model's forward, where FSDP2 has gathered its weight.

    Args:
        model (nn.Module): a torchtune ``TransformerDecoder`` after :func:`spin.attention.patch_attention`, sharded or
            not.
        row (PackedRow): on the model's device.
        chunk_size (int): response tokens whose logits exist at a time.

    Returns:
        torch.Tensor: log-probs in nats, shape (m,), fp64.
    """

    def unembed(hidden: torch.Tensor) -> torch.Tensor:
        predicting = model.norm(hidden)[0, row.predictors]  # (1, s, d) -> (n, d)
        return linear_logprob(predicting, output_weight(model), row.targets, chunk_size, final_softcap(model))

    with replaced_unembed(model, unembed):
        token_logps = model(row.tokens[None], mask=row.dense_mask()[None], input_pos=row.positions[None])
    return segment_sums(token_logps, row.segments, row.num_responses)


@contextmanager
def replaced_unembed(model: nn.Module, unembed: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Lets a model's forward end in ``unembed(hidden)`` instead of logits for every token.

    Args:
        model (nn.Module): a torchtune ``TransformerDecoder``.
        unembed (Callable[[torch.Tensor], torch.Tensor]): takes the last layer's output, shape (b, s, d), before the
            final norm.

    Yields:
        None: while it holds.
    """
    before = vars(model).get("unembed")
    model.unembed = unembed  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.unembed
        if before is not None:
            model.unembed = before


def output_weight(model: nn.Module) -> torch.Tensor:
    """The output projection's weight; the embedding's where the two are tied.

    Args:
        model (nn.Module): a torchtune ``TransformerDecoder``.

    Returns:
        torch.Tensor: shape (v, d).

    Raises:
        ValueError: If the projection has a bias, which no family of torchtune has.
    """
    output = model.output
    if getattr(output, "bias", None) is not None:
        raise ValueError("The model's output projection has a bias; expected none.")
    return output.tied_module.weight if hasattr(output, "tied_module") else output.weight


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_size: int = 2048,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-probs of ``targets`` under ``softmax(hidden @ weight.T)``, a chunk of tokens at a time.

    The logits of a chunk are made again in backward, so the peak is one chunk of logits whatever n. Products run in the
    inputs' precision, the softmax and the sum over chunks of the weight's gradient in fp32 (fp64 for fp64 inputs).

    Args:
        hidden (torch.Tensor): hidden states that PREDICT the targets, shape (n, d).
        weight (torch.Tensor): output projection, shape (v, d).
        targets (torch.Tensor): token ids, int64, shape (n,).
        chunk_size (int): tokens per chunk; higher is faster up to a point and increases memory.
        softcap (float | None): ``c`` of ``c * tanh(logits / c)`` (Gemma 2); None is no cap.

    Returns:
        torch.Tensor: log-probs in nats, shape (n,), fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If ``chunk_size`` is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected 1 or more tokens.")
    return _LinearLogprob.apply(hidden, weight, targets, chunk_size, softcap)


def segment_sums(values: torch.Tensor, segments: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sums the values of each segment, in fp64: the order in which a GPU adds must not show in the sums.

    Args:
        values (torch.Tensor): shape (n,).
        segments (torch.Tensor): segment of each value, int64, shape (n,).
        num_segments (int): how many there are.

    Returns:
        torch.Tensor: shape (num_segments,), fp64; 0 for a segment without values.
    """
    return values.new_zeros(num_segments, dtype=torch.float64).index_add(0, segments, values.double())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk_size: int,
        softcap: float | None,
    ) -> torch.Tensor:
        n = hidden.shape[0]
        logps = hidden.new_empty(n, dtype=_wide(hidden.dtype))
        log_normalizers = torch.empty_like(logps)
        for start in range(0, n, chunk_size):
            chunk = slice(start, start + chunk_size)
            logits, _ = _logits(hidden[chunk], weight, softcap)  # (c, v)
            log_normalizers[chunk] = torch.logsumexp(logits, -1)
            logps[chunk] = logits.gather(-1, targets[chunk, None]).squeeze(-1) - log_normalizers[chunk]
        ctx.save_for_backward(hidden, weight, targets, log_normalizers)
        ctx.chunk_size, ctx.softcap = chunk_size, softcap
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, log_normalizers = ctx.saved_tensors
        wide = _wide(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits, uncapped = _logits(hidden[chunk], weight, ctx.softcap)
            # d logp[target] / d logits = onehot(target) - softmax(logits)
            scale = grad[chunk].to(wide)
            grad_logits = torch.exp(logits - log_normalizers[chunk, None]).mul_(-scale[:, None])
            grad_logits.scatter_add_(-1, targets[chunk, None], scale[:, None])
            if uncapped is not None:
                # d c*tanh(x/c) / dx = 1 - tanh(x/c)^2
                grad_logits.mul_(1 - torch.tanh(uncapped / ctx.softcap) ** 2)
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = narrow @ weight
            if grad_weight is not None:
                _add_product(grad_weight, narrow.t(), hidden[chunk])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits in the wide dtype; with a cap also those before it."""
    logits = (hidden @ weight.t()).to(_wide(hidden.dtype))  # (c, d) x (d, v) -> (c, v)
    if softcap is None:
        return logits, None
    return softcap * torch.tanh(logits / softcap), logits


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``; on CUDA the product of narrow inputs is never rounded to their precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # CPU has no product of bf16 inputs with fp32 output: one rounding a chunk, as the result has in any case
        total.add_(left @ right)
