"""The SPIN loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spin.core.errors import ConfigError

LOSS_TYPES = ("logistic", "hinge", "exponential", "correlation")
_ALIASES = {"sigmoid": "logistic"}


class SPINLoss(nn.Module):
    """Self-Play fIne-tuNing loss: tells the real response from the opponent's.

    With ``z = beta * [(log p(real) - log p_ref(real)) - (log p(gen) - log p_ref(gen))]`` the loss of a pair is
    ``l(z)``, where ``l`` is one of the decreasing convex functions of the paper's section 4:

    - ``logistic`` (alias ``sigmoid``): ``log(1 + exp(-z))``, the paper's choice
    - ``hinge``: ``max(0, 1 - z)``
    - ``exponential``: ``exp(-z)``
    - ``correlation``: ``1 - z``

    Label smoothing mixes in the loss of the swapped pair: ``(1 - eps) * l(z) + eps * l(-z)``.

    Args:
        beta (float): the paper's lambda, NeMo-Aligner's ``ref_policy_kl_penalty``; more than 0.
        loss_type (str): ``logistic``, ``hinge``, ``exponential`` or ``correlation``: which ``l``.
        label_smoothing (float): ``eps``, in [0, 0.5).

    Raises:
        ConfigError: If an argument is outside its range or ``loss_type`` is unknown.

    Source:
        Equation 4.7 of https://arxiv.org/abs/2401.01335; reference implementation: ``spin/alignment/trainer.py`` of
        https://github.com/uclaml/SPIN.

    Example:
        >>> loss = SPINLoss(beta=0.1)
        >>> zero = torch.zeros(1)
        >>> loss(zero, zero, zero, zero)[0]
        tensor([0.6931])
    """

    def __init__(self, beta: float = 0.1, loss_type: str = "logistic", label_smoothing: float = 0.0) -> None:
        super().__init__()
        loss_type = _ALIASES.get(loss_type, loss_type)
        if loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss.loss_type={loss_type!r}: expected one of {', '.join(LOSS_TYPES)} (or sigmoid).")
        if not beta > 0:
            raise ConfigError(f"loss.beta={beta}: expected a number above 0. At 0 the loss has no gradient.")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"loss.label_smoothing={label_smoothing}: expected a fraction in [0, 0.5).")
        self.beta = float(beta)
        self.loss_type = loss_type
        self.label_smoothing = float(label_smoothing)

    def forward(
        self,
        policy_real_logps: torch.Tensor,
        policy_generated_logps: torch.Tensor,
        reference_real_logps: torch.Tensor,
        reference_generated_logps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            policy_real_logps (torch.Tensor): summed log-probs in nats of the real responses, shape (n,).
            policy_generated_logps (torch.Tensor): the same of the generated responses, shape (n,).
            reference_real_logps (torch.Tensor): the opponent's, shape (n,).
            reference_generated_logps (torch.Tensor): the opponent's, shape (n,).

        Returns:
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]: losses, rewards of the real and rewards of the generated
            responses, each of shape (n,). Rewards are ``beta * (log p - log p_ref)``, detached.
        """
        real_rewards = self.beta * (policy_real_logps - reference_real_logps)
        generated_rewards = self.beta * (policy_generated_logps - reference_generated_logps)
        margins = real_rewards - generated_rewards
        losses = self._pair_loss(margins)
        if self.label_smoothing > 0:
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * self._pair_loss(-margins)
        return losses, real_rewards.detach(), generated_rewards.detach()

    def _pair_loss(self, margins: torch.Tensor) -> torch.Tensor:
        if self.loss_type == "logistic":
            return -F.logsigmoid(margins)
        if self.loss_type == "hinge":
            return torch.relu(1 - margins)
        if self.loss_type == "exponential":
            return torch.exp(-margins)
        return 1 - margins
