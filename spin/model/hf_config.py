"""What a Hugging Face folder's config.json asks for, and whether a torchtune model computes that.

Shapes are the business of :mod:`spin.model.hf`. Here is what they cannot tell: with another rotary table, window,
scale or norm epsilon the weights load, and every logit is wrong. Whatever config.json leaves out has the default of
transformers' config class of its family.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from spin.core.errors import CheckpointError
from spin.model.gemma2 import gemma2_caps
from spin.model.torchtune import GemmaNormEmbeddings, GemmaRMSNorm

log = logging.getLogger(__name__)

CONFIG = "config.json"

_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
}
# By model_type: the keys that the family's own code reads, with the defaults of its config class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _COMMON
    | {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    "gemma": _COMMON
    | {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,  # what transformers 4 read
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    "gemma2": _COMMON
    | {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
    },
    "phi3": _COMMON
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
}


@dataclass(frozen=True)
class Layout:
    """How one of torchtune's model types lies in a folder.

    Args:
        families (tuple[str, ...]): the model_type of config.json that it may meet; a folder of another family would
            convert into nonsense or fail late.
        builder (str): torchtune's component builder of such models.
        halves (bool): after conversion the rotary embedding pairs dimension i with i + d / 2, as transformers does;
            else 2 i with 2 i + 1.
    """

    families: tuple[str, ...]
    builder: str
    halves: bool = False


# By the names of torchtune.training.checkpointing.ModelType.
LAYOUTS = {
    "LLAMA2": Layout(("llama",), "torchtune.models.llama2.llama2"),
    "LLAMA3": Layout(("llama",), "torchtune.models.llama3_1.llama3_1"),
    "LLAMA3_2": Layout(("llama",), "torchtune.models.llama3_2.llama3_2"),
    "MISTRAL": Layout(("mistral", "llama"), "torchtune.models.mistral.mistral"),
    "GEMMA": Layout(("gemma",), "torchtune.models.gemma.gemma"),
    "GEMMA2": Layout(("gemma2",), "torchtune.models.gemma2.gemma2"),
    "QWEN2": Layout(("qwen2",), "torchtune.models.qwen2.qwen2", halves=True),
    "PHI3_MINI": Layout(("phi3",), "torchtune.models.phi3.phi3", halves=True),
    "PHI4": Layout(("phi3",), "torchtune.models.phi3.phi3", halves=True),
}

# Keys that change no logits.
_IGNORED = (
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
_HARMLESS = frozenset(_IGNORED.split())
# Keys that other families have, with the values that change nothing. None changes nothing either.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False,),
    "attention_chunk_size": (0,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "attn_temperature_tuning": (False, 0),
    "no_rope_layer_interval": (0,),
    "num_kv_shared_layers": (0,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rope_ratio": (1,),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "rope_percent": (1,),
    "alibi": (False,),
    "use_alibi": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_qk_layernorm": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "clip_qkv": (0,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "lm_head_bias": (False,),
}
_SCALES = re.compile(r"multiplier|scal(e|ing)|soft_?cap|^query_pre_attn_scalar$")

# ---- 1. Values: types and ranges


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**53


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_COUNT = (_is_count, "a whole number, 1 or more")
_POSITIVE = (_is_positive, "a number above 0")
_FLAG = (_is_flag, "true or false")
_TEXT = (_is_text, "text")
_TEXTS = (_are(_is_text), "a list of texts")
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_TOKENS = (
    lambda value: _is_token(value) or (isinstance(value, list) and bool(value) and all(map(_is_token, value))),
    "a token id, 0 or more, or a list of them",
)
_Kind = tuple[Callable[[Any], bool], str]
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "max_position_embeddings", "original_max_position_embeddings", "sliding_window"),
        _COUNT,
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
         "final_logit_softcapping"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"),
        _FLAG,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _TEXT),
    **dict.fromkeys(("layer_types", "architectures"), _TEXTS),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), _OBJECT),
    **dict.fromkeys(("eos_token_id", "bos_token_id"), _TOKENS),
    "pad_token_id": (lambda value: type(value) is int and value >= -1, "a token id (or -1, for none)"),
    "max_window_layers": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
}  # fmt: skip
_ROPE_KINDS: dict[str, _Kind] = {
    "rope_type": _TEXT,
    "type": _TEXT,
    **dict.fromkeys(
        ("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "attention_factor",
         "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        _POSITIVE,
    ),
    "original_max_position_embeddings": _COUNT,
    "truncate": _FLAG,
    **dict.fromkeys(("short_factor", "long_factor"), (_are(_is_positive), "a list of numbers above 0")),
}  # fmt: skip
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# Those that may not be null: transformers would fail, or take null for something else.
_NEVER_NULL = (
    "hidden_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps tie_word_embeddings attention_bias "
    "mlp_bias use_sliding_window hidden_act query_pre_attn_scalar max_position_embeddings max_window_layers"
)


def check_values(config: dict[str, Any], file: Path) -> None:
    """Checks the types and ranges of what is read of a config; all faults are in one error.

    Args:
        config (dict[str, Any]): content of a config.json.
        file (Path): where it comes from.

    Raises:
        CheckpointError: If a value cannot be one of its key.
    """
    faults = _faults_of(config, _KINDS, "", _NEVER_NULL.split())
    for name in ("rope_scaling", "rope_parameters"):
        for where, rope in _rope_objects(config.get(name), name):
            faults += _faults_of(rope, _ROPE_KINDS, f"{where}.", ())
    if not faults:
        heads, kv_heads, width = config["num_attention_heads"], config.get("num_key_value_heads"), config["hidden_size"]
        if not config.get("head_dim") and width % heads:
            faults.append(f"hidden_size is {width} and num_attention_heads {heads}: expected a multiple, or head_dim")
        if kv_heads and heads % kv_heads:
            faults.append(f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}: expected a multiple")
    if faults:
        raise CheckpointError(
            "\n  ".join([f"{file}: {len(faults)} values that no model can have:", *faults])
            if len(faults) > 1
            else f"{file}: {faults[0]}. Put the original's value there."
        )


def _faults_of(values: dict[str, Any], kinds: dict[str, _Kind], prefix: str, never_null: Any) -> list[str]:
    return [
        f"{prefix}{key} is {_shown(values[key])}, expected {expected}"
        for key, (fits, expected) in kinds.items()
        if key in values and (key in never_null if values[key] is None else not fits(values[key]))
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rope_objects(rope: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The rotary parameters in one value of config.json: itself, or one object for each type of layer."""
    if not isinstance(rope, dict):
        return []
    nested = [(f"{name}.{kind}", part) for kind, part in rope.items() if isinstance(part, dict)]
    return nested or [(name, rope)]


