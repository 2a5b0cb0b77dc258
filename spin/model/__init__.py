"""From a model folder to a decoder: built, patched, sharded, compiled. What a recipe calls is exported here."""

from spin.model.build import (
    build_model,
    choose_attention,
    extend_max_seq_len,
    prepare_model,
    row_layout,
    training_options,
)
from spin.model.fingerprint import weights_fingerprint
from spin.model.logits_check import self_test
from spin.model.lora import build_policy, init_adapters, trainable
from spin.model.sharding import accumulating, clip_grad_norm

__all__ = [
    "accumulating",
    "build_model",
    "build_policy",
    "choose_attention",
    "clip_grad_norm",
    "extend_max_seq_len",
    "init_adapters",
    "prepare_model",
    "row_layout",
    "self_test",
    "trainable",
    "training_options",
    "weights_fingerprint",
]
