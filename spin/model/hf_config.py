"""Whether a torchtune model computes what a Hugging Face folder's config.json asks for.

:mod:`spin.model.hf` compares shapes. Here is what they cannot show: with another rotary table, window, scale or norm
epsilon the weights load, and every logit is wrong.

Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23, and ``modeling_rope_utils.py``, whose
functions compute the scaled rotary tables that are compared with the model's own.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from spin.core.errors import CheckpointError
from spin.model.gemma2 import gemma2_caps
from spin.model.hf_families import DEFAULTS, LAYOUTS, family_of, heads_of, known_keys, settings_of
from spin.model.torchtune import GemmaNormEmbeddings, GemmaRMSNorm

log = logging.getLogger(__name__)

CONFIG = "config.json"

# ---- 1. Values: types and ranges

_T = TypeVar("_T")
_Kind = tuple[Callable[[Any], bool], str]


def _is_whole(lowest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and lowest <= value < 2**53


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_token(value: Any) -> bool:
    return _is_whole(0)(value) or (bool(value) and _is_list(_is_whole(0))(value))


def _by_key(table: dict[str, _T]) -> dict[str, _T]:
    return {key: value for keys, value in table.items() for key in keys.split()}


_COUNT = (_is_whole(1), "a whole number, 1 or more")
_POSITIVE = (_is_positive, "a number above 0")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (_is_text, "text")
_KINDS = _by_key(
    {
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
        "max_position_embeddings original_max_position_embeddings sliding_window": _COUNT,
        "rms_norm_eps rope_theta partial_rotary_factor query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping": _POSITIVE,
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_bidirectional_attention": _FLAG,
        "model_type hidden_act hidden_activation": _TEXT,
        "layer_types architectures": (_is_list(_is_text), "a list of texts"),
        "rope_scaling rope_parameters quantization_config": (lambda value: isinstance(value, dict), "an object"),
        "eos_token_id bos_token_id": (_is_token, "a token id, 0 or more, or a list of them"),
        "pad_token_id": (_is_whole(-1), "a token id (or -1, for none)"),
        "max_window_layers": (_is_whole(0), "a whole number, 0 or more"),
    }
)
_ROPE_KINDS = _by_key(
    {
        "rope_type type": _TEXT,
        "rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow "
        "mscale mscale_all_dim": _POSITIVE,
        "original_max_position_embeddings": _COUNT,
        "truncate": _FLAG,
        "short_factor long_factor": (_is_list(_is_positive), "a list of numbers above 0"),
    }
)
# transformers would fail with null in these, or take it for something else
_NEVER_NULL = (
    "hidden_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps tie_word_embeddings attention_bias "
    "mlp_bias use_sliding_window hidden_act query_pre_attn_scalar max_position_embeddings max_window_layers"
)


def check_values(config: dict[str, Any], file: Path) -> None:
    """Raises one CheckpointError that names every value of a config.json whose type or range is wrong."""
    faults = _bad_values(config, _KINDS, "")
    for name in ("rope_scaling", "rope_parameters"):
        for where, rope in _rope_objects(config.get(name), name):
            faults += _bad_values(rope, _ROPE_KINDS, f"{where}.")
    if not faults:
        heads, kv_heads, width = config["num_attention_heads"], config.get("num_key_value_heads"), config["hidden_size"]
        if not config.get("head_dim") and width % heads:
            faults.append(f"hidden_size is {width} and num_attention_heads {heads}: expected a multiple, or head_dim")
        if kv_heads and heads % kv_heads:
            faults.append(f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}: expected a multiple")
    if len(faults) > 1:
        raise CheckpointError("\n  ".join([f"{file}: {len(faults)} values that no model can have:", *faults]))
    if faults:
        raise CheckpointError(f"{file}: {faults[0]}. Put the original's value there.")


def _bad_values(values: dict[str, Any], kinds: dict[str, _Kind], prefix: str) -> list[str]:
    return [
        f"{prefix}{key} is {_shown(values[key])}, expected {expected}"
        for key, (fits, expected) in kinds.items()
        if key in values and (prefix + key in _NEVER_NULL.split() if values[key] is None else not fits(values[key]))
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rope_objects(rope: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The rotary parameters in one value of config.json: itself, or one object for each type of layer."""
    if not isinstance(rope, dict):
        return []
    nested = [(f"{name}.{kind}", part) for kind, part in rope.items() if isinstance(part, dict)]
    return nested or [(name, rope)]


