"""One self-attention forward for all torchtune decoders, patched in, and the key/value cache that generation uses.

torchtune 0.6.1 copies keys and values to all query heads, measures Gemma 2's sliding window in row indices (wrong where
positions restart inside a packed row), and its cache moves all rows in lockstep. ``patch_attention`` replaces the
forward of each attention module; weights and state-dict names stay as they are.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spin.core.errors import ConfigError
from spin.model.flex import attend
from spin.model.torchtune import (
    Gemma2Attention,
    MultiHeadAttention,
    TransformerCrossAttentionLayer,
    TransformerSelfAttentionLayer,
)
from spin.pairs.row_mask import FlexMask

_KV = "spin_kv"  # the attribute of an attention module that holds its KVSlots during generation


def patch_attention(model: nn.Module) -> None:
    """Replace the forward of every self-attention module of ``model``. Doing it twice is harmless.

    Call it before ``layer.compile()`` and before sharding, or after: parameters are looked up at each call.

    The new forward takes ``mask=None`` (causal), a bool tensor of shape (b, s, s_k), True where a token may look, or a
    :class:`spin.pairs.row_mask.FlexMask`; each token must see at least one key.

    Args:
        model (nn.Module): a torchtune decoder; layers may be wrapped (activation checkpointing, FSDP2, compile).

    Raises:
        ConfigError: If there is no attention module, or one that this forward cannot stand in for.
    """
    patched = False
    for name, module in model.named_modules():
        if isinstance(module, TransformerCrossAttentionLayer):
            raise ConfigError(
                f"layer {name!r} attends to an encoder (cross-attention). SPIN trains text-only decoders: choose a "
                "model whose layers are all TransformerSelfAttentionLayer."
            )
        if isinstance(module, MultiHeadAttention | Gemma2Attention):
            _patch_module(name, module)
            patched = True
        elif isinstance(module, TransformerSelfAttentionLayer) and not isinstance(
            _unwrapped(module.attn), MultiHeadAttention | Gemma2Attention
        ):
            raise ConfigError(
                f"layer {name!r} has an attention module of class {type(_unwrapped(module.attn)).__name__}, expected "
                "MultiHeadAttention or Gemma2Attention of torchtune. Add its forward to spin/model/attention.py to "
                "train this model."
            )
    if not patched:
        raise ConfigError(
            f"{type(model).__name__} has no torchtune attention module. Build the model with a torchtune builder, e.g. "
            "torchtune.models.llama3_2.llama3_2_1b."
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    return getattr(module, "_checkpoint_wrapped_module", getattr(module, "_orig_mod", module))


def _patch_module(name: str, module: nn.Module) -> None:
    if getattr(module.forward, "__func__", None) is _forward:
        return
    base = Gemma2Attention if isinstance(module, Gemma2Attention) else MultiHeadAttention
    if not isinstance(module, Gemma2Attention):
        module.scaling = module.softcapping = module.sliding_window_size = None  # type: ignore[assignment]
    module.qk_norm_at, module.query_growth = "rotated", None  # type: ignore[assignment]
    if type(module).forward is not base.forward or "forward" in vars(module):
        raise ConfigError(
            f"attention module {name!r} ({type(module).__name__}) has a forward of its own, which would be lost. "
            "Remove that change, or add it to spin/model/attention.py."
        )
    if getattr(module, "cache_enabled", False):
        raise ConfigError(
            f"attention module {name!r} has torchtune's KV cache set up. Build the model without setup_caches()."
        )
    setattr(module, _KV, None)
    module.forward = MethodType(_forward, module)


def _forward(
    self: Any,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | FlexMask | None = None,
    input_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention: the same projections, rotary embeddings and norms as torchtune's, another core.

    ``x`` has the shape (b, s, d), and so has the result; torchtune's layers pass it as ``y`` too. ``mask`` is bool,
    shape (b, s, s_k), True where a token may look, or a packed row's for FlexAttention; None is causal. ``input_pos``
    has each token's position in its sequence, shape (b, s); None counts from 0.
    """
    b, s, _ = x.shape
    y = x if y is None else y
    q, k = self.q_proj(x), self.k_proj(y)
    if self.qk_norm_at == "whole":
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = q.view(b, s, self.num_heads, self.head_dim), k.view(b, y.shape[1], self.num_kv_heads, self.head_dim)
    if self.qk_norm_at == "head":
        q, k = self.q_norm(q), self.k_norm(k)
    v = self.v_proj(y).view(b, y.shape[1], self.num_kv_heads, self.head_dim)
    kv: KVSlots | None = getattr(self, _KV)
    norms_rotated = self.q_norm is not None and self.qk_norm_at == "rotated"
    # one kernel that rotates and writes to the cache, see spin.generators.fused
    into_cache = None if kv is None or norms_rotated else getattr(self.pos_embeddings, "into_cache", None)
    if into_cache is not None:
        q, k = into_cache(q, k, v, input_pos, *kv.places(k))  # type: ignore[union-attr]
    elif self.pos_embeddings is not None:
        q = self.pos_embeddings(q, input_pos=input_pos)
        k = self.pos_embeddings(k, input_pos=input_pos)
    if self.query_growth is not None:
        rate, period = self.query_growth
        positions = torch.arange(s, device=x.device)[None] if input_pos is None else input_pos
        q = (q * (1 + rate * torch.log1p(positions // period))[..., None, None]).to(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, s, h, hd) -> (b, h, s, hd)
    if norms_rotated:
        q, k = self.q_norm(q), self.k_norm(k)

    decodes = kv is not None and kv.view.positions is not None
    if kv is not None and into_cache is None:
        k, v = kv.update(k, v)  # a decode step gets all keys so far; a prompt its own, untouched
        q = q.to(k.dtype)

    # The one place that chooses how to attend.
    if isinstance(mask, FlexMask):
        blocks = mask.causal if self.sliding_window_size is None else mask.windowed
        out = attend(q, k, v, blocks, self.scaling, self.softcapping, hopper=mask.hopper)
    elif decodes and kv.view.kernel:  # type: ignore[union-attr]
        out = _kernel_attention(self, q, kv)  # type: ignore[arg-type]
    else:
        out = _masked_attention(self, q, k, v, mask, _visible_in_window(self, input_pos, k, decodes), decodes)
    out = out.transpose(1, 2).reshape(b, s, -1).to(x.dtype)  # (b, h, s, hd) -> (b, s, h * hd)
    return self.output_proj(out)


def _masked_attention(
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    window: torch.Tensor | None,
    decodes: bool,
) -> torch.Tensor:
    """Attention by a dense mask: q is (b, h, s, hd), k and v (b, n_kv, s_k, hd), mask (b, s, s_k) or None for causal,
    window (1 or b, s, s_k)."""
    if window is not None:
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None]
        mask = mask & window
    if self.softcapping is not None:
        return _softcapped_attention(self, q, k, v, mask)
    if decodes and mask is not None:
        return _decode_attention(q, k, v, mask, self.scaling)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[:, None],  # (b, s, s_k) -> (b, 1, s, s_k)
        dropout_p=self.attn_dropout if self.training else 0.0,
        is_causal=mask is None and self.is_causal,
        # Query heads share their group's keys inside the kernel. Measured with a dense mask of 1024 tokens, 9
        # query and 3 key heads, forward + backward on 2 CPU cores: 199 ms, against 278 ms with keys copied to all
        # heads, 221 to 223 ms with groups folded into batch or sequence. The fused CPU kernel serves it with and
        # without gradients, which keeps reference and policy bitwise equal. On an H100: 2.0 ms for all forms at
        # 4096 tokens (cuDNN).
        enable_gqa=self.num_heads != self.num_kv_heads,
        scale=self.scaling,
    )


class Attention(MultiHeadAttention):
    """The attention of decoders that are built from their folder: :func:`patch_attention` has nothing to do here.

    Args:
        qk_norm_at (str | None): ``head``, ``rotated`` or ``whole``, see :class:`spin.model.families.Family`.
        scaling (float | None): factor of q k; None is ``head_dim ** -0.5``.
        softcapping (float | None): ``c`` of ``c * tanh(scores / c)``.
        sliding_window_size (int | None): positions that a token sees, itself among them; None: all.
        query_growth (tuple[float, int] | None): b and n: queries at position p are multiplied by
            1 + b log(1 + floor(p / n)), as Llama 4 and Ministral 3 do.
        **arguments (Any): of torchtune's ``MultiHeadAttention``.
    """

    def __init__(
        self,
        *,
        qk_norm_at: str | None,
        scaling: float | None,
        softcapping: float | None,
        sliding_window_size: int | None,
        query_growth: tuple[float, int] | None = None,
        **arguments: Any,
    ) -> None:
        # torchtune wants a width that the heads divide, and uses it for nothing
        super().__init__(embed_dim=arguments["num_heads"] * arguments["head_dim"], **arguments)
        self.qk_norm_at, self.scaling, self.softcapping = qk_norm_at, scaling, softcapping
        self.sliding_window_size, self.query_growth = sliding_window_size, query_growth
        setattr(self, _KV, None)

    forward = _forward


@cache
def generation_kernels(device_type: str) -> ModuleType | None:
    """:mod:`spin.model.decode_kernels` for ``cuda``; None for the CPU, and where there is no Triton."""
    return import_module("spin.model.decode_kernels") if device_type == "cuda" and find_spec("triton") else None


def _kernel_attention(self: Any, q: torch.Tensor, kv: "KVSlots") -> torch.Tensor:
    """One new token per row against the cache, each row as far as its own position, (b, h, 1, hd) -> (b, h, 1, hd)."""
    scale = self.head_dim**-0.5 if self.scaling is None else self.scaling
    kernels: Any = generation_kernels(q.device.type)
    return kernels.attend_slots(
        q, kv.k, kv.v, kv.view.positions, scale=scale, softcap=self.softcapping, window=self.sliding_window_size
    )


def _decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """One new token per row against the cache: q (b, h, 1, hd), k and v (b, n_kv, s_k, hd), mask bool, (b, 1, s_k)."""
    b, h, _, d = q.shape
    n_kv = k.shape[1]
    if q.is_cuda or h == n_kv:  # H100, 32 rows of 700 keys: 0.06 ms, against 0.12 ms grouped
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=h != n_kv, scale=scale)
    # On CPU the group's heads stand as the queries of one key head, so each key is read once per group: bf16, 32 rows
    # of 320 keys, 9 query and 3 key heads: 8 ms, against 16 ms with enable_gqa; 8 ms both in float32.
    grouped = q.reshape(b, n_kv, h // n_kv, d)
    out = F.scaled_dot_product_attention(
        grouped, k, v, attn_mask=mask[:, None].expand(b, 1, h // n_kv, -1), scale=scale
    )
    return out.reshape(b, h, 1, d)


def _visible_in_window(
    self: Any, input_pos: torch.Tensor | None, k: torch.Tensor, cached_decode: bool
) -> torch.Tensor | None:
    """Which keys lie inside the sliding window: ``position of query - position of key < window``.

    Bool, shape (1 or b, s, s_k), or None if no key can be outside. With ``cached_decode`` the keys come from the cache,
    where the index is the position.
    """
    window, s_k = self.sliding_window_size, k.shape[2]
    by_index = input_pos is None or cached_decode
    if window is None or (by_index and s_k <= window):
        return None
    key_pos = torch.arange(s_k, device=k.device)[None] if by_index else torch.atleast_2d(input_pos)
    query_pos = key_pos if input_pos is None else torch.atleast_2d(input_pos)
    return query_pos[:, :, None] - key_pos[:, None, :] < window  # (b, s, 1) - (b, 1, s_k) -> (b, s, s_k)


def _softcapped_attention(
    self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """``softmax(c * tanh(q k scale / c) + mask) v``; no fused CPU kernel has the tanh."""
    b, h, s, d = q.shape
    n_kv, s_k = k.shape[1], k.shape[2]
    if mask is None:
        mask = torch.ones(s, s_k, dtype=torch.bool, device=q.device).tril()[None]
    scale = d**-0.5 if self.scaling is None else self.scaling
    # A group's heads become more queries of its key head.
    scores = (q * scale).reshape(b, n_kv, h // n_kv * s, d) @ k.transpose(2, 3)
    scores = torch.tanh(scores / self.softcapping) * self.softcapping
    scores = scores.view(b, n_kv, h // n_kv, s, s_k).masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(v.dtype).view(b, n_kv, h // n_kv * s, s_k)
    return (weights @ v).view(b, h, s, d)


class KVView:
    """What the next forward does with the cache; one object, shared by all layers.

    Slots hold one sequence each, its token i at index i. A decode step takes slots 0 to n - 1 and reads views of the
    cache, never copies; what stands in a slot without a sequence does not matter to the others.

    Args:
        slots (int): number of sequences that fit.
        capacity (int): number of tokens per slot; ``grow`` raises it.
        kernel (bool): decode steps attend with :func:`spin.model.decode_kernels.attend_slots`, whatever the mask says.
    """

    def __init__(self, slots: int, capacity: int, kernel: bool = False) -> None:
        self.slots = slots
        self.capacity = capacity
        self.kernel = kernel
        self.layers: list[KVSlots] = []
        self.targets: int | torch.Tensor = 0
        self.rows: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None  # None: the next forward takes prompts
        self.length = 0

    def prefill(self, slots: int | torch.Tensor) -> None:
        """The next forward takes prompts, padded on the right, and writes them from index 0 on.

        Row r goes to slot ``slots + r``, or to ``slots[r]``, int64, shape (n,).
        """
        self.targets = slots
        self.positions = None

    def decode(self, positions: torch.Tensor, length: int) -> None:
        """The next forward takes one token for each slot 0 to n - 1 and attends to the first ``length`` indices.

        Row r writes at ``positions[r]``, int64, shape (n,); ``length`` is more than all of them, and the mask's last
        dimension.
        """
        if self.rows is None:
            self.rows = torch.arange(self.slots, device=positions.device)
        self.positions = positions
        self.length = length

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens per slot, layer by layer."""
        if capacity > self.capacity:
            self.capacity = capacity
            for layer in self.layers:
                layer.grow(capacity)

    def move(self, sources: torch.Tensor | list[int], targets: torch.Tensor | list[int], length: int) -> None:
        """Copy the first ``length`` tokens of the slots ``sources`` to the slots ``targets``; no slot is in both."""
        for layer in self.layers:
            layer.move(sources, targets, length)

    def free(self) -> None:
        """Give the memory back at once; view and layers refer to each other, so that Python would do it some day."""
        for layer in self.layers:
            layer.k = layer.v = None
        self.layers.clear()


class KVSlots:
    """Keys and values of one layer, shape (slots, n_kv, capacity, head_dim) each, made at the first write.

    ``dtype`` and ``device`` are the cache's; None takes those of the first keys.
    """

    def __init__(self, view: KVView, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.view = view
        self.dtype = dtype
        self.device = device
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values, shape (b, n_kv, s, hd), as the view says; returns what to attend to.

        That is the arguments for prompts, and views of the cache of shape (b, n_kv, length, hd) for a decode step.
        """
        view = self.view
        keys, values, targets = self.places(k.transpose(1, 2))
        n, _, s, _ = k.shape
        if view.positions is None:
            where = slice(targets, targets + n) if isinstance(targets, int) else targets
            keys[where, :, :s] = k.to(keys.dtype)
            values[where, :, :s] = v.to(values.dtype)
            return k, v
        rows = view.rows[:n]  # type: ignore[index]
        keys[rows, :, view.positions] = k[:, :, 0].to(keys.dtype)  # (b, n_kv, 1, hd) -> (b, n_kv, hd)
        values[rows, :, view.positions] = v[:, :, 0].to(values.dtype)
        return keys[:n, :, : view.length], values[:n, :, : view.length]

    def places(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
        """The cache's keys and values, made for keys like k, (b, s, n_kv, hd), and the slots of its rows: of row 0, or
        of each."""
        view = self.view
        if self.k is None or self.v is None:
            shape = (view.slots, k.shape[2], view.capacity, k.shape[3])
            # Zeros, not empty: a masked key contributes 0 * v, which is NaN if v happens to be.
            self.k = torch.zeros(shape, dtype=self.dtype or k.dtype, device=self.device or k.device)
            self.v = torch.zeros_like(self.k)
        return self.k, self.v, view.targets if view.positions is None else 0

    def grow(self, capacity: int) -> None:
        """Copy into larger tensors; see ``KVView.grow``."""
        if self.k is not None and self.v is not None:
            self.k = F.pad(self.k, (0, 0, 0, capacity - self.k.shape[2]))
            self.v = F.pad(self.v, (0, 0, 0, capacity - self.v.shape[2]))

    def move(self, sources: torch.Tensor | list[int], targets: torch.Tensor | list[int], length: int) -> None:
        """Copy slots; see ``KVView.move``."""
        if self.k is not None and self.v is not None:
            self.k[targets, :, :length] = self.k[sources, :, :length]
            self.v[targets, :, :length] = self.v[sources, :, :length]


def attach_kv(
    model: nn.Module,
    slots: int,
    capacity: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    kernel: bool = False,
) -> KVView:
    """Give every patched attention module a cache. Until ``detach_kv`` its forwards write and read it.

    Args:
        model (nn.Module): after ``patch_attention``.
        slots (int): number of sequences.
        capacity (int): tokens per sequence to begin with.
        dtype (torch.dtype | None): of the cache; None takes the keys' own.
        device (torch.device | None): of the cache; None takes the keys' own.
        kernel (bool): decode with the kernel; only where there are :func:`generation_kernels`.

    Returns:
        KVView: sets what the next forward is.

    Raises:
        ConfigError: If the model is not patched.
    """
    view = KVView(slots, capacity, kernel)
    view.layers = [KVSlots(view, dtype, device) for _ in _kv_modules(model)]
    if not view.layers:
        raise ConfigError(
            "the model's attention is not patched. Call spin.model.attention.patch_attention(model) first."
        )
    reattach_kv(model, view)
    return view


def reattach_kv(model: nn.Module, view: KVView) -> None:
    """Give the caches of ``view``, which were detached, back to the same model."""
    for module, layer in zip(_kv_modules(model), view.layers, strict=True):
        setattr(module, _KV, layer)


def detach_kv(model: nn.Module) -> None:
    """Take the caches away, which frees their memory unless their view lives on; forwards are as before
    ``attach_kv``."""
    for module in _kv_modules(model):
        setattr(module, _KV, None)


def _kv_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, _KV)]
