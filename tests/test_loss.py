"""SPINLoss against what the reference implementations returned (tests/oracles/spin_oracles.json)."""

import math

import pytest
import torch

from spin.core.errors import ConfigError
from spin.loss import SPINLoss


def _arguments(inputs, requires_grad=False):
    return [
        torch.tensor(inputs[name], dtype=torch.float64, requires_grad=requires_grad)
        for name in ("policy_real", "policy_generated", "opponent_real", "opponent_generated")
    ]


def test_matches_the_authors_trainer(oracles):
    oracle = oracles["uclaml_spin_loss"]
    assert oracle["cases"]
    for case in oracle["cases"]:
        losses, real, generated = SPINLoss(beta=case["beta"], loss_type=case["loss_type"])(
            *_arguments(oracle["inputs"])
        )
        torch.testing.assert_close(losses, torch.tensor(case["losses"], dtype=torch.float64), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(real, torch.tensor(case["rewards_real"], dtype=torch.float64))
        torch.testing.assert_close(generated, torch.tensor(case["rewards_generated"], dtype=torch.float64))
        assert (real > generated).double().mean().item() == case["acc"]
        assert (real - generated).mean().item() == pytest.approx(case["margin_mean"], rel=1e-12)


def test_gradient_matches_the_authors_trainer(oracles):
    expected = oracles["uclaml_spin_loss_grad"]
    arguments = _arguments(oracles["uclaml_spin_loss"]["inputs"], requires_grad=True)
    SPINLoss(beta=expected["beta"])(*arguments)[0].mean().backward()
    torch.testing.assert_close(
        arguments[0].grad, torch.tensor(expected["d_loss_d_policy_real"], dtype=torch.float64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        arguments[1].grad, torch.tensor(expected["d_loss_d_policy_generated"], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("loss_type", ["logistic", "hinge", "exponential", "correlation"])
def test_general_losses(oracles, loss_type):
    menu = oracles["general_loss_menu"]
    t = torch.tensor(menu["t"], dtype=torch.float64)
    zero = torch.zeros_like(t)
    losses, _, _ = SPINLoss(beta=1.0, loss_type=loss_type)(t, zero, zero, zero)
    torch.testing.assert_close(losses, torch.tensor(menu[loss_type], dtype=torch.float64), rtol=1e-12, atol=1e-30)


def test_equal_models_start_at_the_initial_loss(oracles):
    expected = oracles["init_invariants"]
    logps = torch.tensor([-3.5, -120.25])
    for loss_type, value in (("logistic", expected["loss_logistic"]), ("hinge", expected["loss_hinge"])):
        loss = SPINLoss(beta=0.3, loss_type=loss_type)
        losses, real, generated = loss(logps, logps * 2, logps, logps * 2)
        assert losses.tolist() == pytest.approx([value, value], abs=1e-7)
        assert real.tolist() == generated.tolist() == [0.0, 0.0]


def test_label_smoothing_mixes_in_the_swapped_pair():
    """beta 1, z = 2, eps 0.1: 0.9 * ln(1 + e^-2) + 0.1 * ln(1 + e^2)."""
    z, zero = torch.tensor([2.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    losses, _, _ = SPINLoss(beta=1.0, label_smoothing=0.1)(z, zero, zero, zero)
    expected = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
    assert losses.item() == pytest.approx(expected, rel=1e-14)


def test_rewards_carry_no_gradient_and_losses_do():
    logps = torch.tensor([-1.0], requires_grad=True)
    losses, real, generated = SPINLoss()(logps, logps.detach() - 1, logps.detach(), logps.detach())
    assert losses.requires_grad
    assert not real.requires_grad
    assert not generated.requires_grad


def test_large_margins_do_not_overflow():
    z, zero = torch.tensor([-1e4, 1e4]), torch.zeros(2)
    losses, _, _ = SPINLoss(beta=1.0)(z, zero, zero, zero)
    assert losses.tolist() == [1e4, 0.0]


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"loss_type": "ipo"}, "ipo"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_refuses_bad_arguments(kwargs, word):
    with pytest.raises(ConfigError, match=word):
        SPINLoss(**kwargs)
