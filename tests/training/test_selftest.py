"""A loss is tried before there are responses to lose."""

import pytest
import torch

from spin.core.errors import ConfigError
from spin.loss import SPACELoss, SPINLoss
from spin.training import check_loss

SPIN = SPINLoss(beta=0.1)


def after(change):
    """SPIN's loss with ``change`` of what it returns."""
    return lambda *logps: change(*SPIN(*logps))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, r"raised TypeError: 'NoneType' object is not callable"),
        (lambda logps: logps, r"raised TypeError: .* Expected a function of policy_real_logps, "),
        (after(lambda losses, real, generated: None), "gave None for three pairs, expected three tensors of shape"),
        (after(lambda losses, real, generated: losses), r"gave shape \(3,\) for three pairs"),
        (after(lambda losses, real, generated: (losses, real)), r"gave shape \(3,\), shape \(3,\) for"),
        (after(lambda losses, real, generated: (losses.mean(), real, generated)), r"gave shape \(\), shape"),
        (after(lambda losses, real, generated: (losses[:, None], real, generated)), r"gave shape \(3, 1\), "),
        (after(lambda losses, real, generated: (losses, None, generated)), r"gave shape \(3,\), None, shape"),
        (after(lambda losses, real, generated: (losses.detach(), real, generated)), "without a gradient"),
        (after(lambda losses, real, generated: (losses.int(), real, generated)), "int32 without a gradient"),
        (after(lambda losses, real, generated: (losses - losses.mean(), real, generated)), "pair i only"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_named(loss, message):
    with pytest.raises(ConfigError, match=rf"(?s)^loss: mine\.Loss .*{message}"):
        check_loss(loss, "mine.Loss")


@pytest.mark.parametrize(
    "loss",
    [
        *(SPINLoss(0.1, loss_type=name) for name in ("logistic", "hinge", "exponential", "correlation")),
        SPACELoss(),
        after(lambda losses, real, generated: [losses.float(), real, generated]),
        after(lambda losses, real, generated: (losses.half(), real, generated)),
        after(lambda losses, real, generated: (losses * torch.nan, real, generated)),  # on_nonfinite's to name
    ],
)
def test_a_loss_that_can_be_is_taken(loss):
    check_loss(loss, "mine.Loss")
