"""What a config needs, in GiB on each GPU, before anything is loaded: from shapes on the meta device, by arithmetic.

The peak of training is where the output layer works on a row: everything that the layers keep for backward is there,
the gradients of the rows before, and the head's own. So

    training = weights + gathered copy + gradients + optimizer + activations + head

and, while the opponent plays, ``weights + gathered copy + optimizer + cache``. The activations of a compiled layer are
counted tensor by tensor; the rest is exact. Measured peaks (torch's allocator, without the CUDA context) are in
tests/cli/test_estimate.py.

    python -m spin estimate --config lora model.path=FOLDER
    python -m spin estimate --config full model.path=FOLDER --ranks 8 pairs.row_tokens=12288
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from spin.cli import parser_of
from spin.config import SPINConfig, complete, load_config, parse_overrides
from spin.core.dtypes import torch_dtype
from spin.core.errors import ConfigError
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4
from spin.model.build import build_model
from spin.model.moe import MoE, idle_parameters
from spin.pairs.packing import RowLayout, plan_rows
from spin.pairs.row_mask import BLOCK

_GIB = 2**30
# Bytes of optimizer state for a trained weight, by class; others are taken for AdamW.
_OPTIMIZER_BYTES = {"AdamW8bit": 2, "AdamWStochasticRounding": 8, "AdamW": 8, "Adam": 8, "RMSprop": 4, "SGD": 0}
# NF4: half a byte, a scale of one byte for 64 weights, a factor for 16,384.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 16_384
_NF4_WORKSPACE_BYTES = 2  # for each number that NF4 stands for, while a product is computed with them
# Kept by eager layers for every tensor that compiled ones keep: 24.3 - 13.0 GiB against 20.6 - 13.0 (Llama 3.2 1B).
_EAGER_FACTOR = 1.45
_CACHE_STEP_TOKENS = 256
_SPREAD = 0.5  # of the logarithm of pairs' lengths, as in conversations


@dataclass(frozen=True)
class Estimate:
    """Memory on each GPU, and disk, of a config; all in GiB."""

    weights: float  # this rank's shards as they are stored, frozen ones included
    gathered: float  # copies in the compute dtype that stay from forward to backward
    gradients: float
    optimizer: float
    activations: float  # what layers keep for backward over one row
    head: float  # logits of a chunk, and the sum of the output weight's gradient if it is trained
    workspace: float  # dequantized NF4, or DoRA's norms, of the largest weight
    cache: float  # keys and values while the opponent plays; 0 if that happens in a separate engine
    playing_copy: float  # the gathered model while the opponent plays
    pair_store: float  # on disk, for each iteration, at most
    checkpoint: float  # on disk, for each resumable checkpoint
    export: float  # on disk, for each iteration
    row_tokens: int  # length of the row that was counted
    trained: int  # parameters
    frozen: int  # parameters
    idle: int  # of both, those of experts that a token does not go to

    @property
    def training(self) -> float:
        """Peak of an optimizer step."""
        in_backward = self.gathered + self.gradients + self.activations + self.head
        return self.weights + self.optimizer + self.workspace + in_backward

    @property
    def playing(self) -> float:
        """Peak while the opponent plays; the optimizer of the iteration before is still there."""
        return self.weights + self.playing_copy + self.optimizer + self.cache + self.workspace

    @property
    def peak(self) -> float:
        """The larger of both."""
        return max(self.training, self.playing)

    def table(self) -> str:
        """Every part, and what it belongs to, a line each."""
        rows: list[tuple[str, float | None, float | None]] = [
            ("weights", self.weights, self.weights),
            ("gathered copy", self.gathered, self.playing_copy),
            ("gradients", self.gradients, None),
            ("optimizer", self.optimizer, self.optimizer),
            (f"activations of a row of {self.row_tokens:,} tokens", self.activations, None),
            ("output layer", self.head, None),
            ("workspace", self.workspace, self.workspace),
            ("key-value cache", None, self.cache),
            ("peak", self.training, self.playing),
        ]
        lines = [f"{'GiB on each GPU':<44}{'training':>10}{'playing':>10}"]
        for name, *values in rows:
            cells = "".join(f"{'-' if value is None else f'{value:.1f}':>10}" for value in values)
            lines.append(f"{name:<44}{cells}")
        active = self.trained + self.frozen - self.idle
        return "\n".join(lines) + (
            f"\nand about 1 GiB for CUDA itself\n\n{self.trained:,} parameters are trained, {self.frozen:,} frozen"
            f"{f'; a token is multiplied with {active:,} of them' if self.idle else ''}\n"
            f"on disk: {self.pair_store:.2f} GiB of pairs at most and {self.export:.2f} GiB of exports each iteration, "
            f"{self.checkpoint:.2f} GiB each checkpoint"
        )


def estimate(cfg: SPINConfig, ranks: int = 1, pair_tokens: int | None = None) -> Estimate:
    """Adds up what a complete config of a training recipe needs on ``ranks`` GPUs. Nothing is read but the config.

    ``pair_tokens`` is the mean length of a pair, prompt and responses; it gives the rows that a batch of such pairs is
    packed into. None takes the longest row that there can be.
    """
    if ranks < 1 or ranks % cfg.replicas:
        raise ConfigError(f"ranks={ranks}: expected 1 or more, in multiples of replicas={cfg.replicas}.")
    if pair_tokens is not None and pair_tokens < 1:
        raise ConfigError(f"pair_tokens={pair_tokens}: expected the mean tokens of a pair, 1 or more.")
    shards = ranks // cfg.replicas
    dtype, compute = (torch_dtype(name, torch.device("cpu")) for name in (cfg.dtype, cfg.compute_dtype))
    model = build_model(cfg.model, torch_dtype(cfg.base_dtype or cfg.dtype, torch.device("cpu")))
    shapes = _Shapes(model)
    trained, base = _split(model)
    trained_count = sum(weight.numel() for weight in trained)

    weights = trained_count * dtype.itemsize + sum(map(_stored_bytes, base))
    playing_copy = trained_count * float(compute.itemsize)
    for weight in base:
        is_nf4 = as_nf4(weight) is not None
        if ranks > 1 or not (is_nf4 or weight.dtype == compute):  # alone, what needs no cast is used where it is
            playing_copy += _stored_bytes(weight) if is_nf4 else weight.numel() * compute.itemsize
    gathered = playing_copy
    if cfg.fsdp_reshard_after_forward:  # the root stays, and two layers: one that computes, one that is on its way
        in_layers = 1 - shapes.root_parameters / shapes.parameters
        gathered *= shapes.root_parameters / shapes.parameters + in_layers * min(1.0, 2 / shapes.layers)
    # full ones are reduced after the last row's head, so they do not add to the shards'
    gradients = trained_count * 4 / (1 if cfg.fsdp_accumulate_unsharded else shards)
    state_bytes = _OPTIMIZER_BYTES.get(cfg.optimizer.component.rsplit(".", 1)[-1], 8)
    if cfg.optimizer.get("momentum"):
        state_bytes += 4
    on_gpu = 0 if cfg.fsdp_cpu_offload else 1
    row = _row_tokens(cfg, ranks, pair_tokens)

    return Estimate(
        weights=on_gpu * weights / shards / _GIB,
        gathered=gathered / _GIB,
        gradients=on_gpu * gradients / _GIB,
        optimizer=on_gpu * trained_count * state_bytes / shards / _GIB,
        activations=_activations(cfg, shapes, row, compute) / _GIB,
        head=_head(cfg, shapes, compute, is_trained=not base) / _GIB,
        workspace=_workspace(model) / _GIB,
        cache=_cache(cfg, model, shapes, compute) / _GIB,
        playing_copy=playing_copy / _GIB,
        pair_store=_pair_store(cfg, model, pair_tokens) / _GIB,
        checkpoint=trained_count * (dtype.itemsize + state_bytes) / _GIB,
        export=_export(cfg, model, trained_count if base else 0, dtype) / _GIB,
        row_tokens=row,
        trained=trained_count,
        frozen=sum(weight.numel() for weight in base),
        idle=idle_parameters(model),
    )


class _Shapes:
    """The numbers of a decoder that activations and caches follow from."""

    def __init__(self, model: Any) -> None:
        layer = model.layers[0]
        attention = layer.attn
        self.layers = len(model.layers)
        self.width = model.tok_embeddings.weight.shape[1]
        self.vocab = model.tok_embeddings.weight.shape[0]
        self.keys = attention.num_kv_heads * attention.head_dim
        queries = attention.num_heads * attention.head_dim
        of_mlp = max(_kept_by_mlp(layer.mlp, self.width) for layer in model.layers)
        norms = (getattr(layer, name, None) for name in ("sa_norm", "mlp_norm", "sa_scale", "mlp_scale"))
        num_norms = sum(norm is not None and not isinstance(norm, nn.Identity) for norm in norms)
        # elements for each token: in and out of each norm, q and attention's output, k, v, and those of the MLP
        self.kept_by_layer = 2 * num_norms * self.width + 2 * queries + 2 * self.keys + of_mlp
        self.parameters = sum(p.numel() for p in model.parameters())
        self.root_parameters = self.parameters - sum(p.numel() for p in model.layers.parameters())


def _kept_by_mlp(mlp: Any, width: int) -> int:
    """Gate, up and their product; of each of a token's experts, its input and output as well."""
    return mlp.top_k * (3 * mlp.hidden + 2 * width) if isinstance(mlp, MoE) else 3 * mlp.w1.weight.shape[0]


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained and frozen parameters: adapters and base, or all and none."""
    parts = [part for module in adapted_modules(model).values() for part in adapter_parameters(module).values()]
    if not parts:
        return list(model.parameters()), []
    return parts, [parameter for parameter in model.parameters() if all(parameter is not part for part in parts)]


def _stored_bytes(weight: torch.Tensor) -> float:
    return weight.numel() * (_NF4_BYTES if as_nf4(weight) is not None else weight.dtype.itemsize)


def _row_tokens(cfg: SPINConfig, ranks: int, pair_tokens: int | None) -> int:
    layout = RowLayout(cfg.pairs.row_tokens, math.lcm(cfg.pairs.row_multiple, BLOCK))  # as FlexAttention needs
    if pair_tokens is None:
        limits = (data_limit(cfg, "max_prompt_tokens"), data_limit(cfg, "max_response_tokens"))
        generated = cfg.pairs.responses_per_prompt * cfg.sampling.max_new_tokens
        longest_pair = sum(limits) + generated if None not in limits else 0
        return layout.longest_row(longest_pair)
    spread = NormalDist(math.log(pair_tokens) - _SPREAD**2 / 2, _SPREAD)  # of the logarithm; its mean is pair_tokens
    size = cfg.global_batch_size
    lengths = [max(1, round(math.exp(spread.inv_cdf((i + 0.5) / size)))) for i in range(size)]
    rows = plan_rows(lengths, layout, ranks)
    longest = max(sum(lengths[i] for i in pairs) for rank in rows for pairs in rank)
    return layout.padded_length(longest)


def _activations(cfg: SPINConfig, shapes: _Shapes, row: int, compute: torch.dtype) -> float:
    layer = shapes.kept_by_layer * (1.0 if cfg.compile else _EAGER_FACTOR)
    around = 4 * shapes.width  # embeddings, last hidden state, what the head takes of it, and its gradient
    if not cfg.enable_activation_checkpointing:
        elements = shapes.layers * layer
    else:  # inputs of the layers that are checkpointed, and one of them in full, with gradients of about the same size
        every = cfg.ac_option or 1 if cfg.ac_mode == "selective" else 1
        checkpointed = shapes.layers // every
        elements = checkpointed * shapes.width + (shapes.layers - checkpointed) * layer + 2 * layer
    return float(row * (elements + around) * compute.itemsize)


def _head(cfg: SPINConfig, shapes: _Shapes, compute: torch.dtype, is_trained: bool) -> float:
    logits = cfg.logprob_chunk_tokens * shapes.vocab * compute.itemsize
    return float(logits + (shapes.vocab * shapes.width * 4 if is_trained else 0))  # summed in fp32


def _workspace(model: nn.Module) -> float:
    quantized = [weight.numel() for weight in model.parameters() if as_nf4(weight) is not None]
    doras = [module.weight.numel() for module in adapted_modules(model).values() if hasattr(module, "magnitude")]
    # DoRA's norms: the weight and its merged form in fp32
    return max([0.0, *(n * _NF4_WORKSPACE_BYTES for n in quantized), *(n * 8.0 for n in doras)])


def data_limit(cfg: SPINConfig, key: str) -> Any:
    """A limit of the data set; of a mixture's sources the largest, and of their numbers of samples the sum."""
    sources = cfg.dataset.get("sources")
    if not sources:
        return cfg.dataset.get(key)
    limits = [source.get(key, (cfg.dataset.get("common") or {}).get(key)) for source in sources.values()]
    if None in limits:
        return None
    return sum(limits) if key == "limit" else max(limits)


