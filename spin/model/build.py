"""From a model builder in a config to a sharded model that is ready for its weights."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from spin.config import COMPONENT, Component, SPINConfig, instantiate
from spin.config.schema import Attention
from spin.core.dtypes import has_fast_bf16
from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import World
from spin.model.adapters import quantizing_at_once
from spin.model.attention import patch_attention
from spin.model.flex import flex_unsupported_reason
from spin.model.float8 import convert_float8
from spin.model.gemma2 import fix_gemma2_softcap
from spin.model.sharding import materialize, shard_model
from spin.model.torchtune import TransformerDecoder
from spin.pairs.packing import RowLayout
from spin.pairs.row_mask import BLOCK

log = logging.getLogger(__name__)

# What an H200 computes in the 8.6 s that a further length of a row takes to compile, in the reference pass and again in
# training (Llama 3.2 1B; programs grow with a layer's operations, not with its size), for each of three iterations
_COMPILING_FLOPS = 8.6 * 471e12 / 3


def build_model(section: Component | Mapping[str, Any] | DictConfig, dtype: torch.dtype) -> nn.Module:
    """Builds a model on the meta device: its shapes, no memory.

    Args:
        section (Component | Mapping[str, Any] | DictConfig): the config's ``model``, any torchtune builder.
        dtype (torch.dtype): of the master weights.

    Returns:
        nn.Module: a torchtune ``TransformerDecoder``.

    Raises:
        CheckpointError: If it is built from a folder whose config.json is broken or asks for what is not built here.
        ConfigError: If it builds something else.
    """
    try:
        with torch.device("meta"), _default_dtype(dtype), quantizing_at_once():
            model = instantiate(section)
    except CheckpointError:  # of the folder that the model is built from
        raise
    # a size below zero, or one that does not fit another; NF4 takes multiples of 16,384
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model: {section.get(COMPONENT)} does not take these sizes ({error}).") from error
    if not isinstance(model, TransformerDecoder):
        raise ConfigError(
            f"model: {section.get(COMPONENT)} makes a {type(model).__name__}, expected a torchtune TransformerDecoder."
        )
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def checkpoint_activations(model: nn.Module, every: int = 1) -> None:
    """Keeps of every ``every``-th layer its input alone; backward computes the layer again."""
    for index, layer in enumerate(model.layers):
        if (index + 1) % every == 0:
            model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)


def choose_attention(model: nn.Module, world: World, compute_dtype: torch.dtype, asked: Attention = "auto") -> bool:
    """Whether packed rows go through FlexAttention; says so in the log."""
    reason = flex_unsupported_reason(model, world.device, compute_dtype)
    if asked == "flex" and reason is not None:
        raise ConfigError(f"attention=flex cannot work here: {reason}. Set attention=dense, or auto.")
    if world.is_main:
        if reason is None and asked != "dense":
            log.info("attention: FlexAttention over the blocks of packed rows")
        else:
            log.info(
                f"attention: dense masks, because {reason if asked == 'auto' else 'attention=dense was asked for'}"
            )
    return reason is None and asked != "dense"


def window_of(model: nn.Module) -> int | None:
    """The sliding window of a model's layers in positions (one size at most), or None if all see everything."""
    found = (getattr(module, "sliding_window_size", None) for module in model.modules())
    windows = {size for size in found if size is not None}
    if len(windows) > 1:
        raise ConfigError(f"layers with sliding windows of {sorted(windows)} positions; packed rows know one size.")
    return windows.pop() if windows else None


def row_layout(model: nn.Module, cfg: SPINConfig, flex: bool) -> RowLayout:
    """How pairs are packed into rows that a model takes."""
    checker = cfg.pairs.checker
    # of a token: twice the weights in the reference pass, six times in each epoch
    token_flops = (2 + 6 * cfg.max_epochs) * sum(parameter.numel() for parameter in model.parameters())
    return RowLayout(
        row_tokens=cfg.pairs.row_tokens,
        row_multiple=math.lcm(cfg.pairs.row_multiple, BLOCK if flex else 1),
        truncated=cfg.pairs.truncated,
        right_weight=1.0 if checker is None else checker.right_weight,
        unknown_weight=1.0 if checker is None else checker.unknown_weight,
        flex=flex,
        window=window_of(model),
        compiling_tokens=round(_COMPILING_FLOPS / token_flops) if flex and cfg.compile else 0,
    )


def extend_max_seq_len(model: nn.Module, longest_pair: int, layout: RowLayout) -> None:
    """Lets a model take rows that are longer than its context; no position in them is beyond it."""
    longest = layout.longest_row(longest_pair)
    model.max_seq_len = max(model.max_seq_len, longest)  # type: ignore[assignment, call-overload]


def training_options(cfg: SPINConfig) -> dict[str, Any]:
    """What a recipe's config says of how its model is wrapped: memory against time."""
    return {
        "checkpointed_every": cfg.checkpointed_every,
        "compile_layers": cfg.compile,
        "float8": cfg.enable_float8_training,
        "reshard_after_forward": cfg.fsdp_reshard_after_forward,
        "cpu_offload": cfg.fsdp_cpu_offload,
    }


def prepare_model(
    model: nn.Module,
    world: World,
    *,
    compute_dtype: torch.dtype,
    checkpointed_every: int = 0,
    compile_layers: bool = False,
    float8: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Patches, wraps and shards a model that stands on the meta device, and gives its shards memory.

    Args:
        model (nn.Module): from :func:`build_model`; weights are to be loaded afterwards.
        world (World): the ranks.
        compute_dtype (torch.dtype): of forward and backward.
        checkpointed_every (int): compute the activations of every so many-th layer again in backward; 0: of none.
        compile_layers (bool): ``torch.compile`` each layer as a whole, once for each length of a row.
        float8 (bool): products of the layers in float8, see :func:`spin.model.float8.convert_float8`.
        reshard_after_forward (bool): see :func:`spin.model.sharding.shard_model`.
        cpu_offload (bool): see :func:`spin.model.sharding.shard_model`.
    """
    if world.is_main and world.device.type == "cpu" and compute_dtype == torch.bfloat16 and not has_fast_bf16():
        log.warning(
            "This CPU has no instructions for bf16: torch multiplies in it many times more slowly than in fp32. Set "
            "compute_dtype=fp32."
        )
    # torchtune's RMSNorm gives fp32 inputs and bf16 weights to torch, which is right, and which torch remarks upon
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # Programs of layers, or of FlexAttention alone: one for each length of a row, with and without gradients, for each
    # kind of layer. Past these limits torch ends the run.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**16
    patch_attention(model)
    fix_gemma2_softcap(model)
    if float8:
        convert_float8(model, world.device)
    if checkpointed_every:
        checkpoint_activations(model, checkpointed_every)
    if compile_layers:
        compile_each_layer(model)
    shard_model(
        model,
        world,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )
    materialize(model, world, cpu_offload=cpu_offload)


def compile_each_layer(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles the forward of each layer: one program without breaks, shared by all layers that are alike.

    What FSDP2 does before and after a layer stays outside, because it hangs on the module and not on its forward.
    """
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
