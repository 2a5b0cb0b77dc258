"""What config.json asks for and a model does not compute is refused; the logits of transformers say who is right."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from spin.core.errors import CheckpointError
from spin.model.build import build_model
from spin.model.hf import check_hf_folder
from spin.model.hf_folder import read_hf_config
from spin.model.logits_check import compare_logits
from tests.families import FAMILIES, MODEL_TYPES, edit_config

LONGROPE = "rope_scaling.rope_type is 'longrope'"
LONG = [1.0 + 0.3 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def folder_of(copy_of):
    """A copy of a family's folder with another config.json, rotary keys as transformers 4 wrote them."""

    def make(name: str, **changes: Any) -> Path:
        folder = copy_of(name)
        if changes.keys() & {"rope_theta", "rope_scaling"}:
            changes = {"rope_parameters": None, "rope_theta": theta_of(name)} | changes
        edit_config(folder, **changes)
        return folder

    return make


def theta_of(name: str) -> float:
    return {"llama3_1": 5e5, "llama3_2": 5e5, "qwen2": 1e6, "qwen2_5": 1e6, "phi4": 2.5e5}.get(name, 1e4)


@cache
def section_of(name: str):
    """The config's ``model`` section that builds a family."""
    builder = FAMILIES[name].args[0]  # type: ignore[attr-defined]
    module = builder.__module__.rpartition("._")[0]
    return OmegaConf.create(
        {"_component_": f"{module}.{builder.__name__}"} | FAMILIES[name].keywords  # type: ignore[attr-defined]
    )


