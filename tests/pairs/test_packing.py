"""Packed, prefix-shared rows equal separate forwards: log-probs and gradients, in float64, on torchtune models."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.config import SPINConfig, complete, load_config
from spin.data import Pair, Response, pack_batch, pack_row, plan_rows
from spin.model.attention import patch_attention
from spin.model.build import build_model, row_layout
from spin.model.gemma2 import final_softcap, fix_gemma2_softcap, softcap
from spin.pairs import packing
from spin.pairs.packing import RowLayout, fit_lengths, loss_weight
from spin.reference.logprobs import replaced_unembed, response_logps
from tests.families import FAMILIES

MASK = RowLayout(truncated="mask")


def make_pairs(num, responses, seed=0, vocab=64, longest=12):
    rng = random.Random(seed)

    def ids(least=1):
        return [rng.randrange(1, vocab) for _ in range(rng.randint(least, longest))]

    return [
        Pair(
            sample_id=f"s{i}",
            iteration=0,
            prompt_ids=ids(),
            real_ids=ids(),
            generated=[Response(ids(), "stop" if rng.random() < 0.5 else "length", -1.5 * k) for k in range(responses)],
            reference_real_logp=-2.5,
        )
        for i in range(num)
    ]


def separate_logps(model, pairs):
    """Every response in a forward of its own: [prompt | response], plain causal mask, full logits."""
    logps = []
    for pair in pairs:
        for ids in (pair.real_ids, *(response.token_ids for response in pair.generated)):
            tokens = torch.tensor([[*pair.prompt_ids, *ids]])
            with replaced_unembed(model, lambda hidden: model.output(model.norm(hidden))):
                logits = model(tokens)
            logits = softcap(logits, final_softcap(model))[0, len(pair.prompt_ids) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    return torch.stack(logps)


def gradients(model, logps):
    coefficients = torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype)
    return torch.autograd.grad((logps * coefficients).sum(), list(model.parameters()))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("responses", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_equals_separate(family, responses):
    model = FAMILIES[family]().double()
    patch_attention(model)
    fix_gemma2_softcap(model)
    pairs = make_pairs(3, responses, vocab=model.tok_embeddings.num_embeddings)
    length = sum(pair.num_tokens for pair in pairs) + 5
    packed = response_logps(model, pack_row(pairs, length), chunk_tokens=7)
    separate = separate_logps(model, pairs)
    assert packed.dtype == torch.float64
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)
    for name, ours, theirs in zip(
        dict(model.named_parameters()), gradients(model, packed), gradients(model, separate), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_leaks_between_responses_or_pairs():
    """Change every token of one response: its own log-prob moves, no other does, bit for bit."""
    model = FAMILIES["llama3_2"]().double()
    patch_attention(model)
    pairs = make_pairs(3, 2)
    before = response_logps(model, pack_row(pairs, 128))
    for i, pair in enumerate(pairs):
        for k in range(3):
            ids = [token % 63 + 1 for token in pair.parts[1 + k]]
            generated = [Response(ids, "stop") if k == j else each for j, each in enumerate(pair.generated, start=1)]
            other = dataclasses.replace(pair, real_ids=ids if k == 0 else pair.real_ids, generated=generated)
            after = response_logps(model, pack_row([*pairs[:i], other, *pairs[i + 1 :]], 128))
            assert (after != before).nonzero().flatten().tolist() == [3 * i + k]


def test_layout_by_hand():
    """Prompt 11 12, real 21, generated 31 32, in a row of 7: positions restart at 2 for each response."""
    pair = Pair("a", 3, [11, 12], [21], [Response([31, 32], "length", -4.0)], -3.0)
    row = pack_row([pair], 7)
    for name, expected in {
        "tokens": [11, 12, 21, 31, 32, 0, 0],
        "positions": [0, 1, 2, 2, 3, 0, 0],
        "predictors": [1, 1, 3],
        "targets": [21, 31, 32],
        "segments": [0, 1, 1],
        "response_lengths": [1, 2],
        "reference_logps": [-3.0, -4.0],
        "real": [0],
        "generated": [1],
        "truncated": [True],
        "weights": [1.0],
    }.items():
        assert getattr(row, name).tolist() == expected, name
    assert (row.used_tokens, row.pair_responses, row.bounds) == (5, [((3, "a"), 0, 2)], [0, 1, 3])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert row.dense_mask().int().tolist() == expected


def test_masked_truncated_responses_weigh_nothing():
    pair = Pair("a", 0, [1], [2], [Response([3], "length"), Response([4], "stop")])
    assert pack_row([pair]).weights.tolist() == [0.5, 0.5]
    assert pack_row([pair], layout=MASK).weights.tolist() == [0.0, 0.5]
    assert loss_weight([pair, pair], RowLayout()) == 2.0
    assert loss_weight([pair, pair], MASK) == 1.0


def test_an_empty_row_is_padding_that_still_has_a_gradient():
    model = FAMILIES["llama3_2"]()
    patch_attention(model)
    row = pack_row([], 8)
    logps = response_logps(model, row)
    assert logps.numel() == 0
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([Pair("x", 0, [], [1])], "sample x: the prompt has no tokens"),
        ([Pair("x", 0, [1], [])], "sample x: a response has no tokens"),
        (make_pairs(4, 1), "do not fit"),
    ],
)
def test_empty_segments_and_pairs_that_do_not_fit_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        pack_row(pairs, 8)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), max_size=60),
    row_tokens=st.integers(64, 2048),
    num_ranks=st.integers(1, 5),
)
def test_plan_places_every_pair_once(lengths, row_tokens, num_ranks):
    plan = plan_rows(lengths, RowLayout(row_tokens), num_ranks)
    assert len(plan) == num_ranks
    assert len({len(rows) for rows in plan}) == 1
    rows = [row for rank in plan for row in rank]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_tokens or len(row) == 1 for row in rows)
    assert plan == plan_rows(lengths, RowLayout(row_tokens), num_ranks)


def test_pairs_longer_than_a_row_leave_no_row_empty():
    """16 pairs of 1.25 rows take a row each, though they have the tokens of 20; so does a pair of ten rows."""
    assert plan_rows([1250] * 16, RowLayout(1000)) == [[[i] for i in range(16)]]
    assert plan_rows([10_000, 100, 100, 100], RowLayout(1000)) == [[[0], [1, 2, 3]]]
    assert [len(rank) for rank in plan_rows([1250] * 16, RowLayout(1000), num_ranks=3)] == [6, 6, 6]


def test_a_plan_of_many_pairs_that_share_no_row_is_found_at_once(monkeypatch):
    """Of 400 pairs of 0.6 rows no two fit into one: the number of rows is known, not found by trying 240 to 400."""
    tried = []
    spread = packing.spread
    monkeypatch.setattr(packing, "spread", lambda lengths, rows: tried.append(rows) or spread(lengths, rows))
    assert len(plan_rows([600] * 400, RowLayout(1000))[0]) == 400
    assert tried == [400, 401, 402]


def test_ranks_share_a_batch():
    pairs = make_pairs(9, 1)
    whole = pack_batch(pairs, RowLayout(64, 16))
    halves = [pack_batch(pairs, RowLayout(64, 16), rank, 2) for rank in range(2)]
    keys = lambda rows: sorted(key for row in rows for key, _, _ in row.pair_responses)  # noqa: E731
    assert keys(whole) == keys([*halves[0], *halves[1]]) == sorted(pair.key for pair in pairs)
    assert len(halves[0]) == len(halves[1])
    assert all(row.tokens.numel() % 16 == 0 for row in whole)


@pytest.mark.parametrize(("row_tokens", "row_multiple"), [(8192, 128), (12288, 128), (512, 32), (1000, 16), (100, 128)])
def test_rows_have_few_lengths_each_of_which_holds_its_tokens(row_tokens, row_multiple):
    layout = RowLayout(row_tokens, row_multiple)
    lengths = layout.lengths()
    assert len(lengths) <= 8
    assert lengths[-1] >= row_tokens
    padded = [layout.padded_length(used) for used in range(1, 3 * row_tokens)]
    assert all(length >= used and length % row_multiple == 0 for used, length in enumerate(padded, start=1))
    assert set(padded[:row_tokens]) == set(lengths)
    assert padded == sorted(padded)  # the recipe takes the length of the longest pair for the longest row
    longest = max(length - used for used, length in enumerate(padded[row_tokens:], start=row_tokens + 1))
    assert longest < row_tokens / 4 + row_multiple  # a pair longer than a row


@pytest.mark.parametrize("row_tokens", [8192, 12288])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("means", [(199, 278, 278), (498, 288, 287), (131, 288, 209)])
def test_rows_of_64_realistic_pairs_are_full_and_even(means, num_ranks, row_tokens):
    """Log-normal lengths (sigma 0.6) of 64 pairs, 20 batches: fill, number of shapes, balance of rows and ranks."""
    rng, layout = np.random.default_rng(0), RowLayout(row_tokens, 128)
    fills, shapes, by_row, by_rank = [], set(), [], []
    for _ in range(20):
        drawn = [np.exp(rng.normal(np.log(mean) - 0.18, 0.6, 64)).clip(8, 2048).astype(int) for mean in means]
        lengths = sum(drawn)
        plan = plan_rows(lengths.tolist(), layout, num_ranks)
        used = np.array([[lengths[row].sum() for row in rank] for rank in plan])  # as many rows on each rank
        padded = [layout.padded_length(tokens) for tokens in used.flat]
        fills.append(used.sum() / sum(padded))
        shapes.update(padded)
        by_row.append(used.min() / used.max())
        by_rank.append(used.sum(1).max() / used.sum(1).mean())
    assert np.mean(fills) >= 0.93 and np.mean(by_row) > 0.9 and np.mean(by_rank) < 1.03
    assert len(shapes) <= 8


def realistic(rng, pairs=64, scale=1.0):
    """Tokens of a batch's pairs: log-normal prompts, real and generated responses of 199, 278 and 278 on average."""
    drawn = [np.exp(rng.normal(np.log(mean * scale) - 0.18, 0.6, pairs)).clip(8, 2048) for mean in (199, 278, 278)]
    return sum(each.astype(int) for each in drawn).tolist()


