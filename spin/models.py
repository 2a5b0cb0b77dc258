"""From a model builder in a config to a sharded model that is ready for its weights."""

from __future__ import annotations

import warnings

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import modules, training

from spin.attention import patch_attention
from spin.config import instantiate
from spin.distributed import World, materialize, shard_model
from spin.gemma2 import fix_gemma2_softcap


def build_model(section: DictConfig, dtype: torch.dtype) -> nn.Module:
    """Builds a model on the meta device: its shapes, no memory.

    Args:
        section (DictConfig): the config's ``model``, any torchtune builder.
        dtype (torch.dtype): of the master weights.

    Returns:
        nn.Module: a torchtune ``TransformerDecoder``.
    """
    with torch.device("meta"), training.set_default_dtype(dtype):
        return instantiate(section)


def prepare_model(
    model: nn.Module,
    world: World,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    compile_layers: bool = False,
) -> None:
    """Patches, wraps and shards a model that stands on the meta device, and gives its shards memory.

    Args:
        model (nn.Module): from :func:`build_model`; weights are to be loaded afterwards.
        world (World): the ranks.
        compute_dtype (torch.dtype): of forward and backward.
        activation_checkpointing (bool): compute a layer's activations again in backward; less memory, a third more
            time.
        compile_layers (bool): ``torch.compile`` each layer.
    """
    # torchtune's RMSNorm gives fp32 inputs and bf16 weights to torch, which is right, and which torch remarks upon
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    patch_attention(model)
    fix_gemma2_softcap(model)
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    if compile_layers:
        for layer in model.layers:
            layer.compile()
    shard_model(model, world, compute_dtype=compute_dtype)
    materialize(model, world)
