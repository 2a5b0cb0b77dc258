"""Every YAML that ships loads, has known keys only, and describes a model of the published size."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from spin import config
from spin.hf import check_model_type

# Parameters as published in the models' safetensors indices on huggingface.co, tied embeddings counted once.
PARAMETERS = {
    "gemma2/2B_full": 2_614_341_888,
    "generate/llama3_2_1B": 1_235_814_400,
    "llama3_1/8B_full": 8_030_261_248,
    "llama3_2/1B_full": 1_235_814_400,
    "llama3_2/1B_full_vllm": 1_235_814_400,
    "llama3_2/3B_full": 3_212_749_824,
    "mistral/7B_full": 7_241_732_096,
    "phi4/14B_full": 14_659_507_200,
    "quickstart/smollm2_135M_cpu": 134_515_008,
    "qwen2_5/0.5B_full": 494_032_768,
    "qwen2_5/1.5B_full": 1_543_714_304,
    "qwen2_5/3B_full": 3_085_938_688,
    "qwen2_5/7B_full": 7_615_616_512,
    "smollm2/135M_full": 134_515_008,
}
ORDER = (
    "output_dir model tokenizer checkpointer dataset generator pairs loss optimizer max_iterations metric_logger seed"
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def recipe_defaults(name: str) -> dict:
    module = "spin_generate" if name.startswith("generate/") else "spin_recipe"
    return importlib.import_module(module).DEFAULTS


def test_every_config_is_in_the_table_and_packaged():
    names = [path.relative_to(path.parents[1]).with_suffix("").as_posix() for path in CONFIGS]
    assert sorted(names) == sorted(PARAMETERS) == config.packaged_configs()


@pytest.mark.parametrize("name", PARAMETERS)
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
    cfg = config.load_config(name)
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_type_is_one_that_weights_can_be_read_for(name):
    model_type = config.load_config(name).checkpointer.model_type
    assert check_model_type(model_type) == model_type


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_house_style(path):
    """Header with what it is and how to launch it under its own name; known order of sections; no line too long."""
    text = path.read_text(encoding="utf-8")
    name = f"{path.parent.name}/{path.stem}"
    header = text.split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in header) and header[0].startswith("# SPIN")
    recipe = "spin_generate" if name.startswith("generate/") else "spin_recipe"
    assert f"{recipe} --config {name}" in text
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
