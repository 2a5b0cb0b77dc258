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
def _angles(table, position, table_row, dtype: tl.constexpr, neighbors: tl.constexpr, rounded: tl.constexpr,
            half: tl.constexpr, half_block: tl.constexpr):  # fmt: skip
    """Cosine and sine of each pair, (1, half_block); those behind the pairs turn nothing."""
    pair = tl.arange(0, half_block)
    line = table + position * table_row
    if neighbors:  # cos and sin of a pair side by side
        cos = tl.load(line + 2 * pair, mask=pair < half, other=1.0)
        sin = tl.load(line + 2 * pair + 1, mask=pair < half, other=0.0)
    else:  # all cosines twice, then all sines twice
        cos = tl.load(line + pair, mask=pair < half, other=1.0)
        sin = tl.load(line + 2 * half + pair, mask=pair < half, other=0.0)
    if rounded:
        cos = cos.to(dtype)
        sin = sin.to(dtype)
    return cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]


@triton.jit
def _put(values, at, inside, out, cache, cache_at, cached: tl.constexpr):
    values = values.to(out.dtype.element_ty)
    tl.store(out + at, values, mask=inside)
    if cached:
        tl.store(cache + cache_at, values.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    x, out, cache, cos, sin, heads, cache_head, cached: tl.constexpr, interleaved: tl.constexpr, head_dim: tl.constexpr,
    half: tl.constexpr, half_block: tl.constexpr, head_block: tl.constexpr,
):  # fmt: skip
    """All heads of a token, contiguous in x and out; the cache's heads are ``cache_head`` apart."""
    head = tl.arange(0, head_block)[:, None]
    if interleaved:  # whole heads are loaded, and their pairs split in registers
        dim = tl.arange(0, 2 * half_block)[None, :]
        inside = (head < heads) & (dim < head_dim)
        value = tl.load(x + head * head_dim + dim, mask=inside, other=0.0).to(tl.float32)
        left, right = tl.split(tl.reshape(value, (head_block, half_block, 2)))
        turned = tl.join(left * cos - right * sin, right * cos + left * sin)
        turned = tl.reshape(turned, (head_block, 2 * half_block))
        _put(turned, head * head_dim + dim, inside, out, cache, head * cache_head + dim, cached)
    else:
        pair = tl.arange(0, half_block)[None, :]
        inside = (head < heads) & (pair < half)
        at = head * head_dim + pair
        cache_at = head * cache_head + pair
        left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
        _put(left * cos - right * sin, at, inside, out, cache, cache_at, cached)
        _put(right * cos + left * sin, at + half, inside, out, cache, cache_at + half, cached)
        for start in tl.static_range(2 * half, head_dim, half_block):
            inside = (head < heads) & (pair + start < head_dim)
            value = tl.load(x + at + start, mask=inside, other=0.0)
            _put(value, at + start, inside, out, cache, cache_at + start, cached)


@triton.jit
def _rotate(
    x, table, positions, out, length, heads, table_row, has_positions: tl.constexpr, interleaved: tl.constexpr,
    neighbors: tl.constexpr, rounded: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
    half_block: tl.constexpr, head_block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token) if has_positions else token % length
    cos, sin = _angles(table, position, table_row, x.dtype.element_ty, neighbors, rounded, half, half_block)
    at = token * heads * head_dim
    _turn(x + at, out + at, out, cos, sin, heads, 0, False, interleaved, head_dim, half, half_block, head_block)