def _cache(cfg: SPINConfig, model: Any, shapes: _Shapes, compute: torch.dtype) -> float:
    if cfg.generator.component.rsplit(".", 1)[-1] != "TorchtuneGenerator":
        return 0.0
    batch = cfg.generator.get("batch_size", 32)
    prompt = data_limit(cfg, "max_prompt_tokens") or model.max_seq_len
    longest = min(model.max_seq_len, prompt + cfg.sampling.max_new_tokens)
    capacity = math.ceil(longest / _CACHE_STEP_TOKENS) * _CACHE_STEP_TOKENS
    keys_and_values = batch * capacity * shapes.layers * 2 * shapes.keys * compute.itemsize
    return float(keys_and_values + batch * shapes.vocab * (compute.itemsize + 4))  # and logits of a step


def _pair_store(cfg: SPINConfig, model: Any, pair_tokens: int | None) -> float:
    """Responses, responses with log-probs, and rows to look them up: three times the token ids, 4 bytes each."""
    samples = cfg.dataset.get("samples") or data_limit(cfg, "limit") or 0
    if pair_tokens is None:
        prompt, real = (data_limit(cfg, f"max_{part}_tokens") or model.max_seq_len for part in ("prompt", "response"))
        pair_tokens = prompt + real + cfg.pairs.responses_per_prompt * cfg.sampling.max_new_tokens
    return float(samples * (3 * 4 * pair_tokens + 300))


