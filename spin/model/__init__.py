"""From a model folder to a decoder: built, patched, sharded, compiled."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.model.build import build_model, prepare_model
    from spin.model.decoder import from_hf
    from spin.model.fingerprint import weights_fingerprint
    from spin.model.logits_check import self_test
    from spin.model.lora import build_policy, prepare_policy, trainable
    from spin.model.sharding import accumulating, clip_grad_norm
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "accumulating",
    "build_model",
    "build_policy",
    "clip_grad_norm",
    "from_hf",
    "prepare_model",
    "prepare_policy",
    "self_test",
    "trainable",
    "weights_fingerprint",
]
