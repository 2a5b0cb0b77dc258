"""What a run trains: a whole model, or adapters over a frozen base.

During a run nothing is merged and there is no second model: the opponent of an iteration is the base with the adapter
as it is at the iteration's start, and generation and the reference pass run with just that.
"""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from spin.config import Component, Faults, SPINConfig, component_of
from spin.config.faults import yaml_text
from spin.core.dtypes import torch_dtype
from spin.core.errors import ConfigError
from spin.core.ranks import World
from spin.core.terminal import nearest_of
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4, patch_dora, patch_nf4
from spin.model.build import (
    build_model,
    choose_attention,
    extend_max_seq_len,
    prepare_model,
    row_layout,
    training_options,
)
from spin.model.sharding import clean_name
from spin.model.torchtune import LORA_ATTN_MODULES
from spin.pairs.packing import RowLayout

log = logging.getLogger(__name__)

_FOR_ADAPTERS = "checkpointer=spin.checkpoint.LoRACheckpointer"
_DROPOUT = (
    "policy and opponent would drop different weights, and the first loss of an iteration would not be that of two "
    "equal models."
)
_ATTENTION = get_args(LORA_ATTN_MODULES)


def check_lora(cfg: SPINConfig) -> None:
    """Checks a config by what its checkpointer saves: adapters alone, or every weight."""
    faults = Faults()
    if cfg.model.get("attn_dropout"):
        faults.add(f"model.attn_dropout={cfg.model.attn_dropout}: {_DROPOUT} Set 0.")
    if not _saves_adapters(cfg):
        if cfg.base_dtype is not None:
            faults.add(
                f"base_dtype={cfg.base_dtype} is of the frozen weights under adapters, and "
                f"{cfg.checkpointer.component} is for full fine-tuning. Set base_dtype=null, or {_FOR_ADAPTERS}."
            )
        return faults.raise_if_any()
    if cfg.enable_float8_training:
        faults.add("enable_float8_training=true: adapters and their frozen base do not multiply in float8. Set false.")
    if cfg.model.get("lora_dropout"):
        faults.add(f"model.lora_dropout={cfg.model.lora_dropout}: {_DROPOUT} Set 0.")
    if cfg.model.component.startswith("torchtune."):  # not one of the user's own
        _check_adapter_arguments(cfg.model, faults)
    if cfg.model.get("apply_lora_to_output"):
        faults.add("model.apply_lora_to_output=true: the fused head takes a plain weight. Set false.")
    if cfg.replicas > 1 and cfg.model.get("quantize_base"):
        faults.add(f"replicas={cfg.replicas} with an NF4 base: torchao gathers NF4 in one dimension only. Set 1.")
    if cfg.fsdp_cpu_offload and cfg.model.get("quantize_base"):
        faults.add("fsdp_cpu_offload=true with an NF4 base is not supported: it is small already. Set false.")
    faults.raise_if_any()


def _check_adapter_arguments(section: Component, faults: Faults) -> None:
    """Notes what torchtune's builders take without a word: wrong names, and a scale that turns adapters off."""
    modules: Any = section.get("lora_attn_modules", _ATTENTION)
    expected = f"expected a list of {', '.join(_ATTENTION)}"
    if not modules or not isinstance(modules, list | tuple):
        faults.add(f"model.lora_attn_modules: found {yaml_text(modules):.100}, {expected}.")
        modules = []
    for name in modules:
        if name not in _ATTENTION:
            hint = nearest_of(name, _ATTENTION) if isinstance(name, str) else ""
            faults.add(f"model.lora_attn_modules: found {yaml_text(name):.100}, {expected}.{hint}")
    alpha = section.get("lora_alpha")
    if isinstance(alpha, int | float) and not alpha > 0:
        faults.add(f"model.lora_alpha={alpha}: adapters are scaled by lora_alpha / lora_rank; expected above 0.")


def _saves_adapters(cfg: SPINConfig) -> bool:
    return getattr(component_of(cfg.checkpointer), "adapters_only", False)


