"""The benchmark of float8 on tiny models: gradients of all arms are fp32's but for quantization, whole runs, tables."""

import math
from types import SimpleNamespace

import float8
import pytest
import work

from spin.core.ranks import init_world, shutdown


@pytest.mark.slow
def test_gradients_speed_and_tables(tiny_lm):
    world = init_world("cpu")
    section = float8.gradients(tiny_lm, work.mixed_pairs("short", 4, 1000, 1.0, share=1 / 16), world)
    for loss, arms in section["losses"].items():
        assert arms.keys() == float8.GRADIENT_TITLES.keys()
        for name, arm in arms.items():
            assert loss == "SFT" or arm["loss"] == pytest.approx(math.log(2), abs=1e-12)
            assert arm["all"]["cosine"] > (1 - 1e-9 if name == "compiled" else 0.97)
            assert len(arm) == 2 + 4 + 7  # loss, all; layers, kinds
            error = {"compiled": 1e-4, "weights": 0.05, "inputs": 0.1}.get(name, 0.25)
            assert arm["all"]["error"] < error and (name == "compiled" or arm["all"]["error"] > 0.01)
    shutdown()
    options = SimpleNamespace(rounds=1, row_tokens=256, device="cpu", arms=list(float8.TITLES), step_alone=False)
    speed = float8.speed("tiny", options)
    assert all(run["median_seconds"] > 0 for run in speed["forward and backward"].values())
    assert speed["off"].pop("compiled") == 0 and all(0 < off < 0.5 for off in speed["off"].values())
    printed = float8.tables({"speed": {"tiny": speed}, "gradients": section})
    assert all(title in printed for title in float8.TITLES.values())
    shutdown()


def test_figures_of_answers():
    """Four words, of which three are among the five real ones: 2 * 3 / 9. The second says `a b c` twice: of its
    six words four trigrams, three of them different."""
    rows = [
        {"response": "The cat sat there.", "real": "a cat sat there, twice", "finish_reason": "stop"},
        {"response": "a b c a b c", "real": "d", "finish_reason": "length"},
    ]
    found = float8.answer_figures(rows)
    assert found == {"answers": 2, "words": 5, "truncated": 0.5, "overlap": (2 * 3 / 9) / 2, "repeated": (1 / 4) / 2}
