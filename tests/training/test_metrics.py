"""Metrics of a batch, by hand and against torch; the fraction of weights updated; the metrics file after a restart."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spin.config import SPINConfig
from spin.core.ranks import init_world
from spin.core.redact import remember
from spin.data import Pair, Response, pack_row
from spin.loss import SPINLoss
from spin.model.sharding import shard_model
from spin.pairs.packing import RowLayout
from spin.run.folder import read_json_lines
from spin.run.log import MetricsFile, RunLog
from spin.training.metrics import PairSums, UpdateFraction, pair_metrics
from spin.training.optim import AdamWStochasticRounding
from spin.training.selftest import check_updated_fraction


def three_pairs():
    """Reference sums -10 and -20; generated responses of 2, 3 and 4 tokens, the last truncated."""
    return [
        Pair(f"s{i}", 0, [1, 2], [3, 4], [Response([5] * (i + 2), "length" if i == 2 else "stop", -20.0)], -10.0)
        for i in range(3)
    ]


POLICY = torch.tensor([-9.0, -21.0, -10.0, -20.0, -12.0, -19.0])  # real, generated of each pair


def run(rows, policy, truncated="keep", beta=0.5):
    packed = [pack_row(pairs, 64, RowLayout(truncated=truncated)) for pairs in rows]
    parts = []
    for row, logps in zip(packed, policy.split([row.num_responses for row in packed]), strict=True):
        sums = PairSums()
        sums.add(row, logps, SPINLoss(beta=beta))
        parts.append(sums.totals())
    return pair_metrics({name: float(sum(part[name] for part in parts)) for name in parts[0]})


def test_by_hand():
    """beta 0.5; real rewards 0.5, 0, -1; generated rewards -0.5, 0, 0.5; margins 1, 0, -1.5; a tie does not count."""
    both = torch.tensor([0.5, 0.0, -1.0, -0.5, 0.0, 0.5])
    assert run([three_pairs()], POLICY) == pytest.approx(
        {
            "loss": torch.nn.functional.softplus(-torch.tensor([1.0, 0.0, -1.5])).mean().item(),
            "acc": 1 / 2,
            "rewards_actual_mean": -0.5 / 3,
            "rewards_generated_mean": 0.0,
            "rewards_all_mean": both.mean().item(),
            "rewards_all_std": both.std().item(),
            "margin": -0.5 / 3,
            "avg_generated_lengths": 3.0,
            "truncated_fraction": 1 / 3,
            "real_logp_drift": (1 + 0 - 2) / 3,
            "generated_logp_drift": 0.0,
            "real_nll": (9 + 10 + 12) / 2 / 3,
            "real_nll_rise": 1 / 30,
        }
    )


@pytest.mark.parametrize(("truncated", "nll"), [("keep", (9 + 10 + 12) / 2 / 3), ("mask", (9 + 10) / 2 / 2)])
def test_the_nll_is_that_of_pairs_with_weight(truncated, nll):
    """Real responses of two tokens at -9, -10 and -12 nats: the mean over the pairs with weight, per token."""
    assert run([three_pairs()], POLICY, truncated)["real_nll"] == pytest.approx(nll)


def test_rows_add_up():
    pairs = three_pairs()
    one, three = run([pairs], POLICY), run([[pair] for pair in pairs], POLICY)
    assert one == pytest.approx(three)


def test_masked_pairs_count_in_lengths_only():
    metrics = run([three_pairs()], POLICY, truncated="mask")
    names = ("acc", "margin", "avg_generated_lengths", "truncated_fraction")
    assert [metrics[name] for name in names] == pytest.approx([1.0, 0.5, 3.0, 1 / 3])


def test_several_responses_share_their_pairs_weight():
    """One pair with margins 1 and 0 and one pair with margin -1: the mean over pairs is (0.5 - 1) / 2."""
    pairs = [
        Pair("a", 0, [1], [2], [Response([3], "stop", 0.0), Response([4], "stop", 0.0)], 0.0),
        Pair("b", 0, [1], [2], [Response([3], "stop", 0.0)], 0.0),
    ]
    metrics = run([pairs], torch.tensor([0.0, -1.0, 0.0, 0.0, 1.0]), beta=1.0)
    assert metrics["margin"] == pytest.approx(-0.25)


def test_no_pair_has_weight():
    assert run([three_pairs()[2:]], POLICY[4:], truncated="mask") == {}


def moved_by_one_step(dtype, make) -> float:
    """Of random weights of scale 0.02, by a step at learning rate 5e-7."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False), torch.nn.Linear(256, 16, bias=False)).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moved = UpdateFraction(model)
    model(torch.randn(64, 256, dtype=dtype)).sum().backward()
    with torch.compiler.set_stance("force_eager"):
        make(model.parameters(), lr=5e-7).step()
    return moved.measure()


