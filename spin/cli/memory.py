"""What a config needs on each GPU and host, before anything is loaded.

Memory is arithmetic with the shapes of a model on the meta device; of a folder config.json is enough. Training peaks
where the output layer works on a row: everything that the layers keep for backward is there, the gradients of the rows
before, and the head's own. So

    train = weights + gathered copy + gradients + optimizer + activations + head
    score = the same without gradients: compiled layers record what backward would need
    generate = weights + gathered copy + optimizer + cache
    save  = weights + optimizer + one tensor

The activations of a compiled layer are counted tensor by tensor; the rest is exact. Measured peaks (torch's allocator,
without the CUDA context) are in tests/cli/test_estimate.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from spin.cli.timing import PairTokens, Work
from spin.cli.workload import data_limit, longest_pair, mean_pair, most_prompts
from spin.config import SPINConfig
from spin.core.dtypes import torch_dtype
from spin.core.errors import ConfigError
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4
from spin.model.build import build_model
from spin.model.flex import flex_unsupported_reason
from spin.model.moe import MoE, idle_parameters
from spin.pairs.packing import RowLayout, plan_rows
from spin.pairs.row_mask import BLOCK

_GIB = 2**30
STAGES = ("generate", "score", "train", "save")
# Bytes of optimizer state for a trained weight, by class; others are taken for AdamW.
_OPTIMIZER_BYTES = {"AdamW8bit": 2, "AdamWStochasticRounding": 8, "AdamW": 8, "Adam": 8, "RMSprop": 4, "SGD": 0}
# NF4: half a byte, a scale of one byte for 64 weights, a factor for 16,384.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 16_384
_NF4_WORKSPACE_BYTES = 2  # for each number that NF4 stands for, while a product is computed with them
# Kept by eager layers for every tensor that compiled ones keep: 24.3 - 13.0 GiB against 20.6 - 13.0 (Llama 3.2 1B).
_EAGER_FACTOR = 1.45
_CACHE_STEP_TOKENS = 256
_IN_USE = 0.92  # of a GPU's memory at most: blocks of many sizes leave gaps
_CUDA_GIB = 1.0  # its context and NCCL's buffers
# A step of 1B was 9 % faster with the first than with 8,192; with the last, a replica of it was 3.8 % faster still.
_LONGER_ROWS = (12288, 16384, 24576)
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
    logits: float  # of that, those of a chunk
    workspace: float  # dequantized NF4, or DoRA's norms, of the largest weight
    cache: float  # keys and values while the opponent plays; 0 if that happens in a separate engine
    playing_copy: float  # the gathered model while the opponent plays, or an engine's part of it
    largest: float  # one tensor of an export
    pinned: float  # on the host for each GPU: offloaded weights and gradients, and a checkpoint that is being written
    host_states: float  # on the host for each GPU: the optimizer's, offloaded
    pair_store: float  # on disk, for each iteration, with pairs of the length that times are counted for
    checkpoint: float  # on disk, for each resumable checkpoint
    export: float  # on disk, for each iteration
    records_graph: bool  # scoring keeps activations, as compiled layers do
    row_tokens: int  # length of the row that was counted
    rows: int  # of a GPU in an optimizer step, with pairs of the length that times are counted for
    pair: PairTokens  # that times are counted for
    trained: int  # parameters
    frozen: int  # parameters
    idle: int  # of both, those of experts that a token does not go to
    work: Work

    def parts(self) -> dict[str, tuple[float | None, ...]]:
        """What is there at the peak of each stage: generate, score, train, save; its last entry is their sum."""
        kept = self.activations if self.records_graph else 0.0
        found: dict[str, tuple[float | None, ...]] = {
            "weights": (self.weights,) * 4,
            "gathered copy": (self.playing_copy, self.gathered, self.gathered, None),
            "gradients": (None, None, self.gradients, None),
            "optimizer": (self.optimizer,) * 4,
            f"activations of a row of {self.row_tokens:,} tokens": (None, kept, self.activations, None),
            "output layer": (None, self.logits, self.head, None),
            "workspace": (*(self.workspace,) * 3, None),
            "key-value cache": (self.cache, None, None, None),
            "a tensor of the export": (None, None, None, self.largest),
        }
        return found | {"peak": tuple(sum(filter(None, column)) for column in zip(*found.values(), strict=True))}

    @property
    def playing(self) -> float:
        """Peak while the opponent plays; the optimizer of the iteration before is still there."""
        return self.peaks()[0]

    @property
    def scoring(self) -> float:
        """Peak of the reference pass."""
        return self.peaks()[1]

    @property
    def training(self) -> float:
        """Peak of an optimizer step."""
        return self.peaks()[2]

    @property
    def peak(self) -> float:
        """The largest of all stages."""
        return max(self.peaks())

    def peaks(self) -> tuple[float, ...]:
        """Of each of ``STAGES``."""
        return tuple(value or 0.0 for value in self.parts()["peak"])

    def host(self, gpus_of_host: int) -> str:
        """What a host's CPU memory holds, and how much a host must have for it."""
        held = (self.pinned + self.host_states) * gpus_of_host
        if not held:
            return "nothing is kept in CPU memory"
        states = f" and {size_text(self.host_states * gpus_of_host)} of optimizer state" if self.host_states else ""
        gigabytes = math.ceil(held * _GIB / 1e9)
        memory = f"{gigabytes} GB" if gigabytes < 1000 else f"{math.ceil(gigabytes / 100) / 10} TB"
        pinned = size_text(self.pinned * gpus_of_host)
        return f"{pinned} of pinned memory{states}, which needs a host with {memory} of memory"

    def table(self, gpus_of_host: int = 1) -> str:
        """Every part, and what it belongs to, a line each."""
        lines = [f"{'GiB on each GPU':<44}{'generate':>10}{'score':>10}{'train':>10}{'save':>10}"]
        for name, values in self.parts().items():
            cells = "".join(
                f"{'-' if value is None else size_text(value).removesuffix(' GiB'):>10}" for value in values
            )
            lines.append(f"{name:<44}{cells}")
        active = self.trained + self.frozen - self.idle
        return "\n".join(lines) + (
            f"\nand about {_CUDA_GIB:.0f} GiB for CUDA itself\n\n"
            f"{self.trained:,} parameters are trained, {self.frozen:,} frozen"
            f"{f'; a token is multiplied with {active:,} of them' if self.idle else ''}\n"
            f"on each host: {self.host(gpus_of_host)}\n"
            f"on disk: {size_text(self.pair_store)} of pairs and {size_text(self.export)} of exports each iteration, "
            f"{size_text(self.checkpoint)} each checkpoint"
        )


