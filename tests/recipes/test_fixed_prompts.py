"""The same held-out prompts, answered before self-play and after each iteration; nothing else changes by it."""

import json

import pytest
import spin_recipe

from spin.core.terminal import cells
from spin.generators import TorchtuneGenerator
from spin.report import fixed_prompts_table
from tests.recipes.helpers import TIMES, dies, run

SHORT = [
    "max_iterations=2",
    "max_epochs=1",
    "limit_train_batches=1",
    "validation.table_rows=0",
    "validation.at_start=false",
]
FIXED = [*SHORT, "validation.fixed_prompts=3"]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, *FIXED).final_weights


def test_rows_are_of_the_same_prompts_and_metrics_as_without(straight, tmp_path):
    folder, weights = straight
    rows = lines(folder / "fixed_prompts.jsonl")
    assert [row["iteration"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["step"] for row in rows[::3]] == [0, 1, 2]
    asked = [[(row["sample_id"], row["prompt"], row["real"]) for row in rows[i : i + 3]] for i in (0, 3, 6)]
    assert asked[0] == asked[1] == asked[2] and len(set(asked[0])) == 3
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert run(tmp_path, *SHORT).final_weights == weights
    assert not (tmp_path / "fixed_prompts.jsonl").exists()
    with_, without = (
        [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in lines(each / "metrics.jsonl")]
        for each in (folder, tmp_path)
    )
    assert with_ == without


def test_a_killed_run_asks_nothing_twice_and_ends_with_the_same_file(straight, tmp_path, monkeypatch):
    class Dies(spin_recipe.SPINRecipe):
        def _finish_iteration(self, iteration):
            super()._finish_iteration(iteration)
            if iteration == 1:
                raise KeyboardInterrupt

    dies(Dies, tmp_path, *FIXED)
    assert {row["iteration"] for row in lines(tmp_path / "fixed_prompts.jsonl")} == {0, 1}

    asked, stream = [], TorchtuneGenerator.stream

    def counted(self, requests, sampling):
        found = list(requests)
        asked.append(len(found))
        return stream(self, found, sampling)

    monkeypatch.setattr(TorchtuneGenerator, "stream", counted)
    for _ in range(2):  # the second finds that all is done
        run(tmp_path, *FIXED)
        assert asked == [3]
        assert (tmp_path / "fixed_prompts.jsonl").read_bytes() == (straight[0] / "fixed_prompts.jsonl").read_bytes()


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_the_table_fits_the_terminal(columns):
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a foo?<|im_end|>\n<|im_start|>assistant\n"
    )
    row = {"sample_id": "a", "prompt": prompt, "real": "A word that stands for another one.<|im_end|>"}
    answers = ["Food, but with an o. " * 9, "A name that means nothing.<|im_end|>", "\x1b[31mA word."]
    rows = [{**row, "iteration": i, "response": text, "finish_reason": "stop"} for i, text in enumerate(answers)]
    rows[0]["finish_reason"] = "length"
    text = fixed_prompts_table(rows, columns)
    assert max(map(len, text.splitlines()[2:])) <= columns
    assert "What is a foo?" in text and "Be brief" not in text and "<|" not in text and "\x1b" not in text
    assert (" | after iteration 0" in text) == (columns >= 105)
    for head in ("before self-play", "after iteration 0", "after iteration 1", "real"):
        assert head in text


def test_the_table_of_wide_text_is_aligned():
    row = {"sample_id": "a", "prompt": "Q", "real": "short", "finish_reason": "stop", "response": "\u6c49\u5b57" * 40}
    lines = fixed_prompts_table([{**row, "iteration": i} for i in range(2)], 100).splitlines()[4:]
    assert len(lines) > 4 and max(map(cells, lines)) <= 100
    assert {cells(line[: line.rindex(" | ")]) for line in lines if line.count(" | ") == 2} == {65}
