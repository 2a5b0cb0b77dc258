"""Low-rank adapters over frozen weights: what torchtune's LoRA, DoRA and QLoRA modules are made of.

A module's adapted weight is

    LoRA   W + (alpha / rank) B A
    DoRA   m * (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, norms by row

with W frozen, in full or as torchao's NF4 (4 bits a weight, with scales of blocks of 64). Nothing here knows ranks or
files; :mod:`spin.core.ranks` gathers, :mod:`spin.model.lora` trains and saves, :mod:`spin.checkpoint.peft` exports.
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
    """The modules that have an adapter.

    Args:
        model (nn.Module): sharded or plain.

    Returns:
        dict[str, Any]: torchtune's LoRALinear and DoRALinear modules, by name in ``model.named_modules()``.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_params")}


def adapter_parameters(module: Any) -> dict[str, nn.Parameter]:
    """The parameters of one module's adapter.

    Args:
        module (Any): of :func:`adapted_modules`.

    Returns:
        dict[str, nn.Parameter]: ``lora_a.weight`` (rank, in), ``lora_b.weight`` (out, rank), and DoRA's ``magnitude``
        (out,).
    """
    return {name: module.get_parameter(name) for name in module.adapter_params()}


def adapter_scale(module: Any) -> float:
    """``alpha / rank``.

    Args:
        module (Any): of :func:`adapted_modules`.

    Returns:
        float: what B A is multiplied by.
    """
    return float(module.scaling if hasattr(module, "scaling") else module.alpha / module.rank)


def merged_weight(module: Any, gather: Gather = lambda tensor: tensor) -> torch.Tensor:
    """A module's weight with its adapter in it: the plain linear layer that computes the same.

    Args:
        module (Any): of :func:`adapted_modules`.
        gather (Gather): makes a whole tensor of a shard.

    Returns:
        torch.Tensor: shape (out, in), in float32, or float64 if the weight is.
    """
    weight = gather(dequantized(module.weight.detach()))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    parts = {name: gather(parameter.detach()).to(wide) for name, parameter in adapter_parameters(module).items()}
    merged = torch.addmm(
        weight.to(wide), parts["lora_b.weight"], parts["lora_a.weight"], alpha=adapter_scale(module)
    )  # (out, rank) x (rank, in)
    if "magnitude" in parts:
        magnitude = parts["magnitude"]
        if _is_patched(module):
            magnitude = magnitude + _row_norms(weight.to(wide))
        merged.mul_((magnitude / _row_norms(merged))[:, None])
    return merged


# ---- DoRA


def patch_dora(model: nn.Module) -> None:
    """Replaces the forward of torchtune's DoRA modules. Doing it twice is harmless; other modules are left alone.

    Two things differ. The parameter ``magnitude`` holds what m has moved since the start, when m was the norm of W's
    rows: m itself, rounded to bf16 for the forward, would stand still at SPIN's learning rates, and be off by up to
    0.4 % in the first place. And a bias is added as it is: torchtune 0.6.1 multiplies it by m over the norm.

    Args:
        model (nn.Module): any torchtune decoder; ``magnitude`` must be set to zero to begin with.

    Source:
        DoRA (arXiv 2402.09353), equation 5, and section 4.3 for the norm without gradient.
    """
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.forward = MethodType(_dora_forward, module)


def full_magnitude(module: Any, gather: Gather = lambda tensor: tensor) -> torch.Tensor:
    """DoRA's m.

    Args:
        module (Any): a DoRALinear, patched or not.
        gather (Gather): makes a whole tensor of a shard.

    Returns:
        torch.Tensor: shape (out,), float32, or float64 if the weight is.
    """
    weight = gather(dequantized(module.weight.detach()))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    magnitude = gather(module.magnitude.detach()).to(wide)
    return magnitude + _row_norms(weight.to(wide)) if _is_patched(module) else magnitude


def _is_patched(module: Any) -> bool:
    return getattr(module.forward, "__func__", None) is _dora_forward


def _row_norms(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=1)  # (out, in) -> (out,)


