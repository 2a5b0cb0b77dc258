"""Metrics of a batch, by hand and against torch; the share of weights moved; the metrics file after a restart."""

import json

import pytest
import torch

from spin.data import Pair, Response, pack_row
from spin.loss import SPINLoss
from spin.metrics import MetricsFile, MovedShare, PairSums, pair_metrics


def three_pairs():
    """Reference sums -10 and -20; generated responses of 2, 3 and 4 tokens, the last truncated."""
    return [
        Pair(f"s{i}", 0, [1, 2], [3, 4], [Response([5] * (i + 2), "length" if i == 2 else "stop", -20.0)], -10.0)
        for i in range(3)
    ]


POLICY = torch.tensor([-9.0, -21.0, -10.0, -20.0, -12.0, -19.0])  # real, generated of each pair


def run(rows, policy, truncated="keep", beta=0.5):
    sums = [PairSums() for _ in rows]
    at = 0
    for pairs, total in zip(rows, sums, strict=True):
        row = pack_row(pairs, 64, truncated)
        logps = policy[at : at + row.num_responses]
        at += row.num_responses
        reference = row.reference_logps.float()
        total.add(
            row,
            logps,
            *SPINLoss(beta=beta)(logps[row.real], logps[row.generated], reference[row.real], reference[row.generated]),
        )
    parts = [total.totals() for total in sums]
    return pair_metrics({name: sum(part[name] for part in parts) for name in parts[0]})


def test_by_hand():
    """beta 0.5; real rewards 0.5, 0, -1; generated rewards -0.5, 0, 0.5; margins 1, 0, -1.5; a tie is wrong."""
    metrics = run([three_pairs()], POLICY)
    real, generated = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([-0.5, 0.0, 0.5])
    assert metrics["acc"] == pytest.approx(1 / 3)
    assert metrics["rewards_actual_mean"] == pytest.approx(real.mean().item())
    assert metrics["rewards_generated_mean"] == pytest.approx(generated.mean().item())
    both = torch.cat((real, generated))
    assert metrics["rewards_all_mean"] == pytest.approx(both.mean().item())
    assert metrics["rewards_all_std"] == pytest.approx(both.std().item())
    assert metrics["margin"] == pytest.approx(-0.5 / 3)
    expected = torch.nn.functional.softplus(-torch.tensor([1.0, 0.0, -1.5])).mean().item()
    assert metrics["loss"] == pytest.approx(expected)
    assert metrics["avg_generated_lengths"] == 3.0
    assert metrics["truncated_share"] == pytest.approx(1 / 3)
    assert metrics["real_logp_drift"] == pytest.approx((1 + 0 - 2) / 3)
    assert metrics["generated_logp_drift"] == pytest.approx(0.0)
    assert metrics["real_nll"] == pytest.approx((9 + 10 + 12) / 2 / 3)


def test_rows_add_up():
    pairs = three_pairs()
    one, three = run([pairs], POLICY), run([[pair] for pair in pairs], POLICY)
    assert one == pytest.approx(three)


def test_masked_pairs_count_in_lengths_only():
    metrics = run([three_pairs()], POLICY, truncated="mask")
    assert metrics["acc"] == pytest.approx(1 / 2)
    assert metrics["margin"] == pytest.approx(0.5)
    assert metrics["avg_generated_lengths"] == 3.0
    assert metrics["truncated_share"] == pytest.approx(1 / 3)


def test_several_responses_share_their_pairs_weight():
    """One pair with margins 1 and 0 and one pair with margin -1: the mean over pairs is (0.5 - 1) / 2."""
    pairs = [
        Pair("a", 0, [1], [2], [Response([3], "stop", 0.0), Response([4], "stop", 0.0)], 0.0),
        Pair("b", 0, [1], [2], [Response([3], "stop", 0.0)], 0.0),
    ]
    metrics = run([pairs], torch.tensor([0.0, -1.0, 0.0, 0.0, 1.0]), beta=1.0)
    assert metrics["margin"] == pytest.approx(-0.25)


def test_no_pair_has_weight():
    assert pair_metrics(PairSums().totals()) == {}


def test_bf16_weights_do_not_move_at_spins_learning_rate():
    """A step of 5e-7 is far below half an ulp of a bf16 weight around 0.02; in fp32 it is not."""
    shares = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.normal_(model.weight, std=0.02)
        model.to(dtype)
        moved = MovedShare(model)
        model(torch.randn(4, 64, dtype=dtype)).sum().backward()
        torch.optim.AdamW(model.parameters(), lr=5e-7).step()
        totals = moved.totals()
        assert totals["sampled_weights"] == 1024
        shares[dtype] = totals["moved_weights"] / totals["sampled_weights"]
    assert shares[torch.bfloat16] < 0.05
    assert shares[torch.float32] > 0.95


def test_metrics_file_forgets_what_will_be_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, from_step=-1)
    for step in range(1, 6):
        file.write(step, {"loss": step / 2})
    with path.open("a") as stream:
        stream.write('{"step": 6, "lo')  # killed while writing
    MetricsFile(path, from_step=3).write(4, {"loss": 9.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 9.0},
    ]
