"""The names of a decoder's weights in torchtune and in a Hugging Face folder, for models that are built from it.

Values stay as they are: only what a family stores as one tensor (queries, keys and values; gate and up) is split, and
experts, which are stored one by one, lie one below the other.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from spin.core.errors import CheckpointError
from spin.model.families import FAMILIES
from spin.model.modules import NORMS

Tensors = dict[str, torch.Tensor]

_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
CONSTANTS = {"beta": 0.5, "eps": -1e-6}  # of xIELU, stored next to its parameters
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("w1", "w3")

# Experts: the parameters of spin.model.moe.MoE, to what is stored of each expert, and where all are stored as one
_ROUTER = "mlp.gate.weight"
_EXPERTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
STACKED = {f"mlp.experts.{name}_proj": tuple(f"mlp.experts.{{}}.{part}.weight" for part in parts)
           for name, parts in _EXPERTS.items()}  # fmt: skip


@cache
def _in_layer(family: str) -> dict[str, str]:
    """The modules of a layer: torchtune's name to the stored one; fused parts keep torchtune's."""
    row = FAMILIES[family]
    names = {f"attn.{part}": f"self_attn.{part}" for part in _QKV}
    names |= {"attn.output_proj": "self_attn.o_proj", "mlp.activation": "mlp.act_fn"}
    names |= {f"mlp.{part}": f"mlp.{stored}" for part, stored in zip(("w1", "w2", "w3"), row.mlp, strict=False)}
    names |= {
        f"attn.{part}": f"self_attn.{stored}" for part, stored in zip(("q_norm", "k_norm"), row.qk_names, strict=True)
    }
    return names | dict(row.norms)


@cache
def _fused(family: str) -> dict[str, tuple[str, ...]]:
    """Stored modules that hold several of torchtune's, one below the other."""
    row = FAMILIES[family]
    fused = {"self_attn.qkv_proj": tuple(f"attn.{part}" for part in _QKV)} if row.fused_qkv else {}
    return fused | ({"mlp.gate_up_proj": tuple(f"mlp.{part}" for part in _GATE_UP)} if row.fused_mlp else {})


def _split_name(name: str, prefix: str) -> tuple[str | None, str, str]:
    """A weight's layer, module and parameter: of ``layers.3.attn.q_proj.weight`` 3, ``attn.q_proj`` and ``weight``."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith(f"{prefix}layers."):
        return None, module, leaf
    layer, _, inside = module.removeprefix(f"{prefix}layers.").partition(".")
    inside, dot, head = inside.partition(".norms.")  # one for each head, which the leaf names
    return layer, inside, f"norms.{head}.{leaf}" if dot else leaf


def is_fused(family: str) -> bool:
    """Whether a folder stores several weights of a layer as one."""
    return bool(_fused(family))


def to_hf(tensors: Tensors, *, family: str, experts: int = 0, **heads: int) -> Tensors:
    """torchtune's tensors under the names of a folder; what it stores as one comes together."""
    whole_of = {part: whole for whole, parts in _fused(family).items() for part in parts}
    found: Tensors = {}
    pieces: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, module, leaf = _split_name(name, "")
        leaf = "weight" if leaf == "scale" else leaf
        if layer is None:
            found[f"{_OUTSIDE[module]}.{leaf}"] = tensor
        elif module == "mlp":
            found |= {f"model.layers.{layer}.{key}": part for key, part in _by_expert(leaf, tensor, experts).items()}
        elif module in whole_of:
            pieces.setdefault(f"model.layers.{layer}.{whole_of[module]}.{leaf}", []).append(tensor)
        else:
            if leaf == "alpha_p":  # xIELU's constants are stored next to it
                stored = f"model.layers.{layer}.mlp.act_fn."
                found |= {stored + key: tensor.new_tensor(value) for key, value in CONSTANTS.items()}
            found[f"model.layers.{layer}.{_in_layer(family)[module]}.{leaf}"] = tensor
    return found | {name: torch.cat(parts) for name, parts in pieces.items()}


def _by_expert(leaf: str, tensor: torch.Tensor, experts: int) -> Tensors:
    """A parameter of a sparse MLP, as it is stored in a layer."""
    if leaf == "router":
        return {_ROUTER: tensor}
    names = STACKED[f"mlp.experts.{leaf}_proj"]
    rows = tensor.unflatten(0, (experts, len(names), -1))
    return {name.format(i): rows[i, part] for i in range(experts) for part, name in enumerate(names)}


def to_tune(
    tensors: Tensors, *, family: str, num_heads: int, num_kv_heads: int, head_dim: int, **others: int
) -> Tensors:
    """A folder's tensors under torchtune's names."""
    inside = {stored: name for name, stored in _in_layer(family).items()}
    outside = {stored: name for name, stored in _OUTSIDE.items()}
    has_scale = not issubclass(NORMS[FAMILIES[family].norm], nn.LayerNorm)
    rows = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    found: Tensors = {}
    experts: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, module, leaf = _split_name(name, "model.")
        if module == "mlp.act_fn" and leaf in CONSTANTS:
            continue
        if f"{module}.{leaf}" == _ROUTER:
            found[f"layers.{layer}.mlp.router"] = tensor
            continue
        if f"{module}.{leaf}" in STACKED:
            found[f"layers.{layer}.mlp.{leaf.removesuffix('_proj')}"] = tensor.flatten(0, 1)
            continue
        if module.startswith("mlp.experts."):
            number, part = module.removeprefix("mlp.experts.").split(".")
            parameter = next(name for name, parts in _EXPERTS.items() if part in parts)
            where = int(number), _EXPERTS[parameter].index(part)
            experts.setdefault(f"layers.{layer}.mlp.{parameter}", {})[where] = tensor
            continue
        if layer is not None and module in _fused(family):
            parts = _fused(family)[module]
            split = tensor.split(rows) if len(parts) == len(rows) else tensor.chunk(2)
            found |= {f"layers.{layer}.{part}.{leaf}": piece for part, piece in zip(parts, split, strict=True)}
            continue
        known = outside if layer is None else inside
        if module not in known:
            raise CheckpointError(f"no module of this family is stored as {name}.")
        tune = known[module] if layer is None else f"layers.{layer}.{known[module]}"
        found[f"{tune}.{'scale' if has_scale and 'norm' in module else leaf}"] = tensor
    return found | {name: torch.cat([parts[where] for where in sorted(parts)]) for name, parts in experts.items()}
