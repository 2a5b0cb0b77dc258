"""A run's checkpoints, and the models that it exports."""

from spin.checkpoint.checkpointer import SPINCheckpointer
from spin.checkpoint.lora import LoRACheckpointer

__all__ = ["LoRACheckpointer", "SPINCheckpointer"]