def estimate(
    cfg: SPINConfig,
    gpus: int = 1,
    pair_tokens: int | None = None,
    gpu_gib: float | None = None,
    model: nn.Module | None = None,
    prompts: int | None = None,
    pair: PairTokens | None = None,
) -> Estimate:
    """Adds up what a complete config of a training recipe needs. Nothing is read but the config.

    Args:
        cfg (SPINConfig): of training.
        gpus (int): one rank each.
        pair_tokens (int | None): mean length of a pair, prompt and responses, or less if the config lets less through;
            it gives the rows that a batch of such pairs is packed into. None takes the longest row that there can be.
        gpu_gib (float | None): memory of a GPU, of which an engine of vLLM takes a part for its cache; None: no cache.
        model (nn.Module | None): the config's, on the meta device; None: it is built.
        prompts (int | None): of an iteration, whose pairs are stored; None: as many as the config limits the data to.
        pair (PairTokens | None): what times and disk are counted for; None follows from ``pair_tokens``, or else it is
            the pair that rates were measured with.

    Returns:
        Estimate: of each GPU.

    Raises:
        ConfigError: If ``gpus`` or ``pair_tokens`` cannot be, or the limits of the data leave no step.
    """
    if gpus < 1 or gpus % cfg.replicas:
        raise ConfigError(f"gpus={gpus}: expected 1 or more, in multiples of replicas={cfg.replicas}.")
    if pair_tokens is not None and pair_tokens < 1:
        raise ConfigError(f"pair_tokens={pair_tokens}: expected the mean tokens of a pair, 1 or more.")
    prompts = most_prompts(cfg) if prompts is None else prompts
    shards = gpus // cfg.replicas
    dtype, compute = (torch_dtype(name, torch.device("cpu")) for name in (cfg.dtype, cfg.compute_dtype))
    model = shapes_of(cfg) if model is None else model
    shapes = _Shapes(model)
    trained, base = _split(model)
    trained_count = sum(weight.numel() for weight in trained)

    weights = trained_count * dtype.itemsize + sum(map(_stored_bytes, base))
    gathered = playing_copy = trained_count * compute.itemsize + _copied_bytes(base, gpus, compute)
    if cfg.fsdp_reshard_after_forward:  # the root stays, and two layers: one that computes, one that is on its way
        in_layers = 1 - shapes.root_parameters / shapes.parameters
        gathered *= shapes.root_parameters / shapes.parameters + in_layers * min(1.0, 2 / shapes.layers)
    # full ones are reduced after the last row's head, so they do not add to the shards'
    gradients = trained_count * 4 / (1 if cfg.fsdp_accumulate_unsharded else shards)
    state_bytes = _OPTIMIZER_BYTES.get(cfg.optimizer.component.rsplit(".", 1)[-1], 8)
    if cfg.optimizer.get("momentum"):
        state_bytes += 4
    on_gpu = 0 if cfg.fsdp_cpu_offload else 1
    context: int = model.max_seq_len  # type: ignore[assignment]
    pair, most = pair or mean_pair(cfg, context, pair_tokens), longest_pair(cfg, context)
    lengths, packed = _packed(cfg, gpus, pair.total, most)
    if pair_tokens is None:
        row = _layout(cfg).longest_row(most or 0)
    else:
        row = _layout(cfg).padded_length(max(sum(lengths[i] for i in pairs) for rank in packed for pairs in rank))
    idle = idle_parameters(model)
    copy, cache = _generator(cfg, model, shapes, compute, playing_copy, gpu_gib)
    checkpoint = trained_count * (dtype.itemsize + state_bytes)
    export = _export(cfg, model, trained_count if base else 0, dtype)
    staged = checkpoint / shards if cfg.checkpointer.get("async_save", True) else 0.0
    offloaded = (weights / shards + gradients) * (1 - on_gpu)
    logits, head = _head(cfg, shapes, compute, is_trained=not base)

    return Estimate(
        weights=on_gpu * weights / shards / _GIB,
        gathered=gathered / _GIB,
        gradients=on_gpu * gradients / _GIB,
        optimizer=on_gpu * trained_count * state_bytes / shards / _GIB,
        activations=_activations(cfg, shapes, row, compute) / _GIB,
        head=head / _GIB,
        logits=logits / _GIB,
        workspace=_workspace(model) / _GIB,
        cache=cache,
        playing_copy=copy,
        largest=max(weight.numel() for weight in model.parameters()) * (4 if base else 2) / _GIB,
        pinned=(offloaded + staged) / _GIB,
        host_states=trained_count * state_bytes / shards * (1 - on_gpu) / _GIB,
        pair_store=_pair_store(prompts or 0, pair) / _GIB,
        checkpoint=checkpoint / _GIB,
        export=export / _GIB,
        records_graph=cfg.compile,
        row_tokens=row,
        rows=len(packed[0]),
        pair=pair,
        trained=trained_count,
        frozen=sum(weight.numel() for weight in base),
        idle=idle,
        work=Work(
            layer_weights=sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
            - idle
            - (trained_count if base else 0),
            head_weights=shapes.vocab * shapes.width,
            layers=shapes.layers,
            attention_dim=shapes.queries,
            trained=trained_count,
            frozen=bool(base),
            sparse=idle > 0,
            weight_bytes=2.0 * shapes.parameters,
            cache_bytes=shapes.layers * 2 * shapes.keys * 2.0,
            gathered_bytes=playing_copy,
            checkpoint_bytes=checkpoint,
            export_bytes=export,
        ),
    )