def check_adapters(cfg: SPINConfig, model: nn.Module) -> bool:
    """Whether adapters alone are trained; a ConfigError if the model does not go with the config's checkpointer."""
    adapted = adapted_modules(model)
    if not _saves_adapters(cfg):
        if adapted:
            raise ConfigError(
                f"model: {cfg.model.component} has adapters, and checkpointer {cfg.checkpointer.component} saves all "
                f"weights. Set {_FOR_ADAPTERS}, or name a model without adapters."
            )
        return False
    if not adapted:
        raise ConfigError(
            f"model: {type(model).__name__} has no adapter. Name one of torchtune's lora_* or qlora_* builders, e.g. "
            "torchtune.models.llama3_2.lora_llama3_2_1b, or set checkpointer=spin.checkpoint.SPINCheckpointer for full "
            "fine-tuning."
        )
    if "output" in adapted:
        raise ConfigError("model.apply_lora_to_output=true: the fused head takes a plain weight. Set false.")
    if any(isinstance(module.dropout, nn.Dropout) for module in adapted.values()):
        raise ConfigError("model: adapters with dropout would make policy and opponent differ. Set lora_dropout=0.")
    return True


def build_policy(cfg: SPINConfig, world: World) -> nn.Module:
    """The model that a run trains, on the meta device: all of it, or adapters over a frozen base.

    The config's checkpointer says which. Says in the log how much is trained.

    Args:
        cfg (SPINConfig): complete.
        world (World): the ranks.

    Returns:
        nn.Module: a torchtune ``TransformerDecoder``; what is trained has ``requires_grad``.

    Raises:
        ConfigError: If model and checkpointer do not go together, or see :func:`check_lora`.
    """
    check_lora(cfg)
    dtype, base_dtype = (torch_dtype(name, world.device) for name in (cfg.dtype, cfg.base_dtype or cfg.dtype))
    model = build_model(cfg.model, base_dtype)
    if check_adapters(cfg, model):
        summary = prepare_adapters(model, dtype, world)
        if world.is_main:
            log.info(summary)
    return model


def prepare_policy(model: nn.Module, world: World, cfg: SPINConfig, longest_pair: int) -> RowLayout:
    """Wraps, shards and gives memory to a model whose weights are loaded afterwards; adapters start here.

    Args:
        model (nn.Module): from :func:`build_policy`.
        world (World): the ranks.
        cfg (SPINConfig): complete.
        longest_pair (int): tokens of the longest pair that there can be, for the longest row.

    Returns:
        RowLayout: how pairs are packed into rows that the model takes.
    """
    compute_dtype = torch_dtype(cfg.compute_dtype, world.device)
    layout = row_layout(model, cfg, choose_attention(model, world, compute_dtype, cfg.attention))
    extend_max_seq_len(model, longest_pair, layout)
    prepare_model(model, world, compute_dtype=compute_dtype, **training_options(cfg))
    init_adapters(model, cfg.seed)
    return layout


def prepare_adapters(model: nn.Module, dtype: torch.dtype, world: World) -> str:
    """Freezes all but the adapters, which get a dtype of their own."""
    adapted = adapted_modules(model)
    ranks = world.mesh.size(world.mesh.ndim - 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        nf4 = as_nf4(parameter)
        if nf4 is not None and (parameter.shape[0] % ranks or nf4.quantization_factor.numel() % ranks):
            block = nf4.block_size * nf4.scaler_block_size
            raise ConfigError(
                f"{name} {list(parameter.shape)} has {parameter.numel() // block} NF4 blocks of {block} weights, which "
                f"{ranks} ranks cannot share evenly. Use another number of GPUs, or quantize_base=false."
            )
    for module in adapted.values():
        for parameter in adapter_parameters(module).values():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    patch_dora(model)
    patch_nf4(model)
    # torchtune's hook of NF4 models makes `state_dict` copy all weights to the CPU in bf16
    model._state_dict_hooks.clear()
    trained = sum(parameter.numel() for parameter in trainable(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"parameters: {trained:,} trainable ({trained / total:.2%}) in {len(adapted)} adapters, "
        f"{total - trained:,} frozen"
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer updates."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Adapters that change nothing yet: A uniform in +-1/sqrt(in), B and DoRA's magnitude (its change) zero.

    The numbers depend on the seed and the module's name only, not on the number of ranks. No collective.

    Source:
        LoRA (arXiv 2106.09685), section 4.1, with the bounds of its code and of torchtune's ``LoRALinear``.
    """
    for name, module in adapted_modules(model).items():
        for part, parameter in adapter_parameters(module).items():
            if part != "lora_a.weight":
                parameter.zero_()
                continue
            digest = hashlib.sha256(f"{seed} {clean_name(name)} {part}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            bound = 1 / math.sqrt(module.in_dim)
            whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator).to(parameter.device)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)
