"""Stopped or killed while the opponent generates: no finished response is lost, and none is generated twice."""

import os
import re
import shlex
import signal
import sys
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest

from spin.data import PairStore
from spin.generators import TorchtuneGenerator
from tests.recipes.helpers import (
    REPO,
    command_line,
    generate,
    metrics_of,
    ranks_of,
    run,
    start,
    wait_for,
)

# two responses to each of eight prompts, all in one shard, which a stop never finds complete
FEW = (
    "max_iterations=1", "max_epochs=1", "validation_dataset=null", "dataset.limit=8",
    "pairs.responses_per_prompt=2", "pairs.prompts_per_shard=64", "generator.batch_size=2",
)  # fmt: skip
# forty of 60 tokens each, one after the other: seconds, in which a process can be signalled
LONG = (
    "pairs.responses_per_prompt=2", "pairs.prompts_per_shard=64", "generator.batch_size=1", "dataset.limit=20",
    "sampling.max_new_tokens=60", "sampling.min_new_tokens=60",
)  # fmt: skip
GENERATE = [sys.executable, str(REPO / "recipes" / "spin_generate.py")]


@contextmanager
def counting(monkeypatch, signals=None):
    """Tokens of the responses that the embedded generator finishes. ``signals`` come after as many of them, or, with
    the key -n, after n steps."""
    stream, found, steps = TorchtuneGenerator.stream, [], []

    def counted(self, *args):
        with closing(stream(self, *args)) as items:
            for item in items:
                (steps if item is None else found).append(item)
                number = (signals or {}).get(-len(steps) if item is None else len(found))
                if number is not None:
                    os.kill(os.getpid(), number)
                yield item
                assert number is None, "a step after the signal"

    with monkeypatch.context() as patch:
        patch.setattr(TorchtuneGenerator, "stream", counted)
        yield (tokens := [])
    tokens += [len(response.token_ids) for _, response in found]


def pairs_of(folder):
    """What a store holds, as lists."""
    return [
        (pair.sample_id, [(np.asarray(r.token_ids).tolist(), r.finish_reason) for r in pair.generated])
        for pair in PairStore.open(folder).pairs()
    ]


def num_tokens(pairs):
    return sum(len(ids) for _, responses in pairs for ids, _ in responses)


def journals(folder):
    return [line for file in folder.glob("journal-*.jsonl") for line in file.read_bytes().split(b"\n") if line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *FEW).final_weights


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory):
    return pairs_of(generate(tmp_path_factory.mktemp("long"), *LONG))


def test_every_stop_keeps_what_is_finished(whole, tmp_path, monkeypatch, caplog, capfd):
    """SIGTERM after a response, SIGINT after three more, SIGUSR1 between two steps, then to the end: the tokens that
    were generated are those of the unbroken run, each once, and so is everything that comes after them."""
    expected = pairs_of(whole[0] / "iteration_000" / "responses")
    folder, made, kept = tmp_path / "iteration_000" / "responses", [], 0
    for signals, finished in [({1: signal.SIGTERM}, 1), ({3: signal.SIGINT}, 3), ({-1: signal.SIGUSR1}, 0)]:
        caplog.clear()
        with counting(monkeypatch, signals) as tokens:
            run(tmp_path, *FEW)
        made += tokens
        kept += finished
        assert len(tokens) == finished and len(journals(folder)) == kept and not list(folder.glob("shard-*"))
        said = f"Stopped at step 0 as asked. {kept} of 16 responses are kept, {16 - kept} left to generate. Resume"
        assert said in caplog.text
        (number,) = signals.values()
        again = " Ctrl-C again ends at once." if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        assert f"\n{name}: stopping; finished steps and responses are kept.{again}\n" in capfd.readouterr().err
    with counting(monkeypatch) as tokens:
        assert run(tmp_path, *FEW).final_weights == whole[1]
    assert len(tokens) == 16 - kept and sum(made + tokens) == num_tokens(expected)
    assert pairs_of(folder) == expected and not journals(folder)
    assert metrics_of(tmp_path) == metrics_of(whole[0])


def test_another_config_uses_nothing_of_the_journal(tmp_path, monkeypatch):
    with counting(monkeypatch, {5: signal.SIGTERM}):
        folder = generate(tmp_path, *FEW)
    with counting(monkeypatch) as tokens:
        generate(tmp_path, *FEW, "seed=5")
    assert len(tokens) == 16
    assert len(journals(folder.with_name("responses.stale-0"))) == 5  # kept aside with its store


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_kill_9_loses_no_finished_response(long_pairs, tmp_path, monkeypatch, torn):
    """The journal is whole, or ends within a line, as one on a full disk does."""
    folder = tmp_path / "iteration_000" / "responses"
    process = start(command_line(tmp_path, *LONG, program=GENERATE))
    wait_for(process, lambda: len(journals(folder)) >= 3)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    kept = len(journals(folder))
    assert 3 <= kept < 40
    if torn:
        (file,) = folder.glob("journal-*.jsonl")
        file.write_bytes(file.read_bytes()[:-40])
        kept -= 1
    with counting(monkeypatch) as tokens:
        generate(tmp_path, *LONG)
    assert len(tokens) == 40 - kept
    assert sum(tokens) == num_tokens(long_pairs) - 60 * kept
    assert pairs_of(folder) == long_pairs and not journals(folder)


@pytest.mark.slow
def test_one_of_two_ranks_is_asked_and_both_stop_within_two_seconds(long_pairs, tmp_path):
    """Rank 1 gets the signal; each rank's finished responses are kept, and the command that is shown makes the rest."""
    folder = tmp_path / "iteration_000" / "responses"
    process = start(command_line(tmp_path, *LONG, recipe="spin_generate", nproc=2))
    wait_for(process, lambda: len(list(folder.glob("journal-*.jsonl"))) == 2)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    asked = time.time()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    kept, left = map(int, re.search(r"(\d+) of 40 responses are kept, (\d+) left", output).groups())
    # rank 0 alone shows progress, of all ranks
    assert re.findall(r"^generate: (\d+)/40 responses", output, re.M) == ["0", str(kept)]
    assert kept == len(journals(folder)) and kept + left == 40 and left > 0
    assert max(file.stat().st_mtime for file in folder.glob("journal-*.jsonl")) - asked < 2
    again = re.search(r"Resume with:\n(.+)\n", output)[1]
    output, _ = start(shlex.split(again)).communicate(timeout=240)
    assert "Complete, in 2 shards" in output, output[-3000:]
    assert re.findall(r"^generate: (\d+)/40 responses", output, re.M) == [str(kept), "40"]
    assert pairs_of(folder) == long_pairs and not journals(folder)