def test_bf16_weights_hardly_move_at_spins_learning_rate(caplog):
    """A step of 5e-7 moves a bf16 weight w if it is half the spacing or more, which lies between w / 256 and w / 128.

    So of random weights of scale 0.02 it moves those below 1.3e-4 to 2.6e-4, about 1 %. Rounded at random it moves a
    typical weight, whose spacing is 1.2e-4, with probability 0.4 %, and the few small ones more often: some 2 %.
    """
    nearest = moved_by_one_step(torch.bfloat16, torch.optim.AdamW)
    at_random = moved_by_one_step(torch.bfloat16, AdamWStochasticRounding)
    fp32 = moved_by_one_step(torch.float32, torch.optim.AdamW)
    assert 0.005 < nearest < 0.02 < at_random < 0.04
    assert fp32 > 0.95

    warned: set[int] = set()
    to_nearest, randomly = SimpleNamespace(), SimpleNamespace(stochastic_rounding=True)  # optimizers
    check_updated_fraction(fp32, 5e-7, to_nearest, "fp32", 0, warned)
    check_updated_fraction(at_random, 5e-7, randomly, "bf16", 0, warned)
    check_updated_fraction(0.0, 0.0, to_nearest, "bf16", 0, warned)  # the first step of a warm-up
    assert not caplog.records
    for iteration in (0, 0, 1, 1):
        check_updated_fraction(nearest, 5e-7, to_nearest, "bf16", iteration, warned)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "A step of iteration 1 at learning rate 5e-07 changed 1.3% of the weights (dtype=bf16)" in caplog.text
    assert "Set dtype=fp32, or optimizer._component_=spin.training.AdamWStochasticRounding" in caplog.text
    check_updated_fraction(0.05, 5e-7, randomly, "fp32", 2, warned)  # there is nothing to round in fp32
    assert "see grad_norm" in caplog.text


def test_updated_fraction_counts_shards_and_skips_what_is_frozen():
    """2 of 6 trained weights change; a sample of an even number of columns reaches all of them."""
    world = init_world("cpu")
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    shard_model(model, world, compute_dtype=torch.float32)
    moved = UpdateFraction(model)
    with torch.no_grad():
        model.layers[0].bias.add_(1)
        model.frozen.weight.add_(1)
    assert moved.measure() == 2 / 6

    model = torch.nn.Linear(64, 64, bias=False)
    moved = UpdateFraction(model, per_parameter=63)
    with torch.no_grad():
        model.weight[:, :32] += 1
    assert moved.measure() == pytest.approx(0.5, abs=0.02)


def test_metrics_file_forgets_what_will_be_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, from_step=-1)
    for step in range(1, 6):
        file.write(step, {"loss": step / 2})
    with path.open("a") as stream:
        stream.write('{"step": 6, "lo')  # killed while writing
    MetricsFile(path, from_step=3).write(4, {"loss": 9.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": step, "loss": loss} for step, loss in ((1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0))]


def test_metrics_file_keeps_texts_with_line_separators_and_outlives_a_truncated_character(tmp_path):
    """JSON leaves U+2028, U+2029 and U+0085 as they are, and a kill can end a write between a character's bytes."""
    path = tmp_path / "samples.jsonl"
    row = {"real": "one\u2028two\u2029three\x85four"}
    MetricsFile(path, from_step=-1).write(1, row)
    with path.open("ab") as stream:
        stream.write('{"step": 2, "real": "é'.encode()[:-1])  # killed while writing
    MetricsFile(path, from_step=1).write(2, {"real": "é"})
    assert read_json_lines(path) == [{"step": 1, **row}, {"step": 2, "real": "é"}]


def test_a_start_keeps_no_secrets_of_the_command(tmp_path, monkeypatch):
    """One that the config is known to hold, and one within a URL."""
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "r.py", "logger.key=sk-in-config", "dataset.source=s3://me:pw@host/x"]
    )
    remember("sk-in-config")
    RunLog(SPINConfig(output_dir=str(tmp_path), log_every_n_steps=1), -1, init_world("cpu"))
    (start,) = read_json_lines(tmp_path / "starts.jsonl")
    assert start["command"] == "python r.py logger.key=*** dataset.source=s3://***@host/x"


def test_resume_never_keeps_the_log_of_the_run_before(tmp_path, caplog):
    """With resume=auto a run without a checkpoint makes its first lines again; with never it is another run."""
    world, section = init_world("cpu"), {"output_dir": str(tmp_path), "log_every_n_steps": 1}
    RunLog(SPINConfig(**section), -1, world).metrics(1, {"loss": 0.5})
    RunLog(SPINConfig(**section), -1, world).metrics(1, {"loss": 0.25})
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.25}]
    first, second = read_json_lines(tmp_path / "starts.jsonl")
    assert first.keys() == {"step", "time", "command", "hardware"} and first["time"] <= second["time"]
    assert Path(sys.executable).name in first["command"] and "cores" in first["hardware"]
    (tmp_path / "nonfinite.jsonl").write_text('{"step": 1}\n')
    for loss in (0.125, 1.0):
        RunLog(SPINConfig(**section, resume="never"), -1, world).metrics(1, {"loss": loss})
    kept = [tmp_path / f"metrics.jsonl.stale-{n}" for n in (0, 1)] + [tmp_path / "metrics.jsonl"]
    assert [read_json_lines(file)[0]["loss"] for file in kept] == [0.25, 0.125, 1.0]
    assert "resume is never: kept as metrics.jsonl.stale-1" in caplog.text
    assert len(read_json_lines(tmp_path / "starts.jsonl")) == 1
    assert not (tmp_path / "nonfinite.jsonl").exists() and (tmp_path / "nonfinite.jsonl.stale-0").exists()
