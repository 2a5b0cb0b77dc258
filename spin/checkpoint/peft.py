"""Adapters as the peft library reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spin.core.errors import CheckpointError
from spin.core.files import atomic_dir, read_json, sync, write_json
from spin.core.heartbeat import set_stage
from spin.core.ranks import World, raise_on_all_ranks
from spin.model.adapters import adapted_modules, adapter_scale, full_magnitude
from spin.model.hf import stored_rows, write_companions
from spin.model.hf_config import CONFIG
from spin.model.hf_families import check_model_type
from spin.model.hf_folder import ADAPTER_CONFIG
from spin.model.sharding import check_weights, clean_name, full_tensor, reshard, weight_gathers

WEIGHTS = "adapter_model.safetensors"


def export_peft(
    model: nn.Module,
    source_dir: str | Path,
    out_dir: str | Path,
    model_type: str | None,
    *,
    world: World,
    tokenizer_dir: Path | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
) -> Path:
    """Writes a model's adapters as a folder that ``peft.PeftModel.from_pretrained`` loads onto the base.
    Replaces one that was exported there. Collective.

    With stop tokens, tokenizer and ``generation_config.json`` lie next to them (see
    :func:`spin.model.hf.write_companions`): the base's own need not stop where the adapter was trained to.

    Rows of B and of DoRA's magnitude move as those of W do. Where a family stores several weights as one (Phi: queries,
    keys and values), their adapters become one of the sum of their ranks, whose B has blocks of zeros.
    """
    set_stage("exporting an adapter")
    out = Path(out_dir)
    check_weights(model, world, str(out))
    reshard(model)
    modules = {clean_name(name): module for name, module in adapted_modules(model).items()}
    with raise_on_all_ranks(world, CheckpointError):
        stored = stored_rows(model, source_dir, check_model_type(model_type))
        is_multimodal = "text_config" in read_json(Path(source_dir) / CONFIG, CheckpointError, "")
    exclude = r".*vision_tower.*" if is_multimodal else None
    weights = weight_gathers(model)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}  # by the last part of the stored name, the same in all layers
    for stored_name, sources in stored.items():
        parts = [(name.removesuffix(".weight"), rows) for name, rows in sources if name.endswith(".weight")]
        if not any(name in modules for name, _ in parts):
            continue
        adapter = _stored_adapter(parts, modules, weights)
        target = stored_name.removesuffix(".weight")
        if is_multimodal:  # the adapter's base is the whole model
            target = target.replace("model.layers.", "model.language_model.layers.")
        ranks[target.rsplit(".", 1)[-1]] = adapter["lora_A.weight"].shape[0]
        if world.is_main:
            tensors |= {f"base_model.model.{target}.{part}": tensor for part, tensor in adapter.items()}
    with raise_on_all_ranks(world, CheckpointError):
        if world.is_main:
            with atomic_dir(out, "adapter") as part:
                if stop_ids:
                    write_companions(Path(source_dir), part, tokenizer_dir, chat_template, stop_ids)
                try:
                    save_file(
                        {name: each.contiguous() for name, each in tensors.items()}, part / WEIGHTS, {"format": "pt"}
                    )
                except SafetensorError as error:
                    raise CheckpointError(f"{part / WEIGHTS}: cannot write ({error}). Is the disk full?") from error
                sync(part / WEIGHTS)
                write_json(part / ADAPTER_CONFIG, _config(ranks, list(modules.values()), source_dir, exclude))
    return out


@torch.no_grad()
def merge_peft(model: Any, folder: str | Path) -> None:
    """Merges an adapter of peft into the transformers model that it was trained on, in place, without peft.

    Raises CheckpointError if the folder is damaged, the adapter is for another model, or is more than LoRA or DoRA of
    linear layers.

    Source: LoRA (arXiv 2106.09685), W + s B A; DoRA (arXiv 2402.09353): its rows scaled to the norms m.
    """
    settings = read_json(Path(folder) / ADAPTER_CONFIG, CheckpointError, "Export the adapter again.")
    try:
        tensors = load_file(Path(folder) / WEIGHTS)
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            stem = name.removesuffix(".lora_A.weight")
            parameter = model.get_submodule(stem.removeprefix("base_model.model.")).weight
            a, b = (tensors.pop(f"{stem}.lora_{each}.weight").to(parameter.device).float() for each in "AB")
            alpha = settings.get("alpha_pattern", {}).get(stem.rsplit(".", 1)[-1], settings["lora_alpha"])
            weight = parameter.float() + alpha / len(a) ** (0.5 if settings.get("use_rslora") else 1) * b @ a
            magnitude = tensors.pop(f"{stem}.lora_magnitude_vector", None)
            if magnitude is not None:
                weight *= (magnitude.to(weight.device) / weight.norm(dim=1))[:, None]
            parameter.copy_(weight)
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: this adapter does not fit its base ({type(error).__name__}: {error})."
        ) from error
    if tensors:
        raise CheckpointError(f"{folder}: more than an adapter of linear layers, it has {sorted(tensors)[0]} too.")


def _stored_adapter(
    parts: list[tuple[str, torch.Tensor]], modules: dict[str, Any], weights: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The adapter of one stored weight, on the CPU, made of those of the torchtune weights in it. Collective."""
    adapted = [(modules[name], rows) for name, rows in parts if name in modules]
    lora_a = torch.cat([full_tensor(module.lora_a.weight.detach()).cpu() for module, _ in adapted])
    lora_b = lora_a.new_zeros(sum(len(rows) for _, rows in parts), lora_a.shape[0])
    column = 0
    for module, rows in adapted:
        block = full_tensor(module.lora_b.weight.detach()).cpu()  # (out, rank)
        lora_b[rows, column : column + block.shape[1]] = block
        column += block.shape[1]
    tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
    if any(hasattr(module, "magnitude") for module, _ in adapted):
        # in float32 whatever the adapter has: bf16 would scale each row by up to 0.4 % more or less
        magnitude = torch.zeros(lora_b.shape[0], dtype=torch.promote_types(lora_a.dtype, torch.float32))
        for name, rows in parts:
            if name in modules:
                magnitude[rows] = full_magnitude(modules[name], full_tensor).cpu().to(magnitude.dtype)
            else:  # stored with one that has an adapter, and keeps its norms
                magnitude[rows] = weights[f"{name}.weight"](torch.float32).norm(dim=1).cpu().to(magnitude.dtype)
        tensors["lora_magnitude_vector"] = magnitude
    return tensors


def _config(ranks: dict[str, int], modules: list[Any], source_dir: str | Path, exclude: str | None) -> dict[str, Any]:
    rank = min(ranks.values())
    scale = adapter_scale(modules[0])
    others = {target: found for target, found in ranks.items() if found != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source_dir),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {target: scale * found for target, found in others.items()},
        "target_modules": sorted(ranks),
        "exclude_modules": exclude,
        "use_dora": hasattr(modules[0], "magnitude"),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