def family_of(config: dict[str, Any], model_type: str) -> str:
    """The family whose defaults a config has.

    Args:
        config (dict[str, Any]): content of a config.json.
        model_type (str): a key of ``LAYOUTS``, which says it where the config does not.

    Returns:
        str: a key of ``DEFAULTS``.
    """
    found = config.get("model_type")
    return found if found in DEFAULTS else LAYOUTS[model_type].families[0]


def settings_of(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """A config over its family's defaults.

    Args:
        config (dict[str, Any]): content of a config.json.
        model_type (str): a key of ``LAYOUTS``.

    Returns:
        dict[str, Any]: every key that the family reads has a value.
    """
    return DEFAULTS[family_of(config, model_type)] | config


def heads_of(config: dict[str, Any], model_type: str) -> dict[str, int]:
    """Heads and widths, with the family's defaults.

    Args:
        config (dict[str, Any]): content of a config.json, checked.
        model_type (str): a key of ``LAYOUTS``.

    Returns:
        dict[str, int]: ``num_heads``, ``num_kv_heads``, ``dim`` and ``head_dim``, as torchtune's converters take them.
    """
    values = settings_of(config, model_type)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return {
        "num_heads": heads,
        "num_kv_heads": values["num_key_value_heads"] or heads,
        "dim": width,
        "head_dim": values["head_dim"] or width // heads,
    }


# ---- 2. What config.json asks for, against what the model computes


def check_model(model: nn.Module, config: dict[str, Any], model_type: str, file: Path) -> None:
    """Compares everything in a config that changes logits with what a built model computes.

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
    if not len(layers) or getattr(layers[0], "attn", None) is None:
        return
    asked = Asked(model, config, model_type)
    check_shapes(layers, asked, file)
    faults = [
        *_rotary_faults(layers, asked, layout.halves),
        *_window_faults(layers, asked),
        *_attention_faults(layers, asked),
        *_layer_faults(model, layers, asked),
        *_foreign_faults(asked),
    ]
    if faults:
        raise CheckpointError(
            "\n  ".join(
                [f"{file} asks for what the config's model does not compute; its logits would be wrong:", *faults]
            )
            + f"\nGive the model section what {CONFIG} says: {layout.builder} takes these values as arguments, and "
            "builders that are named after a size have fixed ones. What no argument can give needs another model."
        )


class Asked:
    """What a config asks for, with its family's defaults.

    Args:
        model (nn.Module): the torchtune decoder that it is asked of; gives the positions that a run can reach.
        config (dict[str, Any]): content of config.json, checked by :func:`check_values`.
        model_type (str): a key of ``LAYOUTS``.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], model_type: str) -> None:
        self.given, self.family = config, family_of(config, model_type)
        self.values = settings_of(config, model_type)
        self.heads = heads_of(config, model_type)
        self.head_dim = self.heads["head_dim"]
        self.num_layers: int = self.values["num_hidden_layers"]
        self.context = _context(model)

    def windows(self) -> list[int | None]:
        """The sliding window of each layer in positions; None sees everything."""
        window = self.values.get("sliding_window")
        if self.family == "qwen2" and not self.values["use_sliding_window"]:
            window = None
        if window is None or self.family not in ("mistral", "qwen2", "gemma2", "phi3"):
            return [None] * self.num_layers
        if self.family in ("mistral", "phi3"):
            return [window] * self.num_layers
        types = self.layer_types()
        return [window if kind == "sliding_attention" else None for kind in types]

    def layer_types(self) -> list[str]:
        """``sliding_attention`` or ``full_attention`` for each layer, as the family's config class fills it in."""
        if self.values.get("layer_types") is not None:
            return list(self.values["layer_types"])
        if self.family == "gemma2":
            slides = [index % 2 == 0 for index in range(self.num_layers)]
        else:
            slides = [index >= self.values.get("max_window_layers", 0) for index in range(self.num_layers)]
        return ["sliding_attention" if each else "full_attention" for each in slides]

    def ropes(self) -> dict[str | None, tuple[str, dict[str, Any]]]:
        """The rotary parameters, by type of layer or for all (None), each with the key that holds them.

        transformers 5 writes ``rope_parameters``; transformers 4 wrote ``rope_theta`` and ``rope_scaling``, which still
        goes first.
        """
        key = "rope_scaling" if self.values["rope_scaling"] else "rope_parameters"
        parts = _rope_objects(self.values[key], key) or [(key, {})]
        ropes: dict[str | None, tuple[str, dict[str, Any]]] = {}
        for where, part in parts:
            rope = {name: value for name, value in part.items() if value is not None}
            kind = rope.pop("type", "default")
            rope.setdefault("rope_type", kind)
            if self.family == "phi3" and rope["rope_type"] in ("su", "yarn"):
                rope["rope_type"] = "longrope"
            rope.setdefault("rope_theta", self.values["rope_theta"] or 10_000.0)
            rope.setdefault("partial_rotary_factor", self.values["partial_rotary_factor"] or 1.0)
            original = self.values.get("original_max_position_embeddings")
            if original is not None and where == key and rope["rope_type"] in ("llama3", "yarn", "longrope"):
                rope["original_max_position_embeddings"] = original  # beside the parameters it goes first
            rope.setdefault("original_max_position_embeddings", original or self.values["max_position_embeddings"])
            ropes[None if where == key else where.removeprefix(f"{key}.")] = (where, rope)
        return ropes


