"""What this machine's CPU can do."""

from __future__ import annotations

import torch


def multiplies_bf16() -> bool:
    """Whether torch has a fast bf16 matrix product on this CPU; without one it multiplies element by element."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # torch was built without oneDNN
        return False
