"""The names of floating-point formats in configs."""

from __future__ import annotations

import torch

from spin.core.errors import ConfigError

# of copies of weights, of exports and of caches
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format that a config names, if the device can compute in it; else a ConfigError."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: expected {', '.join(DTYPES)}.")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{torch.cuda.get_device_name(device)} does not compute in bf16. Set fp32.")
    return DTYPES[name]


def has_fast_bf16() -> bool:
    """Whether torch has a fast bf16 matrix product on this CPU; without one it multiplies element by element."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # torch was built without oneDNN
        return False
