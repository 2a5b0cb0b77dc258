"""The values of a config.json: types and ranges; and the keys that a family does not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spin.core.errors import CheckpointError
from spin.model.families import FAMILIES, heads_of, keys_read

CONFIG = "config.json"

# ---- 1. Values: types and ranges

_T = TypeVar("_T")
_Kind = tuple[Callable[[Any], bool], str]
MAX_LAYERS = 1000  # 8 times those of the deepest models
_MAX_SIZE = 2**24  # of vocabularies, widths and so on
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _is_whole(lowest: int, highest: int = 2**53) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and lowest <= value <= highest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_token(value: Any) -> bool:
    return _is_whole(0)(value) or (bool(value) and _is_list(_is_whole(0))(value))


def _by_key(table: dict[str, _T]) -> dict[str, _T]:
    return {key: value for keys, value in table.items() for key in keys.split()}


_COUNT = (_is_whole(1), "a whole number, 1 or more")
_MAX_EXPERTS = 4096  # of a layer
_SIZE = (_is_whole(1, _MAX_SIZE), f"a whole number, 1 or more, {_MAX_SIZE:,} at most")
_POSITIVE = (_is_positive, "a number above 0")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (_is_text, "text")
_KINDS = _by_key(
    {
        "hidden_size intermediate_size moe_intermediate_size num_attention_heads num_key_value_heads head_dim "
        "vocab_size": _SIZE,
        "num_hidden_layers": (_is_whole(1, MAX_LAYERS), f"a whole number, 1 or more, {MAX_LAYERS:,} at most"),
        "max_position_embeddings original_max_position_embeddings sliding_window decoder_sparse_step": _COUNT,
        "max_window_layers no_rope_layer_interval": (_is_whole(0, _MAX_SIZE), "a whole number, 0 or more"),
        "num_experts num_local_experts num_experts_per_tok": (
            _is_whole(0, _MAX_EXPERTS),
            f"a whole number, {_MAX_EXPERTS:,} at most",
        ),
        "rms_norm_eps layer_norm_eps norm_eps norm_epsilon rope_theta rope_local_base_freq partial_rotary_factor "
        "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping embedding_multiplier residual_multiplier "
        "attention_multiplier logits_scaling logit_scale": _POSITIVE,
        "clip_qkv": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
        "tie_word_embeddings attention_bias attention_out_bias mlp_bias qkv_bias bias use_bias use_qkv_bias "
        "use_sliding_window use_bidirectional_attention use_parallel_residual use_qk_norm qk_layernorm "
        "norm_topk_prob": _FLAG,
        "model_type hidden_act hidden_activation": _TEXT,
        "layer_types": (_is_list(lambda kind: kind in (_SLIDING, _FULL)), f"a list of {_SLIDING} and {_FULL}"),
        "architectures": (_is_list(_is_text), "a list of texts"),
        "no_rope_layers": (_is_list(_is_whole(0, 1)), "a list of 0 and 1"),
        "mlp_only_layers": (_is_list(_is_whole(0)), "a list of whole numbers"),
        "rope_scaling rope_parameters quantization_config": (lambda value: isinstance(value, dict), "an object"),
        "eos_token_id bos_token_id": (_is_token, "a token id, 0 or more, or a list of them"),
        "pad_token_id": (_is_whole(-1), "a token id (or -1, for none)"),
    }
)
_ROPE_KINDS = _by_key(
    {
        "rope_type type": _TEXT,
        "rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow "
        "mscale mscale_all_dim alpha llama_4_scaling_beta": _POSITIVE,
        "original_max_position_embeddings": _COUNT,
        "truncate": _FLAG,
        "short_factor long_factor": (_is_list(_is_positive), "a list of numbers above 0"),
    }
)
# By rope_type: what it cannot do without; phi3 calls longrope su, too
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),
}
# transformers would fail with null in these, or take it for something else
_NEVER_NULL = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps layer_norm_eps "
    "norm_eps norm_epsilon tie_word_embeddings attention_bias mlp_bias use_sliding_window hidden_act "
    "query_pre_attn_scalar max_position_embeddings max_window_layers"
)


def check_values(config: dict[str, Any], file: Path) -> None:
    """Raises one CheckpointError that names every value of a config.json whose type or range is wrong."""
    faults = _bad_values(config, _KINDS, "")
    for name in ("rope_scaling", "rope_parameters"):
        for where, rope in _rope_objects(config.get(name), name):
            faults += _bad_values(rope, _ROPE_KINDS, f"{where}.") or _rope_faults(rope, where)
    for key in ("layer_types", "no_rope_layers"):
        if not faults and config.get(key) and len(config[key]) != config["num_hidden_layers"]:
            faults.append(
                f"{key} has {len(config[key])} entries, and num_hidden_layers is {config['num_hidden_layers']}"
            )
    if len(faults) > 1:
        raise CheckpointError("\n  ".join([f"{file}: {len(faults)} values that no model can have:", *faults]))
    if faults:
        raise CheckpointError(f"{file}: {faults[0]}. Put the original's value there.")


def _bad_values(values: dict[str, Any], kinds: dict[str, _Kind], prefix: str) -> list[str]:
    return [
        f"{prefix}{key} is {shown(values[key])}, expected {expected}"
        for key, (fits, expected) in kinds.items()
        if key in values and (prefix + key in _NEVER_NULL.split() if values[key] is None else not fits(values[key]))
    ]


def shown(value: Any) -> str:
    """A value for a message, as JSON has it where that differs, 80 characters at most."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rope_objects(rope: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The rotary parameters in one value of config.json: itself, or one object for each type of layer."""
    if not isinstance(rope, dict):
        return []
    nested = [(f"{name}.{kind}", part) for kind, part in rope.items() if isinstance(part, dict)]
    return nested or [(name, rope)]