def _dora_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    base = _linear_nf4(x, self.weight) if self._quantize_base else F.linear(x, self.weight)
    if not self.disabled:
        with torch.no_grad():
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            weight = (_values(self.weight) if self._quantize_base else self.weight).to(x.dtype).to(wide)
            start = _row_norms(weight)
            now = _row_norms(weight + self.scaling * (self.lora_b.weight @ self.lora_a.weight).to(wide))
        ratio = ((start + self.magnitude) / now).to(x.dtype)  # exactly 1 while the adapter is at zero
        base = ratio * (base + self.scaling * self.lora_b(self.lora_a(self.dropout(x))))
    return base if self.bias is None else base + self.bias


# ---- NF4


@contextmanager
def quantizing_at_once() -> Iterator[None]:
    """Lets torchao quantize a weight in one piece: on the meta device its pieces cost time and save nothing.

    Yields:
        None: while it holds; 8 seconds less for a model of 14B parameters.
    """
    before = nf4tensor.CHUNK_SIZE
    nf4tensor.CHUNK_SIZE = 1 << 62
    try:
        yield
    finally:
        nf4tensor.CHUNK_SIZE = before


def patch_nf4(model: nn.Module) -> None:
    """Replaces the forward of torchtune's modules over NF4 weights. Doing it twice is harmless.

    torchao's own dequantization is a dozen operations. Outside of compiled layers it takes most of a forward's time;
    inside of them their compiler leaves roundings out, so that training, generation and export would compute with
    different weights. Here all three have the numbers of :func:`dequantized`.

    Args:
        model (nn.Module): any torchtune decoder.
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
    """``x W^T`` with a frozen W, whose numbers are made for the product and again for its gradient."""
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
    data: torch.Tensor,
    scalers: torch.Tensor,
    factors: torch.Tensor,
    mean: torch.Tensor,
    table: torch.Tensor,
    block: int,
    scaler_block: int,
    use: int = 0,
) -> torch.Tensor:
    """The numbers that NF4 stands for, flat; one operation to compilers. See :func:`spin.model.nf4_kernels.nf4_values`.

    ``use`` is 0 in forward and 1 in backward: a compiler that sees the same operation twice would keep the numbers of
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
    data: torch.Tensor,
    scalers: torch.Tensor,
    factors: torch.Tensor,
    mean: torch.Tensor,
    table: torch.Tensor,
    block: int,
    scaler_block: int,
    use: int = 0,
) -> torch.Tensor:
    return table.new_empty(2 * data.numel())


def as_nf4(tensor: torch.Tensor) -> NF4Tensor | None:
    """The NF4 tensor that a parameter is, or that its shard on this rank is.

    Args:
        tensor (torch.Tensor): any.

    Returns:
        NF4Tensor | None: None for a tensor of ordinary numbers.
    """
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local if isinstance(local, NF4Tensor) else None


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that an NF4 tensor stands for.

    Args:
        tensor (torch.Tensor): any, plain or sharded by rows.

    Returns:
        torch.Tensor: sharded like ``tensor``; ``tensor`` itself if it is not NF4.
    """
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
    """Gives an NF4 tensor from the meta device the parts that ``to_empty`` forgets: table and mean of the scales.

    Args:
        tensor (torch.Tensor): after ``to_empty``; left alone if it is not NF4.
        device (torch.device): where it lives.
    """
    nf4 = as_nf4(tensor)
    if nf4 is not None:
        for name in _NF4_PARTS:
            part = getattr(nf4, name)
            if part.is_meta:
                setattr(nf4, name, torch.zeros(part.shape, dtype=part.dtype, device=device))


def fill_nf4(nf4: NF4Tensor, whole: torch.Tensor, first_row: int) -> None:
    """Quantizes a whole weight, and keeps some of its rows.

    The scales are relative to their mean over the whole tensor, so a shard cannot be quantized by itself: its numbers
    would depend on how many ranks there are.

    Args:
        nf4 (NF4Tensor): filled in place.
        whole (torch.Tensor): all rows, in the dtype that ``nf4`` stands for.
        first_row (int): where the rows of ``nf4`` begin.
    """
    quantized = to_nf4(whole, nf4.block_size, nf4.scaler_block_size)
    for name in _NF4_PARTS:
        target, source = getattr(nf4, name), getattr(quantized, name)
        if target.shape != source.shape:  # data and scales lie in the order of rows; table and mean are those of all
            start = first_row * source.numel() // whole.shape[0]
            source = source[start : start + target.numel()]
        target.copy_(source)
