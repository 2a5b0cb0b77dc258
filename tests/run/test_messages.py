"""What a run says at its start and its end."""

import json
from pathlib import Path

import pytest

from spin.core.terminal import cells
from spin.run.messages import finish_message, iteration_summary, sample_table, start_message
from spin.run.progress import SPINProgress


def test_a_run_says_what_it_will_do():
    text = start_message(SPINProgress(5, 2, 3), 4, 20, 8)
    assert text.startswith("20 samples, 8 for validation. 3 iterations") and "trains 2 x 5 steps of 4 pairs" in text
    assert "30 steps in all, 0 done" in text
    assert "Fine-tuning (sft.lr=2e-05) trains 2 x 5 steps" in start_message(SPINProgress(5, 2, 1), 4, 20, 8, 2e-5)
    # with history later iterations are longer
    assert "trains 1 x (5, then 10) steps of 4 pairs; 15 steps in all" in start_message(
        SPINProgress([5, 10], 1, 2), 4, 20, 0
    )


def test_a_finished_run_says_that_it_was_finished_before(tmp_path):
    progress = SPINProgress(1, 1, 1)
    progress.advance(4)
    (tmp_path / "iteration_000" / "hf_model").mkdir(parents=True)
    assert finish_message(tmp_path, progress, had_steps_left=True).startswith("Finished after 1 step;")
    assert "spin report 'my runs/a'" in finish_message(Path("my runs/a"), progress, had_steps_left=True)  # for a shell
    text = finish_message(tmp_path, progress, had_steps_left=False)
    assert "was finished before" in text and "iteration_000/hf_model loads in transformers" in text
    assert f" chat {tmp_path}" in text
    assert "max_iterations=2" in text


@pytest.mark.parametrize(
    ("of_start", "of_iterations", "text"),
    [
        ([2.0], [1.9, 1.5, 1.7], "iteration 1 by validation (val_loss 1.5; the start 2; iteration 2 1.7), {}/i"),
        ([], [1.9, 1.7, 1.5], "iteration 2 by validation (val_loss 1.5), which was not kept"),
        ([2.0], [float("nan"), 1.5], "iteration 1 by validation (val_loss 1.5; the start 2), {}/i"),
        ([1.2271], [1.2269], "iteration 0 by validation (val_loss 1.2269; the start 1.2271: next to no gain), {}/i"),
        ([0.019], [0.024, 0.15], "the start by validation (val_loss 0.019; iteration 1 0.15), so no"),
        ([2.0], [], None),
    ],
)  # fmt: skip
def test_the_best_model_by_validation_is_named(tmp_path, of_start, of_iterations, text):
    """The last value of an iteration counts; the last iteration's model is gone."""
    rows = [{"step": 0, "val_loss": loss} for loss in of_start]
    for iteration, loss in enumerate(of_iterations):
        (tmp_path / f"iteration_{iteration:03d}" / "hf_model").mkdir(parents=True)
        rows += [{"step": iteration, "iteration": iteration, "val_loss": each} for each in (0.001, loss)]
    if of_iterations[2:]:
        (tmp_path / "iteration_002" / "hf_model").rmdir()
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said = finish_message(tmp_path, SPINProgress(1, 1, 1), had_steps_left=True)
    assert f"  best:        {text.format(tmp_path)}" in said if text else "best:" not in said


@pytest.mark.parametrize("kinds", [["hf_model"], ["hf_model", "adapter"], ["adapter"]])
@pytest.mark.parametrize("has_sft", [False, True])
def test_the_end_names_every_export_and_a_chat_with_what_was_before(kinds, has_sft, tmp_path):
    """Adapters are exported next to a merged model, or alone (checkpointer.export_merged=false)."""
    for folder in [f"iteration_000/{kind}" for kind in kinds] + ["sft"] * has_sft:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"val_loss": 2.0}\n{"iteration": 0, "val_loss": 1.0}\n')
    said = finish_message(tmp_path, SPINProgress(1, 1, 1), had_steps_left=True)
    assert [kind for kind in ("hf_model", "adapter") if f"{kind} loads in" in said] == kinds
    assert f"the start 2), {tmp_path}/iteration_000/{kinds[0]}\n" in said
    assert f"spin chat {tmp_path} --against {tmp_path / 'sft' if has_sft else 'base'}\n" in said + "\n"


@pytest.mark.parametrize(("columns", "widest"), [(80, 80), (60, 59), (300, 131)])
def test_tables_are_as_wide_as_the_terminal(monkeypatch, columns, widest):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "What does the hacker slang term grok mean to somebody who never heard it? " * 3
    table = sample_table([{"prompt": text, "real": text, "generated": text, "margin": -1.25}])
    assert max(map(len, table.splitlines()[1:])) == widest and "-1.250" in table
    wide = "\u6c49\u5b57\uff0ccafe\u0301 " * 30
    lines = sample_table([{"prompt": wide, "real": "short", "generated": wide, "margin": 0.5}]).splitlines()[1:]
    assert max(map(cells, lines)) <= widest
    assert cells(lines[2].rpartition(" | ")[0]) == cells(lines[1].rpartition("-+-")[0])
    metrics = dict.fromkeys(("loss", "total_loss", "rewards_generated_mean", "val_spin_loss"), -12.3456)
    summary = iteration_summary("iteration 0", [metrics], -12.3, Path("a/i"), Path("m"), Path("c"))
    assert max(len(line) for line in summary.splitlines() if "step" in line) <= 80