def _context(model: nn.Module) -> int:
    """Positions that a run can reach: rows of packed pairs may be longer, and ``model.max_seq_len`` with them."""
    attention: Any = model.layers[0].attn  # type: ignore[index, union-attr]
    limits = [getattr(part, "max_seq_len", None) for part in (model, attention, attention.pos_embeddings)]
    return min(limit for limit in limits if isinstance(limit, int))


def check_shapes(layers: Any, asked: Asked, file: Path) -> None:
    """Compares the number of layers, and each layer's heads.

    Args:
        layers (Any): of a torchtune decoder.
        asked (Asked): what the config asks for.
        file (Path): the config.json.

    Raises:
        CheckpointError: If they differ.
    """
    expected = {
        "layers": ([len(layers)], asked.num_layers),
        "attention heads": ([layer.attn.num_heads for layer in layers], asked.heads["num_heads"]),
        "key/value heads": ([layer.attn.num_kv_heads for layer in layers], asked.heads["num_kv_heads"]),
        "head dimension": ([layer.attn.head_dim for layer in layers], asked.head_dim),
    }
    wrong = []
    for what, (ours, theirs) in expected.items():
        others = [number for number in ours if number != theirs]
        if others:
            wrong.append(f"{others[0]} {what}, {CONFIG} has {theirs}")
    types = asked.values.get("layer_types")
    if types is not None and len(types) != asked.num_layers:
        wrong.append(f"{len(layers)} layers, layer_types in {CONFIG} has {len(types)} entries")
    if wrong:
        raise CheckpointError(f"{file}: the config's model has {'; '.join(wrong)}. Use the builder of this model.")


