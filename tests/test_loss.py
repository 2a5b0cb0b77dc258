"""SPINLoss against what the reference implementations returned (tests/oracles/spin_oracles.json), SPACELoss against its
formula in numbers of 6,000 digits."""

import math

import mpmath
import pytest
import torch

from spin.core.errors import ConfigError
from spin.loss import SPACELoss, SPINLoss


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


REWARDS = (-1e4, -700.0, -30.0, -2.0, 0.0, 0.5, 20.5, 750.0, 1e4)


@pytest.mark.parametrize(("beta", "mu"), [(1.0, 1.0), (0.1, 4.0), (2.0, 0.5)])
def test_space_is_its_formula_with_its_gradient(beta, mu):
    """d/dr of -log sigma_mu(r) is sigma_mu(r) - 1, of -mu log(1 - sigma_mu(r)) it is mu sigma_mu(r)."""
    inputs = {"dtype": torch.float64, "requires_grad": True}
    real = torch.tensor([r / beta for r in REWARDS for _ in REWARDS], **inputs)
    generated = torch.tensor([r / beta for _ in REWARDS for r in REWARDS], **inputs)
    zero = torch.zeros(len(real), dtype=torch.float64)
    losses, real_rewards, generated_rewards = SPACELoss(beta, mu)(real - 3, generated - 3, zero - 3, zero - 3)
    losses.sum().backward()
    with mpmath.workdps(6000):  # 1 - sigma_mu(1e4) is 1e-4343
        sigma = {r: 1 / (1 + mu * mpmath.exp(-r)) for r in REWARDS}
        of_real = {r: float(-mpmath.log(sigma[r])) for r in REWARDS}
        of_generated = {r: float(-mu * mpmath.log(1 - sigma[r])) for r in REWARDS}
        slopes = {r: (float(beta * (sigma[r] - 1)), float(beta * mu * sigma[r])) for r in REWARDS}
    expected = [of_real[r] + of_generated[s] for r in REWARDS for s in REWARDS]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert real.grad.tolist() == pytest.approx([slopes[r][0] for r in REWARDS for _ in REWARDS], rel=1e-9, abs=1e-12)
    assert generated.grad.tolist() == pytest.approx(
        [slopes[r][1] for _ in REWARDS for r in REWARDS], rel=1e-9, abs=1e-12
    )
    assert real_rewards.tolist() == pytest.approx([r for r in REWARDS for _ in REWARDS])
    assert generated_rewards.tolist() == pytest.approx([r for _ in REWARDS for r in REWARDS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_space_by_hand_in_the_dtypes_of_training(dtype):
    """mu 1: two equal models have 2 ln 2. mu 3: -ln(1/4) - 3 ln(3/4) = 4 ln 4 - 3 ln 3. r = ln 3 of both at mu 1:
    -ln(3/4) - ln(1/4). A lost pair costs its rewards, a won one nothing."""
    zero, tolerance = torch.zeros(1, dtype=dtype), 1e-6 if dtype == torch.float32 else 1e-2
    log3 = torch.tensor([math.log(3)], dtype=dtype)
    far = torch.tensor([1e4], dtype=dtype)
    for mu, real, generated, expected in (
        (1.0, zero, zero, 2 * math.log(2)),
        (3.0, zero, zero, 4 * math.log(4) - 3 * math.log(3)),
        (1.0, log3, log3, math.log(4 / 3) + math.log(4)),
        (1.0, -far, far, 2 * far.item()),
        (1.0, far, -far, 0.0),
    ):
        losses, *rewards = SPACELoss(mu=mu)(real, generated, zero, zero)
        assert losses.item() == pytest.approx(expected, rel=tolerance)
        assert not any(each.requires_grad for each in rewards)


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


@pytest.mark.parametrize("kwargs", [{"beta": 0.0}, {"mu": 0.0}, {"mu": -1.0}, {"mu": math.nan}, {"mu": math.inf}])
def test_space_refuses_bad_arguments(kwargs):
    with pytest.raises(ConfigError, match=rf"loss\.{next(iter(kwargs))}="):
        SPACELoss(**kwargs)
