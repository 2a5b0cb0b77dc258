"""Win rates between models."""
