"""NF4 dequantization in one kernel for GPUs. Import it only where there is Triton; ``spin.model.adapters`` has the same
in PyTorch, which the tests compare with, bit for bit.

torchao's own way makes two int64 indices for every byte and a dozen passes over them. A step of 64 sequences of Llama
3.1 8B took 146 ms with it (one H100) and takes 22 ms with this (one H200), which reads half a byte a weight and writes
two.
"""

import torch
import triton
import triton.language as tl

_BYTES = 1024  # of packed weights in a program


@triton.jit
def _nf4_values(
    data, scalers, factors, mean, table, out, num_bytes, block: tl.constexpr, scaler_block: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < num_bytes
    packed = tl.load(data + place, mask=inside, other=0).to(tl.int32)
    scaler = place * 2 // block
    dtype = out.dtype.element_ty
    # every result is rounded where torchao rounds it
    scale = tl.load(scalers + scaler, mask=inside, other=0).to(tl.float32)
    factor = tl.load(factors + scaler // scaler_block, mask=inside, other=1.0)
    scale = tl.math.div_rn(scale, factor.to(tl.float32)).to(factor.dtype).to(dtype).to(tl.float32)
    scale = (scale + tl.load(mean).to(tl.float32)).to(dtype).to(tl.float32)
    first = (tl.load(table + (packed >> 4)).to(tl.float32) * scale).to(dtype)
    second = (tl.load(table + (packed & 15)).to(tl.float32) * scale).to(dtype)
    tl.store(out + 2 * place, first, mask=inside)
    tl.store(out + 2 * place + 1, second, mask=inside)


def nf4_values(
    data: torch.Tensor, scalers: torch.Tensor, factors: torch.Tensor, mean: torch.Tensor, table: torch.Tensor,
    block: int, scaler_block: int,
) -> torch.Tensor:  # fmt: skip
    """The values that NF4 stands for, in the table's dtype, shape (n,).

    ``data`` is uint8, shape (n / 2,), the first of two weights in the high bits; ``scalers`` int8, shape (n / block,),
    a scale for each ``block`` weights; ``factors`` bf16 or fp32, shape (n / block / scaler_block,), a factor for each
    ``scaler_block`` scales; ``mean`` one number, of the scales; ``table`` bf16 or fp32, shape (16,).
    """
    out = torch.empty(2 * data.numel(), dtype=table.dtype, device=data.device)
    with torch.cuda.device(data.device):
        _nf4_values[(triton.cdiv(data.numel(), _BYTES),)](
            data.contiguous(), scalers.contiguous(), factors.contiguous(), mean, table, out, data.numel(), block=block,
            scaler_block=scaler_block, size=_BYTES,
        )  # fmt: skip
    return out
