"""The transpose of float8 products on a GPU. Import it only where there is Triton; ``spin.model.float8`` has the same
in PyTorch."""

import torch
import triton
import triton.language as tl

_BLOCK = 128
_WARPS = 8


@triton.jit
def _transpose(matrix, factors, out, rows, columns, padded_rows, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    values = tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside).to(tl.float32)
    values = tl.where(inside, values * tl.load(factors + row, mask=row < rows, other=0.0)[:, None], 0.0)
    inside = (column[:, None] < columns) & (row[None, :] < padded_rows)
    tl.store(out + column[:, None] * padded_rows + row[None, :], tl.trans(values.to(tl.float8e4nv)), mask=inside)


def transpose(matrix: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """Writes rows (m, n), times their factors (m, 1), into ``out`` (n, m or more) as columns; all contiguous."""
    (rows, columns), padded_rows = matrix.shape, out.shape[1]
    grid = triton.cdiv(padded_rows, _BLOCK), triton.cdiv(columns, _BLOCK)
    _transpose[grid](matrix, factors, out, rows, columns, padded_rows, block=_BLOCK, num_warps=_WARPS)
