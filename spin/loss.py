"""Losses of self-play: SPIN and SPACE."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from spin.core.errors import ConfigError

LOSS_TYPES = ("logistic", "hinge", "exponential", "correlation")
_ALIASES = {"sigmoid": "logistic"}


class _RewardLoss(nn.Module):
    """A loss of pairs by the rewards of their two responses."""

    beta: float

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
        losses = self._losses(real_rewards, generated_rewards)
        return losses, real_rewards.detach(), generated_rewards.detach()

    def _losses(self, real_rewards: torch.Tensor, generated_rewards: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class SPINLoss(_RewardLoss):
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
        _check_beta(beta)
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"loss.label_smoothing={label_smoothing}: expected a fraction in [0, 0.5).")
        self.beta = float(beta)
        self.loss_type = loss_type
        self.label_smoothing = float(label_smoothing)

    def _losses(self, real_rewards: torch.Tensor, generated_rewards: torch.Tensor) -> torch.Tensor:
        margins = real_rewards - generated_rewards
        losses = self._pair_loss(margins)
        if self.label_smoothing > 0:
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * self._pair_loss(-margins)
        return losses

    def _pair_loss(self, margins: torch.Tensor) -> torch.Tensor:
        if self.loss_type == "logistic":
            return -F.logsigmoid(margins)
        if self.loss_type == "hinge":
            return torch.relu(1 - margins)
        if self.loss_type == "exponential":
            return torch.exp(-margins)
        return 1 - margins


class SPACELoss(_RewardLoss):
    """Self-PlAy via noise Contrastive Estimation: tells real and generated responses apart, each by itself.

    With ``r = beta * (log p - log p_ref)`` of a response and ``sigma_mu(r) = 1 / (1 + mu * exp(-r))``, the probability
    that it is real where ``mu`` generated ones stand beside each real one, the loss of a pair is

        ``-log sigma_mu(r(real)) - mu * log(1 - sigma_mu(r(gen)))``

    It is no function of the margin: a response of probability far from the opponent's is held back even where the pair
    is won, so one that is real and generated at once stays where it is. Two equal models have the loss
    ``(1 + mu) * log(1 + mu) - mu * log(mu)``, 2 ln 2 at ``mu = 1``, and the gradient of SPIN with ``2 * mu * beta / (1
    + mu)``.

    Args:
        beta (float): 1 in the paper, whose optimum is the distribution of the data then; smaller: bigger moves.
        mu (float): generated responses for each real one: 1 in the paper; with several to a prompt, their number.

    Raises:
        ConfigError: If an argument is not above 0.

    Source:
        https://arxiv.org/abs/2512.07175 (NeurIPS 2025), whose second term is ``mu * log sigma_{1/mu}(-r(gen))`` with a
        minus sign, the same number. Its code is not released.

    Example:
        >>> loss = SPACELoss()
        >>> zero = torch.zeros(1)
        >>> loss(zero, zero, zero, zero)[0]
        tensor([1.3863])
    """

    def __init__(self, beta: float = 1.0, mu: float = 1.0) -> None:
        super().__init__()
        _check_beta(beta)
        if not 0 < mu < math.inf:
            raise ConfigError(f"loss.mu={mu}: expected a number above 0, of generated responses for each real one.")
        self.beta, self.mu = float(beta), float(mu)

    def _losses(self, real_rewards: torch.Tensor, generated_rewards: torch.Tensor) -> torch.Tensor:
        log_mu = math.log(self.mu)  # sigma_mu(r) = sigmoid(r - log mu)
        return -F.logsigmoid(real_rewards - log_mu) - self.mu * F.logsigmoid(log_mu - generated_rewards)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ConfigError(f"loss.beta={beta}: expected a number above 0. At 0 the loss has no gradient.")
