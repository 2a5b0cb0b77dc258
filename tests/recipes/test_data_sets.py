"""Mixtures and streams in a whole run: what each iteration plays, the log by source, restarts, changed settings."""

from pathlib import Path

import pytest
import spin_recipe
from omegaconf import OmegaConf

from spin.cli import main
from spin.config import SPINConfig, complete, plain
from spin.core.errors import CheckpointError, ConfigError
from spin.data import PairStore
from tests.recipes.helpers import (
    CONFIG,
    REPO,
    TINY_EVALUATE,
    TINY_LM,
    metrics_of,
    run,
    stops_at,
    tiny_config,
    tiny_overrides,
)

TRAIN, VAL = (str(REPO / f"examples/quickstart/jargon_{part}.jsonl") for part in ("train", "val"))
MIXTURE = {
    "_component_": "spin.data.mixed_prompt_dataset",
    "common": {"max_response_tokens": 80, "on_long_response": "cut"},
    "sources": {"slang": {"source": TRAIN, "limit": 30, "weight": 3}, "few": {"source": VAL, "limit": 2, "weight": 1}},
    "samples": 16,
}
CHANGED = MIXTURE | {"sources": MIXTURE["sources"] | {"few": MIXTURE["sources"]["few"] | {"weight": 2}}}
VAL_MIXTURE = {
    "_component_": "spin.data.mixed_prompt_dataset",
    "common": MIXTURE["common"],
    "sources": {"one": {"source": TRAIN, "limit": 3}, "two": {"source": VAL, "limit": 3}},
}
STREAM = (
    *("dataset.streaming=true", "dataset.limit=8", "dataset.shuffle_buffer=32", "max_iterations=3", "max_epochs=1"),
    *("global_batch_size=4", "pairs.history=1"),
)


def run_with(output_dir, sections, *overrides):
    """A run whose data sets are replaced."""
    cfg = tiny_config(output_dir, "max_epochs=1", "limit_train_batches=2", "max_iterations=2", *overrides)
    values = plain(cfg) | sections

    class Recipe(spin_recipe.SPINRecipe):
        def __init__(self, cfg):
            super().__init__(complete(OmegaConf.create(values), SPINConfig))

    return run(output_dir, recipe_class=Recipe)


def test_a_mixture_is_played_by_its_weights_and_logged_by_source(tmp_path):
    """8 of an iteration's samples, 6 to 2; then 16, 12 to 4, for which the two of the small source are copied."""
    sections = {"dataset": MIXTURE, "validation_dataset": VAL_MIXTURE}
    run_with(tmp_path / "a", sections)
    steps = [row for row in metrics_of(tmp_path / "a") if "loss" in row]
    for iteration in range(2):
        of_iteration = [row for row in steps if row["iteration"] == iteration]
        assert sum(row["samples/slang"] for row in of_iteration) == 6
        assert sum(row["samples/few"] for row in of_iteration) == 2
        stored = [pair.sample_id for pair in PairStore.open(tmp_path / f"a/iteration_{iteration:03d}/pairs").pairs()]
        assert sum(sample_id.startswith("few/") for sample_id in stored) == 2 and len(set(stored)) == 8
    for row in metrics_of(tmp_path / "a"):
        if "val_loss" in row:  # lies between those of its sources, each weighed by its tokens
            parts = sorted([row["val_loss/one"], row["val_loss/two"]])
            assert parts[0] < row["val_loss"] < parts[1]

    run_with(tmp_path / "b", sections, "limit_train_batches=1.0", "max_iterations=1")
    pairs = list(PairStore.open(tmp_path / "b/iteration_000/pairs").pairs())
    few = {pair.sample_id: tuple(pair.generated[0].token_ids) for pair in pairs if pair.sample_id.startswith("few/")}
    originals = {sample_id for sample_id in few if "#" not in sample_id}
    assert len(originals) == 2 and set(few) == originals | {f"{sample_id}#copy1" for sample_id in originals}
    assert len(set(few.values())) == 4  # the opponent samples a copy with other random numbers


