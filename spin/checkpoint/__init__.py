"""A run's checkpoints, and the models that it exports."""

from spin.checkpoint.lora import LoRACheckpointer
from spin.checkpoint.states import SPINCheckpointer

__all__ = ["LoRACheckpointer", "SPINCheckpointer"]
