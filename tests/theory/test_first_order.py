"""At an iteration's start SPIN is supervised fine-tuning with half of beta as its step, and with noise.

With policy = opponent a pair has the gradient ``-(beta / 2) (grad log p(real) - grad log p(generated))``, and
a response that the policy draws at temperature 1 has a score whose mean is zero. Everything here is a sum over all
responses, so nothing is sampled; the model is too small to become the data's source.
"""

import itertools

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

from spin.loss import LOSS_TYPES, SPACELoss, SPINLoss
from spin.model.attention import patch_attention
from spin.pairs.packing import pack_row
from spin.reference.logprobs import response_logps
from spin.training import gradient_metrics
from spin.training.metrics import pair_losses
from spin.types import Pair, Response

TOKENS, LENGTH, PROMPTS = 3, 2, 2
RESPONSES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
SEQUENCES = torch.cat([torch.cat((torch.full((len(RESPONSES), 1), TOKENS + i), RESPONSES), 1) for i in range(PROMPTS)])


def model(width, seed):
    torch.manual_seed(seed)
    made = llama3_2(
        vocab_size=TOKENS + PROMPTS, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=width, intermediate_dim=width,
        max_seq_len=64, tie_word_embeddings=True,
    ).double()  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def log_probs(of, temperature=1.0):
    """Of every response to every prompt: (prompts, responses)."""
    logits = of(SEQUENCES[:, :-1]).double()[..., :TOKENS] / temperature
    chosen = logits.log_softmax(-1).gather(-1, SEQUENCES[:, 1:, None])
    return chosen.sum((1, 2)).view(PROMPTS, -1)


def gradient(of, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(of.parameters()), retain_graph=True)])


def mean_gradients(loss, temperature=1.0):
    """Of self-play with responses drawn at a temperature, and of supervised fine-tuning."""
    student = model(4, seed=1)
    data = log_probs(model(16, seed=2)).detach().exp()
    drawn = log_probs(student, temperature).detach().exp()
    logps = log_probs(student)
    real, generated = (each.reshape(-1) for each in torch.broadcast_tensors(logps[:, :, None], logps[:, None, :]))
    losses, _, _ = loss(real, generated, real.detach(), generated.detach())
    weights = (data[:, :, None] * drawn[:, None, :]).reshape(-1) / PROMPTS
    return gradient(student, weights @ losses), gradient(student, -(data * logps).sum() / PROMPTS)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_mean_gradient_is_that_of_fine_tuning_times_half_of_beta(beta):
    spin, supervised = mean_gradients(SPINLoss(beta=beta))
    torch.testing.assert_close(spin, beta / 2 * supervised, rtol=1e-4, atol=1e-6 * beta)  # norms are fp32


@pytest.mark.parametrize(("beta", "mu"), [(1.0, 1.0), (0.1, 4.0)])
def test_that_of_space_is_that_of_spin_with_another_beta(beta, mu):
    space, supervised = mean_gradients(SPACELoss(beta, mu))
    torch.testing.assert_close(space, mu * beta / (1 + mu) * supervised, rtol=1e-4, atol=1e-6 * beta)


@pytest.mark.parametrize(
    ("loss", "rests"),
    [
        (SPACELoss(mu=1.0), True),
        (SPACELoss(mu=3.0), True),
        (SPINLoss(beta=1.0), True),
        (SPACELoss(beta=0.1), False),
        (SPINLoss(beta=0.1), False),
    ],
)
def test_a_model_that_is_the_data_rests_at_beta_1_whatever_the_opponent_is(loss, rests):
    """There sigma is the probability that a response is real, p / (p + mu q), or that the first of a pair is."""
    student, opponent = model(4, seed=1), log_probs(model(16, seed=2)).detach()
    logps = log_probs(student)
    real, generated = (each.reshape(-1) for each in torch.broadcast_tensors(logps[:, :, None], logps[:, None, :]))
    of_opponent = torch.broadcast_tensors(opponent[:, :, None], opponent[:, None, :])
    losses, _, _ = loss(real, generated, *(each.reshape(-1) for each in of_opponent))
    weights = (logps.detach()[:, :, None] + opponent[:, None, :]).exp().reshape(-1)
    assert (gradient(student, weights @ losses).norm() < 1e-6) == rests


@pytest.mark.parametrize(("temperature", "side"), [(0.5, 1), (2.0, -1)])
def test_responses_drawn_at_another_temperature_add_a_pull_of_their_own(temperature, side):
    """Cool ones take probability from what is probable, which flattens; hot ones take it from the tail."""
    spin, supervised = mean_gradients(SPINLoss(beta=1.0), temperature)
    pull = spin - supervised / 2
    assert pull.norm() > 0.05 * (supervised / 2).norm()
    student = model(4, seed=1)
    logps = log_probs(student)
    entropy = gradient(student, -(logps.exp() * logps).sum())
    assert side * (-pull @ entropy) > 0  # a step goes against the gradient