# ---- 2. What config.json asks for


class Asked:
    """What a checked config.json asks of a model, with its family's defaults.

    Args:
        model (nn.Module): a torchtune decoder; gives the positions that a run can reach.
        config (dict[str, Any]): content of config.json.
        model_type (str): a key of ``LAYOUTS``.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], model_type: str) -> None:
        self.given, self.family = config, family_of(config, model_type)
        self.values = settings_of(config, model_type)
        self.heads = heads_of(config, model_type)
        self.head_dim = self.heads["head_dim"]
        self.num_layers: int = self.values["num_hidden_layers"]
        attention: Any = model.layers[0].attn  # type: ignore[index, union-attr]
        limits = [getattr(part, "max_seq_len", None) for part in (model, attention, attention.pos_embeddings)]
        # rows of packed pairs may be longer, and model.max_seq_len with them
        self.context: int = min(limit for limit in limits if isinstance(limit, int))

    def windows(self) -> list[int | None]:
        """The sliding window of each layer in positions; None sees everything."""
        window = self.values.get("sliding_window")
        if self.family in ("mistral", "phi3"):
            return [window] * self.num_layers
        if self.family == "gemma2" or (self.family == "qwen2" and self.values["use_sliding_window"]):
            return [window if kind == "sliding_attention" else None for kind in self.layer_types()]
        return [None] * self.num_layers

    def reached(self, window: int | None) -> int | None:
        """A window, or None if no position that a run can reach lies outside it."""
        return window if window is not None and window < self.context else None

    def layer_types(self) -> list[str]:
        """``sliding_attention`` or ``full_attention`` for each layer, as the family's config class fills it in."""
        if self.values.get("layer_types") is not None:
            return list(self.values["layer_types"])
        first = self.values.get("max_window_layers", 0)
        slides = [i % 2 == 0 if self.family == "gemma2" else i >= first for i in range(self.num_layers)]
        return ["sliding_attention" if each else "full_attention" for each in slides]

    def ropes(self) -> dict[str | None, tuple[str, dict[str, Any]]]:
        """The rotary parameters, by type of layer or for all (None), each with the key that holds them.

        transformers 5 writes ``rope_parameters``; ``rope_theta`` and ``rope_scaling`` of transformers 4 still go first.
        """
        key = "rope_scaling" if self.values["rope_scaling"] else "rope_parameters"
        ropes: dict[str | None, tuple[str, dict[str, Any]]] = {}
        for where, part in _rope_objects(self.values[key], key) or [(key, {})]:
            rope = {name: value for name, value in part.items() if value is not None}
            kind = rope.pop("type", "default")
            rope.setdefault("rope_type", kind)
            if self.family == "phi3" and rope["rope_type"] in ("su", "yarn"):
                rope["rope_type"] = "longrope"
            rope.setdefault("rope_theta", self.values["rope_theta"] or 10_000.0)
            rope.setdefault("partial_rotary_factor", self.values["partial_rotary_factor"] or 1.0)
            original = self.values.get("original_max_position_embeddings")
            if original is not None and where == key and rope["rope_type"] in ("llama3", "yarn", "longrope"):
                rope["original_max_position_embeddings"] = original  # next to the rotary parameters it goes first
            rope.setdefault("original_max_position_embeddings", original or self.values["max_position_embeddings"])
            ropes[None if where == key else where.removeprefix(f"{key}.")] = (where, rope)
        return ropes


# ---- 3. Against what the model computes


