"""A run's checkpoints, and the models that it exports."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.checkpoint.checkpointer import SPINCheckpointer
    from spin.checkpoint.lora import LoRACheckpointer
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = ["LoRACheckpointer", "SPINCheckpointer"]