def test_changed_weights_are_refused_by_name(tmp_path):
    run_with(tmp_path, {"dataset": MIXTURE}, "max_steps=1")
    with pytest.raises(CheckpointError) as caught:
        run_with(tmp_path, {"dataset": CHANGED}, "max_steps=2")
    message = str(caught.value)
    assert "dataset.weights.few is 0.4, was 0.25; dataset.weights.slang is 0.6, was 0.75" in message
    assert "dataset is" not in message  # the samples are the same
    with pytest.raises(CheckpointError, match=r"^dataset\.weights can change between iterations only"):
        run_with(tmp_path, {"dataset": CHANGED}, "max_steps=2", "resume_with_changes=[dataset.weights]")


def test_weights_may_change_at_an_iterations_start(tmp_path):
    """3 : 1 in the first, 3 : 2 in the second: of 8 samples 6 and 2, then 5 and 3."""
    run_with(tmp_path, {"dataset": MIXTURE}, "max_steps=2")
    run_with(tmp_path, {"dataset": CHANGED}, "resume_with_changes=[dataset.weights]")
    played = [row["samples/few"] for row in metrics_of(tmp_path) if "loss" in row]
    assert [sum(played[:2]), sum(played[2:])] == [2, 3]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Each of three iterations plays the next 8 of the stream."""
    folder = tmp_path_factory.mktemp("stream")
    whole = run(folder, *STREAM)
    stores = [PairStore.open(folder / f"iteration_{iteration:03d}/responses") for iteration in range(3)]
    played = [[pair.sample_id for pair in store.pairs()] for store in stores]
    assert [len(each) for each in played] == [8, 8, 8] and len(set(sum(played, []))) == 24
    return whole, folder


@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_stream_that_is_stopped_resumes_with_the_same_samples(whole_run, tmp_path, stop_at):
    """Iterations of 2, 4 and 4 steps, with history; stopped within each."""
    whole, folder = whole_run
    run(tmp_path, *STREAM, "save_interval=1", recipe_class=stops_at(stop_at))
    assert metrics_of(tmp_path)[-1]["step"] == stop_at
    assert run(tmp_path, *STREAM, "save_interval=1").final_weights == whole.final_weights
    assert metrics_of(tmp_path) == metrics_of(folder)


def test_a_stream_of_another_file_is_refused_by_name(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = Path(TRAIN).read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:40]))
    run(tmp_path / "run", *STREAM, f"dataset.source={file}", "max_steps=1")
    file.write_text("".join(rows[:41]))
    with pytest.raises(CheckpointError, match=r"dataset\.source is \[\['rows\.jsonl', \d+\]"):
        run(tmp_path / "run", *STREAM, f"dataset.source={file}", "max_steps=2")


def test_samples_are_held_out_for_validation(tmp_path, capsys):
    """The run validates on them, plays none of them, and is another run with another fraction; an evaluation and
    `validate` take the same."""
    changes = ("dataset.validation_fraction=0.3", "validation_dataset=null", "validation.spin=true")
    short = (*changes, "max_iterations=1", "max_epochs=1", "val_check_interval=1.0", "max_steps=1")
    run(tmp_path / "run", *short)
    stores = [PairStore.open(tmp_path / "run/iteration_000" / part) for part in ("responses", "validation/responses")]
    played, held_out = ({pair.sample_id for pair in store.pairs()} for store in stores)
    assert held_out and not played & held_out and "val_loss" in metrics_of(tmp_path / "run")[0]
    with pytest.raises(CheckpointError, match=r"dataset\.validation_fraction is 0\.4, was 0\.3"):
        run(tmp_path / "run", *short, "dataset.validation_fraction=0.4", "max_steps=2")

    assert main(["validate", str(CONFIG), *tiny_overrides(tmp_path / "new"), *changes]) == 0
    assert f"{len(held_out)} samples, held out by dataset.validation_fraction" in capsys.readouterr().out
    models = [f"{role}.checkpoint_dir={TINY_LM}" for role in ("candidate", "baseline", "judge")]
    data = [f"dataset.source={TRAIN}", "dataset.limit=20", "dataset.validation_fraction=0.3"]
    words = [f"output_dir={tmp_path / 'new'}", *models, *data]
    assert main(["validate", str(TINY_EVALUATE), *words]) == 0
    assert f"{len(held_out)} samples fit both models" in capsys.readouterr().out


def test_a_validation_set_does_not_stream(tmp_path):
    with pytest.raises(ConfigError, match=r"validation_dataset\.streaming=true"):
        run(tmp_path, "validation_dataset.streaming=true")
    assert not list(tmp_path.iterdir())
