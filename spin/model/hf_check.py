"""Whether a model computes what a Hugging Face folder's config.json asks for.

:mod:`spin.model.hf` compares shapes. Here is what they cannot show: with another rotary table, window, scale or norm
epsilon the weights load, and every logit is wrong. What config.json asks for is the decoder that
:mod:`spin.model.decoder` builds from it, whose logits are those of transformers (tests/model/test_decoder.py).
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spin.core.errors import CheckpointError
from spin.model.attention import Attention
from spin.model.decoder import DecoderBuilder
from spin.model.families import keys_read
from spin.model.gemma2 import final_softcap, gemma2_caps
from spin.model.hf_config import CONFIG, ROPE_NEEDS, foreign_faults, shown
from spin.model.hf_families import LAYOUTS
from spin.model.modules import LayerNorm1P, ParallelLayer, PlainLayerNorm, Rope, Scaled, ScalelessLayerNorm
from spin.model.moe import MoE
from spin.model.torchtune import FeedForward, GemmaNormEmbeddings, GemmaRMSNorm, RMSNorm

log = logging.getLogger(__name__)


def check_model(model: nn.Module, config: dict[str, Any], model_type: str, file: Path) -> None:
    """Compares everything in a config.json that changes logits with what a built model computes.

    Args:
        model (nn.Module): a torchtune decoder on any device, sharded or plain, with or without adapters.
        config (dict[str, Any]): content of config.json, checked by :func:`spin.model.hf_config.check_values`.
        model_type (str): a key of ``LAYOUTS``.
        file (Path): the config.json.

    Raises:
        CheckpointError: If the model would compute other logits than transformers does; all differences are named.
    """
    layers = _layers(model)
    if not layers or getattr(layers[0], "attn", None) is None:
        return
    asked = Asked(layers, config, model_type, file)
    context, c = context_of(model), asked.config
    faults = [
        *_rotary_faults(layers, asked, context),
        *_window_faults(layers, asked, context),
        *_value_faults(model, layers, asked),
        *_activation_faults(layers, asked),
        *foreign_faults(config, c, context),
    ]
    if faults:
        raise CheckpointError(
            "\n  ".join([f"{file} asks for what the config's model does not compute:", *faults])
            + f"\nThe logits would be wrong. Give the model section what {CONFIG} says: {LAYOUTS[model_type].builder} "
            "takes these values as arguments (spin.model.from_hf reads them from its path), and builders that are "
            "named after a size have fixed ones. What no argument can give needs another model."
        )


def context_of(model: Any) -> int:
    """The positions that a run can reach: rows of packed pairs may be longer, and model.max_seq_len with them."""
    attention = _layers(model)[0].attn
    limits = [getattr(part, "max_seq_len", None) for part in (model, attention, attention.pos_embeddings)]
    return min(limit for limit in limits if isinstance(limit, int))


def reached(window: int | None, context: int) -> int | None:
    """A window, or None if no position of a context lies outside it."""
    return window if window is not None and window < context else None


def _layers(model: Any) -> list[Any]:
    return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in getattr(model, "layers", [])]


class Asked:
    """The decoder that a config.json asks for, on the meta device.

    Args:
        layers (list[Any]): of the model that is compared with it.
        config (dict[str, Any]): content of config.json.
        model_type (str): a key of ``LAYOUTS``.
        file (Path): the config.json.

    Raises:
        CheckpointError: If it is of another family or depth, or nothing that can be built.
    """

    def __init__(self, layers: list[Any], config: dict[str, Any], model_type: str, file: Path) -> None:
        layout = LAYOUTS[model_type]
        family = config.get("model_type", layout.families[0])
        own, found = isinstance(layers[0].attn, Attention), f"{file}: model_type is {family!r}, "
        if own != (model_type == "HF"):
            if own:
                raise CheckpointError(
                    f"{found}and the model is built by spin.model.from_hf: leave checkpointer.model_type "
                    f"({model_type}) out, or set HF."
                )
            fitting = [name for name, other in LAYOUTS.items() if family in other.families and name != "HF"]
            by_builder = f"set checkpointer.model_type to {' or '.join(fitting)}, or " if fitting else ""
            raise CheckpointError(
                f"{found}and the model is built by one of torchtune's builders: {by_builder}set model to _component_: "
                f"spin.model.from_hf with path: {file.parent}."
            )
        if family not in layout.families:
            raise CheckpointError(
                f"{found}but the config's model_type {model_type} reads {' or '.join(layout.families)}. Change "
                "checkpointer.model_type or checkpoint_dir."
            )
        self.given, self.builder = config, DecoderBuilder(file, {"model_type": family} | config, max_seq_len=1)
        self.config: Any = self.builder.config
        if self.config.num_hidden_layers != len(layers):
            raise CheckpointError(
                f"{file}: the config's model has {len(layers)} layers, {CONFIG} has {self.config.num_hidden_layers} "
                "(num_hidden_layers). Use the builder of this model."
            )
        try:
            with torch.device("meta"):
                self.decoder: Any = self.builder.decoder(None)
        except RuntimeError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file}: no model has these sizes ({error}).") from error
        self.layers: list[Any] = list(self.decoder.layers)
        self.halves = layout.halves

    def rope_of(self, rope: Rope) -> tuple[str, dict[str, Any]]:
        """The rotary parameters that one of the decoder's embeddings is made of, and the key that holds them."""
        kind = next(kind for kind, each in self.builder.ropes.items() if each is rope)
        key = "rope_scaling" if self.given.get("rope_scaling") else "rope_parameters"
        return key if kind is None else f"{key}.{kind}", self.builder.rope_parameters()[kind]

    def has(self, key: str) -> bool:
        """Whether the family reads a key."""
        return key in keys_read(self.config.model_type)


