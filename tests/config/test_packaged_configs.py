"""Every YAML that ships loads, has known keys only, and describes a model of the published size."""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spin import config
from spin.config.catalog import config_model
from spin.evaluation.models import check_evaluation, eval_model_roles
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4
from spin.model.build import build_model
from spin.model.hf_check import check_model
from spin.model.hf_config import unknown_keys
from spin.model.hf_families import check_model_type
from spin.model.logits_check import compare_logits

# Parameters as published in the models' safetensors indices on huggingface.co, tied embeddings counted once,
# adapters not at all.
_SIZES = {
    "gemma2/2B": (2_614_341_888, "full lora qlora"), "llama3_1/8B": (8_030_261_248, "full lora qlora"),
    "llama3_2/1B": (1_235_814_400, "full full_vllm lora"), "llama3_2/3B": (3_212_749_824, "full lora qlora"),
    "mistral/7B": (7_241_732_096, "full lora qlora"), "phi4/14B": (14_659_507_200, "full lora qlora"),
    "qwen2_5/0.5B": (494_032_768, "full lora"), "qwen2_5/1.5B": (1_543_714_304, "full lora"),
    "qwen2_5/3B": (3_085_938_688, "full lora qlora"), "qwen2_5/7B": (7_615_616_512, "full lora qlora"),
    "smollm2/135M": (134_515_008, "full lora"), "quickstart/smollm2_135M": (134_515_008, "cpu"),
    "generate/llama3_2": (1_235_814_400, "1B"),
}  # fmt: skip
PARAMETERS = {f"{base}_{kind}": count for base, (count, kinds) in _SIZES.items() for kind in kinds.split()}
# Those of evaluations: the size of each model in them.
EVALUATIONS = {
    "evaluate/llama3_2_1B": {"candidate": 1_235_814_400, "baseline": 1_235_814_400, "judge": 8_030_261_248},
    "evaluate/llama3_2_1B_gsm8k": {"candidate": 1_235_814_400, "baseline": 1_235_814_400},
    "evaluate/smollm2_135M_cpu": dict.fromkeys(("candidate", "baseline", "judge"), 134_515_008),
}
# What config.json of the models says in their repositories on huggingface.co, but for sizes that shapes tell.
LLAMA3 = {
    "model_type": "llama", "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "vocab_size": 128256,
}  # fmt: skip
ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN = {
    "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 32768, "num_key_value_heads": 2,
}  # fmt: skip


