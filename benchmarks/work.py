"""What is measured, and how much arithmetic it takes at least: pairs of random tokens, and the count of their FLOPs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.gemma.rms_norm import GemmaRMSNorm

from spin.core.ranks import World
from spin.data import Pair, Response
from spin.model.modules import LayerNorm1P
from spin.model.moe import idle_parameters
from spin.model.sharding import local_tensor, named_full_tensors

# mean tokens of prompt, real and generated responses
MIXES = {"short": (199, 278, 278), "long": (498, 288, 287), "third": (131, 288, 209)}
WEIGHT_SCALE = 0.02  # standard deviation of random weights
SIGMA = 0.55  # of the logarithm of a length
LONGEST = 2048  # tokens of a prompt or response


@dataclass(frozen=True)
class Preset:
    """A model and how much of what is measured with it.

    Args:
        builder (Mapping[str, Any]): the ``model`` section of a config.
        pairs (int): of a global batch.
        row_tokens (int): tokens of a row at most.
        lengths (float): prompts and responses have this fraction of the lengths of ``MIXES``.
        prompt_tokens (tuple[int, ...]): prompt lengths that speed is measured along.
        responses (tuple[int, ...]): generated responses per prompt that it is measured along.
        row_scale (tuple[int, ...]): row lengths that memory is measured along.
        batch_tokens (int): of a global batch along prompt lengths and responses.
    """

    builder: Mapping[str, Any]
    pairs: int = 64
    row_tokens: int = 8192
    lengths: float = 1.0
    prompt_tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    responses: tuple[int, ...] = (1, 2, 4, 8)
    row_scale: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    batch_tokens: int = 65536


_LLAMA = {"_component_": "torchtune.models.llama3_2.llama3_2", "max_seq_len": 131072, "tie_word_embeddings": True}
_LLAMA_8B = {
    "_component_": "torchtune.models.llama3_1.llama3_1", "vocab_size": 128256, "num_heads": 32, "num_kv_heads": 8,
    "embed_dim": 4096, "intermediate_dim": 14336, "max_seq_len": 131072,
}  # fmt: skip
_SMALL = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "embed_dim": 256, "intermediate_dim": 1024}
_TINY = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 128}
SHAPES = Path(__file__).parent / "shapes"  # a config.json of each, as its model's folder has it


def _shape(name: str) -> dict[str, Any]:
    return {"_component_": "spin.model.from_hf", "path": str(SHAPES / name)}


MODELS = {
    "qwen3_4b": Preset(_shape("qwen3_4b"), pairs=32),
    "gemma3_4b": Preset(_shape("gemma3_4b"), pairs=32),
    "llama_4b": Preset(_shape("llama_4b"), pairs=32),  # Qwen3's sizes, for comparison
    "qwen3_14b": Preset(_shape("qwen3_14b"), pairs=32),
    "qwen3_32b": Preset(_shape("qwen3_32b"), pairs=32),
    "llama3_2_1b": Preset({"_component_": "torchtune.models.llama3_2.llama3_2_1b"}),
    "llama3_1_8b": Preset({"_component_": "torchtune.models.llama3_1.llama3_1_8b"}),
    "llama3_1_8b_8_layers": Preset({**_LLAMA_8B, "num_layers": 8}),  # of 32: what one GPU trains with fp32 weights
    # some minutes on two CPU cores
    "small": Preset(
        {**_LLAMA, **_SMALL, "vocab_size": 32000},
        pairs=8,
        row_tokens=2048,
        prompt_tokens=(128, 512),
        responses=(1, 2),
        row_scale=(1024, 2048),
        batch_tokens=4096,
    ),
    # for tests
    "tiny": Preset(
        {**_LLAMA, **_TINY, "vocab_size": 512},
        pairs=8,
        row_tokens=256,
        lengths=1 / 16,
        prompt_tokens=(8, 16),
        responses=(1, 2),
        row_scale=(128, 256),
        batch_tokens=256,
    ),
}


def listed(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """For ``type`` of an option that takes some of the choices with commas between them.

    Args:
        choices (Sequence[str]): what may be named.

    Returns:
        Callable[[str], list[str]]: text to those named, in the order of the choices.
    """

    def parse(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(choices)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected of {', '.join(choices)}")
        return [choice for choice in choices if choice in text.split(",")]

    return parse


def randomize(model: nn.Module, world: World, seed: int = 0) -> None:
    """Normal weights, norms of one; each rank its shards, the same in every model of one shape.

    Args:
        model (nn.Module): sharded, with memory.
        world (World): the ranks.
        seed (int): another one gives another model.
    """
    shards, shard = world.mesh["shard"].size(), world.mesh.get_local_rank("shard")  # replicas have the same weights
    draw = torch.Generator(world.device).manual_seed(seed * shards + shard)
    for module in model.modules():
        one = 0.0 if isinstance(module, GemmaRMSNorm | LayerNorm1P) else 1.0  # these multiply by 1 + weight
        for parameter in module.parameters(recurse=False):
            local = local_tensor(parameter.detach())
            local.fill_(one) if parameter.dim() == 1 else local.normal_(0.0, WEIGHT_SCALE, generator=draw)


def bytes_of(model: nn.Module) -> int:
    """Memory of a model's shards and buffers on this rank."""
    tensors = map(local_tensor, [*model.parameters(), *model.buffers()])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def llama_config(model: Any) -> Any:
    """transformers' config of a torchtune Llama 3.

    Args:
        model (Any): a torchtune decoder, sharded or not.

    Returns:
        Any: a ``LlamaConfig``.
    """
    from transformers import LlamaConfig

    attention, rope = model.layers[0].attn, model.layers[0].attn.pos_embeddings
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=model.tok_embeddings.num_embeddings,
        hidden_size=attention.embed_dim,
        intermediate_size=model.layers[0].mlp.w1.weight.shape[0],
        num_hidden_layers=len(model.layers),
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm.eps,
        tie_word_embeddings=not isinstance(model.output, nn.Linear),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": float(rope.base),
            "factor": float(rope.scale_factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def hf_twin(
    model: Any, dtype: torch.dtype, device: torch.device, weights: Iterable[tuple[str, torch.Tensor]] | None = None
) -> Any:
    """transformers' Llama with the weights of a torchtune Llama 3.

    Args:
        model (Any): a torchtune decoder, sharded or not.
        dtype (torch.dtype): of the twin's weights.
        device (torch.device): where they go.
        weights (Iterable[tuple[str, torch.Tensor]] | None): by torchtune's names; None: the model's, adapters merged.

    Returns:
        Any: a ``LlamaForCausalLM``.

    Raises:
        SystemExit: If the two architectures have other weights.
    """
    from transformers import LlamaForCausalLM

    config = llama_config(model)
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin = twin.to(dtype).to_empty(device=device)
    with torch.device(device):
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config)
    named = {name: tensor.to(dtype) for name, tensor in weights or named_full_tensors(model)}
    missing, unexpected = twin.load_state_dict(tune_to_hf(named, **heads_of(config)), strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise SystemExit(f"transformers' Llama takes other weights: {missing} are missing, {unexpected} too many.")
    twin.tie_weights()
    return twin


def heads_of(config: Any) -> dict[str, int]:
    """Arguments of torchtune's converters between its names and transformers'."""
    names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "dim": "hidden_size"}
    return {ours: getattr(config, theirs) for ours, theirs in names.items()}


