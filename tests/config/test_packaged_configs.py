"""Every YAML that ships loads, has known keys only, passes its checks, and says in its header how it is launched."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spin import config
from spin.config.catalog import config_model
from spin.core.errors import ConfigError
from spin.evaluation.models import check_evaluation
from spin.model.adapters import adapted_modules
from spin.model.build import build_model
from spin.model.lora import check_adapters, check_lora

CONFIG_ROOT = Path(__file__).parents[2] / "configs"
NAMES = config.packaged_configs()
TINY, DATA = "tests/assets/tiny_lm", "dataset.source=examples/quickstart/jargon_train.jsonl"
FILLED = {  # what a config leaves to be filled in
    **dict.fromkeys(("full", "lora", "qlora", "generate"), [f"model.path={TINY}", DATA]),
    "evaluate": [
        *(f"{role}.checkpoint_dir={TINY}" for role in ("candidate", "baseline", "judge")),
        DATA,
        "candidate.name=a",
    ],
    "evaluate_gsm8k": [f"{role}.checkpoint_dir={TINY}" for role in ("candidate", "baseline")] + ["candidate.name=a"],
    "paper/zephyr_7b": [f"model.path={TINY}"],
    "quickstart/smollm2_135M_cpu": [f"model.path={TINY}"],
    "quickstart/evaluate": [],
}
ORDER = (
    "output_dir model tokenizer checkpointer dataset generator pairs loss optimizer max_iterations metric_logger seed"
)


def recipe_of(name: str) -> str:
    """The recipe that a config is for."""
    kind = name.split("/")[-1].split("_")[0]
    return f"spin_{kind}" if kind in ("generate", "evaluate") else "spin_recipe"


def completed(name: str, *overrides: str) -> Any:
    model = config_model(importlib.import_module(recipe_of(name)))
    return config.complete(config.load_config(name, [*FILLED[name], *overrides]), model)


def test_every_config_is_packaged_and_those_of_methods_are_short():
    names = [path.relative_to(CONFIG_ROOT).with_suffix("").as_posix() for path in CONFIG_ROOT.rglob("*.yaml")]
    assert sorted(names) == NAMES == sorted(FILLED)
    for name in ("full", "lora", "qlora"):
        text = (CONFIG_ROOT / f"{name}.yaml").read_text(encoding="utf-8")
        assert 10 <= len(text.splitlines()) <= 25


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete_and_its_components_exist(name):
    """complete() knows every key, and looks up every component and its parameters."""
    cfg = completed(name)
    assert cfg.allow_components == []
    if recipe_of(name) == "spin_evaluate":
        check_evaluation(cfg)
        assert cfg.candidate.model.component == "spin.model.from_hf"
    else:
        check_lora(cfg)
        shape = cfg.model.model_copy(update={"quantize_base": False})  # NF4 takes larger weights than this folder's
        assert check_adapters(cfg, build_model(shape, torch.float32)) == name.endswith("lora")


@pytest.mark.parametrize("name", [name for name, filled in FILLED.items() if filled and "/" not in name])
def test_what_a_config_leaves_open_is_named_with_an_example(name):
    with pytest.raises(ConfigError) as error:
        config.complete(config.load_config(name), config_model(importlib.import_module(recipe_of(name))))
    for path in (override.partition("=")[0] for override in FILLED[name] if "name=" not in override):
        assert re.search(rf"{re.escape(path)}: not set. It names .*: {re.escape(path)}=\S+\.", str(error.value))


def test_the_judge_may_be_a_server_as_the_header_says():
    """The overrides of the header, taken from there."""
    text = (CONFIG_ROOT / "evaluate.yaml").read_text(encoding="utf-8")
    lines = " ".join(line.strip("# \\") for line in text.split("\n\n")[0].splitlines())
    overrides = re.search(r"(judge\.name.*?) every key", lines)[1].split()
    cfg = completed("evaluate", *overrides)
    check_evaluation(cfg)
    generator = {"_component_": "spin.generators.VLLMServerGenerator", "url": "http://localhost:8000"}
    assert config.plain(cfg.judge.generator) == generator


@pytest.mark.parametrize("name", NAMES)
def test_house_style(name):
    """Header with what it is and how to launch it under its own name; known order of sections; no line too long."""
    text = (CONFIG_ROOT / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in header) and header[0].startswith("# SPIN")
    assert f"{recipe_of(name)} --config {name}" in text
    assert max(map(len, text.splitlines())) <= 120
    keys = list(OmegaConf.create(text))
    sections = [key for key in ORDER.split() if key in keys]
    assert sections == sorted(sections, key=keys.index), "sections are out of order"


def test_quickstart_finds_its_data(repo, tmp_path, monkeypatch):
    """In any folder; where the Makefile looks for its model and its run is where the config has them."""
    raw = config.load_config("quickstart/smollm2_135M_cpu")
    makefile = (repo / "Makefile").read_text(encoding="utf-8")
    assert f"MODEL := {raw.model.path}\n" in makefile and f"RUN ?= {raw.output_dir}\n" in makefile
    monkeypatch.chdir(tmp_path)
    raw.model.path = str(repo / TINY)
    cfg = config.complete(raw, config.SPINConfig)
    for section in (cfg.dataset, cfg.validation_dataset):
        assert Path(section.source).is_file()


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


# what a config for adapters has of its own
OF_ADAPTERS = {
    "model.lora_attn_modules", "model.apply_lora_to_mlp", "model.lora_rank", "model.lora_alpha", "model.quantize_base",
    "optimizer.lr", "output_dir", "enable_activation_checkpointing",
}  # fmt: skip


def flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for name, part in node.items() for key, value in flat(part, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_config_for_adapters_is_the_full_one_with_adapters(name):
    """A copy that stays one: what differs is listed. Every linear layer has an adapter."""
    full, lora = (flat(OmegaConf.to_container(config.load_config(n), resolve=False)) for n in ("full", name))
    allowed = OF_ADAPTERS | ({"pairs.row_tokens"} if name == "qlora" else set())  # less memory is what NF4 is for
    assert {key[1:] for key in full | lora if full.get(key) != lora.get(key)} <= allowed
    assert lora.get(".model.quantize_base", False) == (name == "qlora")
    cfg = completed(name, "device=cuda")  # as on a machine with a GPU
    assert (cfg.compute_dtype, cfg.base_dtype, cfg.dtype) == ("bf16", "bf16", "fp32")
    shape = cfg.model.model_copy(update={"quantize_base": False})
    assert len(adapted_modules(build_model(shape, torch.float32))) == 4 * 7


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_a_config_suits_a_model_that_was_fine_tuned(name):
    """A hundredth of fine-tuning's rate, beta 1, one epoch, and no pairs without a gradient."""
    cfg = completed(name)
    assert cfg.optimizer.lr == pytest.approx(config.sft_stage(cfg).optimizer.lr / 100)
    assert (cfg.loss.beta, cfg.max_epochs, cfg.pairs.equal_to_real, cfg.nll_weight) == (1.0, 1, "drop", 0.0)


def test_the_papers_run_has_its_hyper_parameters():
    """arXiv 2401.01335, section 6.1 and appendix B.1."""
    cfg = completed("paper/zephyr_7b")
    assert cfg.loss.beta == [0.1, 0.1, 0.1, 5.0] and cfg.optimizer.lr == [5e-7, 5e-7, 1e-7, 1e-7]
    assert (cfg.max_iterations, cfg.max_epochs, cfg.global_batch_size, cfg.pairs.history) == (4, 2, 64, 1)
    assert (cfg.optimizer.component, cfg.lr_scheduler.warmup) == ("torch.optim.RMSprop", 0.1)
    assert (cfg.dataset.limit, cfg.compute_dtype) == (50_000, "bf16")
