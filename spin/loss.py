"""The losses: SPIN's, and that of T-SPIN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from spin.core.errors import ConfigError

if TYPE_CHECKING:
    from spin.pairs.packing import PackedRow

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
        loss_type (str): which ``l``.
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
            raise ConfigError(f"loss.label_smoothing={label_smoothing}: expected a share in [0, 0.5).")
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
        return self._smoothed(real_rewards - generated_rewards), real_rewards.detach(), generated_rewards.detach()

    def _smoothed(self, margins: torch.Tensor) -> torch.Tensor:
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


class TSPINLoss(SPINLoss):
    """T-SPIN: real answers against the opponent's, and the opponent's against those of what the run started from.

    There is no reference in it. With ``a`` = ``beta`` and ``b`` = ``start_weight`` the loss of a triplet is

        l(a (log p(real) - log p(generated))) + b l(a (log p(generated) - log p(start)))

    Real and generated answers draw level in the end, and the first term then says nothing; the second still does. In
    iteration 0 the opponent is the start, and the first term is all there is. ``l`` and label smoothing are those of
    :class:`SPINLoss`.

    Args:
        beta (float): the paper's alpha; more than 0. The paper has 1.
        loss_type (str): see :class:`SPINLoss`.
        label_smoothing (float): see :class:`SPINLoss`.
        start_weight (float): ``b``, the paper's beta; 0 or more.

    Raises:
        ConfigError: If an argument is outside its range or ``loss_type`` is unknown.

    Source:
        Equation 7 of https://arxiv.org/abs/2601.08198.
    """

    needs_start_answers = True  # a recipe that sees this adds them to its pairs, see spin.generators.triplets

    def __init__(
        self,
        beta: float = 1.0,
        loss_type: str = "logistic",
        label_smoothing: float = 0.0,
        start_weight: float = 0.1,
    ) -> None:
        super().__init__(beta, loss_type, label_smoothing)
        if not 0 <= start_weight < float("inf"):
            raise ConfigError(f"loss.start_weight={start_weight}: expected 0 or more.")
        self.start_weight = float(start_weight)

    def forward(
        self,
        policy_real_logps: torch.Tensor,
        policy_generated_logps: torch.Tensor,
        reference_real_logps: torch.Tensor,
        reference_generated_logps: torch.Tensor,
        policy_start_logps: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            policy_real_logps (torch.Tensor): summed log-probs in nats of the real responses, shape (n,).
            policy_generated_logps (torch.Tensor): the same of the generated responses, shape (n,).
            reference_real_logps (torch.Tensor): unused; the recipes hand it to every loss.
            reference_generated_logps (torch.Tensor): unused.
            policy_start_logps (torch.Tensor | None): the policy's log-probs of the start's responses, shape (n,); None
                in iteration 0.

        Returns:
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]: losses, rewards of the real and rewards of the generated
            responses, each of shape (n,). Rewards are ``beta * log p``, detached.
        """
        real_rewards, generated_rewards = self.beta * policy_real_logps, self.beta * policy_generated_logps
        losses = self._smoothed(real_rewards - generated_rewards)
        if policy_start_logps is not None:
            losses = losses + self.start_weight * self._smoothed(generated_rewards - self.beta * policy_start_logps)
        return losses, real_rewards.detach(), generated_rewards.detach()


def row_losses(loss: nn.Module, row: PackedRow, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a packed row's comparisons.

    Args:
        loss (nn.Module): such as :class:`SPINLoss`; one that is given triplets takes ``policy_start_logps`` too.
        row (PackedRow): with reference log-probs.
        logps (torch.Tensor): the policy's summed log-probs in nats of the row's responses, shape (m,).

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: losses, real and generated rewards, each of shape (c,).
    """
    real, generated, reference = row.real, row.generated, row.reference_logps
    start = {} if row.start is None else {"policy_start_logps": logps[row.start]}
    return loss(logps[real], logps[generated], reference[real], reference[generated], **start)