def check_model(model: nn.Module, config: dict[str, Any], model_type: str, file: Path) -> None:
    """Compares everything in a config.json that changes logits with what a built model computes.

    Args:
        model (nn.Module): a torchtune decoder on any device, sharded or plain, with or without adapters.
        config (dict[str, Any]): content of config.json, checked by :func:`check_values`.
        model_type (str): a key of ``LAYOUTS``.
        file (Path): the config.json.

    Raises:
        CheckpointError: If the model would compute other logits than transformers does; all differences are named.
    """
    layout = LAYOUTS[model_type]
    found = config.get("model_type")
    if found is not None and found not in layout.families:
        raise CheckpointError(
            f"{file}: model_type is {found!r}, but the config's model_type {model_type} reads "
            f"{' or '.join(layout.families)}. Change checkpointer.model_type or checkpoint_dir."
        )
    layers = getattr(model, "layers", [])
    if model_type == "HF":
        return
    if not len(layers) or getattr(layers[0], "attn", None) is None:
        return
    asked = Asked(model, config, model_type)
    check_shapes(layers, asked, file)
    faults = [
        *_rotary_faults(layers, asked, layout.halves),
        *_window_faults(layers, asked),
        *(
            f"{key} is {_shown(theirs)}{'' if key in config else f' (the default of {asked.family})'}, the model "
            f"computes with {argument} {_shown(value)}."
            for key, theirs, ours, argument in _compared(model, layers, asked)
            for value in ours
            if not _same(value, theirs)
        ),
        *_family_faults(model, layers, asked),
        *_activation_faults(layers, asked),
        *_foreign_faults(asked),
    ]
    if faults:
        raise CheckpointError(
            "\n  ".join([f"{file} asks for what the config's model does not compute:", *faults])
            + f"\nThe logits would be wrong. Give the model section what {CONFIG} says: {layout.builder} takes these "
            "values as arguments, and builders that are named after a size have fixed ones. What no argument can give "
            "needs another model."
        )


def check_shapes(layers: Any, asked: Asked, file: Path) -> None:
    """Raises a CheckpointError if the number of layers, or a layer's heads, are not those of a config.json."""
    wrong = []
    for what, ours, theirs in (
        ("layers", [len(layers)], asked.num_layers),
        ("attention heads", [layer.attn.num_heads for layer in layers], asked.heads["num_heads"]),
        ("key/value heads", [layer.attn.num_kv_heads for layer in layers], asked.heads["num_kv_heads"]),
        ("head dimension", [layer.attn.head_dim for layer in layers], asked.head_dim),
    ):
        wrong += [f"{number} {what}, {CONFIG} has {theirs}" for number in ours if number != theirs][:1]
    types = asked.values.get("layer_types")
    if types is not None and len(types) != asked.num_layers:
        wrong.append(f"{len(layers)} layers, layer_types in {CONFIG} has {len(types)} entries")
    if wrong:
        raise CheckpointError(f"{file}: the config's model has {'; '.join(wrong)}. Use the builder of this model.")


def _compared(model: Any, layers: Any, asked: Asked) -> Iterator[tuple[str, Any, Iterable[Any], str]]:
    """The plain values: key, what config.json asks for, what the layers have, and torchtune's argument for it."""
    values, is_gemma2 = asked.values, asked.family == "gemma2"
    attentions = [layer.attn for layer in layers]
    scales = {getattr(each, "scaling", None) or each.head_dim**-0.5 for each in attentions}
    key = "query_pre_attn_scalar" if is_gemma2 else "head_dim"
    yield key, values[key] if is_gemma2 else asked.head_dim, [round(scale**-2, 6) for scale in scales], key
    key = "use_bidirectional_attention"
    yield key, bool(values.get(key)), {not getattr(each, "is_causal", True) for each in attentions}, key
    for key, linears in (
        ("attention_bias", [each.q_proj for each in attentions]),
        ("mlp_bias", [getattr(layer.mlp, "w1", None) for layer in layers]),
    ):
        if key in DEFAULTS[asked.family]:
            yield key, values[key], [any(getattr(each, "bias", None) is not None for each in linears)], key
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    epsilons = {module.eps for module in norms if isinstance(getattr(module, "eps", None), float)}
    yield "rms_norm_eps", values["rms_norm_eps"], epsilons, "norm_eps"
    caps = gemma2_caps(model) or (None, None)
    for key, cap, argument in (
        ("attn_logit_softcapping", caps[0], "hidden_capping_value"),
        ("final_logit_softcapping", caps[1], "final_capping_value"),
    ):
        yield key, values.get(key) if is_gemma2 else None, [cap], argument


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=2e-6)
    return bool(ours == theirs)


def _family_faults(model: Any, layers: Any, asked: Asked) -> Iterator[str]:
    """What torchtune and transformers do for all Gemmas and for no other family."""
    expected = asked.family in ("gemma", "gemma2")
    embeddings, norms = "are {}multiplied by the root of hidden_size", "multiply by {}weight"
    if isinstance(model.tok_embeddings, GemmaNormEmbeddings) != expected:
        theirs, ours = embeddings.format("" if expected else "not "), embeddings.format("not " if expected else "")
        yield f"model_type is {asked.family!r}, whose embeddings {theirs}; the model's {ours}."
    if any(isinstance(layer.sa_norm, GemmaRMSNorm) != expected for layer in layers):
        theirs, ours = norms.format("1 + " if expected else ""), norms.format("" if expected else "1 + ")
        yield f"model_type is {asked.family!r}, whose norms {theirs}; the model's {ours}."