def log_normal_lengths(mean: float, num: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal lengths, clipped to [1, ``LONGEST``] and scaled until their own mean is the one asked for.

    Args:
        mean (float): tokens.
        num (int): how many lengths.
        rng (np.random.Generator): their source.

    Returns:
        np.ndarray: int64, shape (num,).
    """
    shape = np.exp(SIGMA * rng.standard_normal(num))
    scale = mean / shape.mean()
    for _ in range(20):  # rounding and clipping move the mean a little
        lengths = np.clip(np.rint(scale * shape), 1, LONGEST).astype(np.int64)
        scale *= mean / lengths.mean()
    return lengths


def random_pairs(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], vocab_size: int, nats_per_token: float, seed: int = 0
) -> list[Pair]:
    """Pairs of random tokens.

    The opponent's log-probs are those that a random model gives on average. So margins are small, the loss is near ln 2
    and its gradient is far from zero, as at the start of self-play.

    Args:
        prompts (Sequence[int]): tokens of each prompt.
        responses (Sequence[Sequence[int]]): tokens of each pair's responses, the real one first.
        vocab_size (int): tokens are drawn from this many.
        nats_per_token (float): of the opponent.
        seed (int): of the tokens.

    Returns:
        list[Pair]: as many as prompts.
    """
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(1, vocab_size, length).astype(np.int32)

    return [
        Pair(
            sample_id=f"{i:04d}",
            iteration=0,
            prompt_ids=tokens(prompt),
            real_ids=tokens(real),
            generated=[Response(tokens(length), "stop", -nats_per_token * length) for length in generated],
            reference_real_logp=-nats_per_token * real,
        )
        for i, (prompt, (real, *generated)) in enumerate(zip(prompts, responses, strict=True))
    ]


def mixed_pairs(
    mix: str, num: int, vocab_size: int, nats_per_token: float, share: float = 1.0, seed: int = 0
) -> list[Pair]:
    """Pairs of a mix with one generated response each.

    Args:
        mix (str): key of ``MIXES``.
        num (int): how many.
        vocab_size (int): see :func:`random_pairs`.
        nats_per_token (float): see :func:`random_pairs`.
        share (float): lengths are this fraction of the mix's.
        seed (int): of lengths and tokens.

    Returns:
        list[Pair]: ``num`` pairs.
    """
    rng = np.random.default_rng(seed)
    prompts, real, generated = (log_normal_lengths(mean * share, num, rng).tolist() for mean in MIXES[mix])
    return random_pairs(prompts, list(zip(real, generated, strict=True)), vocab_size, nats_per_token, seed)


@dataclass(frozen=True)
class Sizes:
    """What the FLOPs of a decoder depend on.

    Args:
        layer_weights (int): entries of the weight matrices of all layers, of experts those of one token; vectors
            (norms, biases) multiply nothing.
        layers (int): number of layers.
        attention_dim (int): heads times dimensions of a head.
        dim (int): of the hidden states.
        vocab_size (int): rows of the output projection.
    """

    layer_weights: int
    layers: int
    attention_dim: int
    dim: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """The sizes of a torchtune decoder, sharded or not, on any device."""
        attention = model.layers[0].attn
        return cls(
            layer_weights=sum(p.numel() for p in model.layers.parameters() if p.dim() > 1) - idle_parameters(model),
            layers=len(model.layers),
            attention_dim=attention.num_heads * attention.head_dim,
            dim=model.tok_embeddings.embedding_dim,
            vocab_size=model.tok_embeddings.num_embeddings,
        )


def flops(
    sizes: Sizes, *, tokens: int, predictions: int, visible: int, head_products: int = 3, frozen: bool = False
) -> int:
    """Floating-point operations of forward and backward, a product and its addition counted as two.

    - Layers, ``6 * layer_weights * tokens``: each weight meets each token in forward, in the gradient of its input and
      in its own gradient, which frozen weights do not have.
    - Head, ``2 * head_products * vocab_size * dim * predictions``: the same three products, for response tokens only; a
      head that makes its logits a second time in backward has four.
    - Attention, ``12 * layers * attention_dim * visible``: two products of ``2 * attention_dim`` for each query and key
      that it sees in forward, twice as much in backward.

    Args:
        sizes (Sizes): of the model.
        tokens (int): that pass the layers.
        predictions (int): hidden states that pass the output projection.
        visible (int): pairs of a query and a key that it sees, in one layer and for one head.
        head_products (int): matrix products of the head.
        frozen (bool): layers and head have no gradient of their own; what adapters add is left out.

    Returns:
        int: FLOPs.
    """
    layers = (4 if frozen else 6) * sizes.layer_weights * tokens
    head = 2 * (head_products - frozen) * sizes.vocab_size * sizes.dim * predictions
    return layers + head + 12 * sizes.layers * sizes.attention_dim * visible


def floor_of_work(sizes: Sizes, pairs: Sequence[Pair], *, frozen: bool = False) -> int:
    """The FLOPs that pairs need at least: every prompt once, no padding, no masked score, nothing made twice.

    A pair with prompt P and responses R and G has ``P (P + 1) / 2`` visible pairs of query and key within the prompt,
    and ``R P + R (R + 1) / 2`` for a response, whose tokens see the prompt and their own response up to themselves.

    Args:
        sizes (Sizes): of the model.
        pairs (Sequence[Pair]): with any number of responses.
        frozen (bool): see :func:`flops`.

    Returns:
        int: FLOPs of forward and backward.
    """
    tokens = predictions = visible = 0
    for pair in pairs:
        prompt = len(pair.prompt_ids)
        responses = [len(pair.real_ids), *(len(response.token_ids) for response in pair.generated)]
        tokens += prompt + sum(responses)
        predictions += sum(responses)
        visible += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
    return flops(sizes, tokens=tokens, predictions=predictions, visible=visible, frozen=frozen)


def random_nats(sizes: Sizes, scale: float) -> float:
    """Negative log-prob of a random token under a model with normal weights: ``ln v + var(logit) / 2``.

    Hidden states behind the last norm have mean square 1, so logits have the variance ``dim * scale^2``.

    Args:
        sizes (Sizes): of the model.
        scale (float): standard deviation of the output projection.

    Returns:
        float: nats.
    """
    return math.log(sizes.vocab_size) + sizes.dim * scale**2 / 2
