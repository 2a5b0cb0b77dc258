"""The benchmark of float8 on tiny models: every arm's gradient is fp32's but for quantization, and the tables."""

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
    assert section["arms"].keys() == float8.TITLES.keys()
    for name, arm in section["arms"].items():
        assert arm["loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert arm["cosine"] > (1 - 1e-9 if name == "compiled" else 0.98)
        assert len(arm["matrices"]) == 4 * 7
    shutdown()
    speed = float8.speed("tiny", SimpleNamespace(rounds=1, row_tokens=256, device="cpu", arms=list(float8.TITLES)))
    assert all(run["median_seconds"] > 0 for run in speed["forward and backward"].values())
    assert speed["off"].pop("compiled") == 0 and all(0 < off < 0.5 for off in speed["off"].values())
    printed = float8.tables({"speed": {"tiny": speed}, "gradients": section})
    assert all(title in printed for title in float8.TITLES.values())
    shutdown()
