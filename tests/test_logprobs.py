"""Chunked log-probs against plain log-softmax, the reference implementations' values, and finite differences."""

import pytest
import torch

from spin.logprobs import linear_logprob, output_weight, segment_sums


def plain(hidden, weight, targets, softcap=None):
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def problem(n=23, d=7, v=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 23, 1000])
def test_equals_log_softmax(chunk_size, softcap):
    hidden, weight, targets = problem()
    ours, expected = (
        linear_logprob(hidden, weight, targets, chunk_size, softcap),
        plain(hidden, weight, targets, softcap),
    )
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.linspace(-2, 1, targets.numel(), dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad((ours * upstream).sum(), (hidden, weight)),
        torch.autograd.grad((expected * upstream).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets = problem(n=6, d=3, v=5)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, 4, 2.0), (hidden, weight))


@pytest.mark.parametrize(("train_hidden", "train_weight"), [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(train_hidden, train_weight):
    hidden, weight, targets = problem()
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    linear_logprob(hidden, weight, targets, 8).sum().backward()
    assert (hidden.grad is not None) == train_hidden
    assert (weight.grad is not None) == train_weight


def test_sums_match_the_reference_implementations(oracles):
    """Position i of the logits scores label i + 1; -100 is not scored."""
    oracle = oracles["batch_logps"]
    logits = torch.tensor(oracle["logits"], dtype=torch.float64)
    labels = torch.tensor(oracle["labels"])
    rows, cols = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    v = logits.shape[-1]
    token_logps = linear_logprob(logits[rows, cols], torch.eye(v, dtype=torch.float64), labels[rows, cols + 1], 3)
    sums = segment_sums(token_logps, rows, len(labels))
    torch.testing.assert_close(sums, torch.tensor(oracle["sum"], dtype=torch.float64))
    lengths = segment_sums(torch.ones_like(token_logps), rows, len(labels))
    torch.testing.assert_close(sums / lengths, torch.tensor(oracle["mean"], dtype=torch.float64))


def test_scores_every_response_token_and_no_prompt_token(oracles):
    """NeMo-Aligner scored the last prompt token and never the final response token; the oracle has the right sums."""
    oracle = oracles["nemo_mask_double_shift_bug"]
    logits = torch.tensor(oracle["logits"], dtype=torch.float64)
    sums = []
    for i, tokens in enumerate(oracle["tokens"]):
        response = slice(oracle["prompt_lengths"][i], oracle["combined_lengths"][i])
        predictors = logits[i, response.start - 1 : response.stop - 1]
        v = logits.shape[-1]
        sums.append(
            linear_logprob(predictors, torch.eye(v, dtype=torch.float64), torch.tensor(tokens[response])).sum().item()
        )
    assert sums == pytest.approx(oracle["sum_logp_correct"], rel=1e-6)
    assert sums != pytest.approx(oracle["sum_logp_as_written"], rel=1e-6)


def test_bf16_inputs_give_fp32_and_stay_close():
    hidden, weight, targets = problem(n=512, d=64, v=256, dtype=torch.bfloat16)
    ours = linear_logprob(hidden, weight, targets, 100)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = plain(exact_hidden, exact_weight, targets)
    assert ours.dtype == torch.float32
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-2
    ours.sum().backward()
    exact.sum().backward()
    for got, wanted in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert got.dtype == torch.bfloat16
        assert ((got - wanted).norm() / wanted.norm()).item() < 2e-2


def test_no_tokens():
    hidden, weight, _ = problem(n=0)
    logps = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not weight.grad.any()


def test_refuses_a_chunk_of_nothing():
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="chunk_size"):
        linear_logprob(hidden, weight, targets, 0)


def test_output_weight_of_a_head_with_bias_is_refused():
    model = torch.nn.Module()
    model.output = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="bias"):
        output_weight(model)
