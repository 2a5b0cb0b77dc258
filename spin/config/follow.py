"""What a config leaves to its model's folder and to the hardware: two keys, model and data, are a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin.config.interpolation import MISSING, with_paths
from spin.config.schema import COMPONENT, Config, EvaluateConfig, Section, SPINConfig
from spin.core.hub import model_folder

FROM_HF = "spin.model.from_hf"
_TOKENIZER = "spin.data.ChatTokenizer"
_DATASET = "spin.data.prompt_dataset"
_SPIN, LORA_CHECKPOINTER = "spin.checkpoint.SPINCheckpointer", "spin.checkpoint.LoRACheckpointer"
_OF_FOLDERS = ("model", "tokenizer", "checkpointer", "generator", "candidate", "baseline", "judge")
_MODEL = "a model: a Hugging Face folder, or a name on huggingface.co"
TO_FILL = {  # what a config cannot leave out: its meaning and an example
    "model.path": (_MODEL, "Qwen/Qwen3-4B"),
    "dataset.source": ("prompts with real responses: a file, a glob, a folder, or a data set's name", "mine.jsonl"),
    "candidate.checkpoint_dir": (_MODEL, "runs/full/iteration_001/hf_model"),
    "baseline.checkpoint_dir": (_MODEL, "runs/full/iteration_000/hf_model"),
    "judge.checkpoint_dir": (_MODEL, "Qwen/Qwen3-8B"),
}


def follow(values: Mapping[str, Any], model: type[Section]) -> dict[str, Any]:
    """A config with the sections, or their keys, that follow from its model's folder, as references to it."""
    result: dict[str, Any] = dict(values)
    if issubclass(model, SPINConfig):
        section = _section(values.get("model", {}), FROM_HF)
        has_folder = not isinstance(section, Mapping) or section[COMPONENT] == FROM_HF or "path" in section
        folder = "${model.path}" if has_folder else MISSING
        of_run = {"checkpoint_dir": folder, "output_dir": "${output_dir}"}
        checkpointer = LORA_CHECKPOINTER if _asks_for_adapters(section) else _SPIN
        result["tokenizer"] = _filled(values.get("tokenizer", {}), _TOKENIZER, path=folder)
        result["checkpointer"] = _section(values.get("checkpointer", {}), checkpointer)
        if isinstance(result["checkpointer"], Mapping):  # one of the user's own too
            result["checkpointer"] = {**of_run, **result["checkpointer"]}
        if "generator" in values:
            result["generator"] = _with_model_dir(values["generator"], result["checkpointer"], "checkpointer")
    if issubclass(model, EvaluateConfig):
        for role in ("candidate", "baseline", "judge"):
            if not isinstance(evaluated := values.get(role), Mapping):
                continue
            if isinstance(evaluated.get("tokenizer"), Mapping):
                result[role] = evaluated = {**evaluated, "tokenizer": _section(evaluated["tokenizer"], _TOKENIZER)}
            if evaluated.get("checkpoint_dir") is not None:
                folder = f"${{{role}.checkpoint_dir}}"
                result[role] = {
                    **evaluated,
                    "model": _filled(evaluated.get("model") or {}, FROM_HF, path=folder),
                    "tokenizer": _filled(evaluated.get("tokenizer") or {}, _TOKENIZER, path=folder),
                    **({"generator": _with_model_dir(g, evaluated, role)} if (g := evaluated.get("generator")) else {}),
                }
    if issubclass(model, Config):
        result["dataset"] = _filled(values.get("dataset", {}), _DATASET, source=MISSING)
        if values.get("validation_dataset") is not None:
            result["validation_dataset"] = _filled(values["validation_dataset"], _DATASET, source=MISSING)
    return result


def _section(value: Any, component: str) -> Any:
    """A section with its component, if it is one."""
    if isinstance(value, str) and "${" not in value and value != MISSING:
        return {COMPONENT: value}
    return {COMPONENT: component, **value} if isinstance(value, Mapping) else value


def _filled(value: Any, component: str, **keys: str) -> Any:
    """A section, which is of a component unless it says otherwise, and what keys of it are unless it sets them."""
    section = _section(value, component)
    if not isinstance(section, Mapping) or section[COMPONENT] != component:
        return value
    return {**keys, **section}


def _asks_for_adapters(model: Any) -> bool:
    keys = ("lora_attn_modules", "apply_lora_to_mlp")
    return isinstance(model, Mapping) and any(model.get(key) for key in keys)


def _with_model_dir(generator: Any, weights: Any, where: str) -> Any:
    """A generator that takes weights by the names of a folder, with that folder."""
    section = _section(generator, "")
    if not isinstance(section, Mapping) or not isinstance(weights, Mapping):
        return generator
    name = section[COMPONENT].rpartition(".")[2]
    if name != "VLLMGenerator" and not (name == "VLLMServerGenerator" and section.get("transfer_dir")):
        return generator
    keys = {"model_dir": f"${{{where}.checkpoint_dir}}"}
    if weights.get("model_type") is not None:
        keys["model_type"] = f"${{{where}.model_type}}"
    return {**keys, **section}


def settle_dtypes(values: dict[str, Any]) -> None:
    """Writes what ``auto`` stands for on this machine; frozen weights are stored as they are computed with.

    Ranks compare their configs, so that all of them have the same.
    """
    if values.get("compute_dtype") == "auto" and values.get("device") in (None, "cpu", "cuda"):
        from spin.core.dtypes import fast_dtype

        values["compute_dtype"] = "bf16" if values.get("dtype") == "bf16" else fast_dtype(values.get("device"))
    checkpointer = values.get("checkpointer")
    has_adapters = isinstance(checkpointer, Mapping) and checkpointer.get(COMPONENT) == LORA_CHECKPOINTER
    if has_adapters and values.get("base_dtype", "") is None:
        values["base_dtype"] = values["compute_dtype"]


def with_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Resolved values with folders in place of the names of models on huggingface.co, which are downloaded."""
    roles = [role for role in ("candidate", "baseline", "judge") if role != "judge" or values.get("verdict") == role]
    named = {f"{role}.checkpoint_dir": (values.get(role) or {}).get("checkpoint_dir") for role in roles}
    if (model := values.get("model") or {}).get(COMPONENT) == FROM_HF:
        named["model.path"] = model.get("path")
    folders = {name: model_folder(name, key) for key, name in named.items() if isinstance(name, str)}
    in_folders = {key: values[key] for key in _OF_FOLDERS if key in values}
    return values | with_paths(in_folders, lambda text: folders.get(text, text))
