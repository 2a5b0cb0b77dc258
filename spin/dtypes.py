"""The names of floating-point formats in configs."""

from __future__ import annotations

import torch

# of copies of weights, of exports and of caches
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# that the policy is trained in; fp16 would need its loss scaled
TRAINED_DTYPES = ("fp32", "bf16")