@triton.jit(do_not_specialize=["length", "first_slot"])
def _rotate_into_cache(
    q, k, v, table, positions, slots, q_out, k_out, keys, values, length, first_slot, heads, key_heads, table_row,
    cache_row, cache_head, has_positions: tl.constexpr, has_slots: tl.constexpr, interleaved: tl.constexpr,
    neighbors: tl.constexpr, rounded: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
    half_block: tl.constexpr, head_block: tl.constexpr, key_block: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token // length
    position = tl.load(positions + token) if has_positions else token % length
    slot = tl.load(slots + row) if has_slots else first_slot + row
    cos, sin = _angles(table, position, table_row, q.dtype.element_ty, neighbors, rounded, half, half_block)
    at = token * heads * head_dim
    _turn(q + at, q_out + at, q_out, cos, sin, heads, 0, False, interleaved, head_dim, half, half_block, head_block)
    at = token * key_heads * head_dim
    place = slot * cache_row + position * head_dim
    _turn(
        k + at, k_out + at, keys + place, cos, sin, key_heads, cache_head, True, interleaved, head_dim, half,
        half_block, key_block,
    )  # fmt: skip
    head = tl.arange(0, key_block)[:, None]
    dim = tl.arange(0, dim_block)[None, :]
    inside = (head < key_heads) & (dim < head_dim)
    value = tl.load(v + at + head * head_dim + dim, mask=inside, other=0.0)
    tl.store(values + place + head * cache_head + dim, value.to(values.dtype.element_ty), mask=inside)


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
    x: torch.Tensor, input_pos: torch.Tensor | None = None, *, table: torch.Tensor, interleaved: bool,
    rounded: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotary position embeddings, computed in fp32.

    x is queries or keys, shape (b, s, h, hd). ``input_pos`` has their positions, int64, shape (b, s); None counts from
    0. ``table`` is fp32 with a line for each position: cosine and sine of each pair, shape (p, pairs, 2), or all
    cosines and all sines, both twice, shape (p, 2 * hd). With ``interleaved`` a pair's two dimensions are neighbors;
    else they are ``pairs`` apart. Dimensions behind the pairs stay as they are. With ``rounded`` the table is first
    rounded to the dtype of ``x``.
    """
    b, s, heads, head_dim = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    _rotate[(b * s,)](
        x, table, x if input_pos is None else input_pos.contiguous(), out, s, heads, table[0].numel(),
        has_positions=input_pos is not None, head_block=triton.next_power_of_2(heads), num_warps=4,
        **_layout(table, head_dim, interleaved, rounded),
    )  # fmt: skip
    return out


def rotate_into_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: torch.Tensor | None, keys: torch.Tensor,
    values: torch.Tensor, slots: int | torch.Tensor, *, table: torch.Tensor, interleaved: bool, rounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`rotate` for q and k, both of which are returned, and the rotated k and v written to the cache at their
    positions: bit for bit what separate steps write.

    q is (b, s, h, hd), k and v (b, s, n_kv, hd); ``keys`` and ``values`` are (slots, n_kv, capacity, hd), contiguous;
    row r goes to slot ``slots + r``, or to ``slots[r]``, int64, shape (b,).
    """
    b, s, heads, head_dim = q.shape
    key_heads = k.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    is_range = isinstance(slots, int)
    _rotate_into_cache[(b * s,)](
        q, k, v, table, q if input_pos is None else input_pos.contiguous(), q if is_range else slots, q_out, k_out,
        keys, values, s, slots if is_range else 0, heads, key_heads, table[0].numel(), keys.stride(0), keys.stride(1),
        has_positions=input_pos is not None, has_slots=not is_range, head_block=triton.next_power_of_2(heads),
        key_block=triton.next_power_of_2(key_heads), dim_block=triton.next_power_of_2(head_dim), num_warps=4,
        **_layout(table, head_dim, interleaved, rounded),
    )  # fmt: skip
    return q_out, k_out


def _layout(table: torch.Tensor, head_dim: int, interleaved: bool, rounded: bool) -> dict[str, int]:
    """What the kernels know at compile time about rotary embeddings."""
    pairs = table.shape[1] if table.dim() == 3 else head_dim // 2
    block = triton.next_power_of_2(head_dim) // 2 if interleaved else triton.next_power_of_2(pairs)
    return {
        "interleaved": interleaved, "rounded": rounded, "neighbors": table.dim() == 3, "head_dim": head_dim,
        "half": pairs, "half_block": block,
    }  # fmt: skip


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
