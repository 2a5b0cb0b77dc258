"""An optimizer in a checkpoint: its tensors next to the model's, all else in ``state.json``.

It is read as it is: torch's helpers make missing state by a step of learning rate 0, which not every optimizer stands.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as distributed_zeros

from spin.core.errors import CheckpointError
from spin.model.sharding import clean_name, local_tensor

# How an optimizer computes, not what: a resumed run follows its own config.
_IMPLEMENTATION_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}


def describe_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's tensors by name, and, as JSON values, how to put them together again."""
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group, names in zip(optimizer.param_groups, _group_names(model, optimizer), strict=True):
        options = {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key != "params" and key not in _IMPLEMENTATION_OPTIONS
        }
        groups.append({"parameters": names, "options": options})
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                entry: dict[str, Any] = {"value": value}
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                    entry = _describe_tensor(value, f"{_class_name(optimizer)}: {key} of {name}")
                state.setdefault(name, {})[key] = entry
    return tensors, {"class": _class_name(optimizer), "groups": groups, "state": state}


def _describe_tensor(value: torch.Tensor, what: str) -> dict[str, Any]:
    local = local_tensor(value)
    if hasattr(local, "__tensor_flatten__"):
        raise CheckpointError(
            f"{what} is a {type(local).__name__}, which torch.distributed.checkpoint cannot save. "
            "Use spin.training.AdamW8bit for moments in 8 bits, or torch.optim.AdamW."
        )
    placements = value.placements if isinstance(value, DTensor) else ()
    return {
        "distributed": isinstance(value, DTensor),
        "shard_dim": next((placement.dim for placement in placements if isinstance(placement, Shard)), None),
        "on_cpu": local.device.type == "cpu",
    }


def allocate_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], metadata: Metadata, folder: Path
) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]:
    """Memory for a saved optimizer's state, and its tensors by name; CheckpointError if it is another optimizer's."""
    if saved["class"] != _class_name(optimizer):
        raise CheckpointError(
            f"{folder}: saved with {saved['class']}, the config's optimizer is {_class_name(optimizer)}. "
            "Restore the config, or start a new run from the exported model."
        )
    if [group["parameters"] for group in saved["groups"]] != _group_names(model, optimizer):
        raise CheckpointError(f"{folder}: the optimizer's parameter groups are not the saved ones. Restore the config.")
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    # these want the count of steps on the device, all others on the CPU
    counted_on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    state: dict[torch.Tensor, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, entries in saved["state"].items():
        state[parameters[name]] = values = {}
        for key, entry in entries.items():
            if "value" in entry:
                values[key] = entry["value"]
                continue
            if key == "step":
                entry = entry | {"on_cpu": parameters[name] not in counted_on_device}
            full_name = f"optimizer.{name}.{key}"
            stored: Any = metadata.state_dict_metadata[full_name]
            values[key] = tensors[full_name] = _empty_like_saved(
                parameters[name].detach(), entry, stored.size, stored.properties.dtype
            )
    return state, tensors


def _empty_like_saved(
    parameter: torch.Tensor, entry: dict[str, Any], size: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    if not entry["distributed"]:
        return torch.zeros(size, dtype=dtype, device="cpu" if entry["on_cpu"] else parameter.device)
    if size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return torch.zeros(size, dtype=dtype, device=parameter.device)
    shard_dim = entry["shard_dim"]
    placements = [
        Shard(shard_dim) if shard_dim is not None and isinstance(placement, Shard) else Replicate()
        for placement in parameter.placements
    ]
    zeros = distributed_zeros(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
    return zeros.to(parameter.device)  # offloaded shards are not where their mesh is


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[torch.Tensor, dict[str, Any]],
    saved: dict[str, Any],
    keep_options: bool,
) -> None:
    """Gives an optimizer its loaded state and saved options; ``keep_options`` leaves those it was constructed with."""
    optimizer.state.clear()
    optimizer.state.update(state)
    kept = inspect.signature(type(optimizer).__init__).parameters if keep_options else ()
    for group, saved_group in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in saved_group["options"].items():
            current = group.get(key)
            if key in kept:
                continue
            if isinstance(current, torch.Tensor):
                current.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(current, tuple) else value


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
    foreign = sum(parameter not in names for group in optimizer.param_groups for parameter in group["params"])
    if foreign:
        raise CheckpointError(
            f"{_class_name(optimizer)} holds {foreign} parameters that are not the model's. "
            "Make the optimizer after the model is sharded."
        )
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
