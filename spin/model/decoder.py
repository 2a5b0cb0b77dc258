"""A decoder from a Hugging Face folder: its config.json says everything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from spin.core.errors import CheckpointError, ConfigError
from spin.model.attention import Attention
from spin.model.families import FAMILIES, Family, decoder_config, heads_of, keys_read
from spin.model.gemma2 import set_final_softcap
from spin.model.hf_config import shown
from spin.model.hf_folder import CONFIG, read_config
from spin.model.modules import ACTIVATIONS, HEAD_NORMS, NORMS, ParallelLayer, Rope, Scaled, clamp_output, scale_output
from spin.model.moe import MoE
from spin.model.torchtune import (
    DoRALinear,
    FeedForward,
    FrozenNF4Linear,
    LoRALinear,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

_DEFAULT_CONTEXT = 8192  # positions; most models' own are more than anybody trains on
_NF4_BLOCK = 64 * 256  # numbers that share a factor of scales
_SLIDING = "sliding_attention"


def from_hf(
    path: str | Path,
    *,
    max_seq_len: int | None = None,
    tie_word_embeddings: bool | None = None,
    lora_attn_modules: Sequence[str] = (),
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Builds the decoder that a Hugging Face folder holds, with random weights.

    Args:
        path (str | Path): the folder; only its config.json is read.
        max_seq_len (int | None): positions, prompt and response together; None: what the model was made for, 8,192 at
            most.
        tie_word_embeddings (bool | None): whether the output layer has the weights of the embeddings; None: as
            config.json says.
        lora_attn_modules (Sequence[str]): which of ``q_proj``, ``k_proj``, ``v_proj`` and ``output_proj`` get an
            adapter.
        apply_lora_to_mlp (bool): the linear layers of the MLP get one too; experts cannot.
        lora_rank (int): of the adapters.
        lora_alpha (float): adapters are scaled by ``lora_alpha / lora_rank``.
        use_dora (bool): DoRA in place of LoRA.
        quantize_base (bool): the layers' linear weights are NF4 and do not train (QLoRA); not with experts.

    Returns:
        TransformerDecoder: of torchtune, on the current default device and in its default dtype.

    Raises:
        CheckpointError: If config.json is missing or broken, or asks for what is not built here.
        ConfigError: If an argument does not go with the model.
    """
    config = read_config(Path(path) / CONFIG)
    adapters = _Adapters(
        frozenset(lora_attn_modules), apply_lora_to_mlp, lora_rank, lora_alpha, use_dora, quantize_base
    )
    return DecoderBuilder(Path(path) / CONFIG, config, max_seq_len, adapters).decoder(tie_word_embeddings)


class _Adapters:
    """Linear layers of a decoder: plain, with an adapter, or frozen in NF4."""

    def __init__(
        self, attention: frozenset[str], mlp: bool, rank: int, alpha: float, use_dora: bool, quantize_base: bool
    ) -> None:
        self.mlp, self.quantized = mlp, quantize_base
        self._adapted = attention | ({"w1", "w2", "w3"} if mlp else set())
        self._kind = DoRALinear if use_dora else LoRALinear
        self._arguments = {"rank": rank, "alpha": alpha, "quantize_base": quantize_base}

    def linear(self, name: str, wide: int, out: int, bias: bool) -> nn.Module:
        if self.quantized and wide * out % _NF4_BLOCK:
            raise ConfigError(
                f"model.quantize_base=true: the weight of {name} has {out} x {wide} numbers, and NF4 takes multiples "
                f"of {_NF4_BLOCK:,}. Set quantize_base=false (LoRA over the weights as they are)."
            )
        if name in self._adapted:
            return self._kind(wide, out, use_bias=bias, **self._arguments)
        if self.quantized:
            return FrozenNF4Linear(wide, out, bias=bias)
        return nn.Linear(wide, out, bias=bias)


_NO_ADAPTERS = _Adapters(frozenset(), False, 1, 1.0, False, False)