# ---- 1. Values

_NORMS = (LayerNorm1P, PlainLayerNorm, ScalelessLayerNorm, nn.LayerNorm, GemmaRMSNorm, RMSNorm)
_Trait = tuple[str, str]  # keys of config.json, of which a family reads one, and torchtune's argument


def _norm_kind(module: Any) -> str:
    module = getattr(module, "rms_norm", module)  # torchtune's Gemma2FinalNorm has its norm inside
    if module is None or isinstance(module, nn.Identity):
        return "none"
    if isinstance(module, Scaled):
        return f"the factor {module.factor}"
    kind = next((kind for kind in _NORMS if isinstance(module, kind)), type(module))
    return f"{kind.__name__}" + (" (1 + weight)" if kind in (GemmaRMSNorm, LayerNorm1P) else "")


def _model_traits(model: Any, layers: list[Any]) -> dict[_Trait, Any]:
    embeddings, norm = model.tok_embeddings, model.norm
    caps = gemma2_caps(model) or (getattr(layers[0].attn, "softcapping", None), final_softcap(model))
    scale = embeddings.embedding_dim**0.5 if isinstance(embeddings, GemmaNormEmbeddings) else 1.0
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return {
        ("vocab_size", "vocab_size"): embeddings.num_embeddings,
        ("hidden_size", "embed_dim"): embeddings.embedding_dim,
        ("embedding_multiplier model_type", "embeddings multiplied by"): getattr(embeddings, "output_factor", scale),
        ("model_type", "a last norm"): _norm_kind(norm),
        ("rms_norm_eps layer_norm_eps norm_epsilon norm_eps model_type", "norm_eps"): {
            module.eps for module in norms if isinstance(getattr(module, "eps", None), float)
        },
        ("logits_scaling logit_scale model_type", "logits multiplied by"): getattr(norm, "output_factor", 1.0),
        ("attn_logit_softcapping model_type", "hidden_capping_value"): caps[0],
        ("final_logit_softcapping model_type", "final_capping_value"): caps[1],
    }


