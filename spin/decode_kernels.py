"""The decode step's kernels for GPUs. Import it where there is Triton only; ``spin.attention`` has the same in PyTorch,
which is what they are tested against.

A decode step has one query per row and head, and rows of very different length. PyTorch's attention reads the cache as
far as the longest row reaches and, with grouped heads, once per query head; here each program reads the keys of one row
and one key head once, for all query heads of the group, and stops where the row ends. The length of a row is read from
the device, so that one captured CUDA graph serves every length.
"""

import torch
import triton
import triton.language as tl

_TILE = 8192  # entries of a tile of keys
_LEAST = 16  # rows and columns of what tensor cores multiply


@triton.jit
def _attend_slots(
    queries,
    keys,
    values,
    positions,
    out,
    query_row,
    key_row,
    key_head,
    scale,
    cap,
    window,
    group: tl.constexpr,
    group_block: tl.constexpr,
    head_dim: tl.constexpr,
    dim_block: tl.constexpr,
    key_block: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    member = tl.arange(0, group_block)
    dim = tl.arange(0, dim_block)
    is_query = (member < group)[:, None] & (dim < head_dim)[None, :]
    at = row * query_row + (head * group + member)[:, None] * head_dim + dim[None, :]
    query = tl.load(queries + at, mask=is_query, other=0.0)  # (group, hd)
    newest = tl.load(positions + row).to(tl.int32)
    keys += row * key_row + head * key_head
    values += row * key_row + head * key_head

    top = tl.full((group_block,), -1e30, tl.float32)
    total = tl.zeros((group_block,), tl.float32)
    mixed = tl.zeros((group_block, dim_block), tl.float32)
    first = 0
    if windowed:
        first = tl.maximum(newest - window + 1, 0) // key_block * key_block
    for start in range(first, newest + 1, key_block):
        place = start + tl.arange(0, key_block)
        visible = place <= newest
        if windowed:
            visible = visible & (place > newest - window)
        inside = visible[:, None] & (dim < head_dim)[None, :]
        offset = place[:, None] * head_dim + dim[None, :]
        key = tl.load(keys + offset, mask=inside, other=0.0)  # (key_block, hd)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if capped:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), exact enough at both ends
            scores = cap * (1 - 2 / (tl.exp(2 * scores / cap) + 1))
        scores = tl.where(visible[None, :], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        value = tl.load(values + offset, mask=inside, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        top = higher
    result = mixed / total[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=is_query)


def attend_slots(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """One new token per row against the cache: row r sees indices 0 to ``positions[r]``.

    Args:
        q (torch.Tensor): shape (n, h, 1, hd).
        k (torch.Tensor): shape (slots, n_kv, capacity, hd), contiguous; row r is in slot r.
        v (torch.Tensor): same shape as ``k``, contiguous.
        positions (torch.Tensor): index of each row's newest key, int64, shape (n,), below the capacity.
        scale (float): factor of the scores.
        softcap (float | None): ``c`` of ``c * tanh(scores / c)``.
        window (int | None): a row sees its last ``window`` keys only.

    Returns:
        torch.Tensor: shape (n, h, 1, hd).
    """
    n, h, _, head_dim = q.shape
    n_kv = k.shape[1]
    q = q.to(k.dtype).contiguous()
    out = torch.empty_like(q)
    dim_block = max(_LEAST, triton.next_power_of_2(head_dim))
    _attend_slots[(n, n_kv)](
        q,
        k,
        v,
        positions,
        out,
        h * head_dim,
        k.stride(0),
        k.stride(1),
        scale,
        softcap or 1.0,
        window or 0,
        group=h // n_kv,
        group_block=max(_LEAST, triton.next_power_of_2(h // n_kv)),
        head_dim=head_dim,
        dim_block=dim_block,
        key_block=max(_LEAST, _TILE // dim_block // (2 if k.element_size() > 2 else 1)),
        capped=softcap is not None,
        windowed=window is not None,
        num_warps=4,
    )
    return out
