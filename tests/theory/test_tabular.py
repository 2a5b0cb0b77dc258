"""What an iteration does to a policy, in closed form, against the product's own loss trained to its end."""

import json
import sys
from pathlib import Path

import pytest
import torch

from spin.loss import SPINLoss

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "experiments"))  # as when it runs

import tabular  # noqa: E402

P_DATA, P_0 = (torch.tensor(p, dtype=torch.float64) for p in (tabular.P_DATA, tabular.P_0))


@pytest.mark.parametrize("lam", [0.1, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0])
def test_the_optimum_of_the_loss_is_the_closed_form(lam):
    fitted = tabular.fit(P_0, P_DATA, lam)
    torch.testing.assert_close(fitted, tabular.closed_form(P_0, P_DATA, lam), rtol=0, atol=1e-6)


def test_the_optimum_is_the_oracles(oracles):
    oracle = oracles["theory_tabular_optimum"]
    p_data, p_0 = (torch.tensor([oracle[name]], dtype=torch.float64) for name in ("p_data", "p_0"))
    for case in oracle["cases"]:
        expected = torch.tensor([case["p1_closed_form"]], dtype=torch.float64)
        torch.testing.assert_close(tabular.fit(p_0, p_data, case["lam"]), expected, rtol=0, atol=1e-6)
        loss = tabular.population_loss(expected.log(), p_0, p_data, SPINLoss(beta=case["lam"]))
        assert loss.item() == pytest.approx(case["loss_at_optimum"], abs=1e-9)
        divergences = [value for value in case["KL_pdata_p"] if value is not None]
        policy = p_0
        for value in divergences:
            assert tabular.kl(p_data, policy) == pytest.approx(value, rel=1e-6)
            policy = tabular.closed_form(policy, p_data, case["lam"])


def test_lambda_of_one_reaches_the_data_in_one_iteration():
    torch.testing.assert_close(tabular.fit(P_0, P_DATA, 1.0), P_DATA, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("lam", "multiplier"), [(0.1, -9.0), (0.5, -1.0), (0.75, -1 / 3), (2.0, 0.5), (5.0, 0.8)])
def test_an_iteration_multiplies_the_distance_from_the_data(lam, multiplier):
    """``log(p_1 / p_data) = (1 - 1 / lambda) log(p_0 / p_data)``: contraction above 1/2, nine times too far at 0.1."""
    before, after = (policy.log() - P_DATA.log() for policy in (P_0, tabular.fit(P_0, P_DATA, lam)))
    before, after = (ratio - ratio.mean(-1, keepdim=True) for ratio in (before, after))  # up to each prompt's constant
    torch.testing.assert_close(after, multiplier * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_the_data_are_a_fixed_point(lam):
    """No gradient, a loss of ln 2; any other policy has a gradient."""
    for policy, is_fixed in ((P_DATA, True), (P_0, False)):
        logits = policy.log().requires_grad_()
        loss = tabular.population_loss(logits, policy, P_DATA, SPINLoss(beta=lam))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-12)
        assert (gradient.abs().max().item() < 1e-12) == is_fixed


def test_stopping_early_tames_a_small_lambda():
    """At 0.1 the policy passes close by the data, and is far behind them at the end; twice the steps at half the
    learning rate pass at the same place."""
    start = tabular.kl(P_DATA, P_0)
    path = [tabular.kl(P_DATA, policy) for policy in tabular.descend(P_0, P_DATA, 0.1, 0.5, 2000)]
    best = min(range(len(path)), key=path.__getitem__)
    assert path[best] < start / 50 and path[-1] > 3 * start
    slower = [tabular.kl(P_DATA, policy) for policy in tabular.descend(P_0, P_DATA, 0.1, 0.25, 1000)]
    assert min(range(len(slower)), key=slower.__getitem__) == pytest.approx(2 * best, abs=2)


def test_the_published_results_are_those_of_the_code(tmp_path):
    tabular.main(["--out", str(tmp_path), "--no-plot"])
    ours = json.loads((tmp_path / "tabular.json").read_text())
    published = json.loads((REPO / "docs/experiments/tabular.json").read_text())
    for section in ("to_the_end", "step_by_step"):
        assert ours[section].keys() == published[section].keys()
        for lam, result in ours[section].items():
            assert result["kl"] == pytest.approx(published[section][lam]["kl"], rel=1e-5, abs=1e-9)
    assert max(result["deviation_from_closed_form"] for result in ours["to_the_end"].values()) < 1e-6