def _rope_faults(rope: dict[str, Any], where: str) -> list[str]:
    kind, layers = rope.get("rope_type", rope.get("type", "default")), where.partition(".")[2]
    if layers not in ("", _SLIDING, _FULL):
        return [f"{where} is an object, expected one for {_SLIDING} and one for {_FULL}, or numbers"]
    if kind not in ROPE_NEEDS:
        return [f"{where}.rope_type is {shown(kind)}, expected one of {', '.join(ROPE_NEEDS)}"]
    missing = [key for key in ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        return [f"{where} has rope_type {kind!r} without {', '.join(missing)}"]
    if rope.get("mrope_section"):
        return [f"{where}.mrope_section is {shown(rope['mrope_section'])}: positions on several axes, of vision models"]
    return []


# ---- 2. Keys that the family does not read

# They change no logits, or another key says the same
_HARMLESS = (
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "partial_rotary_factor max_position_embeddings tie_word_embeddings attention_bias mlp_bias max_window_layers "
    "dtype torch_dtype transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id "
    "unk_token_id sep_token_id cls_token_id mask_token_id eod_token_id decoder_start_token_id attention_dropout "
    "resid_pdrop embd_pdrop hidden_dropout residual_dropout embedding_dropout attn_pdrop initializer_factor "
    "_name_or_path auto_map pretraining_tp quantization_config attn_implementation _attn_implementation "
    "_attn_implementation_autoset cache_implementation max_length min_length unsloth_version unsloth_fixed "
    "is_llama_config transformers.js_config task task_specific_params id2label label2id output_attentions "
    "output_hidden_states output_scores output_router_logits router_aux_loss_coef return_dict _model_name_or_path "
    "return_dict_in_generate torchscript tf_legacy_loss use_bfloat16 pruned_heads tokenizer_class "
    "is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder prefix "
    "chunk_size_feed_forward problem_type finetuning_task use_return_dict gradient_checkpointing "
    "sliding_window_size original_max_position_embeddings neuron license name_or_path model_name "
    "generation_config force_bos_token_to_be_generated forced_bos_token_id forced_eos_token_id do_sample temperature "
    "top_k top_p typical_p num_beams num_beam_groups diversity_penalty num_return_sequences length_penalty "
    "repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping bad_words_ids "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens model_max_length "
    "use_flash_attention use_flash_attn flash_attention num_logits_to_keep"
)
# By model_type: what real folders have besides, and transformers does not read or reads under another name
_LEFTOVERS = _by_key(
    {
        "gemma3_text": "rope_local_base_freq sliding_window_pattern mm_tokens_per_image boi_token_index "
        "eoi_token_index image_token_index",
        "starcoder2": "activation_function attention_softmax_in_fp32 scale_attention_softmax_in_fp32 "
        "scale_attn_weights layer_norm_epsilon norm_type mlp_type",
        "cohere cohere2": "use_embedding_sharing use_gated_activation use_parallel_block use_parallel_embedding "
        "position_embedding_type order_of_interleaved_layers layer_switch sliding_window_pattern "
        "_sliding_window_pattern",
        "phi3": "full_attn_mod interpolate_factor",
        "hunyuan_v1_dense": "add_classification_head attention_head_dim cla_share_factor class_num dense_list "
        "im_end_id im_newline_id im_start_id image_token_id mask_init_id norm_type org_vocab_size pad_id pool_type "
        "skip_cls_token text_end_id text_start_id use_rotary_pos_emb video_start_id video_end_id "
        "max_position_embeddings_base",
        "apertus": "mlp_bias",
        "exaone4": "reorder_and_upcast_attn layer_norm_epsilon embed_dropout num_layers activation_function",
        "stablelm": "norm_eps num_heads rotary_scaling_factor",
        "olmo olmo2 olmo3": "sliding_window_pattern",
        "ernie4_5": "compression_ratio",
    }
)
# By key of another family: the values that change nothing, as null does, or a test for them
_NEUTRAL = _by_key(
    {
        "use_sliding_window use_bidirectional_attention use_mrope alibi use_alibi lm_head_bias use_cla post_norm": (
            False,
        ),
        "attention_chunk_size no_rope_layer_interval num_kv_shared_layers clip_qkv": (0,),
        "rope_ratio rotary_percent rope_percent scale_emb": (1,),
        "rope_local_base_freq scale_depth dim_model_base": (),
        "num_experts num_local_experts n_routed_experts": (0, 1),
        "attn_temperature_tuning": (False, 0),
        "is_causal": (True,),
    }
)
_NEUTRAL_IF: dict[str, Callable[[Any, Any, int], bool]] = {  # of the value, transformers' config and the context
    "layer_types": lambda value, c, context: (
        FAMILIES[c.model_type].windows == "all" or all(kind == _FULL for kind in value)
    ),
    "sliding_window": lambda value, c, context: value >= context or getattr(c, "use_sliding_window", None) is False,
    "query_pre_attn_scalar": lambda value, c, context: value == heads_of(c)[2],
    "attention_multiplier": lambda value, c, context: math.isclose(value, heads_of(c)[2] ** -0.5, rel_tol=1e-4),
    "no_rope_layers": lambda value, c, context: all(each == 1 for each in value),
    "hidden_activation": lambda value, c, context: value == c.hidden_act,
    "rope_interleaved": lambda value, c, context: value is FAMILIES[c.model_type].interleaved,
    **dict.fromkeys(
        ("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm"),
        lambda value, c, context: value is (FAMILIES[c.model_type].qk_norm is not None),
    ),
    **dict.fromkeys(
        ("parallel_attn", "use_parallel_residual"),
        lambda value, c, context: value is FAMILIES[c.model_type].parallel(c),
    ),
    **dict.fromkeys(
        ("rotary_pct", "rope_pct"),
        lambda value, c, context: value == (c.rope_parameters.get("partial_rotary_factor") or 1),
    ),
}
_SCALES = re.compile(r"multiplier|scal(e|ing)|soft_?cap")  # by name: 1 changes nothing


def _known(family: str) -> frozenset[str]:
    return keys_read(family) | set(f"{_HARMLESS} {_LEFTOVERS.get(family, '')}".split())


def foreign_faults(config: dict[str, Any], made: Any, context: int) -> list[str]:
    """Keys of other families that ask for something, which transformers does not do in this one either.

    Args:
        config (dict[str, Any]): content of config.json, checked by :func:`check_values`.
        made (Any): transformers' config of it.
        context (int): positions that a run can reach.

    Returns:
        list[str]: a sentence for each.
    """
    faults, known = [], _known(made.model_type)
    for key, value in config.items():
        # is_causal is checked even if it is null, which transformers takes for false
        if key in known or (value is None and key != "is_causal"):
            continue
        if key in _NEUTRAL_IF:
            changes_nothing = _NEUTRAL_IF[key](value, made, context)
        elif key in _NEUTRAL:
            changes_nothing = value in _NEUTRAL[key]
        else:  # what is not known here is for unknown_keys
            changes_nothing = not _SCALES.search(key) or value in (False, 1, {}, [], "")
        if not changes_nothing:
            faults.append(
                f"{key} is {shown(value)}, which models of model_type {made.model_type!r} do not have, in transformers "
                "or here. If the weights were trained without it, remove the key."
            )
    return faults


def unknown_keys(config: dict[str, Any], family: str) -> list[str]:
    """Keys of a config.json that mean nothing known in its family, sorted."""
    known = _known(family) | _NEUTRAL.keys() | _NEUTRAL_IF.keys()
    return sorted(
        key for key, value in config.items() if key not in known and value is not None and not _SCALES.search(key)
    )
