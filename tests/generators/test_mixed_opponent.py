"""The mixed opponent: its log-probs, the weights that are lent and put back, and where it leads."""

import pytest
import torch
from torch import nn

from spin.core.errors import SelfTestError, StoreError
from spin.data import Pair
from spin.generators.mixed_opponent import mix_references, weights_of_start
from spin.loss import SPINLoss
from spin.model.fingerprint import weights_fingerprint
from spin.types import Response


def pair(name, real, *generated):
    return Pair(name, 0, [1], [2], [Response([3], "stop", logp) for logp in generated], real)


def test_log_probs_are_mixed_by_share():
    (mixed,) = mix_references([pair("a", -8.0, -4.0, -2.0)], [pair("a", -16.0, -8.0, -10.0)], 0.25)
    assert mixed.reference_real_logp == -10.0  # 0.75 * 8 + 0.25 * 16
    assert [response.reference_logp for response in mixed.generated] == [-5.0, -4.0]


@pytest.mark.parametrize("other", [pair("b", -1.0, -1.0), pair("a", -1.0, -1.0, -1.0)])
def test_other_pairs_are_refused(other):
    with pytest.raises(StoreError, match="do not belong together"):
        list(mix_references([pair("a", -1.0, -1.0)], [other], 0.5))
    with pytest.raises(StoreError, match="sample b where the run's start scored nothing"):
        list(mix_references([pair("a", -1.0, -1.0), pair("b", -1.0, -1.0)], [pair("a", -1.0, -1.0)], 0.5))


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


def test_weights_are_lent_and_put_back():
    model = make_model()
    policy = weights_fingerprint(model)
    with weights_of_start(model, lambda: model[1].weight.zero_(), policy) as start:
        assert model[1].weight.abs().sum() == 0
        assert start == weights_fingerprint(model) != policy
    assert weights_fingerprint(model) == policy


def test_weights_are_put_back_when_scoring_fails():
    model = make_model()
    policy = weights_fingerprint(model)
    with pytest.raises(RuntimeError, match="scoring"):
        with weights_of_start(model, lambda: model[1].weight.zero_(), policy):
            raise RuntimeError("scoring")
    assert weights_fingerprint(model) == policy


def test_weights_that_do_not_come_back_are_noticed():
    """What is not trained is not kept, so nothing may change it."""
    model = make_model()
    with pytest.raises(SelfTestError, match="not what they were"):
        with weights_of_start(model, lambda: model[0].weight.zero_(), weights_fingerprint(model)):
            pass


@pytest.mark.parametrize(("share", "lam"), [(0.25, 1.0), (0.5, 0.5), (1.0, 2.0)])
def test_where_self_play_against_the_mixture_comes_to_rest(share, lam):
    """An iteration's optimum is ``p ~ r (p_data / p_t)^(1 / lambda)`` with the mixture ``r ~ p_t^(1 - a) p_0^a``. It is
    ``p_t`` itself where ``log p_t = (a lambda log p_0 + log p_data) / (a lambda + 1)`` up to a constant: not the data,
    but a mixture of the data and the start. There the product's loss has no gradient."""
    p_data, p_0 = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1]))
    at_rest = ((share * lam * p_0.log() + p_data.log()) / (share * lam + 1)).log_softmax(0)
    for policy, rests in ((at_rest, True), (p_data.log(), False)):
        logits = policy.clone().requires_grad_()
        mixed = [
            next(mix_references([pair("a", now, now)], [pair("a", start, start)], share)).reference_real_logp
            for now, start in zip(policy.tolist(), p_0.log().tolist(), strict=True)
        ]
        reference = torch.tensor(mixed, dtype=torch.float64)
        ours = logits.log_softmax(0)
        answers = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # all real answers with all generated ones
        real, generated = answers.unbind(1)
        losses, _, _ = SPINLoss(beta=lam)(ours[real], ours[generated], reference[real], reference[generated])
        (losses * p_data[real] * policy.exp()[generated]).sum().backward()
        assert (logits.grad.abs().max().item() < 1e-12) is rests