def padding(batches, layout, num_ranks):
    """Positions that all ranks' rows take, the longest n-th row of all for each, by the tokens in them; and lengths."""
    total, found = 0, set()
    for lengths in batches:
        plan = plan_rows(lengths, layout, num_ranks)
        rows = [[layout.padded_length(max(1, sum(lengths[i] for i in row))) for row in rank] for rank in plan]
        found.update(length for rank in rows for length in rank)
        total += num_ranks * sum(map(max, zip(*rows, strict=True)))
    return total / sum(map(sum, batches)), found


def test_fitted_lengths_are_those_that_pad_least():
    """Rows of one pair each: 6 x 300, 3 x 500 and 1 x 900 tokens, in units of 1024 / 32 = 32: 10, 16 and 29 of them.
    Three lengths hold them in 320, 512 and 928 tokens. 700 more of 100 (4 units, 128) take the place of the 512s: with
    128, 320 and 928 these pad 3 x 416, without 320 the 300s would pad 6 x 192 instead, which is less."""
    batches = [[length] for length in [300] * 6 + [500] * 3 + [900]]
    assert fit_lengths(batches, RowLayout(1024)).fitted == (320, 512, 928)
    fitted = fit_lengths([*batches, *[[100]] * 700], RowLayout(1024))
    assert fitted.fitted == (128, 512, 928)
    assert fitted.lengths() == [128, 512, 928, 1024]  # what comes later may be longer
    assert fit_lengths([[5000]], RowLayout(1024)) == RowLayout(1024)  # longer than any row


