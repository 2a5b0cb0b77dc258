"""Models that are built from a folder against config.json: of another folder, of real models, and of nobody's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from spin.core.errors import CheckpointError, ConfigError
from spin.model import build_model
from spin.model.families import FAMILIES as ROWS
from spin.model.hf_check import check_model
from spin.model.hf_config import unknown_keys
from spin.model.hf_folder import read_config
from spin.model.logits_check import compare_logits
from tests.families import FAMILIES
from tests.hf_folders import FOLDERS, FULL, SLIDING, folder_config
from tests.model.test_hf_config import section_of


@pytest.fixture
def config_file(tmp_path):
    """Writes a config.json, of a folder of tests/hf_folders.py or of its own."""

    def write(config: str | dict[str, Any], **changes: Any) -> Path:
        values = json.loads(folder_config(config).to_json_string(False)) if isinstance(config, str) else config
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        return folder / "config.json"

    return write


def section(file: Path) -> dict[str, str]:
    return {"_component_": "spin.model.from_hf", "path": str(file.parent)}


def check(file: Path, other: Path | None = None, model_type: str = "HF") -> None:
    """The model of a folder against the config of another one, or its own."""
    other = other or file
    check_model(build_model(section(file), torch.float32), read_config(other), model_type, other)


@pytest.mark.parametrize("name", FOLDERS)
def test_models_agree_with_their_folder_and_with_transformers(name, config_file):
    file = config_file(name)
    check(file)
    report = compare_logits(section(file), file.parent, None)
    assert not report.is_fault and report.difference < 2e-4, str(report)


NARROW = {"sliding_window": 4}
# folder, what the other folder has in its place, and what the error says
OTHERS = [
    ("llama", {"hidden_size": 128}, "hidden_size is 128, the model computes with embed_dim 64"),
    ("llama", {"num_hidden_layers": 3}, "2 layers, config.json has 3"),
    ("llama", {"vocab_size": 170}, "vocab_size is 170"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, "another rotary table"),
    ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'factor': 2.0"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"model_type": "qwen2"}, "attention_bias"),
    ("llama", {"model_type": "gemma"}, "in place of 'GemmaRMSNorm (1 + weight)'"),
    ("llama", {"model_type": "olmo"}, "'ScalelessLayerNorm'"),
    ("llama", {"model_type": "olmo2"}, "with sa_norm 'RMSNorm' in place of 'none'"),
    ("llama", {"model_type": "ernie4_5"}, "rotates other pairs"),
    ("mistral", NARROW, "sliding_window is 4 in 2 of 2 layers"),
    ("qwen3", {"attention_bias": True}, "attention_bias is true"),
    ("qwen3", {"model_type": "qwen2"}, "qk_norm 'RMSNorm head' in place of null"),
    ("gemma3_text", {"layer_types": [FULL, SLIDING, FULL]}, "sliding_window is off in 1 of 3 layers (layer_types)"),
    ("gemma3_text", {"final_logit_softcapping": 5.0}, "final_logit_softcapping is 5.0"),
    ("gemma3_text", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
    ("gemma2", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping is 2.0"),
    ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("olmo_clipped", {"clip_qkv": 2.0}, "clip_qkv is 2.0"),
    ("olmo3", {"sliding_window": 4}, "sliding_window is 4 in 3 of 4 layers"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
    ("granite", {"residual_multiplier": 0.5}, "residual_multiplier is 0.5"),
    ("granite", {"embedding_multiplier": 3.0}, "embedding_multiplier is 3.0"),
    ("granite", {"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
    ("granite", {"logits_scaling": 2.0}, "logits_scaling is 2.0"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is true"),
    ("stablelm", {"use_qkv_bias": False}, "use_qkv_bias is false"),
    ("stablelm", {"layer_norm_eps": 1e-2}, "layer_norm_eps is 0.01"),
    ("seed_oss", {"attention_out_bias": True}, "attention_out_bias is true"),
    ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "queries that grow by"),
    ("exaone4", {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]}, "layer_types"),
    ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
     "another rotary table"),
    ("cohere", {"logit_scale": 0.25}, "logit_scale is 0.25"),
    ("cohere2", {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001"),
    ("starcoder2", {"norm_epsilon": 1e-3}, "norm_epsilon is 0.001"),
    ("starcoder2", {"use_bias": False}, "use_bias is false"),
    ("nemotron", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("nemotron", {"norm_eps": 1e-3}, "norm_eps is 0.001"),
    ("apertus", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("qwen3_moe", {"num_experts_per_tok": 2}, "num_experts_per_tok is 2"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "an MLP of class 'MoE' in place of 'FeedForward'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), OTHERS, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in OTHERS])
def test_a_model_of_another_folder_is_refused_by_key(name, changes, message, config_file):
    file = config_file(name)
    with pytest.raises(CheckpointError) as caught:
        check(file, config_file(name, **changes))
    assert message in str(caught.value)


def test_builder_and_model_type_go_together(config_file, folders):
    file = config_file("llama")
    with pytest.raises(CheckpointError, match=r"built by spin\.model\.from_hf: leave checkpointer\.model_type"):
        check(file, model_type="LLAMA3_2")
    model = build_model(section_of("llama2"), torch.float32)
    with pytest.raises(CheckpointError, match=r"set checkpointer\.model_type to LLAMA2 or LLAMA3 or LLAMA3_2 or MIST"):
        check_model(model, read_config(file), "HF", file)
    file = config_file("qwen3")
    with pytest.raises(CheckpointError, match=r"torchtune's builders: set model to _component_: spin\.model\.from_hf"):
        check_model(model, read_config(file), "HF", file)
    for name in FAMILIES:  # both ways to build a folder's model
        check(folders[name] / "config.json")


# ---- keys

V4 = {
    "torch_dtype": "bfloat16", "transformers_version": "4.55.0", "use_cache": True, "initializer_range": 0.02,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "_attn_implementation_autoset": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def sized(model_type: str, **keys: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return V4 | sizes | {"model_type": model_type, "vocab_size": 160, "intermediate_size": 96} | keys


# What real folders of each family have in config.json, small.
REAL = {
    "llama-3.3": sized("llama", rope_scaling=LLAMA3, rope_theta=5e5, mlp_bias=False, attention_bias=False, head_dim=16,
                       pretraining_tp=1, hidden_act="silu", max_position_embeddings=131072),
    "mistral-nemo": sized("mistral", head_dim=16, sliding_window=None, rope_theta=1e6),
    "ministral-3": sized("ministral3", head_dim=16, rope_parameters={
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1e6, "rope_type": "yarn",
        "type": "yarn"}),
    "qwen2.5": sized("qwen2", use_sliding_window=False, sliding_window=131072, max_window_layers=28, rope_theta=1e6,
                     use_mrope=False),
    "qwen3": sized("qwen3", head_dim=16, attention_bias=False, max_window_layers=36, rope_scaling=None,
                   sliding_window=None, use_sliding_window=False),
    "qwen3-moe": sized("qwen3_moe", head_dim=16, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=24,
                       norm_topk_prob=True, num_experts=8, num_experts_per_tok=2, output_router_logits=False,
                       router_aux_loss_coef=0.001, max_window_layers=48, sliding_window=None),
    "phi-3": sized("phi3", auto_map={"AutoConfig": "x.Y"}, embd_pdrop=0.0, resid_pdrop=0.0, attention_bias=False,
                   original_max_position_embeddings=4096, rope_scaling=None, sliding_window=2047),
    "phi-4-mini": sized("phi3", full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
                        attention_bias=False, partial_rotary_factor=0.75, sliding_window=262144,
                        original_max_position_embeddings=4096, max_position_embeddings=131072, tie_word_embeddings=True,
                        rope_scaling={"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}),
    "gemma": sized("gemma", head_dim=16, hidden_act="gelu", hidden_activation=None),
    "gemma-1.1": sized("gemma", head_dim=16, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"),
    "gemma-2": sized("gemma2", head_dim=16, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
                     query_pre_attn_scalar=16, sliding_window=4096, sliding_window_size=4096,
                     cache_implementation="hybrid", attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma-3-1b": sized("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=512,
                        sliding_window_pattern=6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
                        attn_logit_softcapping=None, final_logit_softcapping=None, cache_implementation="hybrid",
                        hidden_activation="gelu_pytorch_tanh", attention_bias=False),
    "gemma-3-4b": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "image_token_index": 262144, "mm_tokens_per_image": 256, "initializer_range": 0.02,
        "vision_config": {"model_type": "siglip_vision_model"}, "torch_dtype": "bfloat16",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    },
    "olmo": sized("olmo", clip_qkv=None, attention_bias=False, rope_scaling=None),
    "olmo-2": sized("olmo2", attention_bias=False, rope_theta=500000, rope_scaling=None),
    "olmo-3": sized("olmo3", attention_bias=False, sliding_window=4096, layer_types=[SLIDING, FULL], rope_theta=500000,
                    rope_scaling={"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836,
                                  "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8192}),
    "smollm3": sized("smollm3", no_rope_layer_interval=4, no_rope_layers=[1, 0], layer_types=[FULL, FULL],
                     max_window_layers=28, use_sliding_window=False, sliding_window=None, pretraining_tp=2,
                     attention_bias=False, mlp_bias=False, rope_theta=5000000.0),
    "granite-3.3": sized("granite", attention_multiplier=0.0078125, embedding_multiplier=12.0, residual_multiplier=0.22,
                         logits_scaling=16.0, attention_bias=False, mlp_bias=False, rope_scaling=None),
    "stablelm-2": sized("stablelm", use_qkv_bias=True, use_parallel_residual=False, qk_layernorm=False,
                        layer_norm_eps=1e-5, partial_rotary_factor=0.25, rope_pct=0.25, hidden_dropout=0.0),
    "seed-oss": sized("seed_oss", head_dim=16, attention_bias=True, attention_out_bias=False, mlp_bias=False,
                      residual_dropout=0.1, rope_scaling={"rope_type": "default"}, rope_theta=1e7, pretraining_tp=1),
    "hunyuan": sized("hunyuan_v1_dense", head_dim=16, attention_head_dim=16, add_classification_head=False,
                     cla_share_factor=2, class_num=0, dense_list=[64, 0], eod_token_id=127967, im_end_id=5,
                     im_newline_id=11, im_start_id=4, image_token_id=7, mask_init_id=12, mlp_bias=False,
                     norm_type="rms", num_experts=1, org_vocab_size=160, pad_id=2, pool_type="last", sep_token_id=4,
                     skip_cls_token=False, text_end_id=7, text_start_id=6, use_cla=False, use_qk_norm=True,
                     use_rotary_pos_emb=True, video_end_id=10, video_start_id=9, rope_scaling={
                         "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"}),
    "exaone-4": sized("exaone4", sliding_window=4096, sliding_window_pattern="LLLG", layer_types=[SLIDING, FULL],
                      reorder_and_upcast_attn=False, rope_scaling=LLAMA3 | {"factor": 16.0}, rope_theta=1000000),
    "glm-4": sized("glm4", head_dim=16, attention_bias=False, partial_rotary_factor=0.5, rope_theta=10000.0),
    "command-r": sized("cohere", logit_scale=0.0625, layer_norm_eps=1e-5, use_qk_norm=False, model_max_length=131072,
                       pretraining_tp=1, attention_bias=False),
    "command-r7b": sized("cohere2", logit_scale=0.25, layer_norm_eps=1e-5, use_qk_norm=False, layer_switch=4,
                         order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
                         rotary_pct=1.0, use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True,
                         use_parallel_embedding=False, cache_implementation="hybrid", sliding_window=4096,
                         sliding_window_pattern=4, rope_scaling=None),
    "starcoder2": sized("starcoder2", activation_function="gelu", attention_softmax_in_fp32=True, use_bias=True,
                        scale_attention_softmax_in_fp32=True, scale_attn_weights=True, layer_norm_epsilon=1e-5,
                        norm_epsilon=1e-5, norm_type="layer_norm", mlp_type="default", embedding_dropout=0.1,
                        residual_dropout=0.1, sliding_window=4096, hidden_act="gelu_pytorch_tanh"),
    "nemotron": sized("nemotron", head_dim=16, hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5,
                      rope_scaling=None, attention_bias=False, mlp_bias=False),
    "ernie-4.5": sized("ernie4_5", head_dim=16, use_bias=False, compression_ratio=1.0, use_flash_attention=False,
                       rope_theta=500000),
    "apertus": sized("apertus", hidden_act="xielu", qk_norm=True, post_norm=False, mlp_bias=False, attention_bias=False,
                     rope_scaling=LLAMA3 | {"type": "llama3"}, rope_theta=12000000),
    "internlm3": sized("internlm3", head_dim=16, qkv_bias=False, bias=False, auto_map={"AutoConfig": "x.Y"},
                       rope_scaling={"factor": 6.0, "rope_type": "dynamic"}, rope_theta=50000000),
}  # fmt: skip


def test_there_is_a_real_config_of_every_family(config_file):
    assert {read_config(config_file(each))["model_type"] for each in REAL.values()} == ROWS.keys() - {"ministral"}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_pass_without_a_word(name, config_file, caplog):
    """As transformers 4 wrote it, and as transformers 5 writes it again."""
    from transformers import AutoConfig

    file = config_file(REAL[name])
    check(file)
    config = read_config(file)
    assert not unknown_keys(config, config["model_type"])
    AutoConfig.from_pretrained(file.parent).save_pretrained(file.parent)
    check(file)
    config = read_config(file)
    assert not unknown_keys(config, config["model_type"])
    assert not [record for record in caplog.records if record.name.startswith("spin")]


FOREIGN = [
    ("qwen3", {"residual_multiplier": 0.22}, "residual_multiplier is 0.22, which models of model_type 'qwen3' do not"),
    ("granite", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("glm4", {"layer_types": [SLIDING] * 2}, "layer_types is"),
    ("seed_oss", {"sliding_window": 32}, "sliding_window is 32"),
    ("apertus", {"qk_norm": False}, "qk_norm is false"),
    ("ernie4_5", {"num_experts": 64}, "num_experts is 64"),
    ("cohere", {"use_parallel_residual": False}, "use_parallel_residual is false"),
    ("nemotron", {"is_causal": False}, "is_causal is false"),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), FOREIGN, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in FOREIGN])
def test_what_another_family_would_read_is_refused(name, changes, message, config_file):
    with pytest.raises(CheckpointError) as caught:
        check(config_file(name, **changes))
    assert message in str(caught.value)


# ---- values of nobody's model

RUBBISH = [
    None, "x", -1, 0, 2**60, 10**400, float("nan"), float("inf"), 1e-320, [], {}, [[[1]]], {"a": {"b": []}}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rubbish_is_an_error_in_words_or_changes_nothing(name, config_file):
    """Every key of a family in turn; a model that is built agrees with its own folder."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    values = json.loads(folder_config(name).to_json_string(False))
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    keys = [*values, "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"]
    cases = [{key: RUBBISH[(place + turn) % len(RUBBISH)]} for place, key in enumerate(keys) for turn in (0, 7)]
    cases += [{"rope_parameters": rope | {key: value}} for key in rope for value in RUBBISH[::3]]
    refused = 0
    for changes in cases:
        file = config_file(values, **changes)
        try:
            check(file)
        except (CheckpointError, ConfigError) as error:
            assert "config.json" in str(error)
            refused += 1
    assert refused > len(cases) // 4