def _layer_traits(layer: Any) -> dict[_Trait, Any]:
    attention, mlp = layer.attn, layer.mlp
    traits: dict[_Trait, Any] = {
        ("num_attention_heads", "num_heads"): attention.num_heads,
        ("num_key_value_heads", "num_kv_heads"): attention.num_kv_heads,
        ("head_dim", "head_dim"): attention.head_dim,
        ("query_pre_attn_scalar attention_multiplier head_dim", "an attention scale of"): (
            getattr(attention, "scaling", None) or attention.head_dim**-0.5
        ),
        ("use_bidirectional_attention", "is_causal"): getattr(attention, "is_causal", True),
        ("clip_qkv model_type", "clip_qkv"): getattr(attention.q_proj, "output_limit", None),
        ("rope_parameters", "queries that grow by"): getattr(attention, "query_growth", None),
        ("use_qk_norm qk_layernorm model_type", "qk_norm"): (
            None if attention.q_norm is None else f"{_norm_kind(attention.q_norm)} {attention.qk_norm_at}"
        )
        if hasattr(attention, "q_norm")
        else None,
        ("use_parallel_residual model_type", "attention and MLP in parallel"): isinstance(layer, ParallelLayer),
        **{
            ("residual_multiplier model_type", name): _norm_kind(getattr(layer, name, None))
            for name in ("sa_norm", "sa_scale", "mlp_norm", "mlp_scale")
        },
        **{
            (f"{keys} use_bias model_type", keys.split()[0]): getattr(getattr(attention, part), "bias", None)
            is not None
            for part, keys in (
                ("q_proj", "attention_bias use_qkv_bias"),
                ("output_proj", "attention_out_bias attention_bias"),
            )
        },
        ("model_type", "an MLP of class"): "FeedForward" if isinstance(mlp, FeedForward) else type(mlp).__name__,
    }
    if isinstance(mlp, FeedForward):
        traits |= {
            ("intermediate_size", "intermediate_dim"): mlp.w1.weight.shape[0],
            ("mlp_bias use_bias model_type", "mlp_bias"): getattr(mlp.w1, "bias", None) is not None,
            ("model_type", "a gated MLP"): mlp.w3 is not None,
        }
    elif isinstance(mlp, MoE):
        traits |= {
            ("num_experts", "num_experts"): mlp.experts,
            ("num_experts_per_tok", "num_experts_per_tok"): mlp.top_k,
            ("norm_topk_prob", "norm_topk_prob"): mlp.normalized,
            ("moe_intermediate_size", "moe_intermediate_size"): mlp.hidden,
        }
    return traits


def _value_faults(model: Any, layers: list[Any], asked: Asked) -> Iterator[str]:
    compared = [(_model_traits(model, layers), _model_traits(asked.decoder, asked.layers))]
    compared += [
        (_layer_traits(mine), _layer_traits(theirs)) for mine, theirs in zip(layers, asked.layers, strict=True)
    ]
    seen: dict[tuple[str, str, str, str], None] = {}  # a dict, for its order
    for mine, theirs in compared:
        for (keys, argument), expected in theirs.items():
            for ours in sorted(found) if isinstance(found := mine.get((keys, argument)), set) else [found]:
                wanted = expected if isinstance(expected, set) else [expected]
                if not all(_same(ours, value) for value in wanted):
                    seen[keys, argument, _text(ours), _text(expected)] = None
    for keys, argument, is_now, should_be in seen:
        key = next((key for key in keys.split() if asked.has(key) or key in asked.given), keys.split()[-1])
        if key in ("vocab_size", "intermediate_size") and key not in asked.given:
            continue  # the stored tensors tell
        value = shown(getattr(asked.config, key, None))
        default = "" if key in asked.given else f" (the default of {asked.config.model_type})"
        place = "" if value == should_be else f" in place of {should_be}"
        yield f"{key} is {value}{default}, the model computes with {argument} {is_now}{place}."