def test_a_pair_is_noisier_than_a_supervised_response():
    """The noise of the generated response comes on top, independent of the real one's."""
    student = model(4, seed=1)
    logps = log_probs(student)[0]
    scores = torch.stack([gradient(student, logp) for logp in logps])
    data, own = log_probs(model(16, seed=2))[0].detach().exp(), logps.detach().exp()

    def variance(weights):
        return weights @ scores.pow(2).sum(1) - (weights @ scores).pow(2).sum()

    supervised, pair = variance(data), variance(data) + variance(own)
    assert (own @ scores).norm() < 1e-6  # the policy's own score has mean zero
    assert 1.2 < (pair / supervised).sqrt() < 2


@pytest.mark.parametrize(("beta", "pairs"), [(0.1, 2000), (1.0, 2000), (1.0, 30)])
def test_what_a_run_measures_of_its_gradients_is_this_law(beta, pairs):
    """From eight parts of drawn pairs: cosine 1, ratio beta / 2, and the signal of a step's gradient, exactly known.
    The cosine of the two halves' plain means is lower, by their noise."""
    student = model(4, seed=1)
    logps = log_probs(student)
    data, own = (log_probs(of).detach().exp() for of in (model(16, seed=2), student))
    torch.manual_seed(0)

    def part():
        prompt = torch.randint(PROMPTS, (pairs,))
        real, generated = (logps[prompt, torch.multinomial(from_[prompt], 1)[:, 0]] for from_ in (data, own))
        losses, _, _ = SPINLoss(beta=beta)(real, generated, real.detach(), generated.detach())
        return gradient(student, losses.sum()), gradient(student, -real.sum())

    gradients = torch.stack([each for kind in zip(*(part() for _ in range(8)), strict=True) for each in kind])
    found = gradient_metrics(gradients @ gradients.T, torch.full((8,), float(pairs)), batch_size=64)
    assert found["gradient/cosine"] == pytest.approx(1, abs=3 * found["gradient/cosine_error"] + 1e-3)
    assert found["gradient/cosine_error"] < (0.01 if pairs > 100 else 0.15)
    assert found["gradient/ratio"] == pytest.approx(beta / 2, rel=0.05 if pairs > 100 else 0.3)
    one, other = gradients[:4].sum(0), gradients[12:].sum(0)
    assert torch.cosine_similarity(one, other, dim=0) < found["gradient/cosine"]

    scores = torch.stack([gradient(student, logp) for logp in logps.flatten()])
    weights = [each.flatten() / PROMPTS for each in (data, own)]
    mean = weights[0] @ scores
    squares = [(each @ scores.pow(2).sum(1)).item() for each in weights]
    for name, noise in (("sft_signal", squares[0]), ("signal", sum(squares))):  # the own score has mean zero
        exact = mean.pow(2).sum() / (mean.pow(2).sum() + (noise - mean.pow(2).sum()) / 64)
        assert found[f"gradient/{name}"] == pytest.approx(exact.item(), rel=0.05 if pairs > 100 else 0.3)


def of_row(generated, loss, dtype, real=(0, 1, 2)):
    """A row's summed loss, in which three prompts have the same responses, and its gradient; the opponent is another
    model, of a kind: its log-probs of two copies of one response are the same number."""
    student = model(4, seed=1).to(dtype)
    patch_attention(student)
    opponent = {ids: -0.5 * sum(ids) for ids in (real, *generated)}
    responses = [Response(list(ids), "stop", opponent[ids]) for ids in generated]
    pairs = [Pair(f"s{i}", 0, [TOKENS, TOKENS + 1, i], list(real), responses, opponent[real]) for i in range(3)]
    row = pack_row(pairs)
    losses, _, _ = pair_losses(loss, row, response_logps(student, row))
    value = (losses * row.weights).sum()
    return value, gradient(student, value)


@pytest.mark.parametrize("generated", [[(0, 1, 2)], [(0, 1, 2)] * 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_response_that_equals_the_real_one_has_no_gradient_whatever_is_rounded(loss_type, generated):
    """Exactly none: Adam makes full steps of the least. Beside others it leaves theirs, of its own weight."""
    loss = SPINLoss(beta=0.7, loss_type=loss_type, label_smoothing=0.1)
    value, found = of_row(generated, loss, torch.bfloat16)
    assert not found.any() and value.isfinite()
    (_, both), (_, alone) = (of_row([*each, (2, 0)], loss, torch.float64) for each in (generated, []))
    torch.testing.assert_close(both * (len(generated) + 1), alone, rtol=1e-5, atol=1e-8)  # norms are fp32


def test_space_holds_a_response_that_is_real_and_generated_at_once():
    """``beta * (sigma(r) - sigma(-r)) grad log p`` of each copy: as of two responses that are not known to be equal."""
    loss, row_of = SPACELoss(beta=0.7), of_row([(0, 1, 2)], SPACELoss(beta=0.7), torch.float64)
    student = model(4, seed=1)  # each response in a forward of its own
    logps = torch.stack([
        student(torch.tensor([[TOKENS, TOKENS + 1, i, 0, 1, 2]]))[0, 2:-1].double().log_softmax(-1).diagonal().sum()
        for i in range(3)
    ])  # fmt: skip
    losses, _, _ = loss(logps, logps, *torch.full((2, 3), -1.5))
    torch.testing.assert_close(row_of[0], losses.sum(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(row_of[1], gradient(student, losses.sum()), rtol=1e-4, atol=1e-7)
    assert row_of[1].abs().max() > 1e-3