class DecoderBuilder:
    """Builds the decoder of a config.json that was checked by :func:`spin.model.hf_config.check_values`.

    ``config`` is transformers' config of it, complete.
    """

    def __init__(
        self, file: Path, config: dict[str, Any], max_seq_len: int | None = None, adapters: _Adapters = _NO_ADAPTERS
    ) -> None:
        self.file, self.adapters = file, adapters
        self.config = c = decoder_config(config, file)
        self.family: Family = FAMILIES[c.model_type]
        self.norm = NORMS[self.family.norm]
        self.heads, self.kv_heads, self.head_dim = heads_of(c)
        if not getattr(c, "head_dim", None) and c.hidden_size % self.heads:
            self._refuse(f"hidden_size is {c.hidden_size} and num_attention_heads {self.heads}: expected a multiple")
        if self.heads % self.kv_heads:
            self._refuse(
                f"num_attention_heads is {self.heads} and num_key_value_heads {self.kv_heads}: expected a multiple"
            )
        self.eps: float = getattr(c, self.family.eps) if self.family.eps else 1e-5
        self.context = max_seq_len or min(c.max_position_embeddings, _DEFAULT_CONTEXT, *self.unscaled_positions())
        self.ropes: dict[str | None, Rope] = {}
        for key, values in self.family.refused.items():
            if getattr(c, key, values[0]) not in values:
                self._refuse(
                    f"{key} is {shown(getattr(c, key))}, which is not built here; expected {shown(values[-1])}"
                )

    def _refuse(self, what: str) -> None:
        raise CheckpointError(f"{self.file}: {what}.")

    def decoder(self, tied: bool | None) -> TransformerDecoder:
        c = self.config
        self._check_experts()
        embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        scale_output(embeddings, self.family.embedding_scale(c), rounded=True)
        norm = self.norm(c.hidden_size, eps=self.eps)
        scale_output(norm, self.family.logits_scale(c))
        output = (
            TiedLinear(embeddings)
            if (c.tie_word_embeddings if tied is None else tied)
            else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        )
        model = TransformerDecoder(
            tok_embeddings=embeddings,
            layers=nn.ModuleList(self._layer(index) for index in range(c.num_hidden_layers)),
            max_seq_len=self.context,
            num_heads=self.heads,
            head_dim=self.head_dim,
            norm=norm,
            output=output,
        )
        set_final_softcap(model, self._softcap(1))
        return model

    def _softcap(self, which: int) -> float | None:
        key = self.family.softcaps[which]
        return None if key is None else getattr(self.config, key, None)

    def _layer(self, index: int) -> nn.Module:
        c, family = self.config, self.family
        norms = {name: self.norm(c.hidden_size, eps=self.eps) for name in family.norms}
        kind = TransformerSelfAttentionLayer
        if family.parallel(c):
            kind = ParallelLayer
            norms.pop("mlp_norm", None)
        if (scale := family.residual_scale(c)) != 1.0:
            norms |= {"sa_scale": Scaled(scale), "mlp_scale": Scaled(scale)}
        mlp = self._experts() if family.sparse(c, index) else self._mlp()
        return kind(self._attention(index), mlp, **norms)

    def _attention(self, index: int) -> nn.Module:
        c, family = self.config, self.family
        sliding = family.windows == "all" or (family.windows == "listed" and c.layer_types[index] == _SLIDING)
        window = c.sliding_window if sliding else None
        if family.windows == "listed" and sliding and window is None:
            self._refuse(
                f"layer_types has {_SLIDING}, and sliding_window (or use_sliding_window) says that none slides"
            )
        qkv_bias, output_bias, _ = family.biases(c)
        linear, queries, keys = self.adapters.linear, self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms: dict[str, nn.Module] = {}
        if own := family.head_norms(c):
            norms = {
                "q_norm": HEAD_NORMS[own](self.heads, self.head_dim, self.eps),
                "k_norm": HEAD_NORMS[own](self.kv_heads, self.head_dim, self.eps),
            }
        elif family.qk_norm:
            widths = (queries, keys) if family.qk_norm == "whole" else (self.head_dim, self.head_dim)
            norms = {
                name: self.norm(width, eps=self.eps) for name, width in zip(("q_norm", "k_norm"), widths, strict=True)
            }
        attention = Attention(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            q_proj=linear("q_proj", c.hidden_size, queries, qkv_bias),
            k_proj=linear("k_proj", c.hidden_size, keys, qkv_bias),
            v_proj=linear("v_proj", c.hidden_size, keys, qkv_bias),
            output_proj=linear("output_proj", queries, c.hidden_size, output_bias),
            pos_embeddings=self._rope(index) if family.rotates(c, index, window is not None) else None,
            max_seq_len=self.context,
            qk_norm_at="head" if own else family.qk_norm,
            scaling=family.attention_scale(c),
            softcapping=self._softcap(0),
            sliding_window_size=window,
            query_growth=self._query_growth(),
            **norms,
        )
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            clamp_output(projection, family.clip_qkv(c))
        return attention

    def _activation(self) -> nn.Module:
        key = "hidden_activation" if "hidden_activation" in keys_read(self.config.model_type) else "hidden_act"
        name = getattr(self.config, key)
        if name not in ACTIVATIONS:
            self._refuse(f"{key} is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]()

    def _check_experts(self) -> None:
        c = self.config
        if not any(self.family.sparse(c, index) for index in range(c.num_hidden_layers)):
            return
        if self.adapters.mlp:
            raise ConfigError(
                f"model.apply_lora_to_mlp=true: {self.file} has {c.num_experts} experts in place of an MLP, and "
                "adapters go on attention alone there. Set false."
            )
        if self.adapters.quantized:
            raise ConfigError(
                f"model.quantize_base=true: NF4 is for linear layers, and the {c.num_experts} experts of {self.file}, "
                "which are most of its weights, would stay as they are. Set false, and base_dtype=bf16."
            )
        if not 0 < c.num_experts_per_tok <= c.num_experts:
            self._refuse(f"num_experts_per_tok is {c.num_experts_per_tok}; expected 1 to num_experts={c.num_experts}")

    def _experts(self) -> nn.Module:
        c = self.config
        return MoE(
            c.hidden_size,
            c.moe_intermediate_size,
            c.num_experts,
            c.num_experts_per_tok,
            c.norm_topk_prob,
            self._activation(),
        )

    def _mlp(self) -> nn.Module:
        c, linear, bias = self.config, self.adapters.linear, self.family.biases(self.config)[2]
        gated = len(self.family.mlp) == 3
        return FeedForward(
            gate_proj=linear("w1", c.hidden_size, c.intermediate_size, bias),
            down_proj=linear("w2", c.intermediate_size, c.hidden_size, bias),
            up_proj=linear("w3", c.hidden_size, c.intermediate_size, bias) if gated else None,
            activation=self._activation(),
        )

    # ---- Rotary embeddings

    def _query_growth(self) -> tuple[float, int] | None:
        rope = self.rope_parameters().get(None, {})
        beta, original = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        return (beta, original) if beta and original else None

    def rope_parameters(self) -> dict[str | None, dict[str, Any]]:
        """By type of layer, or for all (None)."""
        parameters = self.config.rope_parameters
        nested = {kind: rope for kind, rope in parameters.items() if isinstance(rope, dict)}
        return nested or {None: parameters}

    def unscaled_positions(self) -> list[int]:
        """Up to where rotary tables that depend on the length of the sequence are the same for all lengths."""
        whole: int = self.config.max_position_embeddings
        limits = []
        for rope in self.rope_parameters().values():
            if rope["rope_type"] == "dynamic" and not rope.get("alpha"):
                limits.append(whole)
            elif rope["rope_type"] == "longrope":
                own = getattr(self.config, "original_max_position_embeddings", None)
                limits.append(own or rope.get("original_max_position_embeddings") or whole)
        return limits

    def _rope(self, index: int) -> Rope:
        ropes = self.rope_parameters()
        kind = None if None in ropes else getattr(self.config, "layer_types", ["full_attention"] * (index + 1))[index]
        if kind in self.ropes:
            return self.ropes[kind]
        if kind not in ropes:
            self._refuse(f"rope_parameters has no {kind}, which layers have")
        rope = ropes[kind]
        rope_type = rope["rope_type"]
        share = rope.get("partial_rotary_factor") or 1.0
        if not self.family.partial_rotary and share != 1.0:
            self._refuse(f"partial_rotary_factor is {share}; models of this family rotate all of a head")
        if (rotated := int(self.head_dim * share)) % 2 or not 2 <= rotated <= self.head_dim:
            self._refuse(
                f"head_dim is {self.head_dim} and partial_rotary_factor {share}: {rotated} dimensions of a head would "
                f"be rotated, expected an even number from 2 to {self.head_dim}"
            )
        limits = self.unscaled_positions()
        if limits and self.context > min(limits):
            raise ConfigError(
                f"model.max_seq_len={self.context}: by {self.file} ({rope_type}), the rotation of all tokens of a "
                f"sequence depends on its length beyond {min(limits)} positions, so that packed rows and cached keys "
                f"have no one right value. Set {min(limits)} at most."
            )
        frequencies = partial(rope_frequencies, rope, self.config, self.head_dim)
        try:
            self.ropes[kind] = Rope(frequencies, self.context, self.family.interleaved)
        except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            self._refuse(f"rope_parameters is {shown(rope)}, of which no rotary table can be computed ({error})")
        return self.ropes[kind]


def rope_frequencies(rope: dict[str, Any], config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float32, shape (rotated dimensions / 2,), and what cosine and sine are multiplied by.

    Args:
        rope (dict[str, Any]): the rotary parameters of a config.json.
        config (Any): transformers' config.
        head_dim (int): dimensions of a head.

    Returns:
        tuple[torch.Tensor, float]: the two.

    Source:
        ``ROPE_INIT_FUNCTIONS`` of transformers, which computes the scaled tables here.
    """
    share = rope.get("partial_rotary_factor") or 1.0
    if rope["rope_type"] in ("default", "dynamic"):  # dynamic is the default within the model's own context
        dim = int(head_dim * share)
        base = rope["rope_theta"]
        if rope.get("alpha"):  # HunYuan's, for all lengths
            base *= rope["alpha"] ** (dim / (dim - 2))
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = ("hidden_size", "num_attention_heads", "max_position_embeddings", "original_max_position_embeddings")
    flat: Any = SimpleNamespace(
        **{key: getattr(config, key) for key in keys if hasattr(config, key)},
        rope_parameters=rope,
        rope_scaling=rope,
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=share,
        head_dim=head_dim,
        standardize_rope_params=lambda: None,
    )
    theta, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](flat, torch.device("cpu"), seq_len=None)
    return theta.float(), float(factor)
