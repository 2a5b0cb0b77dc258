"""Chunked log-probs against plain log-softmax, the reference implementations' values, and finite differences."""

import pytest
import torch

from spin.data import pack_row
from spin.loss import SPINLoss
from spin.model.attention import patch_attention
from spin.model.gemma2 import fix_gemma2_softcap
from spin.pairs.packing import RowLayout
from spin.reference import logprobs
from spin.reference.logprobs import linear_logprob, output_weight, pair_objective, response_logps, segment_sums
from tests.families import FAMILIES
from tests.pairs.test_packing import make_pairs


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
    ours = linear_logprob(hidden, weight, targets, chunk_size, softcap)
    expected = plain(hidden, weight, targets, softcap)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.linspace(-2, 1, targets.numel(), dtype=torch.float64)
    grads = [torch.autograd.grad((logps * upstream).sum(), (hidden, weight)) for logps in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


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
    identity, sums = torch.eye(logits.shape[-1], dtype=torch.float64), []
    for i, tokens in enumerate(oracle["tokens"]):
        start, stop = oracle["prompt_lengths"][i], oracle["combined_lengths"][i]
        sums.append(linear_logprob(logits[i, start - 1 : stop - 1], identity, torch.tensor(tokens[start:stop])).sum())
    assert torch.stack(sums).tolist() == pytest.approx(oracle["sum_logp_correct"], rel=1e-6)
    assert torch.stack(sums).tolist() != pytest.approx(oracle["sum_logp_as_written"], rel=1e-6)


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


def test_no_gradient_for_frozen_states_no_tokens_no_chunk_and_no_bias():
    hidden, weight, targets = problem()
    linear_logprob(hidden.requires_grad_(False), weight, targets, 8).sum().backward()
    assert hidden.grad is None and weight.grad.any()
    hidden, weight, targets = problem(n=0)
    logps = linear_logprob(hidden, weight, targets)
    logps.sum().backward()
    assert logps.shape == (0,) and not weight.grad.any()
    with pytest.raises(ValueError, match="chunk_size"):
        linear_logprob(hidden, weight, targets, 0)
    model = torch.nn.Module()
    model.output = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="bias"):
        output_weight(model)


def row_objective(row, calls=None):
    """The SPIN loss and some cross-entropy: not linear in the log-probs, and different for every pair."""
    loss = SPINLoss(beta=0.7)

    def objective(logps):
        if calls is not None:
            calls.append(logps.detach().clone())
        references = row.reference_logps
        losses, _, _ = loss(logps[row.real], logps[row.generated], references[row.real], references[row.generated])
        nll = (logps / row.response_lengths)[row.real]
        return ((losses - 0.3 * nll) * row.weights).sum() / 4

    return objective


