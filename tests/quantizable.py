"""The tests' trained model in a shape that NF4 takes: weights in multiples of 16,384."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

# what a config of tests/assets/tiny_lora.yaml changes for it
QUANTIZED = ("model.num_kv_heads=4", "model.quantize_base=true", "optimizer.lr=1e-3")


def quantizable(tiny_lm: Path, folder: Path) -> Path:
    """A copy of tests/assets/tiny_lm whose two key/value heads stand twice each, which computes the same."""
    shutil.copytree(tiny_lm, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] == 4 and config["num_key_value_heads"] == 2
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.view(2, -1, tensor.shape[1])  # (64, 128) -> (2, 32, 128)
            tensors[name] = heads.repeat_interleave(2, 0).reshape(-1, tensor.shape[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