def size_text(gib: float) -> str:
    """GiB, or MiB of less than a tenth."""
    if gib >= 0.1 or not gib:
        return f"{gib:.1f} GiB"
    return f"{gib * 1024:.0f} MiB" if gib * 1024 >= 10 else f"{max(0.1, gib * 1024):.1f} MiB"


def usable_gib(memory_gib: float) -> float:
    """What a GPU's memory leaves for tensors."""
    return _IN_USE * memory_gib - _CUDA_GIB


def shapes_of(cfg: SPINConfig) -> Any:
    """The config's model on the meta device."""
    return build_model(cfg.model, torch_dtype(cfg.base_dtype or cfg.dtype, torch.device("cpu")))


class _Shapes:
    """The numbers of a decoder that activations and caches follow from."""

    def __init__(self, model: Any) -> None:
        layer = model.layers[0]
        attention = layer.attn
        self.layers = len(model.layers)
        self.width = model.tok_embeddings.weight.shape[1]
        self.vocab = model.tok_embeddings.weight.shape[0]
        self.keys = attention.num_kv_heads * attention.head_dim
        self.queries = attention.num_heads * attention.head_dim
        of_mlp = max(_kept_by_mlp(layer.mlp, self.width) for layer in model.layers)
        norms = (getattr(layer, name, None) for name in ("sa_norm", "mlp_norm", "sa_scale", "mlp_scale"))
        num_norms = sum(norm is not None and not isinstance(norm, nn.Identity) for norm in norms)
        # elements for each token: in and out of each norm, q and attention's output, k, v, and those of the MLP
        self.kept_by_layer = 2 * num_norms * self.width + 2 * self.queries + 2 * self.keys + of_mlp
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