# ---- rotary embedding


def _rotary_faults(layers: Any, asked: Asked, halves: bool) -> list[str]:
    ropes, types = asked.ropes(), asked.layer_types()
    unknown = [kind for kind in ropes if kind is not None and kind not in ("sliding_attention", "full_attention")]
    if unknown:
        return [
            f"rope_parameters has {', '.join(map(str, unknown))}, expected types of layers (sliding_attention, ...)."
        ]
    faults: list[str] = []
    seen = set()
    for layer, kind in zip(layers, types, strict=True):
        where, rope = ropes[None] if None in ropes else ropes.get(kind, ("rope_parameters", {}))
        rotary = layer.attn.pos_embeddings
        if (id(rotary), where) in seen:
            continue
        seen.add((id(rotary), where))
        if not rope:
            faults.append(f"rope_parameters has no {kind}, which layers have.")
            continue
        faults += _rope_faults(rotary, where, rope, asked, halves)
    return list(dict.fromkeys(faults))


def _rope_faults(rotary: Any, where: str, rope: dict[str, Any], asked: Asked, halves: bool) -> list[str]:
    kind = rope["rope_type"]
    if kind not in _ROPE_NEEDS:
        return [f"{where}.rope_type is {kind!r}, expected one of {', '.join(_ROPE_NEEDS)}."]
    missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
    if missing:
        return [f"{where} has rope_type {kind!r} without {', '.join(missing)}."]
    if rope.get("mrope_section"):
        return [
            f"{where}.mrope_section is {_shown(rope['mrope_section'])}: positions of several axes, of vision models."
        ]
    if rotary is None:
        return [f"{where}: the config's model has no rotary embedding."]
    partial = rope["partial_rotary_factor"]
    if partial > 1 or int(asked.head_dim * partial) < 2:
        return [f"partial_rotary_factor is {partial}, expected a share of the head above 0, 1 at most."]
    try:
        tables = [_expected_table(rope, asked, length) for length in _lengths(rope, asked)]
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        return [f"{where} is {_shown(rope)}, of which no rotary table can be computed ({error})."]
    ours = _computed_rotation(rotary, asked.head_dim)
    if ours is None:
        log.warning(
            f"{CONFIG}: the model's {type(rotary).__name__} has no table that could be compared with {where}. "
            "`python -m spin validate CONFIG --logits` compares the logits."
        )
        return []
    if all(_agree(ours, *table, asked.head_dim, halves) for table in tables):
        return []
    if all(_agree(ours, *table, asked.head_dim, not halves) for table in tables):
        return [
            f"model_type {asked.values.get('model_type', asked.family)!r}: {type(rotary).__name__} rotates other "
            "pairs of "
            "dimensions than those that the weights of checkpointer.model_type are laid out for. Use the family's "
            "builder."
        ]
    return _named_rope_faults(rotary, where, rope, asked)


