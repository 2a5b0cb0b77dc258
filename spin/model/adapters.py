"""Low-rank adapters over frozen weights: what torchtune's LoRA, DoRA and QLoRA modules are made of.

A module's adapted weight is

    LoRA   W + (alpha / rank) B A
    DoRA   m * (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, norms by row

with W frozen, in full or as torchao's NF4 (4 bits a weight, with scales of blocks of 64). Nothing here knows ranks or
files; :mod:`spin.model.sharding` gathers, :mod:`spin.model.lora` trains, :mod:`spin.checkpoint` saves and exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.dtypes import nf4tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from spin.model.torchtune import DoRALinear, FrozenNF4Linear, LoRALinear

Gather = Callable[[torch.Tensor], torch.Tensor]

_NF4_PARTS = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """torchtune's LoRALinear and DoRALinear modules, by name in ``model.named_modules()``."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_params")}


def adapter_parameters(module: Any) -> dict[str, nn.Parameter]:
    """``lora_a.weight`` (rank, in), ``lora_b.weight`` (out, rank) and DoRA's ``magnitude`` (out,) of a module."""
    return {name: module.get_parameter(name) for name in module.adapter_params()}


def adapter_scale(module: Any) -> float:
    """``alpha / rank``, the factor of B A."""
    return float(module.scaling if hasattr(module, "scaling") else module.alpha / module.rank)


def merged_weight(module: Any, gather: Gather = lambda tensor: tensor) -> torch.Tensor:
    """The plain linear layer that computes the same: shape (out, in), in float32, or float64 if the weight is.

    ``gather`` makes a full tensor of a shard.
    """
    weight = _wide(gather(dequantized(module.weight.detach())))
    parts = {name: gather(each.detach()).to(weight.dtype) for name, each in adapter_parameters(module).items()}
    merged = torch.addmm(
        weight, parts["lora_b.weight"], parts["lora_a.weight"], alpha=adapter_scale(module)
    )  # (out, rank) x (rank, in)
    if "magnitude" in parts:
        magnitude = parts["magnitude"] + (_row_norms(weight) if _is_patched(module) else 0)
        merged.mul_((magnitude / _row_norms(merged))[:, None])
    return merged


# ---- DoRA


def patch_dora(model: nn.Module) -> None:
    """Replaces the forward of torchtune's DoRA modules. Doing it twice is harmless; other modules are left alone.

    Two things differ. The parameter ``magnitude``, which must start at zero, holds what m has moved since the start,
    when m was the norm of W's rows: m itself, rounded to bf16 for the forward, would stand still at SPIN's learning
    rates, and be off by up to 0.4 % in the first place. And a bias is added unscaled: torchtune 0.6.1 multiplies it by
    m over the norm.

    Source:
        DoRA (arXiv 2402.09353), equation 5, and section 4.3 for the norm without gradient.
    """
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.forward = MethodType(_dora_forward, module)


def full_magnitude(module: Any, gather: Gather = lambda tensor: tensor) -> torch.Tensor:
    """DoRA's m, shape (out,), in float32, or float64 if the weight is; ``gather`` makes a full tensor of a shard."""
    weight = _wide(gather(dequantized(module.weight.detach())))
    magnitude = gather(module.magnitude.detach()).to(weight.dtype)
    return magnitude + _row_norms(weight) if _is_patched(module) else magnitude


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_patched(module: Any) -> bool:
    return getattr(module.forward, "__func__", None) is _dora_forward


def _row_norms(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=1)  # (out, in) -> (out,)


def _dora_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    base = _linear_nf4(x, self.weight) if self._quantize_base else F.linear(x, self.weight)
    if not self.disabled:
        with torch.no_grad():
            weight = _wide((_values(self.weight) if self._quantize_base else self.weight).to(x.dtype))
            start = _row_norms(weight)
            now = _row_norms(weight + self.scaling * (self.lora_b.weight @ self.lora_a.weight).to(weight.dtype))
        ratio = ((start + self.magnitude) / now).to(x.dtype)  # exactly 1 while the adapter is at zero
        base = ratio * (base + self.scaling * self.lora_b(self.lora_a(self.dropout(x))))
    return base if self.bias is None else base + self.bias


# ---- NF4


@contextmanager
def quantizing_at_once() -> Iterator[None]:
    """Lets torchao quantize a weight in one piece: on the meta device its pieces cost 8 s for a 14B model."""
    before = nf4tensor.CHUNK_SIZE
    nf4tensor.CHUNK_SIZE = 1 << 62
    try:
        yield
    finally:
        nf4tensor.CHUNK_SIZE = before


