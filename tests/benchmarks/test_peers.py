"""Arms of the comparison with peers: those that run here agree with fp32; a wrong or failing one is reported."""

import importlib.util
import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import peer_arms
import peer_lora
import peer_passes
import peer_trl
import peers
import pytest
import rounds
import torch
import work

from spin.core.ranks import shutdown

DEFAULT_ARMS = [name for name in peers.PEERS if name not in peers.NOT_BY_DEFAULT]
TINY = ["--model", "tiny", "--device", "cpu", "--rounds", "1"]
needs_trl = pytest.mark.skipif(peer_trl.TRL.skip_reason(on_gpu=False) is not None, reason="no TRL")


@pytest.fixture
def bench():
    """The tiny model, one rank."""
    yield peers.PeerBench(peers.engine_arguments(peers.parse_args(["step", *TINY])))
    shutdown()


@pytest.fixture
def measured(tmp_path, capsys, monkeypatch):
    """Runs the command, gives what it writes."""

    def run(*arguments):
        out = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, *TINY, "--out", str(out)])
        peers.main()
        results = json.loads(out.read_text(encoding="utf-8"))
        assert capsys.readouterr().out.endswith(f"{json.dumps(results, indent=1)}\n")
        return results

    yield run
    shutdown()


def skipped_here(kinds, names):
    return {name: reason for name in names if (reason := kinds[name].skip_reason(on_gpu=False))}


def check_agreement(results, arms, ran):
    """Every arm that ran has the loss and the gradient of fp32, and was timed."""
    assert results["check"].keys() == arms.keys() == ran
    for name, deviations in results["check"].items():
        assert 0.1 < deviations["loss"] < 2, name
        assert all(value < 1e-5 for key, value in deviations.items() if key != "loss"), (name, deviations)
    assert all(run["step"]["pairs_per_second"] > 0 for run in arms.values())


