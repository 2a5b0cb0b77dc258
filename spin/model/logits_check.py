"""Compares the logits of a config's model with those of transformers' model of the folder.

transformers builds the architecture from the folder's config.json with a few layers and random weights; the weights go
through the converters with which a run reads a folder; then both compute logits in float32 for the same tokens. No
weight of the folder is read, and width, heads, positions and windows are its own.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from spin import config
from spin.core.command import spin_command
from spin.core.errors import CheckpointError
from spin.core.ranks import World, raise_on_all_ranks
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4, patch_dora
from spin.model.attention import patch_attention
from spin.model.build import build_model
from spin.model.gemma2 import fix_gemma2_softcap
from spin.model.hf import from_hf_tensors
from spin.model.hf_check import Asked, check_model, context_of, reached
from spin.model.hf_config import CONFIG
from spin.model.hf_families import check_model_type
from spin.model.hf_folder import read_config
from spin.model.torchtune import FeedForward, TransformerDecoder

log = logging.getLogger(__name__)

TOKENS = 64
MAX_PARAMETERS = 900_000_000  # of one of the two copies, 4 bytes each
SELF_TEST_PARAMETERS = 80_000_000  # what a recipe compares at its start: a few seconds
_VOCABULARY = 512
_TOLERANCE = 1e-3  # logits have a standard deviation of about 1.5; float32 leaves 1e-5


@dataclass(frozen=True)
class LogitsReport:
    """The largest absolute difference of two logits, over how many tokens, of which layers, of how many parameters."""

    difference: float
    tokens: int
    layers: tuple[int, ...]
    parameters: int

    @property
    def is_fault(self) -> bool:
        """True if the difference is more than float32 explains."""
        return not self.difference <= _TOLERANCE  # NaN is one

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        found = (
            f"largest difference to the logits of transformers {self.difference:.2g} in float32, over {self.tokens} "
            f"tokens (random weights, layers {layers}, {self.parameters:,} parameters)"
        )
        if not self.is_fault:
            return found
        return (
            f"{found}; expected {_TOLERANCE} at most. The model section does not build what {CONFIG} describes, or "
            "transformers reads it otherwise: compare the two, and the arguments of the builder."
        )


class TooLargeError(CheckpointError):
    """A model whose few layers are more than the comparison may take."""


def compare_logits(
    section: config.Component | DictConfig,
    checkpoint_dir: str | Path,
    model_type: str | None,
    max_parameters: int = MAX_PARAMETERS,
) -> LogitsReport:
    """Compares the logits of a config's model with those of transformers' model of the folder.

    Args:
        section (config.Component | DictConfig): the config's ``model``.
        checkpoint_dir (str | Path): Hugging Face folder with the model's config.json.
        model_type (str | None): name in torchtune's ``ModelType``; None: the model is built from its folder.
        max_parameters (int): of the model of one or two layers, at most.

    Returns:
        LogitsReport: the largest difference.

    Raises:
        CheckpointError: If transformers cannot build the folder's architecture, its weights do not fit the model, or,
            as ``TooLargeError``, the model is too large.
    """
    model_type = check_model_type(model_type)
    file = Path(checkpoint_dir) / CONFIG
    content = read_config(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(section)
        asked, context = Asked(list(model.layers), content, model_type, file), context_of(model)
        layers = _shrink(model, asked, max_parameters)
        windows = _windows(model, asked, layers, context)
        twin = _twin(asked, layers, windows, file)
        _fill(model, twin, content, model_type)
        differences = [
            _difference(model, twin, ids, positions)
            for ids, positions in _inputs(model.tok_embeddings.num_embeddings, context, any(windows))
        ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
    return LogitsReport(worst, len(differences) * min(TOKENS, context), tuple(layers), parameters)


def _build(section: config.Component | DictConfig) -> TransformerDecoder:
    """The section's model on the meta device, without NF4: 4 bits compute other logits, as they should."""
    plain = config.plain(section) | {"quantize_base": False}
    if section.get("quantize_base"):
        return build_model(plain, torch.float32)
    model = build_model(section, torch.float32)
    quantizes = any(as_nf4(parameter) is not None for parameter in model.parameters())  # qlora_llama3_1_8b and so on
    return build_model(plain, torch.float32) if quantizes else model


def _shrink(model: Any, asked: Asked, max_parameters: int) -> list[int]:
    """Leaves one layer of each kind, two at least, and a small vocabulary, which changes nothing but the size."""
    kinds: dict[Any, int] = {}
    for index, (ours, theirs) in enumerate(zip(model.layers, asked.layers, strict=True)):
        window = getattr(ours.attn, "sliding_window_size", None), theirs.attn.sliding_window_size
        kinds.setdefault((*window, id(theirs.attn.pos_embeddings), type(theirs.mlp)), index)
    layers = sorted(kinds.values())
    if len(layers) == 1 and len(model.layers) > 1:
        layers = [0, 1]
    vocabulary = model.tok_embeddings.num_embeddings
    model.tok_embeddings.num_embeddings = min(_VOCABULARY, vocabulary)
    for part in (model.tok_embeddings, model.output):
        for module in part.modules() if isinstance(part, nn.Module) else ():  # a tied output is none
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.shape[0] == vocabulary:
                    module.register_parameter(name, nn.Parameter(parameter[:_VOCABULARY].detach()))
    outside = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("layers."))
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in model.layers)
    while len(layers) > len(kinds) and outside + len(layers) * largest > max_parameters:
        layers.pop()
    if outside + len(layers) * largest > max_parameters:
        raise TooLargeError(
            f"{len(layers)} layers of the model have {outside + len(layers) * largest:,} parameters, more than "
            f"{max_parameters:,}, of which logits are compared"
        )
    model.layers = nn.ModuleList(model.layers[index] for index in layers)
    return layers


