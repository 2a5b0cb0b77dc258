"""GPU kernels for generation. Import it only where there is Triton; ``spin.model.attention`` and torchtune's modules
compute the same in PyTorch, which the tests compare with.

A decode step has one query per row and head, and rows of very different length. PyTorch's attention reads the cache as
far as the longest row reaches and, with grouped heads, once per query head; here each program reads the keys of one row
and one key head once, for all query heads of the group, and stops where the row ends. The length of a row is read from
the device, so that one captured CUDA graph serves every length.

The others do in one pass what torchtune writes as six to ten: for a few rows each pass costs a launch, for many a trip
to memory and back.
"""

import torch
import triton
import triton.language as tl

_TILE = 8192  # entries of a tile of keys
_DRAWN = 1024  # logits of a program
_GATE = 2048  # entries of a gated activation in a program
_LEAST = 16  # rows and columns of what tensor cores multiply


@triton.jit
def _attend_slots(
    queries, keys, values, positions, out, query_row, key_row, key_head, scale, cap, window, group: tl.constexpr,
    group_block: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr, key_block: tl.constexpr,
    capped: tl.constexpr, windowed: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _rotate(
    x, table, positions, out, length, heads, head_dim, table_row, has_positions: tl.constexpr,
    interleaved: tl.constexpr, neighbors: tl.constexpr, rounded: tl.constexpr, half: tl.constexpr,
    half_block: tl.constexpr, head_block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if has_positions:
        position = tl.load(positions + token)
    else:
        position = token % length
    pair = tl.arange(0, half_block)
    head = tl.arange(0, head_block)
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    line = table + position * table_row
    if neighbors:  # cos and sin of a pair side by side
        cos = tl.load(line + 2 * pair, mask=pair < half, other=0.0)
        sin = tl.load(line + 2 * pair + 1, mask=pair < half, other=0.0)
    else:  # all cosines twice, then all sines twice
        cos = tl.load(line + pair, mask=pair < half, other=0.0)
        sin = tl.load(line + 2 * half + pair, mask=pair < half, other=0.0)
    if interleaved:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + half
    if rounded:
        cos = cos.to(x.dtype.element_ty)
        sin = sin.to(x.dtype.element_ty)
    cos = cos.to(tl.float32)[None, :]
    sin = sin.to(tl.float32)[None, :]
    at = (token * heads + head)[:, None] * head_dim
    left = tl.load(x + at + first[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + at + second[None, :], mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + at + first[None, :], (left * cos - right * sin).to(kind), mask=inside)
    tl.store(out + at + second[None, :], (right * cos + left * sin).to(kind), mask=inside)


@triton.jit
def _rms_norm(x, weight, out, dim, eps, offset, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < dim
    value = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / dim + eps)
    tl.store(out + row * dim + column, (value * inverse * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate, up, out, entries, gelu: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < entries
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)  # sqrt(2 / pi)
        active = value * (1 - 1 / (tl.exp(2 * inner) + 1))  # (1 + tanh(x)) / 2 = 1 - 1 / (exp(2 x) + 1)
    else:
        active = value / (1 + tl.exp(-value))
    active = active.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (active * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _drawable(line, column, vocab, temperature, is_early, stops, num_stops: tl.constexpr):
    value = tl.load(line + column, mask=column < vocab, other=-float("inf")).to(tl.float32) / temperature
    for i in tl.static_range(num_stops):
        value = tl.where(is_early & (column == tl.load(stops + i)), -float("inf"), value)
    return value


@triton.jit
def _weigh_blocks(
    logits, new_tokens, stops, tops, totals, vocab, stride, blocks, temperature, min_new_tokens,
    num_stops: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    is_early = tl.load(new_tokens + row) < min_new_tokens
    column = part * block + tl.arange(0, block)
    value = _drawable(logits + row * stride, column, vocab, temperature, is_early, stops, num_stops)
    top = tl.maximum(tl.max(value, 0), -1e30)  # of a block that is banned entirely
    tl.store(tops + row * blocks + part, top)
    tl.store(totals + row * blocks + part, tl.sum(tl.exp(value - top).to(tl.float64), 0))


@triton.jit
def _draw(
    logits, new_tokens, stops, tops, totals, uniforms, out, vocab, stride, blocks, temperature, min_new_tokens,
    num_stops: tl.constexpr, block: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, parts)
    top = tl.load(tops + row * blocks + part, mask=part < blocks, other=-1e30)
    weight = tl.load(totals + row * blocks + part, mask=part < blocks, other=0.0)
    highest = tl.max(top, 0)
    weight = weight * tl.exp(top - highest).to(tl.float64)
    cumulative = tl.cumsum(weight, 0)
    total = tl.max(cumulative, 0)
    target = tl.load(uniforms + row) * total
    target = tl.where(target < total, target, total - total * 2.220446049250313e-16)  # 2^-52
    chosen = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), blocks - 1)
    # Sums of a scan differ by their rounding: where all blocks behind are banned, it is the last that is not.
    chosen = tl.max(tl.where((weight > 0) & (part <= chosen), part, 0), 0)
    before = tl.max(tl.where(part < chosen, cumulative, 0.0), 0)

    place = tl.arange(0, block)
    column = chosen * block + place
    is_early = tl.load(new_tokens + row) < min_new_tokens
    value = _drawable(logits + row * stride, column, vocab, temperature, is_early, stops, num_stops)
    weights = tl.exp(value - highest).to(tl.float64)
    within = before + tl.cumsum(weights, 0)
    # A block's total and its tokens' sum differ by their rounding: beyond the last token, it is the last that counts.
    possible = weights > 0
    index = tl.min(tl.where(possible & (within > target), place, block), 0)
    last = tl.max(tl.where(possible, place, 0), 0)
    tl.store(out + row, (chosen * block + tl.minimum(index, last)).to(tl.int64))


def rotate(
    x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor | None, *, interleaved: bool, rounded: bool = False
) -> torch.Tensor:
    """Rotary position embeddings, computed in fp32.

    x is queries or keys, shape (b, s, h, hd). ``table`` is fp32 with a line for each position: cosine and sine of each
    pair, shape (p, pairs, 2), or all cosines and all sines, both twice, shape (p, 2 * hd). ``positions`` is int64,
    shape (b, s); None counts from 0. With ``interleaved`` a pair's two dimensions are neighbors; else they are
    ``pairs`` apart. Dimensions behind the pairs stay as they are. With ``rounded`` the table is rounded to the dtype of
    ``x`` first.
    """
    b, s, heads, head_dim = x.shape
    pairs = table.shape[1] if table.dim() == 3 else head_dim // 2
    x = x.contiguous()
    out = x.clone() if 2 * pairs < head_dim else torch.empty_like(x)
    _rotate[(b * s,)](
        x, table, x if positions is None else positions.contiguous(), out, s, heads, head_dim, table[0].numel(),
        has_positions=positions is not None, interleaved=interleaved, neighbors=table.dim() == 3, rounded=rounded,
        half=pairs, half_block=triton.next_power_of_2(pairs), head_block=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension, computed in fp32."""
    dim = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(dim)
        _rms_norm[(x.numel() // dim,)](
            x, weight, out, dim, eps, offset, block=block, num_warps=4 if block <= 2048 else 8
        )
    return out


def gate(gated: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """``silu(gated) * up``, or with the tanh form of GELU; both of the same shape and dtype."""
    gated, up = gated.contiguous(), up.contiguous()
    out = torch.empty_like(gated)
    _gate[(triton.cdiv(gated.numel(), _GATE),)](gated, up, out, gated.numel(), gelu=gelu, block=_GATE, num_warps=4)
    return out


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, new_tokens: torch.Tensor, min_new_tokens: int,
    stops: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Ban on early stops, temperature and inverse CDF, reading the logits once.

    Args:
        logits (torch.Tensor): shape (n, v), rows contiguous.
        uniforms (torch.Tensor): float64 in [0, 1), shape (n,), contiguous.
        temperature (float): more than 0.
        new_tokens (torch.Tensor): tokens that each response has so far, int64, shape (n,), contiguous.
        min_new_tokens (int): no stop token before so many.
        stops (torch.Tensor): stop tokens, int64, shape (k,).

    Returns:
        torch.Tensor: token ids, int64, shape (n,).
    """
    n, vocab = logits.shape
    blocks = triton.cdiv(vocab, _DRAWN)
    tops = torch.empty(n, blocks, dtype=torch.float32, device=logits.device)
    totals = torch.empty(n, blocks, dtype=torch.float64, device=logits.device)
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    sizes = (vocab, logits.stride(0), blocks, float(temperature), min_new_tokens)
    fixed = {"num_stops": len(stops), "block": _DRAWN, "num_warps": 4}
    _weigh_blocks[(n, blocks)](logits, new_tokens, stops, tops, totals, *sizes, **fixed)
    parts = triton.next_power_of_2(blocks)
    _draw[(n,)](logits, new_tokens, stops, tops, totals, uniforms, out, *sizes, **fixed, parts=parts)
    return out


def attend_slots(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, *, scale: float,
    softcap: float | None = None, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """One new token per row against the cache: row r sees indices 0 to ``positions[r]``, or its last ``window`` keys.

    q is (n, h, 1, hd), and so is the result; k and v are (slots, n_kv, capacity, hd), contiguous, row r in slot r;
    ``positions`` has the index of each row's newest key, int64, shape (n,), below the capacity. ``softcap`` is ``c`` of
    ``c * tanh(scores / c)``.
    """
    n, h, _, head_dim = q.shape
    n_kv = k.shape[1]
    q = q.to(k.dtype).contiguous()
    out = torch.empty_like(q)
    dim_block = max(_LEAST, triton.next_power_of_2(head_dim))
    _attend_slots[(n, n_kv)](
        q, k, v, positions, out, h * head_dim, k.stride(0), k.stride(1), scale, softcap or 1.0, window or 0,
        group=h // n_kv, group_block=max(_LEAST, triton.next_power_of_2(h // n_kv)), head_dim=head_dim,
        dim_block=dim_block, key_block=max(_LEAST, _TILE // dim_block // (2 if k.element_size() > 2 else 1)),
        capped=softcap is not None, windowed=window is not None, num_warps=4,
    )  # fmt: skip
    return out