def _text(value: Any) -> str:
    return shown(next(iter(value), None) if isinstance(value, set) else value)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=2e-6)
    return bool(ours == theirs)


def _window_faults(layers: list[Any], asked: Asked, context: int) -> Iterator[str]:
    windows = Counter(
        tuple(reached(getattr(each.attn, "sliding_window_size", None), context) for each in pair)
        for pair in zip(layers, asked.layers, strict=True)
    )
    keys = ", ".join(key for key in ("layer_types", "use_sliding_window", "max_window_layers") if asked.has(key))
    for (ours, theirs), count in windows.items():
        if ours != theirs:
            yield (
                f"sliding_window is {theirs or 'off'} in {count} of {len(layers)} layers"
                f"{f' ({keys})' if keys else ''}, the model's see {f'{ours} positions' if ours else 'all'}, "
                f"and its context is {context}."
                + ("" if ours else f" Build it with max_seq_len={theirs}: no position is then out of sight.")
            )


def _activation_faults(layers: list[Any], asked: Asked) -> Iterator[str]:
    key = "hidden_activation" if asked.has("hidden_activation") else "hidden_act"
    points = torch.linspace(-5, 5, 101)
    pairs = {
        (str(ours), str(theirs)): (ours, theirs)
        for ours, theirs in (
            (getattr(mine.mlp, "activation", None), getattr(other.mlp, "activation", None))
            for mine, other in zip(layers, asked.layers, strict=True)
        )
        if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module)
    }
    for (name, _), (ours, theirs) in pairs.items():
        if any(True for each in (ours, theirs) for _ in each.parameters()):  # trained ones are on any device
            same = type(ours) is type(theirs)
        else:
            same = torch.allclose(ours(points), theirs(points), rtol=0, atol=1e-5)
        if not same:
            yield f"{key} is {shown(getattr(asked.config, key))}, the model computes with {name}."


# ---- 2. Rotary embeddings


def _rotary_faults(layers: list[Any], asked: Asked, context: int) -> list[str]:
    faults = {}  # a dict, for its order: layers share rotary embeddings and faults
    for mine, theirs in zip(layers, asked.layers, strict=True):
        ours, rope = mine.attn.pos_embeddings, theirs.attn.pos_embeddings
        if (id(ours), id(rope)) in faults or (mine.attn.head_dim != theirs.attn.head_dim):
            continue
        faults[id(ours), id(rope)] = _rope_faults(ours, rope, asked, context)
    return list(dict.fromkeys(fault for found in faults.values() for fault in found))


def _rope_faults(rotary: Any, rope: Rope | None, asked: Asked, context: int) -> list[str]:
    head_dim, name = asked.builder.head_dim, type(rotary).__name__
    if rope is None:
        key = "no_rope_layers" if asked.has("no_rope_layers") else "layer_types"
        return [] if rotary is None else [f"{key}: the model rotates queries and keys of layers that have no rotation."]
    where, parameters = asked.rope_of(rope)
    if rotary is None:
        return [f"{where}: the config's model has no rotary embedding in layers that {CONFIG} rotates."]
    limits = asked.builder.unscaled_positions()
    if limits and context > min(limits):
        return [
            f"{where}.rope_type is {parameters['rope_type']!r}, whose rotation depends on the length of a sequence "
            f"beyond {min(limits)} positions, and the model's context is {context}. Build it with "
            f"max_seq_len={min(limits)}."
        ]
    ours, theirs = (_rotation(each, head_dim) for each in (rotary, rope))
    if ours is None or theirs is None:
        log.warning(
            f"{CONFIG}: the model's {name} has no table that could be compared with {where}. "
            "`--logits` has `spin validate` compare the logits."
        )
        return []
    whole, even = torch.arange(head_dim), head_dim // 2 * 2
    # where torchtune's Llama has the dimensions of transformers'
    pairs = torch.cat([whole[:even].view(2, -1).T.flatten(), whole[even:]])
    orders = [whole, pairs, pairs.argsort()]
    same = [torch.allclose(ours, theirs[:, order][:, :, order], rtol=0, atol=1e-3) for order in orders]
    if same[0 if asked.halves else 1]:
        return []
    if any(same):
        return [
            f"model_type {asked.config.model_type!r}: {name} rotates other pairs of dimensions than those that the "
            "weights of checkpointer.model_type are laid out for. Use the family's builder."
        ]
    return _named_rope_faults(rotary, where, parameters, asked)