def float64_model(family):
    model = FAMILIES[family]().double()
    model.max_seq_len = 256  # of a row; no position in it is that large
    patch_attention(model)
    fix_gemma2_softcap(model)
    return model


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("chunk_tokens", [1, 7, 25, 1000])  # pairs have 3 to 36 response tokens
@pytest.mark.parametrize("family", ["llama3_2", "qwen2_5", "gemma2"])  # tied, untied, capped
def test_the_fused_head_gives_value_and_gradient_of_the_objective(family, chunk_tokens):
    model = float64_model(family)
    row = pack_row(make_pairs(5, 2, vocab=150), 256, RowLayout(truncated="mask"))
    fused, logps = pair_objective(model, row, row_objective(row), chunk_tokens)
    expected_logps = response_logps(model, row)
    expected = row_objective(row)(expected_logps)
    torch.testing.assert_close(logps, expected_logps.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    assert not logps.requires_grad
    # a scale from outside reaches the gradient too
    grads = [torch.autograd.grad(total * 3, list(model.parameters())) for total in (fused, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["fused", "recomputed"])
def test_a_frozen_head_has_no_gradient_and_no_product_for_it(form, monkeypatch):
    """Two products of (tokens, vocabulary) size instead of three in the fused head; the rest of the gradient stays."""
    products, made, gradients = [], [], []
    add_product, zeros = logprobs.add_product, torch.zeros
    monkeypatch.setattr(logprobs, "add_product", lambda *args: products.append(1) or add_product(*args))
    monkeypatch.setattr(torch, "zeros", lambda *size, **how: made.append(size) or zeros(*size, **how))
    for frozen in (False, True):
        products.clear(), made.clear()
        model = float64_model("qwen2_5")
        model.output.weight.requires_grad_(not frozen)
        row = pack_row(make_pairs(5, 2, vocab=150), 256)
        if form == "fused":
            total, _ = pair_objective(model, row, row_objective(row), 25)
        else:
            total = row_objective(row)(response_logps(model, row, 25))
        total.backward()
        gradients.append(model.layers[0].attn.q_proj.weight.grad)
        assert bool(products) is not frozen
        assert ((model.output.weight.shape,) in made) is not frozen  # the sum over chunks is not even allocated
        assert (model.output.weight.grad is None) is frozen
    assert torch.equal(gradients[0], gradients[1])


def test_policy_and_reference_go_through_the_same_products(monkeypatch):
    """The shapes of the chunks decide how a product rounds: bf16 log-probs are equal bit for bit only if they agree."""
    shapes, target_logps = [], logprobs.target_logps
    watched = lambda logits, *args: shapes.append(logits.shape) or target_logps(logits, *args)  # noqa: E731
    monkeypatch.setattr(logprobs, "target_logps", watched)
    model = float64_model("llama3_2").to(torch.bfloat16)
    row = pack_row(make_pairs(6, 1, vocab=150), 256)
    with torch.no_grad():
        reference = response_logps(model, row, 20)
    in_reference = len(shapes)
    _, policy = pair_objective(model, row, row_objective(row), 20)
    assert shapes[:in_reference] == shapes[in_reference:] and in_reference > 1
    assert torch.equal(policy, reference)


def test_pairs_are_whole_when_the_objective_sees_them():
    """A chunk's gradient is taken when all responses of its pairs are known; later ones still stand at the reference's
    log-probs, which is nobody's concern, for no term looks at two pairs."""
    model = float64_model("llama3_2")
    row = pack_row(make_pairs(4, 1, vocab=150), 256)
    calls = []
    _, logps = pair_objective(model, row, row_objective(row, calls), chunk_tokens=1)
    assert len(calls) == 5  # one for each pair, and one for the value
    for pair, seen in enumerate(calls[:-1]):
        known = 2 * (pair + 1)
        assert torch.equal(seen[:known], logps[:known])
        assert torch.equal(seen[known:], row.reference_logps[known:])


def test_a_row_without_pairs_has_an_objective_of_zero_and_reaches_every_parameter():
    """Ranks run equally many rows, and a sharded model needs a backward from each."""
    model = float64_model("llama3_2")
    row = pack_row([], 32)
    total, logps = pair_objective(model, row, row_objective(row))
    assert total == 0
    assert logps.shape == (0,)
    total.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.tok_embeddings.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [160, 8192, 128_256])
def test_kernels_equal_pytorch(vocab, dtype, softcap):
    from spin.reference import kernels

    torch.manual_seed(0)
    logits = (torch.randn(67, vocab, device="cuda") * 6).to(dtype)
    targets = torch.randint(vocab, (67,), device="cuda")
    logits[torch.arange(20, device="cuda"), targets[:20]] = 40.0  # where the model is sure
    by_token = torch.randn(67, device="cuda")
    exact = logits.double()
    exact_logps, exact_normalizers = logprobs.target_logps(exact, targets, softcap)
    logps, normalizers = kernels.target_logps(logits, targets, softcap)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(normalizers.double(), exact_normalizers, rtol=2e-6, atol=2e-5)
    logprobs.logits_to_gradient(exact, targets, exact_normalizers, by_token.double(), softcap)
    kernels.logits_to_gradient(logits, targets, normalizers, by_token, softcap)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits.double(), exact, rtol=rounding, atol=1e-5)
