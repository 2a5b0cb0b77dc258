"""Tiny torchtune decoders, one per family, and their transformers twins with the same weights.

``FAMILIES[name]()`` builds a 2-layer float32 model through torchtune's component builder. Every parameter is random,
norm scales and biases included: with their constant initial values a wrong name mapping would not show.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torchtune.models.gemma import gemma, lora_gemma
from torchtune.models.gemma2 import gemma2, lora_gemma2
from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.models.llama3_1 import llama3_1, lora_llama3_1
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import lora_mistral, mistral
from torchtune.models.phi3 import lora_phi3, phi3
from torchtune.models.qwen2 import lora_qwen2, qwen2
from torchtune.modules import TransformerDecoder
from transformers import CONFIG_MAPPING

from spin.model.adapters import adapted_modules, adapter_parameters, patch_dora, patch_nf4
from spin.model.hf_families import LAYOUTS
from tests.hf_folders import ONE_OF_EACH, decoder, write_folder

VOCAB_SIZE = 160
MAX_SEQ_LEN = 128
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64,
    "intermediate_dim": 96, "max_seq_len": MAX_SEQ_LEN,
}  # fmt: skip
_GEMMA2: dict[str, Any] = {  # caps are low, so that they bend the values of a tiny model
    "head_dim": 32, "sliding_window_size": 8, "query_pre_attn_scalar": 24, "hidden_capping_value": 5.0,
    "final_capping_value": 10.0,
}  # fmt: skip


def _build(builder: Callable[..., TransformerDecoder], **arguments: Any) -> TransformerDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = builder(**arguments)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    return model.eval()


FAMILIES: dict[str, Callable[[], TransformerDecoder]] = {
    "llama2": partial(_build, llama2, **_SHAPE),
    "llama3_1": partial(_build, llama3_1, **_SHAPE),
    "llama3_2": partial(_build, llama3_2, **_SHAPE, tie_word_embeddings=True),
    "mistral": partial(_build, mistral, **_SHAPE),
    "qwen2": partial(_build, qwen2, **_SHAPE, tie_word_embeddings=True),
    "qwen2_5": partial(_build, qwen2, **_SHAPE, tie_word_embeddings=False),
    "gemma": partial(_build, gemma, **_SHAPE, head_dim=32),
    "gemma2": partial(_build, gemma2, **_SHAPE, **_GEMMA2),
    "phi3": partial(_build, phi3, **{**_SHAPE, "num_kv_heads": 4}),
    "phi4": partial(_build, phi3, **_SHAPE, rope_base=250_000),
}
# Those that are built from their folder: one of each model_type that the installed transformers knows.
FROM_HF: dict[str, Callable[[], Any]] = {
    f"hf/{name}": partial(decoder, name) for name in ONE_OF_EACH if name in CONFIG_MAPPING
}
MODELS = FAMILIES | FROM_HF
MODEL_TYPES = {
    "llama2": "LLAMA2", "llama3_1": "LLAMA3", "llama3_2": "LLAMA3_2", "mistral": "MISTRAL", "qwen2": "QWEN2",
    "qwen2_5": "QWEN2", "gemma": "GEMMA", "gemma2": "GEMMA2", "phi3": "PHI3_MINI", "phi4": "phi4",  # any case
}  # fmt: skip
LORA_BUILDERS: dict[str, Callable[..., TransformerDecoder]] = {
    "llama2": lora_llama2, "llama3_1": lora_llama3_1, "llama3_2": lora_llama3_2, "mistral": lora_mistral,
    "qwen2": lora_qwen2, "qwen2_5": lora_qwen2, "gemma": lora_gemma, "gemma2": lora_gemma2, "phi3": lora_phi3,
    "phi4": lora_phi3,
}  # fmt: skip
EVERYWHERE = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
HF_NF4_SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
NF4_SHAPE = {"embed_dim": 256, "intermediate_dim": 512}  # every weight has a multiple of 16,384 numbers


def lora_model(
    name: str, rank: int = 4, alpha: float = 12.0, shape: dict[str, int] | None = None, **arguments: Any
) -> TransformerDecoder:
    """A model of family ``name`` with random adapters; its base has the weights of ``FAMILIES[name](**shape)``."""
    adapters = EVERYWHERE | {"lora_rank": rank, "lora_alpha": alpha} | arguments
    if name == "hf/qwen3_moe":
        adapters |= {"apply_lora_to_mlp": False}  # experts take none
    if name in FROM_HF:
        return decoder(name.removeprefix("hf/"), shape, **adapters)  # type: ignore[return-value]
    plain = FAMILIES[name](**(shape or {}))
    arguments = FAMILIES[name].keywords | (shape or {}) | adapters  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LORA_BUILDERS[name](**arguments)
        patch_dora(model)
        patch_nf4(model)
        for module in adapted_modules(model).values():
            for parameter in adapter_parameters(module).values():
                nn.init.normal_(parameter, std=0.2)
    left, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("lora" in key or "magnitude" in key for key in left)
    return model.eval()


def tiny_lm_model() -> TransformerDecoder:
    """The decoder of tests/assets/tiny_lm, with random weights."""
    return llama3_2(
        vocab_size=1024, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=128, intermediate_dim=384,
        max_seq_len=512, rope_base=10_000, norm_eps=1e-5, scale_factor=1, tie_word_embeddings=True,
    )  # fmt: skip


def load_llama_weights(model: TransformerDecoder, folder: Path) -> None:
    """Fill a torchtune Llama from a Hugging Face folder with one safetensors file, in float32."""
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights.pop("lm_head.weight", None)  # tied
    attention = model.layers[0].attn
    heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads, "dim": attention.embed_dim}
    model.load_state_dict(LAYOUTS["LLAMA3_2"].to_tune(weights, **heads))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _llama3(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0}
    return {"rope_parameters": rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_HF_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_SEQ_LEN, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager",
    "tie_word_embeddings": False, **_theta(1e4),
}  # fmt: skip
_HF_GEMMA = {"head_dim": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {}),
    "llama3_1": ("Llama", _llama3(8.0)),
    "llama3_2": ("Llama", {**_llama3(32.0), "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {**_theta(1e6), "tie_word_embeddings": True}),
    "qwen2_5": ("Qwen2", _theta(1e6)),
    "gemma": ("Gemma", {**_HF_GEMMA, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": (
        "Gemma2",
        {**_HF_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 10.0},
    ),
    "phi3": ("Phi3", {"num_key_value_heads": 4}),
    "phi4": ("Phi3", _theta(2.5e5)),
}  # fmt: skip


def hf_twin(name: str, model: TransformerDecoder) -> nn.Module:
    """The transformers model of family ``name`` with the weights of ``model``, in float32 with eager attention.

    Weights go through the converters of :mod:`spin.model.hf_families`; equal logits show that these are right.
    """
    import transformers

    if name in FROM_HF:
        with tempfile.TemporaryDirectory() as folder:
            return write_folder(name.removeprefix("hf/"), Path(folder))
    kind, changes = _TWINS[name]
    config = getattr(transformers, f"{kind}Config")(**_HF_SHAPE | changes)
    heads = {"num_heads": 4, "num_kv_heads": config.num_key_value_heads, "dim": 64}
    heads["head_dim"] = getattr(config, "head_dim", None) or 16
    weights = LAYOUTS[MODEL_TYPES[name].upper()].to_hf(model.state_dict(), **heads)
    twin: nn.Module = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    left_out = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert not left_out and not unexpected, (left_out, unexpected)
    twin.tie_weights()  # type: ignore[operator]
    return twin