def _export(cfg: SPINConfig, model: nn.Module, adapter: int, dtype: torch.dtype) -> float:
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}[cfg.checkpointer.get("export_dtype", "bf16")]
    merged = cfg.checkpointer.get("export_merged", True)
    plain = sum(parameter.numel() for parameter in model.parameters()) - adapter
    return float(plain * itemsize * merged + adapter * dtype.itemsize)


def main(argv: Sequence[str]) -> None:
    """Prints the table of a config."""
    usage = "%(prog)s --config NAME_OR_FILE [--ranks N] [--pair-tokens N] [key=value ...]"
    description = "Memory that a config needs on each GPU, and disk, before anything is loaded."
    parser = parser_of("estimate", description, usage)
    parser.add_argument("--config", required=True, help="a YAML file, or a packaged config such as lora")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs")
    parser.add_argument("--pair-tokens", type=int, help="mean tokens of a pair: prompt, real and generated response")
    arguments, overrides = parse_overrides(parser, argv)
    raw = load_config(arguments.config, overrides)
    if "candidate" in raw:
        raise ConfigError(f"{arguments.config} is an evaluation's config; estimates are of training.")
    if raw.get("compute_dtype", "auto") == "auto" and raw.get("device") != "cpu":
        raw.compute_dtype = "bf16"  # of the GPUs that it is for, wherever this runs
    cfg = complete(raw, SPINConfig)
    table = estimate(cfg, arguments.ranks, arguments.pair_tokens).table()
    print(f"{arguments.config} on {arguments.ranks} GPU{'s' if arguments.ranks > 1 else ''}: an estimate\n\n{table}")
