"""Products of a decoder's layers in float8; weights stay what they are, and so does the state dict.

Activations, weights and gradients are quantized by rows, each once for all products:

    y = x w^T      the scales of both rows stand outside the sum
    dx = dy w      the sum runs over rows of w, whose scales are multiplied into dy before that is quantized
    dw = dy^T x    the sum runs over rows of dy and x, whose scales, powers of two, shift dy's float8 values

A weight's scales are no powers of two: of a weight that was stored in bf16 one value in 16 would stand in the middle
between two of float8's, and the first step, however small, would move all of these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spin.core.errors import ConfigError

log = logging.getLogger(__name__)

_BODY = "layers."
_MULTIPLE = 16  # of what float8 products take
_E4M3 = torch.float8_e4m3fn  # 3 bits of mantissa, 2**-9 to 448; for gradients too, since every row has its own scale
_WEIGHT_MAX = 443.0  # rounds to e4m3's largest, 448; a prime, so that no bf16 value is in the middle of two float8's
_EXPONENT = 0x7F800000  # bits of a float32


class Float8Linear(nn.Linear):
    """A linear layer whose three products are in float8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``: (..., in) -> (..., out)."""
        y = _Float8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


@torch._dynamo.allow_in_graph  # as a whole: torch 2.11's own look into such functions loses gradients
class _Float8Product(torch.autograd.Function):
    """``x @ weight.T`` of (t, in) and (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x_scales, weight_scales = _powers_of_two(_largest(x)), _largest(weight) / _WEIGHT_MAX
        x8 = _quantize(x, x_scales)
        # not the weight's values: FSDP2 frees the gathered weight until backward, and would not free those
        ctx.save_for_backward(x8, x_scales, weight, weight_scales)
        return _product(x8, _quantize(weight, weight_scales).t(), x_scales, weight_scales.t(), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x8, x_scales, weight, weight_scales = ctx.saved_tensors
        scaled = dy * weight_scales.t()
        dy_scales = _powers_of_two(_largest(scaled))
        dy8 = _quantize(scaled, dy_scales)
        ones = torch.ones_like(x_scales), x_scales.new_ones(1, x8.shape[1])
        dx = _product(dy8, _transpose(weight, weight_scales.reciprocal()).t(), dy_scales, ones[1], dy.dtype)
        scales = dy_scales * x_scales
        largest = scales.amax()
        dy8 = _transpose(dy8, scales / largest)  # (out, t)
        dw = _product(dy8, _transpose(x8, ones[0]).t(), largest / weight_scales, ones[1], weight.dtype)
        return dx, dw


def _largest(matrix: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each row, (m, n) -> (m, 1); the least makes two scales' product a normal number."""
    return matrix.float().abs().amax(-1, keepdim=True).clamp(min=2.0**-56)


def _powers_of_two(largest: torch.Tensor) -> torch.Tensor:
    """Scales with which rows' largest values become 128 to 256 of the 448 that there are."""
    return (largest.view(torch.int32) & _EXPONENT).view(torch.float32) * 2.0**-7


def _quantize(matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (matrix.float() / scales).to(_E4M3, memory_format=torch.contiguous_format)


# one operation to compilers, which make one of several equal calls: the input of q, k and v is transposed once
@torch.library.custom_op("spin::float8_transpose", mutates_args=())
def _transpose(matrix: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """float8 values of rows (m, n) times their factors (m, 1), as (n, m), m padded with zeros to what products take."""
    out = _empty_transpose(matrix, factors)
    if matrix.is_cuda:
        from spin.model import float8_kernels  # only where there is Triton

        float8_kernels.transpose(matrix, factors, out)
    else:
        out.copy_(F.pad((matrix.float() * factors).t(), (0, out.shape[1] - matrix.shape[0])))
    return out


@_transpose.register_fake
def _empty_transpose(matrix: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    return matrix.new_empty(columns, -(-rows // _MULTIPLE) * _MULTIPLE, dtype=_E4M3)


def _product(
    left: torch.Tensor, right: torch.Tensor, left_scales: torch.Tensor, right_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(m, k) times (k, n), whose columns are contiguous; scales of shape (m, 1) and (1, n). Emulated on a CPU."""
    if left.is_cuda:
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_mm(left, right, left_scales, right_scales, **options).to(dtype)
    return (left.float() @ right.float() * left_scales * right_scales).to(dtype)


def convert_float8(model: nn.Module, device: torch.device) -> int:
    """Makes the linear layers inside a decoder's ``layers`` multiply in float8, forward and backward.

    Embeddings and the output head are left alone, and so are layers with a dimension that is not a multiple of 16. Call
    it before activation checkpointing, ``torch.compile`` and sharding; the model may be on the meta device. Without
    compilation it is slower than bf16. Each token has its own scale, so log-probs do not depend on packing.

    Args:
        model (nn.Module): a torchtune decoder.
        device (torch.device): where it will run; on ``cpu`` float8 is emulated, which is for tests.

    Returns:
        int: number of layers that were converted.

    Raises:
        ConfigError: If the GPU has no float8, or no layer can be converted.

    Source:
        Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise ConfigError(
            f"float8 needs a GPU of compute capability 8.9 or more (H100, H200, L40S, RTX 4090), found "
            f"{torch.cuda.get_device_name(device)} with {found}. Set enable_float8_training=false."
        )
    fitting = [module for name, module in model.named_modules() if _fits(name, module)]
    if not fitting:
        raise ConfigError(
            f"float8: {type(model).__name__} has no linear layer in `{_BODY}` whose dimensions are multiples of "
            f"{_MULTIPLE}. Set enable_float8_training=false."
        )
    if device.type == "cpu":
        log.warning("float8 is emulated on CPU: slower than without it, for tests only.")
    for module in fitting:
        module.__class__ = Float8Linear
    return len(fitting)


@contextmanager
def float8_off(model: nn.Module) -> Iterator[None]:
    """Runs plain linear layers, for decoding, which would quantize the same weights again for each token.

    Does nothing for a model that was not converted.
    """
    converted = [module for module in model.modules() if type(module) is Float8Linear]
    # Their class, not their forward: compiled layers notice it.
    for module in converted:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in converted:
            module.__class__ = Float8Linear


def _fits(name: str, module: nn.Module) -> bool:
    return (
        name.startswith(_BODY)
        and type(module) is nn.Linear
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    )
