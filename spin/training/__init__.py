"""What a training step needs besides the model and the loss."""

from spin.training.optim import AdamW8bit, AdamWStochasticRounding

__all__ = ["AdamW8bit", "AdamWStochasticRounding"]
