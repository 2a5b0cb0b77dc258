"""Gemma 2 as it was trained. torchtune 0.6.1 differs from the released model in three places, put right from outside:

1. ``Gemma2FinalNorm`` soft-caps the hidden state; Gemma 2 soft-caps the logits.
2. The builders ``gemma2_2b``, ``gemma2_9b`` and ``gemma2_27b`` pass 30 to attention and 50 to the output; it is the
   other way round.
3. The weight converters swap the norm before the MLP and the one after it.

Source: Gemma 2 (arXiv 2408.00118), section 2, "Logit soft-capping", and table 1. Tests compare with transformers.
"""

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from spin.model.torchtune import Gemma2Attention, Gemma2FinalNorm, TransformerDecoder

Value = TypeVar("Value")


_CAP = "spin_final_softcap"  # a decoder's attribute
_RELEASED = (50.0, 30.0)  # attention and logits, of every released Gemma 2


def gemma2_caps(model: nn.Module) -> tuple[float | None, float | None] | None:
    """``attn_logit_softcapping`` and ``final_logit_softcapping`` of a Gemma 2; None for other models.

    They are what its builder was given, except for the 30 and 50 of torchtune's ``gemma2_2b``, ``gemma2_9b`` and
    ``gemma2_27b``, which are swapped.
    """
    norm = getattr(model, "norm", None)
    if not isinstance(norm, Gemma2FinalNorm):
        return None
    attention = {module.softcapping for module in model.modules() if isinstance(module, Gemma2Attention)}
    caps = (min(attention, key=lambda cap: cap or 0.0, default=None), norm.capping_value)
    return _RELEASED if caps == _RELEASED[::-1] else caps


def fix_gemma2_softcap(model: nn.Module) -> bool:
    """Moves the final soft cap from the hidden state to the logits, and sets both to :func:`gemma2_caps`.

    True if the model is a Gemma 2; other models are left alone, and calling it twice is harmless. A head that computes
    logits itself instead of calling ``model.unembed`` must apply ``final_softcap(model)``.
    """
    caps, norm = gemma2_caps(model), getattr(model, "norm", None)
    if caps is None or not isinstance(norm, Gemma2FinalNorm):
        return False
    norm.capping_value = norm.logit_capping.capping_value = caps[1]
    norm.forward = MethodType(_norm_without_cap, norm)
    set_final_softcap(model, caps[1])
    for module in model.modules():
        if isinstance(module, Gemma2Attention):
            module.softcapping = caps[0]
    return True


def final_softcap(model: nn.Module) -> float | None:
    """The c of ``c * tanh(logits / c)`` that ``model.output(model.norm(hidden))`` still needs, or None."""
    return getattr(model, _CAP, None)


def set_final_softcap(model: nn.Module, cap: float | None) -> None:
    """Makes a decoder's ``unembed`` soft-cap the logits; None: it does not."""
    if cap is not None:
        setattr(model, _CAP, float(cap))
        model.unembed = MethodType(_capped_unembed, model)  # type: ignore[assignment]


def softcap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(logits / cap)``, or ``logits`` if there is no cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def swap_mlp_norms(state_dict: dict[str, Value]) -> dict[str, Value]:
    """Exchanges ``mlp_norm`` and ``mlp_scale`` in the names of a torchtune Gemma 2 state dict; its own inverse.

    Needed after ``gemma2_hf_to_tune`` and before ``gemma2_tune_to_hf``, which confuse pre_feedforward_layernorm and
    post_feedforward_layernorm.
    """
    other = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm"}
    return {".".join(other.get(part, part) for part in name.split(".")): value for name, value in state_dict.items()}


def _norm_without_cap(self: Gemma2FinalNorm, x: torch.Tensor) -> torch.Tensor:
    return self.rms_norm(x)


def _capped_unembed(self: Any, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    cap = final_softcap(self)
    output = TransformerDecoder.unembed(self, h)
    if isinstance(output, list):  # chunked output
        return [softcap(chunk.float(), cap) for chunk in output]
    return softcap(output, cap)
