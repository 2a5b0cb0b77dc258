"""The start's answers: which are missing, where each comes from, and which configs cannot have them."""

import shutil
from pathlib import Path

import pytest

from spin.config.checks import check_run
from spin.config.defaults import RECIPE_DEFAULTS
from spin.config.parse import complete, load_config
from spin.core.errors import ConfigError, StoreError
from spin.core.ranks import init_world
from spin.data import Pair, PairStore, Prompt, PromptDataset, Response
from spin.generators.triplets import StartAnswers, answers_per_pair, takes_triplets

PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2]) for i in range(4)])


def store(path, answers):
    """A store of one answer to each of some samples; the prompt is the data set's unless another is given."""
    made = PairStore.open_or_create(path, {"opponent": "start"}, 1)
    pairs = [Pair(f"s{i}", 0, prompt or [1, i + 1], [2], [Response(ids, "stop")]) for i, prompt, ids in answers]
    made.write_shard(0, pairs)
    made.seal()


@pytest.mark.parametrize("within", ["", "validation"])
def test_what_iteration_0_did_not_answer_is_asked_for(tmp_path, within):
    world = init_world("cpu")
    folder = tmp_path / "iteration_002" / within
    assert StartAnswers(tmp_path, folder).missing(PROMPTS, [3, 1], world) == [3, 1], "nothing is there"
    first = tmp_path / "iteration_000" / within / "responses"
    store(first, [(0, None, [5]), (1, None, [6]), (3, [1, 9], [7])])
    # sample 2 was not played, and sample 3 was another prompt then
    starts = StartAnswers(tmp_path, folder)
    assert starts.missing(PROMPTS, [3, 1, 2, 0], world) == [3, 2]
    shutil.rmtree(first)  # it is read once
    store(folder / "start" / "responses", [(2, None, [8]), (3, None, [9])])
    pairs = [Pair(f"s{i}", 2, [1, i + 1], [2], [Response([4], "stop")]) for i in (3, 1, 2, 0)]
    triplets = list(starts.add_to(pairs))
    assert [[list(each.token_ids) for each in pair.generated] for pair in triplets] == [
        [[4], [9]], [[4], [6]], [[4], [8]], [[4], [5]],
    ]  # fmt: skip


def test_a_sample_without_an_answer_of_the_start_is_named(tmp_path):
    store(tmp_path / "iteration_000/responses", [(0, None, [5])])
    pairs = [Pair("s2", 1, [1, 3], [2], [Response([4], "stop")])]
    with pytest.raises(StoreError, match="sample s2: neither .*iteration_000"):
        list(StartAnswers(tmp_path, tmp_path / "iteration_001").add_to(pairs))


TSPIN = ("loss._component_=spin.loss.TSPINLoss", "loss.beta=1.0")


def config(*changes):
    tiny = Path(__file__).parents[1] / "assets" / "tiny.yaml"
    return complete(load_config(str(tiny), ["output_dir=out", *changes]), RECIPE_DEFAULTS)


def test_the_loss_says_whether_pairs_are_triplets():
    spin, tspin = config("pairs.responses_per_prompt=2"), config(*TSPIN)
    assert (takes_triplets(spin), answers_per_pair(spin)) == (False, 2)
    assert (takes_triplets(tspin), answers_per_pair(tspin)) == (True, 2)
    check_run(tspin)


@pytest.mark.parametrize("change", ["pairs.responses_per_prompt=2", "pairs.history=1", "pairs.start_share=0.5"])
def test_triplets_refuse_what_they_cannot_be_with(change):
    with pytest.raises(ConfigError, match=rf"{change} with loss\._component_=spin\.loss\.TSPINLoss: .* Set pairs\."):
        check_run(config(*TSPIN, change))
    check_run(config(change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("loss={_component_: spin.loss.TSPINLoss}",), "loss.beta: missing, expected a number"),
        (("pairs.max_margin=much",), "pairs.max_margin='much': expected nats per token"),
        (("pairs.min_margin=.nan",), "pairs.min_margin=nan: expected nats per token"),
        (("pairs.min_margin=1", "pairs.max_margin=0"), "pairs.min_margin=1 is above pairs.max_margin=0"),
    ],
)
def test_values_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_run(config(*changes))
    check_run(config("pairs.min_margin=-1.5", "pairs.max_margin=0"))
