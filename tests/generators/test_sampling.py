"""Filters equal transformers' processors, and samples follow the exact probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spin.generators.generator import SamplingParams
from spin.generators.sampling import (
    ban_early_stops,
    invert_cdf,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample_seed,
    sample_tokens,
    token_logprobs,
    uniforms,
)


def _logits(n: int = 6, v: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


def _numbers(n: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, 0, n))


def _chi_square(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Within 5 standard deviations of its mean: chi-square with d degrees of freedom has mean d and variance 2 d."""
    expected = counts.sum() * probs
    kept = expected > 5
    assert counts[probs == 0].sum() == 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


# --- random numbers ---


def test_sample_seeds_are_fixed_for_all_time_and_differ_in_every_field():
    """The value came from this code: another one means that no earlier run can be continued."""
    assert sample_seed(1, 0, "a", 2) == 4530845031867463401
    assert 0 <= sample_seed(2**40, 99, "é" * 100, 7) < 2**63
    fields = [(1, 0, "a", 0), (2, 0, "a", 0), (1, 1, "a", 0), (1, 0, "b", 0), (1, 0, "a", 1), (10, 0, "a", 0)]
    assert len({sample_seed(*each) for each in [*fields, (1, 0, "0\x1fa", 0)]}) == 7


def test_uniforms_by_parts_are_the_whole():
    whole = uniforms(123, 0, 100)
    for start, n in ((0, 1), (1, 1), (3, 6), (4, 4), (50, 50), (99, 1)):
        assert np.array_equal(uniforms(123, start, n), whole[start : start + n])
    assert uniforms(123, 7, 0).shape == (0,)


def test_uniforms_are_uniform_and_independent():
    numbers = np.concatenate([uniforms(seed, 0, 50) for seed in range(2000)])
    assert numbers.min() >= 0 and numbers.max() < 1 and numbers.dtype == np.float64
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    _chi_square(torch.tensor(counts, dtype=torch.float64), torch.full((100,), 0.01, dtype=torch.float64))
    table = numbers.reshape(2000, 50)
    assert abs(np.corrcoef(table[:-1, 0], table[1:, 0])[0, 1]) < 5 / 2000**0.5  # neighbouring seeds
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 5 / 2000**0.5  # neighbouring tokens


# --- filters ---


TIES = torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    ("ours", "theirs", "values", "logits"),
    [
        (keep_top_k, TopKLogitsWarper, [1, 5, 49, 50, 99], _logits()),
        (keep_top_k, TopKLogitsWarper, [3], TIES),
        (keep_top_p, TopPLogitsWarper, [1e-6, 0.2, 0.5, 0.9, 0.999], _logits(n=200)),
    ],
    ids=["top_k", "ties", "top_p"],
)
def test_filters_equal_transformers(ours, theirs, values, logits):
    for value in values:
        assert torch.equal(ours(logits, value), theirs(value)(None, logits.clone()))
    assert torch.equal(keep_top_k(TIES, 3), torch.tensor([[-torch.inf, 3.0, 3.0, 2.0, 2.0]]))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    logits = _logits()
    ids = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_ban_early_stops_equals_transformers():
    """Rows 0 to 5 have 0 to 5 tokens; transformers sees one length at a time."""
    logits = _logits()
    got = ban_early_stops(logits, torch.arange(6), 3, (4, 9))
    for row in range(6):
        processor = MinNewTokensLengthLogitsProcessor(2, 3, [4, 9])
        expected = processor(torch.zeros(1, 2 + row, dtype=torch.long), logits[row : row + 1].clone())
        assert torch.equal(got[row : row + 1], expected)


def test_top_p_by_hand():
    """Probabilities 0.5, 0.3, 0.2: 0.5 alone reaches p = 0.5; p = 0.51 needs two tokens; 0.81 needs three."""
    logits = torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64).log()
    kept = [(keep_top_p(logits, p) > -torch.inf)[0].tolist() for p in (0.5 - 1e-9, 0.51, 0.81)]
    assert kept == [[False, True, False], [True, True, False], [True, True, True]]


def test_order_of_filters_is_that_of_transformers():
    """Penalty, early stops, temperature, top_k, top_p, all at once; then the same uniform numbers choose the same
    tokens."""
    logits = _logits(n=300, v=40)
    ids = torch.randint(0, 40, (300, 8), generator=torch.Generator().manual_seed(5))
    sampling = SamplingParams(
        temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.4, min_new_tokens=4, stop_token_ids=(3, 17)
    )
    scores = RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone())
    scores = MinNewTokensLengthLogitsProcessor(6, 4, [3, 17])(ids, scores)  # 2 new tokens
    scores = TemperatureLogitsWarper(0.7)(ids, scores)
    scores = TopPLogitsWarper(0.8)(ids, TopKLogitsWarper(12)(ids, scores))
    seen = torch.zeros(300, 40, dtype=torch.bool).scatter(1, ids, True)
    got = sample_tokens(logits, sampling, _numbers(300), seen=seen, new_tokens=torch.full((300,), 2))
    assert torch.equal(got, invert_cdf(scores, _numbers(300)))
    assert not set(got.tolist()) & {3, 17}