def _window_faults(layers: Any, asked: Asked) -> Iterator[str]:
    unknown = set(asked.values.get("layer_types") or ()) - {"sliding_attention", "full_attention"}
    if unknown:
        yield f"layer_types has {', '.join(sorted(unknown))}, expected full_attention or sliding_attention."
        return
    keys = {"qwen2": " (layer_types, use_sliding_window, max_window_layers)", "gemma2": " (layer_types)"}
    windows = Counter(
        (asked.reached(getattr(layer.attn, "sliding_window_size", None)), asked.reached(window))
        for layer, window in zip(layers, asked.windows(), strict=True)
    )
    for (ours, theirs), count in windows.items():
        if ours != theirs:
            yield (
                f"sliding_window is {theirs or 'off'} in {count} of {asked.num_layers} layers"
                f"{keys.get(asked.family, '')}, the model's see {f'{ours} positions' if ours else 'all'}, and its "
                f"context is {asked.context}."
                + ("" if ours else f" Build it with max_seq_len={theirs}: no position is then out of sight.")
            )


def _activation_faults(layers: Any, asked: Asked) -> Iterator[str]:
    from transformers.activations import ACT2FN

    names = {"hidden_act": asked.values["hidden_act"]}
    if asked.family == "gemma2":
        names = {"hidden_activation": asked.values["hidden_activation"] or "gelu_pytorch_tanh"}
    elif asked.family == "gemma":
        names = {"hidden_act": "gelu_pytorch_tanh" if names["hidden_act"] == "gelu" else names["hidden_act"]}
        if asked.values["hidden_activation"] is not None:
            names["hidden_activation"] = asked.values["hidden_activation"]
    points = torch.linspace(-5, 5, 101)
    functions = {id(each): each for each in (getattr(layer.mlp, "activation", None) for layer in layers) if each}
    for key, name in names.items():
        if name not in ACT2FN:
            yield f"{key} is {name!r}, which transformers does not know."
            continue
        expected = ACT2FN[name](points)
        wrong = [each for each in functions.values() if not torch.allclose(each(points), expected, rtol=0, atol=1e-5)]
        if wrong:
            detail = getattr(wrong[0], "approximate", "")
            ours = type(wrong[0]).__name__ + (f"({detail})" if detail else "")
            yield f"{key} is {name!r}, the model computes with {ours}."


# ---- 4. Rotary embeddings

# By rope_type: what it cannot do without
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def _rotary_faults(layers: Any, asked: Asked, halves: bool) -> list[str]:
    ropes = asked.ropes()
    unknown = [kind for kind in ropes if kind not in (None, "sliding_attention", "full_attention")]
    if unknown:
        return [
            f"rope_parameters has {', '.join(map(str, unknown))}, expected types of layers (sliding_attention, ...)."
        ]
    faults = {}  # a dict, for its order: layers share rotary embeddings and faults
    for layer, kind in zip(layers, asked.layer_types(), strict=True):
        where, rope = ropes.get(None) or ropes.get(kind, ("rope_parameters", {}))
        rotary = layer.attn.pos_embeddings
        if (id(rotary), where) not in faults:
            faults[id(rotary), where] = (
                _rope_faults(rotary, where, rope, asked, halves)
                if rope
                else [f"rope_parameters has no {kind}, which layers have."]
            )
    return list(dict.fromkeys(fault for found in faults.values() for fault in found))


