"""What a run says at its start and its end."""

from pathlib import Path

from spin.run.messages import finish_message, start_message
from spin.run.progress import SPINProgress


def test_a_run_says_what_it_will_do():
    text = start_message(SPINProgress(5, 2, 3), 4, 20, 8)
    assert text.startswith("20 samples, 8 for validation. 3 iterations") and "trains 2 x 5 steps of 4 pairs" in text
    assert "30 steps in all, 0 done" in text
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