# --- choosing ---


def test_greedy_takes_the_largest_and_needs_no_number():
    logits = _logits()
    got = sample_tokens(logits, SamplingParams(temperature=0), torch.full((6,), float("nan"), dtype=torch.float64))
    assert torch.equal(got, logits.argmax(-1))


def test_inverse_cdf_by_hand():
    """Probabilities 1/4, 0, 1/2, 1/4 have the cumulative sums 0.25, 0.25, 0.75, 1."""
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(logits.expand(6, 4), numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_largest_number_never_falls_off_the_end():
    """The last tokens have probability 0, and u * total rounds up to total."""
    logits = _logits(n=500, v=33)
    logits[:, 20:] = -torch.inf
    tokens = invert_cdf(logits, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    assert tokens.max() <= 19
    only_one = torch.tensor([[-torch.inf, 2.0, -torch.inf]])
    assert invert_cdf(only_one, torch.zeros(1, dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 15, "top_p": 0.9}]
)
def test_samples_follow_the_exact_probabilities(changes):
    n, sampling = 20_000, SamplingParams(**changes)
    logits = _logits(n=1, v=30) / 2
    tokens = sample_tokens(logits.expand(n, -1), sampling, _numbers(n, seed=9))
    exact = logits.double()[0] / sampling.temperature
    if sampling.top_k:
        exact[exact < exact.sort(descending=True).values[sampling.top_k - 1]] = -torch.inf
    probs, total = exact.softmax(0), 0.0
    for token in probs.argsort(descending=True):
        if total >= sampling.top_p:
            exact[token] = -torch.inf
        total += float(probs[token])
    _chi_square(torch.bincount(tokens, minlength=30).double(), exact.softmax(0))


def test_rows_do_not_touch_each_other():
    logits, numbers = _logits(n=9), _numbers(9)
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.95)
    together = sample_tokens(logits, sampling, numbers)
    alone = [sample_tokens(logits[i : i + 1], sampling, numbers[i : i + 1])[0] for i in range(9)]
    assert torch.equal(together, torch.stack(alone))


def test_blocks_of_the_vocabulary_give_the_plain_inverse_cdf():
    """700 tokens are 3 blocks, the last one partly filled; whole blocks have probability 0."""
    logits = _logits(n=2000, v=700)
    logits[:1000, 100:600] = -torch.inf
    numbers = _numbers(2000)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    plain = (cumulative > numbers[:, None]).int().argmax(-1)
    assert torch.equal(invert_cdf(logits, numbers), plain)


def test_bfloat16_logits_are_summed_in_float64():
    """100,000 equal tokens: a sum in bfloat16 would stop growing at 256, in float32 lose the even steps."""
    tokens = invert_cdf(torch.zeros(3, 100_000), torch.tensor([0.1, 0.5, 0.99999], dtype=torch.float64))
    assert tokens.tolist() == [10_000, 50_000, 99_999]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 7, "top_p": 0.9}])
def test_banned_tokens_are_as_if_the_vocabulary_had_none_of_them(changes):
    """The likeliest token, one inside and the last five: the other 43 have the tokens that they would have alone."""
    sampling = SamplingParams(**changes)
    logits = _logits(n=400, v=50)
    logits[:, 12] += 9
    banned = (12, 30, 45, 46, 47, 48, 49)
    others = torch.tensor([i for i in range(50) if i not in banned])
    before, numbers = logits.clone(), _numbers(400)
    got = sample_tokens(logits, replace(sampling, banned_token_ids=banned), numbers)
    assert torch.equal(got, others[sample_tokens(logits[:, others], sampling, numbers)])
    assert torch.equal(logits, before)  # log-probs are of these


def test_token_logprobs_are_those_of_the_unaltered_distribution():
    logits, tokens = _logits(), torch.arange(6)
    expected = logits.double().log_softmax(-1)[torch.arange(6), tokens].float()
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)


def test_missing_context_is_an_error():
    for name, needs in (("seen", {"repetition_penalty": 1.1}), ("new_tokens", {"min_new_tokens": 1})):
        with pytest.raises(ValueError, match=name):
            sample_tokens(_logits(), SamplingParams(stop_token_ids=(1,), **needs), _numbers(6))


def test_logits_that_are_not_numbers_give_tokens_that_exist():
    """A broken policy is found out by the reference pass, not by an index error in the middle of a response."""
    for vocab_size in (7, 300):
        logits = torch.full((3, vocab_size), torch.nan)
        logits[1, :3] = 1.0
        logits[2] = torch.inf
        tokens = sample_tokens(logits, SamplingParams(), torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64))
        assert ((tokens >= 0) & (tokens < vocab_size)).all()