def _windows(model: Any, asked: Asked, layers: list[int], context: int) -> list[int | None]:
    """Sets windows that a run can reach to a few positions, in the model; returns those of transformers.

    Equal ones stay equal, and others in their order.
    """
    theirs = [reached(asked.layers[index].attn.sliding_window_size, context) for index in layers]
    ours = [reached(getattr(layer.attn, "sliding_window_size", None), context) for layer in model.layers]
    sizes = sorted({window for window in (*theirs, *ours) if window is not None})
    small = {size: min(size, 8 * (place + 1)) for place, size in enumerate(sizes)}
    for layer, window in zip(model.layers, ours, strict=True):
        if hasattr(layer.attn, "sliding_window_size"):
            layer.attn.sliding_window_size = None if window is None else small[window]
    return [None if window is None else small[window] for window in theirs]


def _twin(asked: Asked, layers: list[int], windows: list[int | None], file: Path) -> nn.Module:
    """transformers' model of the folder's config with the chosen layers, random weights, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    c, left_out = asked.config, ("auto_map", "torch_dtype", "dtype", "_name_or_path", "model_type")
    small = {key: value for key, value in asked.given.items() if key not in left_out and not key.endswith("_token_id")}
    small |= {
        "num_hidden_layers": len(layers),
        "vocab_size": min(_VOCABULARY, c.vocab_size),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **{
            key: [getattr(c, key)[index] for index in layers]
            for key in ("layer_types", "no_rope_layers")
            if asked.has(key)
        },
    }
    if asked.has("mlp_only_layers"):
        dense = [place for place, index in enumerate(layers) if isinstance(asked.layers[index].mlp, FeedForward)]
        small |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if any(windows):
        small["sliding_window"] = max(window for window in windows if window is not None)
    try:
        # a copy: the classes change the objects in it
        made = AutoConfig.for_model(c.model_type, **json.loads(json.dumps(small)))
        twin = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:  # noqa: BLE001 - whatever transformers says of a config that it does not take
        raise CheckpointError(
            f"{file}: transformers cannot build this model ({type(error).__name__}: {error})."
        ) from error
    # weights that make every part count: scores of about 2, soft caps that bend, norms and biases of their own
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
            else:  # norms around what they are set to, biases around 0
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return twin.eval()


def _fill(model: TransformerDecoder, twin: nn.Module, content: dict[str, Any], model_type: str) -> None:
    """Gives the model its memory and the twin's weights, patched as a run patches it; adapters do nothing."""
    patch_attention(model)
    fix_gemma2_softcap(model)
    patch_dora(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with torch.device("cpu"):
                module.rope_init()
    for module in adapted_modules(model).values():
        for parameter in adapter_parameters(module).values():
            nn.init.zeros_(parameter)
    from_hf_tensors(model, dict(twin.state_dict()), content, model_type)
    model.eval()


def _inputs(vocabulary: int, context: int, windowed: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and positions, shape (1, s): a text from position 0 on, and without a window one with jumps.

    Far positions show what slow frequencies, long and short factors do.
    """
    count = min(TOKENS, context)
    ids = torch.randint(0, vocabulary, (1, count))
    near = torch.arange(count)[None]
    if windowed or context <= TOKENS:
        return [(ids, near)]
    return [(ids, near), (ids, torch.linspace(0, min(context, 65536) - 1, count).long()[None])]


@torch.no_grad()
def _difference(model: nn.Module, twin: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> float:
    ours = model(ids, input_pos=positions)
    # without a mask of ones transformers takes jumps of the position for borders of packed sequences
    try:
        theirs = twin(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    except Exception as error:  # noqa: BLE001 - as in _twin
        raise CheckpointError(f"{CONFIG}: transformers cannot compute it ({type(error).__name__}: {error}).") from error
    return float((ours - theirs).abs().max())


def self_test(cfg: config.SPINConfig, world: World) -> None:
    """What a run compares before it loads weights, on its first rank, if that takes about a second.

    Raises a CheckpointError on all ranks if logits differ or cannot be compared; logs what it found.
    """
    with raise_on_all_ranks(world, CheckpointError):
        if not world.is_main:
            return
        folder, model_type = cfg.checkpointer.checkpoint_dir, check_model_type(cfg.checkpointer.get("model_type"))
        file = Path(folder) / CONFIG
        check_model(build_model(cfg.model, torch.float32), read_config(file), model_type, file)  # names the key
        try:
            report = compare_logits(cfg.model, folder, model_type, SELF_TEST_PARAMETERS)
        except TooLargeError as error:
            command = spin_command("validate", Path(cfg.output_dir) / "config.yaml", "--logits")
            log.info(f"self-test: no comparison with transformers: {error}. This makes it: {command}")
            return
        if report.is_fault:
            raise CheckpointError(f"{folder}: {report}")
        log.info(f"self-test: {report}")
