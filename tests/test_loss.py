"""SPINLoss against what the reference implementations returned (tests/oracles/spin_oracles.json), TSPINLoss against its
formula."""

import math

import pytest
import torch

from spin.core.errors import ConfigError
from spin.data import Pair, Response
from spin.loss import SPINLoss, TSPINLoss, row_losses
from spin.pairs.packing import RowLayout, pack_row


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


@pytest.mark.parametrize(
    ("loss_type", "function"),
    [("logistic", lambda z: math.log1p(math.exp(-z))), ("exponential", lambda z: math.exp(-z))],
)
def test_triplets_by_the_formula(loss_type, function):
    """l(a (real - generated)) + b l(a (generated - start)), the gradient by differences; references do not matter."""
    real, generated, start = (torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -4.0], [-1.0, -4.5], [-2.0, -1.0]))
    nan = torch.full((2,), math.nan, dtype=torch.float64)
    loss = TSPINLoss(beta=0.7, loss_type=loss_type, start_weight=0.3)

    def by_hand(real, generated, start):
        return function(0.7 * (real - generated)) + 0.3 * function(0.7 * (generated - start))

    policy = [x.clone().requires_grad_() for x in (real, generated, start)]
    losses, real_rewards, generated_rewards = loss(*policy[:2], nan, nan, policy_start_logps=policy[2])
    values = list(zip(real.tolist(), generated.tolist(), start.tolist(), strict=True))
    assert losses.tolist() == pytest.approx([by_hand(*each) for each in values], rel=1e-14)
    assert (real_rewards - generated_rewards).tolist() == pytest.approx([0.7 * -2.0, 0.7 * 0.5])
    losses.sum().backward()
    step = 1e-6
    for i, logps in enumerate(policy):
        for n, each in enumerate(values):
            up, down = (by_hand(*(x + sign * step * (j == i) for j, x in enumerate(each))) for sign in (1, -1))
            assert logps.grad[n].item() == pytest.approx((up - down) / (2 * step), rel=1e-6)
    losses, _, _ = loss(real, generated, nan, nan)  # iteration 0
    assert losses.tolist() == pytest.approx([function(0.7 * (r - g)) for r, g, _ in values], rel=1e-14)


def test_a_rows_triplets_are_one_comparison_each():
    pairs = [Pair(name, 1, [1, 2], [3, 4], [Response([5], "stop"), Response([6], "stop")]) for name in "ab"]
    logps = torch.tensor([-3.0, -1.0, -2.0, -4.0, -4.0, -1.0], dtype=torch.float64)
    losses, _, _ = row_losses(TSPINLoss(beta=2.0), pack_row(pairs, layout=RowLayout(triplets=True)), logps)
    margins = torch.tensor([-2.0, 1.0, 0.0, -3.0], dtype=torch.float64)  # -3 + 1, -1 + 2, -4 + 4, -4 + 1
    terms = torch.log1p(torch.exp(-2 * margins))
    torch.testing.assert_close(losses, terms[0::2] + 0.1 * terms[1::2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_refuses_a_bad_weight_of_the_start(weight):
    with pytest.raises(ConfigError, match="start_weight"):
        TSPINLoss(start_weight=weight)