def _rope_faults(rotary: Any, where: str, rope: dict[str, Any], asked: Asked, halves: bool) -> list[str]:
    kind, partial, name = rope["rope_type"], rope["partial_rotary_factor"], type(rotary).__name__
    if kind not in _ROPE_NEEDS:
        return [f"{where}.rope_type is {kind!r}, expected one of {', '.join(_ROPE_NEEDS)}."]
    missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
    if missing:
        return [f"{where} has rope_type {kind!r} without {', '.join(missing)}."]
    if rope.get("mrope_section"):
        return [
            f"{where}.mrope_section is {_shown(rope['mrope_section'])}: positions on several axes, of vision models."
        ]
    if rotary is None:
        return [f"{where}: the config's model has no rotary embedding."]
    if partial > 1 or int(asked.head_dim * partial) < 2:
        return [f"partial_rotary_factor is {partial}, expected a fraction of the head above 0, 1 at most."]
    # the lengths for which the table differs, among those that a run can reach
    threshold = {
        "longrope": rope["original_max_position_embeddings"],
        "dynamic": asked.values["max_position_embeddings"],
    }
    lengths = [None, asked.context] if asked.context > threshold.get(kind, asked.context) else [None]
    try:
        tables = [_expected_table(rope, asked, length) for length in lengths]
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        return [f"{where} is {_shown(rope)}, of which no rotary table can be computed ({error})."]
    ours = _computed_rotation(rotary, asked.head_dim)
    if ours is None:
        log.warning(
            f"{CONFIG}: the model's {name} has no table that could be compared with {where}. "
            "`python -m spin validate CONFIG --logits` compares the logits."
        )
        return []
    if all(_agree(ours, *table, asked.head_dim, halves) for table in tables):
        return []
    if all(_agree(ours, *table, asked.head_dim, not halves) for table in tables):
        return [
            f"model_type {asked.values.get('model_type', asked.family)!r}: {name} rotates other pairs of dimensions "
            "than those that the weights of checkpointer.model_type are laid out for. Use the family's builder."
        ]
    return _named_rope_faults(rotary, where, rope, asked)