def sizes(width: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2/2B": sizes(2304, 26, 8, 4) | {
        "model_type": "gemma2", "attention_bias": False,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "cache_implementation": "hybrid",
    },
    "llama3_1/8B": LLAMA3 | sizes(4096, 32, 32, 8) | {
        "rope_scaling": ROPE | {"factor": 8.0}, "tie_word_embeddings": False,
    },
    "llama3_2/1B": LLAMA3 | sizes(2048, 16, 32, 8) | {
        "rope_scaling": ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 64,
    },
    "llama3_2/3B": LLAMA3 | sizes(3072, 28, 24, 8) | {
        "rope_scaling": ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 128,
    },
    "mistral/7B": sizes(4096, 32, 32, 8) | {
        "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "phi4/14B": sizes(5120, 40, 40, 10) | {
        "model_type": "phi3", "rms_norm_eps": 1e-05, "rope_theta": 250000, "rope_scaling": None, "sliding_window": None,
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "hidden_act": "silu",
        "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False,
    },
    "qwen2_5/0.5B": QWEN | sizes(896, 24, 14, 2) | {"tie_word_embeddings": True, "max_window_layers": 24},
    "qwen2_5/1.5B": QWEN | sizes(1536, 28, 12, 2) | {"tie_word_embeddings": True, "max_window_layers": 21},
    "qwen2_5/3B": QWEN | sizes(2048, 36, 16, 2) | {"tie_word_embeddings": True, "max_window_layers": 36},
    "qwen2_5/7B": QWEN | sizes(3584, 28, 28, 4) | {"tie_word_embeddings": False, "max_window_layers": 28},
    "smollm2/135M": sizes(576, 30, 9, 3) | {
        "model_type": "llama", "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": None, "vocab_size": 49152,
        "rope_interleaved": False, "is_llama_config": True,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "hidden_act": "silu", "pretraining_tp": 1, "transformers.js_config": {},
    },
}  # fmt: skip
ORDER = (
    "output_dir model tokenizer checkpointer dataset generator pairs loss optimizer max_iterations metric_logger seed"
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@cache
def model_of(name: str) -> Any:
    """The model of a config, without memory."""
    return build_model(config.load_config(name).model, torch.float32)


def recipe_of(name: str) -> str:
    """The recipe that a config is for."""
    if name.startswith(("generate/", "evaluate/")):
        return f"spin_{name.split('/')[0]}"
    return "spin_recipe"


def recipe_model(name: str) -> Any:
    return config_model(importlib.import_module(recipe_of(name)))


def test_every_config_is_in_the_table_and_packaged():
    names = [path.relative_to(path.parents[1]).with_suffix("").as_posix() for path in CONFIGS]
    assert sorted(names) == sorted([*PARAMETERS, *EVALUATIONS]) == config.packaged_configs()


@pytest.mark.parametrize("name", [*PARAMETERS, *EVALUATIONS])
def test_config_is_complete_and_its_components_exist(name):
    """complete() knows every key, and looks up every component and its parameters."""
    cfg = config.complete(config.load_config(name), recipe_model(name))
    assert cfg.allow_components == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_the_published_number_of_parameters(name):
    model = model_of(name)
    adapters = [part for module in adapted_modules(model).values() for part in adapter_parameters(module).values()]
    count = sum(parameter.numel() for parameter in model.parameters()) - sum(part.numel() for part in adapters)
    assert count == PARAMETERS[name]
    assert bool(adapters) == name.endswith("lora")


def published(name: str) -> dict[str, Any]:
    """config.json of the model that a config is for."""
    size = re.search(r"[\d.]+[BM]", name)[0]  # type: ignore[index]
    family = {"quickstart": "smollm2", "generate": "llama3_2"}.get(name.split("/")[0], name.split("/")[0])
    return PUBLISHED[f"{family}/{size}"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_computes_what_the_published_config_says(name):
    model_type = config.load_config(name).checkpointer.model_type
    assert check_model_type(model_type) == model_type
    check_model(model_of(name), published(name), model_type, Path("config.json"))
    assert not unknown_keys(published(name), published(name)["model_type"])


# NF4 takes weights of multiples of 16,384 numbers
SMALL = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512, "vocab_size": 160}


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_are_those_of_transformers(name, tmp_path, monkeypatch):
    """The config's own builder and the published config.json, with every width made small."""
    section = config.load_config(name).model
    module, _, builder = section._component_.rpartition(".")
    found = getattr(importlib.import_module(module), builder)
    called = importlib.import_module(found.__module__)  # where the builder finds the component builder that it calls
    small = SMALL | ({"head_dim": 64} if name.startswith("gemma2") else {})
    family = "llama3_1" if name.startswith("llama3_1") else module.rpartition(".")[2].replace("qwen2_5", "qwen2")
    if "num_layers" not in section:  # a builder that is named after a size
        for part in (family, f"lora_{family}"):
            whole = getattr(called, part)
            monkeypatch.setattr(called, part, lambda *args, whole=whole, **options: whole(*args, **options | small))
    else:
        section = OmegaConf.merge(section, small)
    values = published(name) | {
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 512,
        "vocab_size": 160, "head_dim": 64,
    }  # fmt: skip
    if name.startswith("gemma2"):  # torchtune divides by the root of head_dim, which is 256 in the released model
        values["query_pre_attn_scalar"] = 64
    (tmp_path / "config.json").write_text(json.dumps(values))
    report = compare_logits(section, tmp_path, config.load_config(name).checkpointer.model_type)
    assert not report.is_fault, str(report)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_pass_their_checks_and_have_the_published_models(name):
    cfg = config.complete(config.load_config(name), recipe_model(name))
    check_evaluation(cfg)
    for role in eval_model_roles(cfg):
        model = build_model(cfg[role].model, torch.float32)
        assert sum(parameter.numel() for parameter in model.parameters()) == EVALUATIONS[name][role]
        assert check_model_type(cfg[role].model_type) == cfg[role].model_type
    assert set(eval_model_roles(cfg)) == EVALUATIONS[name].keys()


def test_the_judge_may_be_a_server_as_the_header_says(repo):
    """The overrides of the header, taken from there."""
    text = (repo / "configs/evaluate/llama3_2_1B.yaml").read_text(encoding="utf-8")
    lines = " ".join(line.strip("# \\") for line in text.split("\n\n")[0].splitlines())
    overrides = re.search(r"llama3_2_1B (judge\.name.*?) GPU memory", lines)[1].split()
    cfg = config.complete(config.load_config("evaluate/llama3_2_1B", overrides), recipe_model("evaluate/llama3_2_1B"))
    check_evaluation(cfg)
    generator = {"_component_": "spin.generators.VLLMServerGenerator", "url": "http://localhost:8000"}
    assert config.plain(cfg.judge.generator) == generator


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_house_style(path):
    """Header with what it is and how to launch it under its own name; known order of sections; no line too long."""
    text = path.read_text(encoding="utf-8")
    name = f"{path.parent.name}/{path.stem}"
    header = text.split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in header) and header[0].startswith("# SPIN")
    assert f"{recipe_of(name)} --config {name}" in text
    assert max(map(len, text.splitlines())) <= 120
    keys = list(OmegaConf.load(path))
    sections = [key for key in ORDER.split() if key in keys]
    assert sections == sorted(sections, key=keys.index), "sections are out of order"