@pytest.mark.parametrize(("row_tokens", "num_ranks"), [(8192, 1), (12288, 1), (12288, 2), (24576, 1), (8192, 8)])
def test_three_fitted_lengths_pad_about_as_little_as_eight(row_tokens, num_ranks):
    """Also in batches that they were not fitted to: another epoch's."""
    rng, plain = np.random.default_rng(0), RowLayout(row_tokens, 128)
    first, second = ([realistic(rng) for _ in range(32)] for _ in range(2))
    fitted = fit_lengths(first, plain, num_ranks)
    for batches in (first, second):
        excess, found = padding(batches, fitted, num_ranks)
        assert excess < padding(batches, plain, num_ranks)[0] + 0.025
        assert len(found - {row_tokens}) <= 3
    assert len(padding(first, fitted, num_ranks)[1]) <= 3
    assert fit_lengths(second, fitted, num_ranks) == fitted  # nothing to gain: nothing is compiled


def test_lengths_stay_until_new_ones_save_what_compiling_them_takes():
    """Pairs of 600 tokens, a row each, are padded to 928 where 608 would do: 320 less for each. 250 times that is
    80,000, 251 times more."""
    fitted = RowLayout(1024, compiling_tokens=80_000, fitted=(320, 512, 928))
    assert fit_lengths([[600]] * 250, fitted) == fitted
    again = fit_lengths([[600]] * 251, fitted)
    assert again.fitted == (608,)
    assert fit_lengths([[600]] * 251, again) == again  # what a restart finds
    many = [[900]] * 20_000  # 3 % of their tokens is more
    assert fit_lengths([*many, *[[600]] * 251], fitted) == fitted


