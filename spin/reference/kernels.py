"""The output layer's two kernels for GPUs. Import it where there is Triton only; ``spin.reference.logprobs`` has the
same in PyTorch, which is what they are tested against.

Logits of a 128k vocabulary in bf16 are read once here for the softmax's normalizer and once for the gradient, which
overwrites them. One H100, 1,550 tokens: 0.22 ms and as much again, against 2.4 ms for ``torch.logsumexp`` of an fp32
copy and 0.4 to 0.6 ms for each under torch.compile, whose choice for a varying number of tokens was at times 1.7 ms.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

_BLOCK = 8192  # logits at a time in a program
_WARPS = 16


@triton.jit
def _capped(logits, cap, capped: tl.constexpr):
    if capped:
        return cap * libdevice.tanh(logits / cap)
    return logits


@triton.jit
def _target_logps(
    logits, targets, logps, log_normalizers, vocab, stride, cap, capped: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    line = logits + token * stride
    largest = tl.full((block,), -1e30, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, vocab, block):
        column = start + tl.arange(0, block)
        inside = column < vocab
        value = _capped(tl.load(line + column, mask=inside, other=0.0).to(tl.float32), cap, capped)
        value = tl.where(inside, value, -1e30)
        larger = tl.maximum(largest, value)
        total = total * tl.exp(largest - larger) + tl.where(inside, tl.exp(value - larger), 0.0)
        largest = larger
    top = tl.max(largest, 0)
    normalizer = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    target = _capped(tl.load(line + tl.load(targets + token)).to(tl.float32), cap, capped)
    tl.store(log_normalizers + token, normalizer)
    tl.store(logps + token, target - normalizer)


@triton.jit
def _logits_to_gradient(
    logits, targets, log_normalizers, by_token, vocab, stride, cap, capped: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < vocab
    place = logits + token * stride + column
    value = _capped(tl.load(place, mask=inside, other=0.0).to(tl.float32), cap, capped)
    is_target = (column == tl.load(targets + token)).to(tl.float32)
    grad = tl.load(by_token + token) * (is_target - tl.exp(value - tl.load(log_normalizers + token)))
    if capped:
        grad *= 1 - (value / cap) * (value / cap)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=inside)


def target_logps(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the targets (int64, shape (c,)) and log-normalizers of the softmax, both fp32, shape (c,).

    The logits, shape (c, v), are bf16, fp16 or fp32 and contiguous.
    """
    tokens, vocab = logits.shape
    logps = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    log_normalizers = torch.empty_like(logps)
    _target_logps[(tokens,)](
        logits, targets.contiguous(), logps, log_normalizers, vocab, logits.stride(0), softcap or 1.0,
        capped=softcap is not None, block=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return logps, log_normalizers


def logits_to_gradient(
    logits: torch.Tensor, targets: torch.Tensor, log_normalizers: torch.Tensor, by_token: torch.Tensor,
    softcap: float | None,
) -> None:  # fmt: skip
    """Overwrites logits with ``by_token * (onehot(target) - softmax(logits))``, the gradient by them.

    ``by_token`` is the gradient by the targets' log-probs, fp32, shape (c,); for the rest see :func:`target_logps`.
    """
    tokens, vocab = logits.shape
    _logits_to_gradient[(tokens, triton.cdiv(vocab, _BLOCK))](
        logits, targets.contiguous(), log_normalizers.contiguous(), by_token.contiguous(), vocab, logits.stride(0),
        softcap or 1.0, capped=softcap is not None, block=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