@pytest.mark.slow
def test_every_arm_that_runs_here_agrees_with_fp32(measured):
    results = measured("step", "--mixes", "third")
    assert results["skipped"] == skipped_here(peers.PEERS, DEFAULT_ARMS)
    ran = set(DEFAULT_ARMS) - results["skipped"].keys()
    assert {"ours", "ours_unshared", "hf_packed", "torchtune", "authors"} <= ran
    check_agreement(results, results["step"]["third"]["arms"], ran)
    assert all("gradient_deviation" in deviations for deviations in results["check"].values())
    for run in results["step"]["third"]["arms"].values():
        assert run["step"]["median"] > run["forward_backward"]["median"] > 0
        assert run["step"]["pairs_per_second"] == pytest.approx(8 / run["step"]["values"][0])
    assert results["setup"]["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_adapters_agree_with_fp32(measured, monkeypatch):
    if importlib.util.find_spec("peft") is not None:
        # the arm tells peft so itself; here the test's end takes it back
        monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    results = measured("lora8b")
    ran = set(peer_lora.LORA_PEERS) - skipped_here(peer_lora.LORA_PEERS, peer_lora.LORA_PEERS).keys()
    assert {"ours", "torchtune"} <= ran
    check_agreement(results, results["lora"]["short"]["arms"], ran)


class Wrong(peer_arms.OursUnshared):
    """An arm with one of the mistakes that such arms make."""

    mistake = ""

    def forward_backward(self, pieces, num_pairs):
        if self.mistake == "too large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return super().forward_backward([self.spoilt(piece) for piece in pieces], num_pairs)

    def spoilt(self, row):
        last = row.targets.numel() - 1
        return {
            "swapped": lambda: replace(row, reference_logps=row.reference_logps.flip(0)),
            "shifted": lambda: replace(row, predictors=(row.predictors + 1).clamp_max(row.tokens.numel() - 1)),
            "one token": lambda: replace(row, targets=row.targets.index_fill(0, torch.tensor([last]), 7)),
            "none": lambda: row,
        }[self.mistake]()


@pytest.mark.parametrize("mistake", ["swapped", "shifted", "one token", "too large", "none"])
def test_a_wrong_arm_is_found_and_not_timed_and_the_others_run(bench, mistake):
    """Wrong reference log-probs, labels off by one, one wrong token among hundreds, no memory; none is what says so
    alone."""
    wrong, right = Wrong(bench), peer_arms.Ours(bench)
    wrong.mistake, failed, kept = mistake, {}, []
    peers.check(bench, {"ours_unshared": wrong, "ours": right}, failed)
    whole = peers.step(bench, {"ours_unshared": wrong, "ours": right}, failed, "short", on_round=kept.append)
    found, error = whole["arms"]["ours_unshared"], "computes something else than fp32 does"
    assert kept == [whole] and ("error" in found) == (mistake != "none")
    if mistake == "too large":
        error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
        assert found == {"error": error, "title": Wrong.title}
    assert mistake == "none" or error in found["error"]
    assert whole["arms"]["ours"]["step"]["pairs_per_second"] > 0


def test_a_gradient_of_another_size_is_found(bench):
    """The loss is right, its gradient is not: a piece that counts twice."""

    class Twice(peer_arms.Authors):
        def piece_loss(self, piece):
            loss = super().piece_loss(piece)
            return 2 * loss - loss.detach()

    failed = {}
    found = peers.check(bench, {"authors": Twice(bench)}, failed)["authors"]
    assert found["loss_deviation"] < 1e-5 and found["grad_norm_deviation"] == pytest.approx(1, rel=1e-4)
    assert "computes something else" in failed["authors"]


def test_arms_take_turns():
    seen = []

    def turn(name):
        def run(first):
            seen.append((name, first))
            if name == "c" and len(seen) > 5:
                raise ValueError("late")
            return {"seconds": float(len(seen))}

        return run

    failed, kept = {}, []
    results = rounds.race({name: turn(name) for name in "abc"}, 2, failed, on_round=kept.append)
    assert kept[0]["a"]["seconds"]["values"] == [4.0] and kept[1] == results  # a round is kept when it is over
    assert [name for name, _ in seen] == list("abcabcab")
    assert [first for _, first in seen] == [True] * 3 + [False] * 5
    assert results["a"]["seconds"] == {"values": [4.0, 7.0], "median": 5.5, "min": 4.0, "max": 7.0}
    assert results["c"] == {"error": "ValueError: late"}
    assert rounds.race({"a": lambda first: {"seconds": 1.0}}, 0, {}) == {}  # compiled, and nothing measured
    # none begins after the time is over, but one that counts there must be
    results = rounds.race({"a": lambda first: {"seconds": 1.0}}, 5, {}, until=0.0)
    assert results["a"]["seconds"]["values"] == [1.0]


def test_size_of_a_batch_is_the_fastest_that_fits(bench, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda function: function())

    class Sized(peer_arms.Authors):
        micro_batches, as_it_is = (1, 2, 3, 4, 8), False
        tried: list[int] = []

        def forward_backward(self, pieces, num_pairs):
            self.tried.append(self.micro_batch)
            if self.micro_batch == 8:
                raise torch.OutOfMemoryError
            return {1: 3.0, 2: 1.0, 4: 2.0}[self.micro_batch]

    peer = Sized(bench)
    pieces = peers.best_size(bench, peer, bench.mixed_pairs("short", 8))
    assert peer.tried == [1, 1, 2, 2, 4, 4, 8]  # 3 does not divide the pairs
    assert peer.micro_batch == 2 and len(pieces) == 4


def test_rows_without_padding_are_as_long_as_is_fastest(bench, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda function: function())
    longest, pairs = bench.layout.long_row_tokens, bench.mixed_pairs("long", 16)

    class Timed(peer_arms.PackedTwin):
        tried: list[tuple[int, list[int]]] = []

        def forward_backward(self, pieces, num_pairs):
            self.tried.append((self.row_tokens, [piece.tokens.numel() for piece in pieces]))
            return float(abs(self.row_tokens - self.fastest))

    for fastest in (longest // 2, longest):
        peer = Timed(bench)
        peer.fastest, peer.tried = fastest, []
        pieces = peers.best_size(bench, peer, pairs)
        assert {tokens for tokens, _ in peer.tried} == {longest // 2, longest} and peer.row_tokens == fastest
        shapes, rows = peer.tried[2 * (fastest == longest)][1], [piece.tokens.numel() for piece in pieces]
        assert sorted(shapes) == sorted(set(rows)) and max(rows) <= fastest  # compiled first, one of each


def test_rows_without_padding_have_every_token_of_both_sequences(bench):
    """Each response behind a prompt of its own, positions from zero; that is what transformers tells sequences by."""
    pairs = bench.mixed_pairs("short", 4)
    rows = peer_arms.unshared_rows(pairs, bench.layout)
    tokens = torch.cat([row.tokens[: row.used_tokens] for row in rows])
    starts = torch.cat([row.positions[: row.used_tokens] for row in rows]) == 0
    found = {tuple(part.tolist()) for part in tokens.tensor_split(starts.nonzero().flatten()[1:])}
    assert found == sequences_of(pairs)


def sequences_of(pairs):
    """Token ids of every prompt with each of its two responses."""
    responses = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.real_ids, pair.generated[0].token_ids)]
    return {(*prompt.tolist(), *ids.tolist()) for prompt, ids in responses}


@needs_trl
def test_trl_gets_our_token_ids_whole(bench):
    """Longer than its default ``max_length`` of 1,024 too; grouped by length, longest first."""
    pairs = bench.mixed_pairs("short", 8)
    long = replace(pairs[0], prompt_ids=torch.arange(1, 512).repeat(3).numpy())
    pairs = [long, *pairs[1:]]
    peer = peer_trl.TRLTuned(bench)
    peer.micro_batch = 4
    pieces = peer.lay_out(pairs)
    rows = [row for piece in pieces for row in zip(piece["input_ids"], piece["attention_mask"], strict=True)]
    assert {tuple(ids[mask.bool()].tolist()) for ids, mask in rows} == sequences_of(pairs)
    widths = [piece["input_ids"].shape[1] for piece in pieces]
    assert widths == sorted(widths, reverse=True) and widths[0] > 1024


@needs_trl
def test_trl_default_is_its_default(bench):
    from trl import DPOConfig

    args = peer_trl.TRL(bench).trainer(peer_trl.preference_data(bench.mixed_pairs("short", 8))).args
    plain = DPOConfig(output_dir="x", use_cpu=True, bf16=False)
    for name in ("per_device_train_batch_size", "gradient_checkpointing", "train_sampling_strategy", "optim", "beta",
                 "loss_type", "max_grad_norm", "torch_compile", "use_liger_kernel", "weight_decay"):  # fmt: skip
        assert getattr(args, name) == getattr(plain, name), name
    assert args.per_device_train_batch_size == peer_trl.TRL.micro_batch


def test_the_reference_pass_agrees_with_fp32(measured):
    section = measured("reference")["reference"]
    ran = set(peer_passes.PASS_TITLES) - skipped_here(peers.PEERS, peer_passes.PASS_TITLES).keys()
    assert section["arms"].keys() == ran and section["pairs"] == 32
    for name, run in section["arms"].items():
        assert run["logps_deviation"] < 1e-6, name
        assert run["pairs_per_second"] == pytest.approx(32 / run["seconds"]["median"])


def test_a_wrong_reference_pass_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(peer_passes, "our_pass", lambda bench, pairs: [(-1.0, -1.0)] * len(pairs))
    failed = {}
    arms_ = peer_passes.reference(bench, ["ours"], failed)["arms"]
    assert "log-probs are off by" in arms_["ours"]["error"]


@pytest.mark.long
@pytest.mark.slow
def test_whole_iterations_have_all_stages(measured, monkeypatch):
    """With heads of 32 dimensions, which are the smallest that vLLM takes; its processes end with it."""
    monkeypatch.setenv("WHOSE", "whole iterations")
    tiny, kinds = work.MODELS["tiny"], peer_passes.ITERATION_PEERS
    heads = {"num_heads": 2, "num_kv_heads": 1}
    monkeypatch.setitem(work.MODELS, "tiny", replace(tiny, builder={**tiny.builder, **heads}))
    section = measured("iteration", "--prompts", "16")["iteration"]
    ran = set(kinds) - skipped_here(kinds, kinds).keys()
    assert section["arms"].keys() == ran and section["prompts"] == 16
    for name, run in section["arms"].items():
        hashed = [] if name == "ours" else [peer_passes.HASH]
        assert list(run["stages"]) == ["generate", *hashed, "reference log-probs", "train"]
        assert run["seconds"]["median"] == pytest.approx(sum(stage["median"] for stage in run["stages"].values()))
    assert not spawned_with("WHOSE=whole iterations")


def spawned_with(variable):
    """Ids of processes that multiprocessing has spawned with a variable, also of those that were left behind."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            spawned = b"spawn_main" in (process / "cmdline").read_bytes()
            if spawned and variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def test_a_file_of_other_settings_is_refused(tmp_path):
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"setup": {"model": "other"}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="Choose another --out"):
        peers.measure(peers.parse_args(["step", *TINY, "--out", str(out)]))
    shutdown()