def test_a_length_is_compiled_where_it_saves_what_that_takes():
    """Pairs of 500 tokens, a row each, are padded to 928 where 512 would do: 416 less for each. 192 times that is less
    than 80,000, 193 times more."""
    for count, lengths in ((192, (928,)), (193, (512, 928))):
        batches = [[900], *[[500]] * count]
        assert fit_lengths(batches, RowLayout(1024, compiling_tokens=80_000)).fitted == lengths
        assert fit_lengths(batches, RowLayout(1024)).fitted == (512, 928)


@pytest.mark.parametrize(("compiling_tokens", "batches", "num_lengths"), [
    (131_000, 8, 1), (131_000, 64, 2), (131_000, 400, 3), (20_000, 24, 2), (20_000, 64, 3),
])  # fmt: skip
def test_short_runs_compile_few_lengths(compiling_tokens, batches, num_lengths):
    """Of a 1B and an 8B: what all others would save is less than they cost."""
    rng, plain = np.random.default_rng(0), RowLayout(12288, 128)
    pairs = [realistic(rng) for _ in range(batches)]
    fitted, best = (
        fit_lengths(pairs, dataclasses.replace(plain, compiling_tokens=cost)) for cost in (compiling_tokens, 0)
    )
    assert len(fitted.fitted) == num_lengths and len(best.fitted) == 3
    excess, found = padding(pairs, fitted, 1)
    assert found == {*fitted.fitted}
    saved = (excess - padding(pairs, best, 1)[0]) * sum(map(sum, pairs))
    # plan_rows takes a row more where that pads less, which fit_lengths does not see
    assert saved <= compiling_tokens * (3 - num_lengths) + 0.002 * sum(map(sum, pairs))


def test_what_a_length_must_save_follows_from_the_model(tiny_lm):
    """A third of 8.6 s at 471 TFLOP/s are 1.35e15 operations, 8 for each weight and token of one epoch, 14 of two."""

    def tokens(*changes, flex=True):
        overrides = [f"model.path={tiny_lm}", "dataset.source=x", "device=cpu", *changes]
        cfg = complete(load_config("full", overrides), SPINConfig)
        return row_layout(build_model(cfg.model, torch.float32), cfg, flex).compiling_tokens

    one, two = tokens("max_epochs=1", "compile=true"), tokens("max_epochs=2", "compile=true")
    assert one == pytest.approx(1.35e15 / (8 * 918_656), rel=1e-3)
    assert two == pytest.approx(one * 8 / 14)
    assert tokens("compile=false") == tokens("compile=true", flex=False) == 0  # nothing is compiled for a length


def test_fitted_rows_of_small_parts_of_a_batch_are_full():
    """Eight ranks share 64 short pairs: a rank's part is a fifth of a row, of which the shortest length was a half."""
    rng, plain = np.random.default_rng(0), RowLayout(12288, 128)
    batches = [realistic(rng, scale=0.45) for _ in range(32)]
    assert padding(batches, plain, 8)[0] > 2
    assert padding(batches, fit_lengths(batches, plain, 8), 8)[0] < 1.15