def _copied_bytes(base: Sequence[torch.Tensor], gpus: int, compute: torch.dtype) -> float:
    """Of frozen weights that the generator does not use where they are."""
    found = 0.0
    for weight in base:
        is_nf4 = as_nf4(weight) is not None
        if gpus > 1 or not (is_nf4 or weight.dtype == compute):  # alone, what needs no cast is used where it is
            found += _stored_bytes(weight) if is_nf4 else weight.numel() * compute.itemsize
    return found


def _layout(cfg: SPINConfig) -> RowLayout:
    return RowLayout(cfg.pairs.row_tokens, math.lcm(cfg.pairs.row_multiple, BLOCK))  # as FlexAttention needs


def _packed(cfg: SPINConfig, gpus: int, pair_tokens: int, most: int | None) -> tuple[list[int], Any]:
    """A batch of pairs of ``pair_tokens`` on average and ``most`` at most: their lengths, and for each GPU the pairs of
    its rows."""
    spread = NormalDist(math.log(pair_tokens) - _SPREAD**2 / 2, _SPREAD)  # of the logarithm; its mean is pair_tokens
    size = cfg.global_batch_size
    lengths = [max(1, round(math.exp(spread.inv_cdf((i + 0.5) / size)))) for i in range(size)]
    if most is not None:
        lengths = [min(length, most) for length in lengths]
    return lengths, plan_rows(lengths, _layout(cfg), gpus)


def _activations(cfg: SPINConfig, shapes: _Shapes, row: int, compute: torch.dtype) -> float:
    layer = shapes.kept_by_layer * (1.0 if cfg.compile else _EAGER_FACTOR)
    around = 4 * shapes.width  # embeddings, last hidden state, what the head takes of it, and its gradient
    if not cfg.checkpointed_every:
        elements = shapes.layers * layer
    else:  # inputs of the layers that are checkpointed, and one of them in full, with gradients of about the same size
        checkpointed = shapes.layers // cfg.checkpointed_every
        elements = checkpointed * shapes.width + (shapes.layers - checkpointed) * layer + 2 * layer
    return float(row * (elements + around) * compute.itemsize)