def _expected_table(rope: dict[str, Any], asked: Asked, length: int | None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, shape (rotated dimensions / 2,), and what cosine and sine are multiplied by."""
    if rope["rope_type"] == "default":
        dim = int(asked.head_dim * rope["partial_rotary_factor"])
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = "original_max_position_embeddings"
    config: Any = SimpleNamespace(
        **{original: rope[original]} if asked.family == "phi3" else {},
        **{key: asked.values[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")},
        rope_parameters=rope,
        rope_scaling=rope,
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=rope["partial_rotary_factor"],
        head_dim=asked.head_dim,
        standardize_rope_params=lambda: None,
    )
    table, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=length)
    return table.float(), float(factor)


@dataclass(frozen=True)
class _Rotation:
    """What a rotary embedding does: its table of inverse frequencies, if it has one, and rotated unit vectors."""

    table: torch.Tensor | None
    positions: torch.Tensor  # (p,)
    rotated: torch.Tensor  # (p, head_dim, head_dim)


def _computed_rotation(rotary: Any, head_dim: int) -> _Rotation | None:
    """Asks a rotary embedding itself, rebuilt on the CPU with a short table; None if that cannot be."""
    fresh = copy.copy(rotary)
    if hasattr(rotary, "rope_init"):  # on the meta device, or on another one, or with a table of many positions
        fresh.__dict__.update(_buffers={}, _non_persistent_buffers_set=set())
        if type(rotary).__module__.startswith("torchtune."):
            fresh.max_seq_len = min(rotary.max_seq_len, 128)
        with torch.device("cpu"):
            fresh.rope_init()
    positions = torch.tensor([1, 3, 64]).clamp(max=getattr(fresh, "max_seq_len", 65) - 1)
    units = torch.eye(head_dim).repeat(1, len(positions), 1, 1)  # a head for each unit vector
    try:
        with torch.no_grad():
            rotated = fresh(units, input_pos=positions[None])[0]
    except (RuntimeError, NotImplementedError):  # it is on another device and has no rope_init
        return None
    table = getattr(fresh, "theta", None)
    return _Rotation(table.float() if isinstance(table, torch.Tensor) else None, positions, rotated.float())


def _agree(ours: _Rotation, table: torch.Tensor, factor: float, head_dim: int, halves: bool) -> bool:
    if ours.table is not None and (
        ours.table.shape != table.shape or not torch.allclose(ours.table, table, rtol=2e-6, atol=0)
    ):
        return False
    i = torch.arange(len(table))
    first, second = (i, i + len(table)) if halves else (2 * i, 2 * i + 1)
    angles = ours.positions[:, None] * table  # (p, pairs)
    expected = torch.eye(head_dim).repeat(len(ours.positions), 1, 1)
    expected[:, first, first] = expected[:, second, second] = angles.cos() * factor
    expected[:, first, second] = angles.sin() * factor
    expected[:, second, first] = -angles.sin() * factor
    return torch.allclose(ours.rotated, expected, rtol=0, atol=1e-4)


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
    kind, name = rope["rope_type"], type(rotary).__name__

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
    if rope["partial_rotary_factor"] != 1:
        said = rope["partial_rotary_factor"]
        faults.append(f"{place('partial_rotary_factor')} is {said}, the model's {name} rotates the whole head.")
    if kind not in ("default", "llama3") or (kind == "llama3" and not hasattr(rotary, "scale_factor")):
        parts = {key: value for key, value in rope.items() if key in _ROPE_NEEDS[kind]}
        faults.append(
            f"{where}.rope_type is {kind!r} with {_shown(parts)}, the model's {name} does not scale positions so."
        )
    return faults or [f"{where} is {_shown(rope)}, the model's {name} computes another rotary table."]


# ---- 5. Keys of other families

# Keys that change no logits
_HARMLESS = (
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "dtype torch_dtype transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id "
    "unk_token_id sep_token_id decoder_start_token_id attention_dropout resid_pdrop embd_pdrop hidden_dropout "
    "_name_or_path auto_map pretraining_tp quantization_config attn_implementation _attn_implementation "
    "_attn_implementation_autoset cache_implementation max_length unsloth_version unsloth_fixed is_llama_config "
    "transformers.js_config task task_specific_params id2label label2id output_attentions output_hidden_states "
    "return_dict torchscript tokenizer_class is_encoder_decoder is_decoder add_cross_attention "
    "chunk_size_feed_forward problem_type finetuning_task use_return_dict gradient_checkpointing "
    "sliding_window_size original_max_position_embeddings neuron license name_or_path model_name "
    "generation_config force_bos_token_to_be_generated"
)
# By key of another family: the values that change nothing, as null does, or a test for them
_NEUTRAL = _by_key(
    {
        "use_sliding_window use_bidirectional_attention use_mrope rope_interleaved alibi use_alibi qk_norm use_qk_norm "
        "qk_layernorm use_qk_layernorm parallel_attn use_parallel_residual lm_head_bias": (False,),
        "attention_chunk_size no_rope_layer_interval num_kv_shared_layers clip_qkv": (0,),
        "rope_ratio rotary_pct rotary_percent rope_percent scale_emb": (1,),
        "rope_local_base_freq scale_depth dim_model_base": (),
        "num_experts num_local_experts n_routed_experts": (0, 1),
        "attn_temperature_tuning": (False, 0),
        "is_causal": (True,),
    }
)
_NEUTRAL_IF: dict[str, Callable[[Any, Asked], bool]] = {
    "layer_types": lambda value, asked: (
        all(kind == "full_attention" for kind in value) or asked.family in ("mistral", "phi3")
    ),
    "sliding_window": lambda value, asked: value >= asked.context or asked.given.get("use_sliding_window") is False,
    "query_pre_attn_scalar": lambda value, asked: value == asked.head_dim,
    "attention_multiplier": lambda value, asked: (
        _is_positive(value) and math.isclose(value, asked.head_dim**-0.5, rel_tol=1e-4)
    ),
    "no_rope_layers": lambda value, asked: isinstance(value, list) and all(each == 1 for each in value),
}
_SCALES = re.compile(r"multiplier|scal(e|ing)|soft_?cap")  # by name: 1 changes nothing


def _foreign_faults(asked: Asked) -> Iterator[str]:
    """Keys of other families that ask for something: neither transformers nor torchtune does it in this one."""
    for key, value in asked.given.items():
        # is_causal is checked even if it is null, which transformers takes for false
        if key in known_keys(asked.family) or key in _HARMLESS.split() or (value is None and key != "is_causal"):
            continue
        if key in _NEUTRAL_IF:
            changes_nothing = _NEUTRAL_IF[key](value, asked)
        elif key in _NEUTRAL:
            changes_nothing = value in _NEUTRAL[key]
        else:  # what is not known here is for unknown_keys
            changes_nothing = not _SCALES.search(key) or value in (False, 1, {}, [], "")
        if not changes_nothing:
            yield (
                f"{key} is {_shown(value)}, which models of model_type {asked.family!r} do not have, in torchtune or "
                "in transformers. If the weights were trained without it, remove the key."
            )


def unknown_keys(config: dict[str, Any], model_type: str) -> list[str]:
    """Keys of a config.json that mean nothing known in its family, sorted."""
    known = known_keys(family_of(config, model_type)) | _KINDS.keys() | _NEUTRAL.keys() | _NEUTRAL_IF.keys()
    known |= set(_HARMLESS.split())
    return sorted(
        key for key, value in config.items() if key not in known and value is not None and not _SCALES.search(key)
    )