def _lengths(rope: dict[str, Any], asked: Asked) -> list[int | None]:
    """The lengths for which the rotary table differs, among those that a run can reach."""
    threshold = {
        "longrope": rope["original_max_position_embeddings"],
        "dynamic": asked.values["max_position_embeddings"],
    }.get(rope["rope_type"])
    return [None] if threshold is None or asked.context <= threshold else [None, asked.context]


def _expected_table(rope: dict[str, Any], asked: Asked, length: int | None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, shape (rotated dimensions / 2,), and what cosine and sine are multiplied by."""
    if rope["rope_type"] == "default":
        dim = int(asked.head_dim * rope["partial_rotary_factor"])
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stand_in: Any = SimpleNamespace(
        **{"original_max_position_embeddings": rope["original_max_position_embeddings"]}
        if asked.family == "phi3"
        else {},
        rope_parameters=rope,
        rope_scaling=rope,
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=rope["partial_rotary_factor"],
        head_dim=asked.head_dim,
        hidden_size=asked.values["hidden_size"],
        num_attention_heads=asked.values["num_attention_heads"],
        max_position_embeddings=asked.values["max_position_embeddings"],
        standardize_rope_params=lambda: None,
    )
    table, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](stand_in, torch.device("cpu"), seq_len=length)
    return table.float(), float(factor)


@dataclass(frozen=True)
class _Rotation:
    """What a rotary embedding does: its table of inverse frequencies, if it has one, and rotated unit vectors."""

    table: torch.Tensor | None
    positions: torch.Tensor  # (p,)
    rotated: torch.Tensor  # (p, head_dim, head_dim)


def _computed_rotation(rotary: Any, head_dim: int) -> _Rotation | None:
    """Asks a rotary embedding itself, made again on the CPU with a short table; None if that cannot be."""
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
    except (RuntimeError, NotImplementedError):  # it stands on another device, and cannot be made again
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


def _named_rope_faults(rotary: Any, where: str, rope: dict[str, Any], asked: Asked) -> list[str]:
    """Which keys of the rotary parameters differ, by the names of torchtune's arguments."""
    faults = []
    name = type(rotary).__name__
    top = [key for key in ("rope_theta", "partial_rotary_factor") if asked.given.get(key) is not None]
    arguments = {"rope_theta": ("base", "rope_base"), "factor": ("scale_factor", "scale_factor")}
    if rope["rope_type"] == "llama3" and hasattr(rotary, "scale_factor"):
        arguments |= {
            "low_freq_factor": ("low_freq_factor", "low_freq_factor"),
            "high_freq_factor": ("high_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings": ("old_context_len", "old_context_len"),
        }
    for key, (attribute, argument) in arguments.items():
        ours, theirs = getattr(rotary, attribute, None), rope.get(key, 1 if key == "factor" else None)
        if key == "factor" and rope["rope_type"] not in ("default", "llama3"):
            continue
        if ours is not None and theirs is not None and float(ours) != float(theirs):
            place = key if key in top else f"{where}.{key}"
            said = "not there, which is 1" if key == "factor" and "factor" not in rope else repr(theirs)
            faults.append(f"{place} is {said}, the model computes with {argument} {ours!r}.")
    if rope["partial_rotary_factor"] != 1:
        place = "partial_rotary_factor" if "partial_rotary_factor" in top else f"{where}.partial_rotary_factor"
        faults.append(f"{place} is {rope['partial_rotary_factor']}, the model's {name} rotates the whole head.")
    plain = not hasattr(rotary, "scale_factor")
    if rope["rope_type"] not in ("default", "llama3") or (rope["rope_type"] == "llama3" and plain):
        parts = {key: value for key, value in rope.items() if key in _ROPE_NEEDS[rope["rope_type"]]}
        faults.append(
            f"{where}.rope_type is {rope['rope_type']!r} with {_shown(parts)}, the model's {name} does not scale "
            "positions "
            "so."
        )
    return faults or [f"{where} is {_shown(rope)}, the model's {name} computes another rotary table."]


# ---- windows, attention, layers


def _window_faults(layers: Any, asked: Asked) -> list[str]:
    kinds = set(asked.values.get("layer_types") or ()) - {"sliding_attention", "full_attention"}
    if kinds:
        return [f"layer_types has {', '.join(sorted(kinds))}, expected full_attention or sliding_attention."]

    def reached(window: int | None) -> int | None:
        return window if window is not None and window < asked.context else None

    differing: Counter[tuple[int | None, int | None]] = Counter()
    for layer, window in zip(layers, asked.windows(), strict=True):
        ours, theirs = reached(getattr(layer.attn, "sliding_window_size", None)), reached(window)
        if ours != theirs:
            differing[ours, theirs] += 1
    keys = "layer_types, use_sliding_window, max_window_layers" if asked.family == "qwen2" else "layer_types"
    return [
        f"sliding_window is {theirs or 'off'} in {count} of {asked.num_layers} layers"
        f"{f' ({keys})' if asked.family in ('qwen2', 'gemma2') else ''}, the model's see "
        f"{f'{ours} positions' if ours else 'all'}, and its context is {asked.context}. "
        + (f"Build it with max_seq_len={theirs}: no position is then out of sight." if theirs and not ours else "")
        for (ours, theirs), count in differing.items()
    ]


def _attention_faults(layers: Any, asked: Asked) -> list[str]:
    faults = []
    scalar = asked.values["query_pre_attn_scalar"] if asked.family == "gemma2" else asked.head_dim
    scales = {getattr(layer.attn, "scaling", None) or layer.attn.head_dim**-0.5 for layer in layers}
    for scale in sorted(scales):
        if not math.isclose(scale, scalar**-0.5, rel_tol=1e-6):
            key = "query_pre_attn_scalar" if asked.family == "gemma2" else "head_dim"
            faults.append(f"{key} is {scalar}, the model's attention divides by the root of {scale**-2:.6g}.")
    if not all(getattr(layer.attn, "is_causal", True) for layer in layers):
        faults.append("the model's attention is not causal.")
    if asked.family in ("llama", "gemma", "gemma2"):
        biased = any(getattr(layer.attn.q_proj, "bias", None) is not None for layer in layers)
        if asked.values["attention_bias"] != biased:
            faults.append(
                f"attention_bias is {_json(asked.values['attention_bias'])}, the model's attention has "
                f"{'biases' if biased else 'none'}."
            )
    if asked.family == "llama":
        biased = any(getattr(getattr(layer.mlp, "w1", None), "bias", None) is not None for layer in layers)
        if asked.values["mlp_bias"] != biased:
            faults.append(
                f"mlp_bias is {_json(asked.values['mlp_bias'])}, the model's layers have "
                f"{'biases' if biased else 'none'}."
            )
    return faults


def _layer_faults(model: Any, layers: Any, asked: Asked) -> list[str]:
    faults = []
    epsilons = {
        module.eps for module in model.modules() if isinstance(getattr(module, "eps", None), float) and _is_norm(module)
    }
    wrong = [eps for eps in epsilons if not math.isclose(eps, asked.values["rms_norm_eps"], rel_tol=1e-6)]
    if wrong:
        said = "" if "rms_norm_eps" in asked.given else f" (the default of {asked.family})"
        faults.append(
            f"rms_norm_eps is {asked.values['rms_norm_eps']}{said}, the model computes with norm_eps "
            f"{', '.join(map(str, sorted(wrong)))}."
        )
    faults += _activation_faults(layers, asked)
    is_gemma = asked.family in ("gemma", "gemma2")
    if isinstance(model.tok_embeddings, GemmaNormEmbeddings) != is_gemma:
        faults.append(
            f"model_type is {asked.family!r}, whose embeddings are {'' if is_gemma else 'not '}multiplied by the "
            "root of "
            f"hidden_size; the model's are{' not' if is_gemma else ''}."
        )
    if any(isinstance(layer.sa_norm, GemmaRMSNorm) != is_gemma for layer in layers):
        faults.append(
            f"model_type is {asked.family!r}, whose norms multiply by {'1 + weight' if is_gemma else 'weight'}; the "
            f"model's multiply by {'weight' if is_gemma else '1 + weight'}."
        )
    ours = gemma2_caps(model) or (None, None)
    for key, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), ours, strict=True):
        theirs = asked.values.get(key) if asked.family == "gemma2" else None
        if theirs != cap:
            argument = "hidden_capping_value" if key.startswith("attn") else "final_capping_value"
            faults.append(f"{key} is {_json(theirs)}, the model computes with {argument} {_json(cap)}.")
    return faults


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _activation_faults(layers: Any, asked: Asked) -> list[str]:
    from transformers.activations import ACT2FN

    names: dict[str, str] = {}
    if asked.family == "gemma2":
        names["hidden_activation"] = asked.values["hidden_activation"] or "gelu_pytorch_tanh"
    else:
        names["hidden_act"] = asked.values["hidden_act"]
    if asked.family == "gemma":
        names["hidden_act"] = "gelu_pytorch_tanh" if names["hidden_act"] == "gelu" else names["hidden_act"]
        if asked.values["hidden_activation"] is not None:
            names["hidden_activation"] = asked.values["hidden_activation"]
    faults = []
    points = torch.linspace(-5, 5, 101)
    functions = {id(each): each for each in (getattr(layer.mlp, "activation", None) for layer in layers) if each}
    for key, name in names.items():
        if name not in ACT2FN:
            faults.append(f"{key} is {name!r}, which transformers does not know.")
            continue
        expected = ACT2FN[name](points)
        for function in functions.values():
            if not torch.allclose(function(points), expected, rtol=0, atol=1e-5):
                what = f"{type(function).__name__}({getattr(function, 'approximate', '')})".replace("()", "")
                faults.append(f"{key} is {name!r}, the model computes with {what}.")
                break
    return faults