def _head(cfg: SPINConfig, shapes: _Shapes, compute: torch.dtype, is_trained: bool) -> tuple[float, float]:
    """Logits of a chunk, and those with the sum of the weight's gradient in fp32."""
    logits = cfg.logprob_chunk_tokens * shapes.vocab * compute.itemsize
    return float(logits), float(logits + (shapes.vocab * shapes.width * 4 if is_trained else 0))


def _workspace(model: nn.Module) -> float:
    quantized = [weight.numel() for weight in model.parameters() if as_nf4(weight) is not None]
    doras = [module.weight.numel() for module in adapted_modules(model).values() if hasattr(module, "magnitude")]
    # DoRA's norms: the weight and its merged form in fp32
    return max([0.0, *(n * _NF4_WORKSPACE_BYTES for n in quantized), *(n * 8.0 for n in doras)])


def _generator(
    cfg: SPINConfig, model: Any, shapes: _Shapes, compute: torch.dtype, playing_copy: float, gpu_gib: float | None
) -> tuple[float, float]:
    """GiB of the weights by which responses are generated, and of the engine's cache."""
    name = cfg.generator.component.rsplit(".", 1)[-1]
    if name == "VLLMGenerator":
        itemsize = 4 if cfg.generator.get("dtype") == "fp32" else 2
        copy = shapes.parameters * itemsize / cfg.generator.get("tensor_parallel_size", 1) / _GIB
        return copy, max(0.0, cfg.generator.get("gpu_memory_utilization", 0.5) * (gpu_gib or 0.0) - copy)
    if name != "TorchtuneGenerator":  # an engine elsewhere
        return 0.0, 0.0
    batch = fewest_sequences(cfg)
    prompt = data_limit(cfg, "max_prompt_tokens") or model.max_seq_len
    longest = min(model.max_seq_len, prompt + cfg.sampling.max_new_tokens)
    capacity = math.ceil(longest / _CACHE_STEP_TOKENS) * _CACHE_STEP_TOKENS
    keys_and_values = batch * capacity * shapes.layers * 2 * shapes.keys * compute.itemsize
    logits = batch * shapes.vocab * (compute.itemsize + 4)  # of a step
    return playing_copy / _GIB, (keys_and_values + logits) / _GIB


def fewest_sequences(cfg: SPINConfig) -> int:
    """Sequences at a time of the embedded generator; of ``auto``, which takes what is free, the fewest."""
    size = cfg.generator.get("batch_size", "auto")
    return 32 if size == "auto" else int(size)


def _pair_store(prompts: int, pair: PairTokens) -> float:
    """Responses, responses with log-probs, and rows to look them up: three times the token ids, 4 bytes each."""
    return float(prompts * (3 * 4 * pair.total + 300))


def _export(cfg: SPINConfig, model: nn.Module, adapter: int, dtype: torch.dtype) -> float:
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}[cfg.checkpointer.get("export_dtype", "bf16")]
    merged = cfg.checkpointer.get("export_merged", True)
    plain = sum(parameter.numel() for parameter in model.parameters()) - adapter
    return float(plain * itemsize * merged + adapter * dtype.itemsize)


def longer_rows(cfg: SPINConfig, gpus: int, pair_tokens: float, model: nn.Module) -> list[int]:
    """Rows of more tokens than a config's that are faster, ascending: a GPU's part of a batch of pairs of
    ``pair_tokens`` on average fills them, and attention is over their blocks alone. A dense mask costs the square."""
    compute = torch_dtype(cfg.compute_dtype, torch.device("cpu"))
    if cfg.attention == "dense" or flex_unsupported_reason(model, torch.device("cuda"), compute):
        return []
    part = cfg.global_batch_size * pair_tokens / gpus
    return [tokens for tokens in _LONGER_ROWS if cfg.pairs.row_tokens < tokens <= part]