def _rotation(rotary: Any, head_dim: int) -> torch.Tensor | None:
    """Unit vectors that a rotary embedding turned, (3 positions, head_dim, head_dim); None if it cannot be asked.

    It is rebuilt on the CPU with a short table.
    """
    fresh = copy.copy(rotary)
    if hasattr(rotary, "rope_init"):  # on the meta device, or on another one, or with a table of many positions
        fresh.__dict__.update(_buffers={}, _non_persistent_buffers_set=set())
        if isinstance(rotary, Rope) or type(rotary).__module__.startswith("torchtune."):
            fresh.max_seq_len = 1024
        with torch.device("cpu"):
            fresh.rope_init()
    # far enough for slow pairs to show, and near enough for float32
    positions = torch.tensor([1, 3, 1000]).clamp(max=getattr(fresh, "max_seq_len", 1024) - 1)
    units = torch.eye(head_dim).repeat(1, len(positions), 1, 1)  # a head for each unit vector
    try:
        with torch.no_grad():
            return fresh(units, input_pos=positions[None])[0].float()  # type: ignore[no-any-return]
    except (RuntimeError, NotImplementedError):  # it is on another device and has no rope_init
        return None


# By key of the rotary parameters: the attribute of torchtune's module, and the argument of its builder
_ROPE_ARGUMENTS = {
    "rope_theta": ("base", "rope_base"),
    "factor": ("scale_factor", "scale_factor"),
    "low_freq_factor": ("low_freq_factor", "low_freq_factor"),
    "high_freq_factor": ("high_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings": ("old_context_len", "old_context_len"),
}


def _named_rope_faults(rotary: Any, where: str, rope: dict[str, Any], asked: Asked) -> list[str]:
    """Which keys of the rotary parameters differ, by the names of torchtune's arguments."""
    kind, name, partial = rope["rope_type"], type(rotary).__name__, rope.get("partial_rotary_factor") or 1

    def place(key: str) -> str:
        at_top = key in ("rope_theta", "partial_rotary_factor") and asked.given.get(key) is not None
        return key if at_top else f"{where}.{key}"

    faults = []
    for key, (attribute, argument) in _ROPE_ARGUMENTS.items():
        named = kind == "llama3" or key == "rope_theta" or (key == "factor" and kind == "default")
        ours, theirs = getattr(rotary, attribute, None), rope.get(key, 1 if key == "factor" else None)
        if named and ours is not None and theirs is not None and float(ours) != float(theirs):
            said = repr(theirs) if key in rope else "not there, which is 1"
            faults.append(f"{place(key)} is {said}, the model computes with {argument} {ours!r}.")
    if partial != 1 and not isinstance(rotary, Rope):
        faults.append(f"{place('partial_rotary_factor')} is {partial}, the model's {name} rotates the whole head.")
    scales = hasattr(rotary, "scale_factor") if kind == "llama3" else kind == "default"
    if not scales and not isinstance(rotary, Rope):
        parts = {key: value for key, value in rope.items() if key in ROPE_NEEDS[kind]}
        faults.append(
            f"{where}.rope_type is {kind!r} with {shown(parts)}, the model's {name} does not scale positions so."
        )
    return faults or [f"{where} is {shown(rope)}, the model's {name} computes another rotary table."]
