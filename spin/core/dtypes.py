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


def fast_dtype(device: str | None) -> str:
    """The format that a kind of device (None: a GPU if there is one) multiplies fast: bf16, or fp32 where it does not.
    A GPU that is not here is taken for one that does."""
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "bf16" if has_fast_bf16() else "fp32"
    is_here = torch.cuda.is_available()
    return "bf16" if not is_here or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