def _foreign_faults(asked: Asked) -> list[str]:
    """Keys of other families that ask for something: neither transformers nor torchtune does it in this one."""
    faults = []
    known = DEFAULTS[asked.family].keys() | _HARMLESS
    for key, value in asked.given.items():
        if key == "use_bidirectional_attention":
            if value:
                faults.append(f"{key} is true, the model's attention is causal.")
            continue
        if key in known or (value is None and key != "is_causal"):  # transformers takes null for false
            continue
        if key == "layer_types":
            neutral = all(kind == "full_attention" for kind in value) or asked.family in ("mistral", "phi3")
        elif key == "sliding_window":
            neutral = value >= asked.context or asked.given.get("use_sliding_window") is False
        elif key == "query_pre_attn_scalar":
            neutral = value == asked.head_dim
        elif key == "attention_multiplier":
            neutral = _is_positive(value) and math.isclose(value, asked.head_dim**-0.5, rel_tol=1e-4)
        elif key == "no_rope_layers":
            neutral = isinstance(value, list) and all(each == 1 for each in value)
        elif key in _NEUTRAL:
            neutral = value in _NEUTRAL[key]
        elif _SCALES.search(key):
            neutral = value in (False, 1, {}, [], "")
        else:
            continue  # unknown: listed
        if not neutral:
            faults.append(
                f"{key} is {_shown(value)}, which models of model_type {asked.family!r} do not have, in torchtune "
                "or in "
                "transformers. If the weights were trained without it, remove the key."
            )
    return faults


def unknown_keys(config: dict[str, Any], model_type: str) -> list[str]:
    """Keys of a config that mean nothing known in its family.

    Args:
        config (dict[str, Any]): content of a config.json.
        model_type (str): a key of ``LAYOUTS``.

    Returns:
        list[str]: sorted.
    """
    known = DEFAULTS[family_of(config, model_type)].keys() | _HARMLESS | _KINDS.keys() | _NEUTRAL.keys()
    known |= {"no_rope_layers"}
    return sorted(
        key for key, value in config.items() if key not in known and value is not None and not _SCALES.search(key)
    )


def _json(value: Any) -> str:
    return json.dumps(value)
