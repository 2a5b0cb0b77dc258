"""float8 matmuls for a decoder's body, by torchao; weights stay what they are, and so does the state dict."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from spin.core.errors import ConfigError

log = logging.getLogger(__name__)

# Not torchao's "tensorwise": its one scale for all of a row's tokens lets the log-probs of a pair depend on what the
# pair is packed with, by half a nat in a tiny model, and the reference's packing is not that of every epoch.
_RECIPE = "rowwise"
_BODY = "layers."
_MULTIPLE = 16  # of what float8 matmuls take


def convert_float8(model: nn.Module, device: torch.device) -> int:
    """Makes the linear layers inside a decoder's ``layers`` multiply in float8, forward and backward.

    Embeddings and the output head are left alone, and so are layers with a dimension that is not a multiple of 16. Call
    it before activation checkpointing, ``torch.compile`` and sharding; the model may be on the meta device. Without
    compilation it is slower than bf16. Each token has its own scale, so log-probs do not depend on packing.

    Args:
        model (nn.Module): a torchtune decoder.
        device (torch.device): where it will run; on ``cpu`` float8 is emulated, which is for tests.

    Returns:
        int: number of layers that were converted.

    Raises:
        ConfigError: If the GPU has no float8, or no layer can be converted.

    Source:
        Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433; the layers are
        ``torchao.float8``'s.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise ConfigError(
            f"float8 needs a GPU of compute capability 8.9 or more (H100, H200, L40S, RTX 4090), found "
            f"{torch.cuda.get_device_name(device)} with {found}. Set enable_float8_training=false."
        )
    fitting = {name for name, module in model.named_modules() if _fits(name, module)}
    if not fitting:
        raise ConfigError(
            f"float8: {type(model).__name__} has no linear layer in `{_BODY}` whose dimensions are multiples of "
            f"{_MULTIPLE}. Set enable_float8_training=false."
        )
    if device.type == "cpu":
        log.warning("float8 is emulated on CPU: slower than without it, for tests only.")
    # weight gradients sum over a row's tokens, whose number may be odd: padded to what float8 takes
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(_RECIPE), emulate=device.type == "cpu", pad_inner_dim=True
    )
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in fitting)
    return len(fitting)


@contextmanager
def float8_off(model: nn.Module) -> Iterator[None]:
    """Runs plain linear layers, for decoding, which would quantize the same weights again for each token.

    Does nothing for a model that was not converted.
    """
    converted = [module for module in model.modules() if type(module) is Float8Linear]
    # Their class, not their forward: compiled layers notice it.
    for module in converted:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in converted:
            module.__class__ = Float8Linear


def _fits(name: str, module: nn.Module) -> bool:
    return (
        name.startswith(_BODY)
        and type(module) is nn.Linear
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    )