def check(name: str, folder: Path) -> None:
    check_hf_folder(build_model(section_of(name), torch.float32), folder, MODEL_TYPES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_right_folders_pass_and_have_the_logits_of_transformers(name, folders, caplog):
    check(name, folders[name])
    assert not caplog.records
    report = compare_logits(section_of(name), folders[name], MODEL_TYPES[name])
    assert not report.is_fault and report.difference < 1e-3, str(report)


def rope_scaling(**values: Any) -> dict[str, Any]:
    return {"rope_scaling": values}


# What config.json asks for, and what the error says. All but those marked are wrong by 0.01 and more in the logits.
WRONG = [
    ("phi3", rope_scaling(type="longrope", short_factor=LONG, long_factor=LONG), LONGROPE),
    # short factors of one up to 64 positions, others beyond: the run reaches 128
    ("phi3", {"original_max_position_embeddings": 64, "max_position_embeddings": 64}
     | rope_scaling(rope_type="longrope", short_factor=[1.0] * 8, long_factor=LONG), "is 'longrope'"),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
     "partial_rotary_factor is 0.75, the model's Phi3RotaryPositionalEmbeddings rotates the whole head"),
    ("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama2", rope_scaling(type="linear", factor=4.0), "rope_scaling.rope_type is 'linear' with {'factor': 4.0}"),
    ("llama2", rope_scaling(rope_type="yarn", factor=4.0), "rope_scaling.rope_type is 'yarn'"),
    ("llama3_1", rope_scaling(rope_type="yarn", factor=8.0), "rope_scaling.rope_type is 'yarn'"),
    ("mistral", rope_scaling(rope_type="linear", factor=2.0), "rope_scaling.rope_type is 'linear'"),
    ("gemma", rope_scaling(rope_type="linear", factor=2.0), "rope_scaling.rope_type is 'linear'"),
    ("gemma2", rope_scaling(rope_type="yarn", factor=4.0), "rope_scaling.rope_type is 'yarn'"),
    ("qwen2", rope_scaling(type="yarn", factor=4.0, original_max_position_embeddings=32), "is 'yarn'"),
    ("qwen2_5", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_parameters"),
    # no effect up to max_position_embeddings, which the run goes beyond
    ("llama2", {"max_position_embeddings": 32} | rope_scaling(type="dynamic", factor=4.0), "rope_type is 'dynamic'"),
    ("llama2", {"rope_theta": 2e4}, "rope_theta is 20000.0, the model computes with rope_base 10000"),
    ("llama2", {"rope_parameters": {"rope_theta": 2e4}}, "rope_parameters.rope_theta is 20000.0, the model computes"),
    ("phi4", {"rope_theta": 1e4}, "rope_theta is 10000.0, the model computes with rope_base 250000"),
    ("phi4", {"rope_parameters": None}, "rope_parameters.rope_theta is 10000.0"),
    ("llama3_2", {"rope_theta": 5e5}, "factor is not there, which is 1, the model computes with scale_factor 32"),
    ("llama3_2", rope_scaling(**LLAMA3 | {"factor": 8.0}, original_max_position_embeddings=8192), "factor is 8.0"),
    ("llama3_2", rope_scaling(**LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0},
     original_max_position_embeddings=8192), "high_freq_factor is 8.0, the model computes with high_freq_factor 4"),
    ("llama3_2", rope_scaling(**LLAMA3, original_max_position_embeddings=64),
     "original_max_position_embeddings is 64, the model computes with old_context_len 8192"),
    ("llama3_1", {"original_max_position_embeddings": 64}, "original_max_position_embeddings is 64, the model"),
    ("llama2", rope_scaling(**LLAMA3, original_max_position_embeddings=64), "rope_scaling.rope_type is 'llama3'"),
    ("phi3", {"sliding_window": 32}, "is 32 in 2 of 2 layers, the model's see all, and its context is 128"),
    ("mistral", {"sliding_window": 32}, "Build it with max_seq_len=32"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": None},
     "sliding_window is 32 in 1 of 2 layers"),
    ("qwen2_5", {"use_sliding_window": True, "sliding_window": 32,
     "layer_types": ["sliding_attention", "full_attention"]}, "sliding_window is 32 in 1 of 2 layers"),
    ("gemma2", {"sliding_window": 16}, "is 16 in 1 of 2 layers (layer_types), the model's see 8 positions"),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is off in 1 of 2 layers"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "sliding_window is off"),
    ("gemma2", {"query_pre_attn_scalar": 64},
     "query_pre_attn_scalar is 64, the model computes with an attention scale of 0.204"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is null, the model computes with"),
    ("gemma2", {"attn_logit_softcapping": 2.0}, "hidden_capping_value 5.0"),
    ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, the model computes with"),
    ("gemma2", {"hidden_activation": "silu"},
     "hidden_activation is 'silu', the model computes with GELU(approximate='tanh')"),
    ("gemma", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', the model computes with SiLU"),
    ("llama2", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, the model computes with norm_eps 1e-05"),
    ("qwen2", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01"),
]  # fmt: skip
# Wrong as well, where transformers ignores the key, cannot build it, or the difference is small.
REFUSED = [
    ("phi3", rope_scaling(type="su", short_factor=LONG, long_factor=LONG),
     "keys in `rope_parameters` for 'rope_type'='longrope'"),
    ("llama2", {"attention_bias": True}, "attention_bias is true, the model computes with attention_bias false"),
    ("llama2", {"mlp_bias": True}, "mlp_bias is true"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ("llama2", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, the model computes with norm_eps 1e-05"),
    ("llama2", {"rope_theta": 10001.0}, "rope_theta is 10001.0"),
    ("llama2", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama2", rope_scaling(rope_type="llama4", factor=2.0), "rope_type is 'llama4', expected one of default, linear"),
    ("llama2", rope_scaling(rope_type="linear"), "rope_scaling has rope_type 'linear' without factor"),
    ("qwen2", rope_scaling(type="mrope", mrope_section=[2, 3, 3]), "rope_type is 'mrope'"),
    ("qwen2", rope_scaling(type="default", mrope_section=[2, 3, 3]), "mrope_section"),
    ("gemma2", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
     "rope_parameters.full_attention.rope_theta is 1000000.0"),
    ("gemma2", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "has no full_attention"),
    ("llama2", {"hidden_act": "swoosh"}, "hidden_act is 'swoosh'; expected one of silu"),
    ("llama2", {"residual_multiplier": 0.22}, "residual_multiplier is 0.22, which models of model_type 'llama' do not"),
    ("llama2", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    ("mistral", {"logits_scaling": 8}, "logits_scaling is 8"),
    ("qwen2", {"logit_scale": 0.0625}, "logit_scale is 0.0625"),
    ("llama2", {"attention_multiplier": 0.0156}, "attention_multiplier is 0.0156"),
    ("llama2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama2", {"sliding_window": 32}, "sliding_window is 32, which models of model_type 'llama' do not have"),
    ("llama2", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
    ("llama2", {"layer_types": ["chunked_attention"] * 2},
     "layer_types is ['chunked_attention', 'chunked_attention'], expected a list"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, and num_hidden_layers is 2"),
    ("llama2", {"use_qk_norm": True}, "use_qk_norm is true"),
    ("llama2", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
    ("llama2", {"is_causal": False}, "is_causal is false"),
    ("llama2", {"is_causal": None}, "is_causal is null"),
    ("llama2", {"head_dim": 32}, "head_dim is 32, the model computes with head_dim 16"),
    # with other heads the weights would load, permuted wrongly
    ("llama3_2", {"num_attention_heads": 8, "head_dim": None},
     "num_attention_heads is 8, the model computes with num_heads 4"),
    ("llama3_2", {"num_key_value_heads": 4}, "num_key_value_heads is 4, the model computes with num_kv_heads 2"),
    ("llama3_2", {"num_hidden_layers": 3}, "2 layers, config.json has 3"),
    ("llama3_2", {"model_type": "qwen2"}, "model_type is 'qwen2', but the config's model_type LLAMA3_2 reads llama"),
    ("gemma", {"head_dim": None}, "'head_dim' expected int, got NoneType"),
    ("llama2", {"vocab_size": 200}, "vocab_size is 200, the model computes with vocab_size 160"),
    ("llama2", {"intermediate_size": 100}, "intermediate_size is 100, the model computes with intermediate_dim 96"),
]  # fmt: skip


def ids_of(cases):
    return [f"{name}-{'-'.join(changes)}" for name, changes, _ in cases]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=ids_of(WRONG))
def test_what_would_be_wrong_is_refused_by_key_and_is_wrong(name, changes, message, folder_of):
    folder = folder_of(name, **changes)
    with pytest.raises(CheckpointError) as caught:
        check(name, folder)
    assert message in str(caught.value) and "Give the model section what config.json says" in str(caught.value)
    report = compare_logits(section_of(name), folder, MODEL_TYPES[name])
    assert report.is_fault and report.difference > 0.01, str(report)


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=ids_of(REFUSED))
def test_what_transformers_does_not_show_is_refused_too(name, changes, message, folder_of):
    with pytest.raises(CheckpointError) as caught:
        check(name, folder_of(name, **changes))
    assert message in str(caught.value)


HARMLESS = [
    ("mistral", {"sliding_window": 128}),
    ("mistral", {"sliding_window": 4096}),
    ("phi3", {"sliding_window": 2047}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 28, "layer_types": None}),
    ("llama2", rope_scaling(type="dynamic", factor=4.0)),
    ("llama2", rope_scaling(rope_type="linear", factor=1.0)),
    ("llama2", rope_scaling(rope_type="default")),
    ("llama3_2", rope_scaling(**LLAMA3, original_max_position_embeddings=8192)),
    ("phi3", rope_scaling(type="longrope", short_factor=[1.0] * 8, long_factor=LONG)
     | {"original_max_position_embeddings": 128, "max_position_embeddings": 128}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    ("gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
    ("llama2", {"logit_scale": 1.0, "residual_multiplier": None, "attention_multiplier": 0.25, "head_dim": 16}),
    ("llama2", {"num_key_value_heads": 2, "pretraining_tp": 2, "pad_token_id": -1, "eos_token_id": [2, 3]}),
    ("qwen2", {"use_mrope": False, "attention_bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), HARMLESS, ids=[f"{n}-{'-'.join(c)}" for n, c in HARMLESS])
def test_what_changes_no_logits_passes(name, changes, folder_of, caplog):
    folder = folder_of(name, **changes)
    check(name, folder)
    assert not caplog.records
    report = compare_logits(section_of(name), folder, MODEL_TYPES[name])
    assert not report.is_fault, str(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 2**50},
            "num_hidden_layers is 1125899906842624, expected a whole number, 1 or more, 1,000",
        ),
        ({"num_hidden_layers": 3}, "2 layers, config.json has 3"),
        ({"num_attention_heads": 2, "head_dim": 16}, "do not fit the config's model"),
        ({"hidden_size": 128, "head_dim": 16}, "do not fit the config's model"),
        ({"intermediate_size": 64}, "do not fit the config's model"),
        ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'; expected one of silu"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_an_error_too(changes, message, folder_of):
    with pytest.raises(CheckpointError, match=message):
        compare_logits(section_of("llama2"), folder_of("llama2", **changes), "LLAMA2")


def test_all_differences_are_in_one_error(folder_of):
    with pytest.raises(CheckpointError) as caught:
        check("llama2", folder_of("llama2", rms_norm_eps=1e-6, rope_theta=5e5, hidden_act="gelu", logit_scale=2.0))
    assert [line.strip().split(" ")[0] for line in str(caught.value).splitlines()[1:-1]] == [
        "rope_theta", "rms_norm_eps", "hidden_act", "logit_scale",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(name, folders, tmp_path):
    """A config with sizes alone: the check refuses it if and only if the logits differ."""
    config = json.loads((folders[name] / "config.json").read_text())
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    bare = {key: config[key] for key in [*sizes.split(), "model_type"]} | (
        {"head_dim": 32} if name.startswith("gemma") else {}
    )
    bare["tie_word_embeddings"] = config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(bare))
    report = compare_logits(section_of(name), folder, MODEL_TYPES[name])
    if report.difference < 1e-4:
        check(name, folder)
    else:
        with pytest.raises(CheckpointError, match="asks for what the config's model does not compute"):
            check(name, folder)


def test_unknown_keys_are_listed_once(folder_of, caplog):
    neutral = {"_model_name_or_path": "a file in GGUF", "rope_interleaved": False, "residual_multiplier": 1.0}
    check("llama2", folder_of("llama2", zebra=1, apple={"a": 2}, **neutral))
    assert [record.message.partition("config.json: ")[2] for record in caplog.records] == [
        "keys that are not known here, and not looked at: apple, zebra."
    ]


# ---- heads and embeddings


def with_head(folder: Path, head: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors | ({} if head is None else {"lm_head.weight": head}), folder / "model.safetensors")


def test_tied_heads(folder_of, caplog):
    folder = folder_of("llama3_2")
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_head(folder, embeddings.clone())
    check("llama3_2", folder)
    with_head(folder, embeddings + 1)
    with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight.*transformers 5 does not tie"):
        check("llama3_2", folder)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight.*tie_word_embeddings=False"):
        check("llama3_2", folder)
    with_head(folder, None)
    with pytest.raises(CheckpointError, match="no lm_head.weight, and config.json does not tie it"):
        check("llama3_2", folder)
    assert not caplog.records


def test_heads_of_their_own(folder_of, caplog):
    folder = folder_of("qwen2_5", tie_word_embeddings=True)
    check("qwen2_5", folder)
    assert "lm_head.weight differs from model.embed_tokens.weight, which config.json ties" in caplog.text
    with_head(folder, None)
    with pytest.raises(CheckpointError, match="Use a builder with tie_word_embeddings=True"):
        check("qwen2_5", folder)


# ---- values that no model can have

VALUES = [
    ({"num_attention_heads": "4"}, "num_attention_heads is '4', expected a whole number, 1 or more"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number, 1 or more"),
    ({"num_attention_heads": None}, "num_attention_heads is null"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3: expected a multiple"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    ({"hidden_size": 66, "head_dim": None}, "hidden size (66) is not a multiple of the number of attention heads (4)"),
    ({"hidden_size": True}, "hidden_size is true"),
    ({"hidden_size": [64]}, "hidden_size is [64]"),
    ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
    ({"head_dim": "16"}, "head_dim is '16'"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_scaling": [4]}, "rope_scaling is [4], expected an object"),
    ({"rope_parameters": "default"}, "rope_parameters is 'default', expected an object"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope_scaling.factor is '4', expected a number above 0"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3, expected text"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": ["a"]}}, "rope_scaling.short_factor is ['a']"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true', expected true or false"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list of texts"),
    ({"eos_token_id": -2}, "eos_token_id is -2, expected a token id, 0 or more"),
    ({"eos_token_id": "2"}, "eos_token_id is '2'"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]"),
    ({"bos_token_id": {}}, "bos_token_id is {}"),
    ({"pad_token_id": -2}, "pad_token_id is -2"),
    ({"vocab_size": 10**40}, "vocab_size"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list of sliding_attention and"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"model_type": 7}, "model_type is 7, expected text"),
    ({"hidden_act": None}, "hidden_act is null"),
]


@pytest.mark.parametrize(("changes", "message"), VALUES, ids=[json.dumps(c)[:40] for c, _ in VALUES])
def test_values_that_no_model_has_are_refused_by_file_and_key(changes, message, folder_of):
    folder = folder_of("llama2")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        check("llama2", folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ") and message in str(caught.value)


def test_all_such_values_at_once(folder_of):
    folder = folder_of("llama2", num_attention_heads="4", hidden_size=0, eos_token_id=-1)
    with pytest.raises(CheckpointError, match="3 values that no model can have") as caught:
        read_hf_config(folder)
    assert "num_attention_heads" in str(caught.value) and "eos_token_id" in str(caught.value)
