"""Every YAML that ships loads, has known keys only, and describes a model of the published size."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spin import config
from spin.adapters import adapted_modules, adapter_parameters, nf4_of
from spin.hf import check_model_type
from spin.models import build_model
from spin.players import check_evaluation, players_of

# Parameters as published in the models' safetensors indices on huggingface.co, tied embeddings counted once,
# adapters not at all.
PARAMETERS = {
    "gemma2/2B_full": 2_614_341_888,
    "gemma2/2B_lora": 2_614_341_888,
    "gemma2/2B_qlora": 2_614_341_888,
    "generate/llama3_2_1B": 1_235_814_400,
    "llama3_1/8B_full": 8_030_261_248,
    "llama3_1/8B_lora": 8_030_261_248,
    "llama3_1/8B_qlora": 8_030_261_248,
    "llama3_2/1B_full": 1_235_814_400,
    "llama3_2/1B_full_vllm": 1_235_814_400,
    "llama3_2/1B_lora": 1_235_814_400,
    "llama3_2/3B_full": 3_212_749_824,
    "llama3_2/3B_lora": 3_212_749_824,
    "llama3_2/3B_qlora": 3_212_749_824,
    "mistral/7B_full": 7_241_732_096,
    "mistral/7B_lora": 7_241_732_096,
    "mistral/7B_qlora": 7_241_732_096,
    "phi4/14B_full": 14_659_507_200,
    "phi4/14B_lora": 14_659_507_200,
    "phi4/14B_qlora": 14_659_507_200,
    "quickstart/smollm2_135M_cpu": 134_515_008,
    "qwen2_5/0.5B_full": 494_032_768,
    "qwen2_5/0.5B_lora": 494_032_768,
    "qwen2_5/1.5B_full": 1_543_714_304,
    "qwen2_5/1.5B_lora": 1_543_714_304,
    "qwen2_5/3B_full": 3_085_938_688,
    "qwen2_5/3B_lora": 3_085_938_688,
    "qwen2_5/3B_qlora": 3_085_938_688,
    "qwen2_5/7B_full": 7_615_616_512,
    "qwen2_5/7B_lora": 7_615_616_512,
    "qwen2_5/7B_qlora": 7_615_616_512,
    "smollm2/135M_full": 134_515_008,
    "smollm2/135M_lora": 134_515_008,
}
# Those of evaluations: the size of each model in them.
EVALUATIONS = {
    "evaluate/llama3_2_1B": {"candidate": 1_235_814_400, "baseline": 1_235_814_400, "judge": 8_030_261_248},
    "evaluate/llama3_2_1B_gsm8k": {"candidate": 1_235_814_400, "baseline": 1_235_814_400},
    "evaluate/smollm2_135M_cpu": dict.fromkeys(("candidate", "baseline", "judge"), 134_515_008),
}
ORDER = (
    "output_dir model tokenizer checkpointer dataset generator pairs loss optimizer max_iterations metric_logger seed"
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@cache
def model_of(name: str) -> Any:
    """The model of a config, without memory."""
    return build_model(config.load_config(name).model, torch.float32)


def recipe_of(name: str) -> str:
    """The recipe that a config is for."""
    if name.startswith(("generate/", "evaluate/")):
        return f"spin_{name.split('/')[0]}"
    return "spin_lora_recipe" if name.endswith("lora") else "spin_recipe"


def recipe_defaults(name: str) -> dict:
    return importlib.import_module(recipe_of(name)).DEFAULTS


def test_every_config_is_in_the_table_and_packaged():
    names = [path.relative_to(path.parents[1]).with_suffix("").as_posix() for path in CONFIGS]
    assert sorted(names) == sorted([*PARAMETERS, *EVALUATIONS]) == config.packaged_configs()


@pytest.mark.parametrize("name", [*PARAMETERS, *EVALUATIONS])
def test_config_is_complete_and_its_components_exist(name):
    """complete() knows every key, and looks up every component and its parameters."""
    cfg = config.complete(config.load_config(name), recipe_defaults(name))
    assert cfg.allow_components == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_config_passes_the_checks_of_the_run(name):
    from spin.checks import check_run

    check_run(config.complete(config.load_config(name), recipe_defaults(name)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_the_published_number_of_parameters(name):
    model = model_of(name)
    adapters = [part for module in adapted_modules(model).values() for part in adapter_parameters(module).values()]
    count = sum(parameter.numel() for parameter in model.parameters()) - sum(part.numel() for part in adapters)
    assert count == PARAMETERS[name]
    assert bool(adapters) == (recipe_of(name) == "spin_lora_recipe")


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_type_is_one_that_weights_can_be_read_for(name):
    model_type = config.load_config(name).checkpointer.model_type
    assert check_model_type(model_type) == model_type


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_pass_their_checks_and_have_the_published_models(name):
    cfg = config.complete(config.load_config(name), recipe_defaults(name))
    check_evaluation(cfg)
    for role in players_of(cfg):
        model = build_model(cfg[role].model, torch.float32)
        assert sum(parameter.numel() for parameter in model.parameters()) == EVALUATIONS[name][role]
        assert check_model_type(cfg[role].model_type) == cfg[role].model_type
    assert set(players_of(cfg)) == EVALUATIONS[name].keys()


def test_the_judge_may_be_a_server_as_the_header_says(repo):
    """The overrides of the header, taken from there."""
    text = (repo / "configs/evaluate/llama3_2_1B.yaml").read_text(encoding="utf-8")
    lines = " ".join(line.strip("# \\") for line in text.split("\n\n")[0].splitlines())
    overrides = re.search(r"llama3_2_1B (judge\.name.*?) GPU memory", lines)[1].split()
    cfg = config.complete(
        config.load_config("evaluate/llama3_2_1B", overrides), recipe_defaults("evaluate/llama3_2_1B")
    )
    check_evaluation(cfg)
    assert cfg.judge.generator == {"_component_": "spin.generators.VLLMServerGenerator", "url": "http://localhost:8000"}


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


# what a config of the LoRA recipe has of its own
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
    assert lora[".base_dtype"] == "bf16" and lora[".dtype"] == "fp32"
    assert lora[".optimizer.lr"] == pytest.approx(10 * full[".optimizer.lr"])
    assert lora.get(".model.quantize_base", False) == (kind == "qlora")
    model = model_of(name)
    weights = [p for n, p in model.layers.named_parameters() if n.endswith("proj.weight") or "mlp.w" in n]
    frozen = [weight for weight in weights if weight.shape[0] > 16 and weight.shape[1] > 16]
    assert all((nf4_of(weight) is not None) == (kind == "qlora") for weight in frozen)


def test_every_full_config_has_one_for_adapters():
    assert {name.removesuffix("_full") for name in PARAMETERS if name.endswith("_full")} == {
        name.removesuffix("_lora") for name in PARAMETERS if name.endswith("_lora")
    }