def patch_nf4(model: nn.Module) -> None:
    """Replaces the forward of torchtune's modules over NF4 weights. Doing it twice is harmless.

    torchao's own dequantization is a dozen operations. Outside compiled layers it takes most of a forward's time;
    inside them the compiler leaves roundings out, so that training, generation and export would compute with different
    weights. Here all three have the values of :func:`dequantized`.
    """
    for module in model.modules():
        if isinstance(module, LoRALinear) and module._quantize_base:
            module.forward = MethodType(_lora_forward, module)
        elif isinstance(module, FrozenNF4Linear):
            module.forward = MethodType(_frozen_forward, module)


def _lora_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = _linear_nf4(x, self.weight)
    if self.use_bias:
        out = out + self.bias
    if self.disabled:
        return out
    return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


def _frozen_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = _linear_nf4(x, self.weight)
    return out if self.bias is None else out + self.bias


def _linear_nf4(x: torch.Tensor, weight: NF4Tensor) -> torch.Tensor:
    """``x W^T`` with a frozen W, which is dequantized for the product and again for its gradient."""
    return _LinearNF4.apply(x, weight.shape[1], *_parts(weight))  # type: ignore[no-any-return, no-untyped-call]


class _LinearNF4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, columns: int, *parts: Any) -> torch.Tensor:
        ctx.save_for_backward(*parts[: len(_NF4_PARTS)])
        ctx.columns, ctx.blocks = columns, parts[len(_NF4_PARTS) :]
        return F.linear(x, _nf4_values(*parts).view(-1, columns).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight = _nf4_values(*ctx.saved_tensors, *ctx.blocks, use=1).view(-1, ctx.columns)
        return grad @ weight.to(grad.dtype), *[None] * 8


def _values(nf4: NF4Tensor) -> torch.Tensor:
    return _nf4_values(*_parts(nf4)).view(nf4.shape)


def _parts(nf4: Any) -> tuple[Any, ...]:
    """The arguments of ``_nf4_values``."""
    return *(getattr(nf4, name) for name in _NF4_PARTS), nf4.block_size, nf4.scaler_block_size


@torch.library.custom_op("spin::nf4_values", mutates_args=())
def _nf4_values(
    data: torch.Tensor, scalers: torch.Tensor, factors: torch.Tensor, mean: torch.Tensor, table: torch.Tensor,
    block: int, scaler_block: int, use: int = 0,
) -> torch.Tensor:  # fmt: skip
    """The values that NF4 stands for, flat; one operation to compilers. See :func:`spin.model.nf4_kernels.nf4_values`.

    ``use`` is 0 in forward and 1 in backward: a compiler that sees the same operation twice would keep the values of
    all layers in between, 2 bytes a weight.
    """
    if data.is_cuda:
        from spin.model import nf4_kernels  # only where there is Triton

        return nf4_kernels.nf4_values(data, scalers, factors, mean, table, block, scaler_block)
    scales = (scalers.view(-1, scaler_block) / factors[:, None]).flatten().to(table.dtype) + mean
    places = torch.stack((data >> 4, data & 15), dim=-1).flatten().long()
    return table[places] * scales.repeat_interleave(block)


@_nf4_values.register_fake
def _(
    data: torch.Tensor, scalers: torch.Tensor, factors: torch.Tensor, mean: torch.Tensor, table: torch.Tensor,
    block: int, scaler_block: int, use: int = 0,
) -> torch.Tensor:  # fmt: skip
    return table.new_empty(2 * data.numel())


def as_nf4(tensor: torch.Tensor) -> NF4Tensor | None:
    """The NF4 tensor that a parameter is, or that its shard on this rank is; None for a tensor of ordinary numbers."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local if isinstance(local, NF4Tensor) else None


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """The values that an NF4 tensor stands for, sharded by rows like it; any other tensor as it is."""
    nf4 = as_nf4(tensor)
    if nf4 is None:
        return tensor
    values = _values(nf4)
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def allocate_nf4(tensor: torch.Tensor, device: torch.device) -> None:
    """Gives an NF4 tensor from the meta device what ``to_empty`` forgets: the table and the mean of its scales."""
    nf4 = as_nf4(tensor)
    if nf4 is not None:
        for name in _NF4_PARTS:
            part = getattr(nf4, name)
            if part.is_meta:
                setattr(nf4, name, torch.zeros(part.shape, dtype=part.dtype, device=device))


def fill_nf4(nf4: NF4Tensor, weight: torch.Tensor, first_row: int) -> None:
    """Quantizes all rows of a weight, in the dtype that ``nf4`` stands for, and keeps those of ``nf4``.

    The scales are relative to their mean over the full tensor, so a shard cannot be quantized by itself: its values
    would depend on how many ranks there are.
    """
    quantized = to_nf4(weight, nf4.block_size, nf4.scaler_block_size)
    for name in _NF4_PARTS:
        target, source = getattr(nf4, name), getattr(quantized, name)
        if target.shape != source.shape:  # data and scales lie in the order of rows; table and mean are those of all
            start = first_row * source.numel() // weight.shape[0]
            source = source[start : start + target.numel()]
        target.copy_(source)