def test_quickstart_finds_its_data(repo):
    cfg = config.load_config("quickstart/smollm2_135M_cpu")
    for section in (cfg.dataset, cfg.validation_dataset):
        assert (repo / section.source).is_file()
    makefile = (repo / "Makefile").read_text(encoding="utf-8")
    assert f"MODEL := {cfg.checkpointer.checkpoint_dir}\n" in makefile
    assert cfg.tokenizer.path == cfg.checkpointer.checkpoint_dir
    assert f"output_dir={cfg.output_dir}" in makefile


def test_quickstart_data_are_conversations(repo):
    """As many as the README says, each with an id of its own, and no question in both files."""
    from spin.data.messages import row_to_messages
    from spin.data.sources import read_rows

    questions = {}
    for split, count in (("train", 912), ("val", 102)):
        rows = list(read_rows(str(repo / "examples" / "quickstart" / f"jargon_{split}.jsonl")))
        assert len(rows) == count and len({row.data["id"] for row in rows}) == count
        messages = [row_to_messages(row.data, row_format="auto") for row in rows]
        assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in messages)
        assert all(60 <= len(chat[1]["content"]) <= 320 for chat in messages)
        questions[split] = {chat[0]["content"] for chat in messages}
    assert not questions["train"] & questions["val"]


def test_a_config_for_vllm_differs_in_its_generator_only():
    """It is a copy, and stays one."""
    plain, vllm = (config.load_config(name) for name in ("llama3_2/1B_full", "llama3_2/1B_full_vllm"))
    assert vllm.generator._component_ == "spin.generators.VLLMGenerator"
    vllm.generator, vllm.output_dir = plain.generator, plain.output_dir
    assert vllm == plain


# what a config for adapters has of its own
OF_ADAPTERS = {
    "model._component_", "model.lora_attn_modules", "model.apply_lora_to_mlp", "model.lora_rank", "model.lora_alpha",
    "model.use_dora", "model.quantize_base", "checkpointer._component_", "checkpointer.export_merged", "optimizer.lr",
    "base_dtype", "output_dir", "enable_activation_checkpointing", "enable_float8_training",
}  # fmt: skip


def flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for name, part in node.items() for key, value in flat(part, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.endswith("lora")])
def test_a_config_for_adapters_is_the_full_one_with_adapters(name):
    """A copy that stays one: what differs is listed. The name says whether the base is in NF4."""
    base, kind = name.rsplit("_", 1)
    full, lora = (flat(OmegaConf.to_container(config.load_config(n), resolve=False)) for n in (f"{base}_full", name))
    allowed = OF_ADAPTERS | ({"pairs.row_tokens"} if kind == "qlora" else set())  # less memory is what NF4 is for
    assert {key[1:] for key in full | lora if full.get(key) != lora.get(key)} <= allowed
    cfg = config.complete(config.load_config(name), recipe_model(name))
    assert cfg.base_dtype == "bf16" and cfg.dtype == "fp32"
    assert lora[".optimizer.lr"] == pytest.approx(10 * full[".optimizer.lr"])
    assert lora.get(".model.quantize_base", False) == (kind == "qlora")
    model = model_of(name)
    weights = [p for n, p in model.layers.named_parameters() if n.endswith("proj.weight") or "mlp.w" in n]
    frozen = [weight for weight in weights if weight.shape[0] > 16 and weight.shape[1] > 16]
    assert all((as_nf4(weight) is not None) == (kind == "qlora") for weight in frozen)


def test_every_full_config_has_one_for_adapters():
    assert {name.removesuffix("_full") for name in PARAMETERS if name.endswith("_full")} == {
        name.removesuffix("_lora") for name in PARAMETERS if name.endswith("_lora")
    }
