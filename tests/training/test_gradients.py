"""What a run measures of its gradients, on one rank and two; that it is the law: tests/theory/test_first_order.py."""

import json
import re

import pytest
import torch

from spin.core.ranks import init_world
from spin.model.attention import patch_attention
from spin.reference.logprobs import response_logps
from spin.training import gradient_metrics, is_checked
from tests.ranks import run_ranks
from tests.two_ranks.gradients import compared, model_of, row_loss, rows_of
from tests.two_ranks.tiny import build


@pytest.fixture(scope="module")
def world():
    return init_world("cpu")


@pytest.fixture(scope="module")
def found(world):
    """On one rank, which leaves no gradient and no other weight, and draws no random number."""
    model, before, random = model_of(world), build().state_dict(), torch.get_rng_state()
    result = compared(model, world)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), before[name])
    return result


def test_it_is_made_of_the_rows_gradients_by_autograd(found, world):
    plain, rows = build(), rows_of(world)
    patch_attention(plain)

    def gradient(value):
        parts = torch.autograd.grad(value, list(plain.parameters()))
        return torch.cat([part.flatten() for part in parts])

    spin = [gradient(row_loss(row, response_logps(plain, row))) for row in rows]
    sft = [gradient(-response_logps(plain, row)[row.real].sum()) for row in rows]
    gradients = torch.stack(spin + sft).double()
    expected = gradient_metrics(gradients @ gradients.T, torch.full((8,), 2.0).double(), batch_size=16)
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 5


def test_what_does_not_stand_out_of_the_noise_has_no_cosine():
    torch.manual_seed(0)
    noise = torch.randn(16, 1000, dtype=torch.float64)
    found = gradient_metrics(noise @ noise.T, torch.ones(8), batch_size=8)
    assert found.keys() == {"gradient/signal", "gradient/sft_signal"} and abs(found["gradient/signal"]) < 0.1
    assert gradient_metrics(torch.full((16, 16), torch.nan), torch.ones(8), batch_size=8) == {}
    noise[:8] = 0  # pairs of equal responses have no gradient
    assert gradient_metrics(noise @ noise.T, torch.ones(8), batch_size=8)["gradient/signal"] == 0


@pytest.mark.parametrize(
    ("steps", "rows", "checks", "at"),
    [
        (100, 12, None, [0]),  # 1,200 rows, of which a check takes 16
        (99, 8, None, []),
        (400, 12, None, [0, 100, 200, 300]),
        (10, 1, 4, [0, 2, 5, 7]),
        (400, 12, 0, []),
        (2, 1, 4, [0, 1]),
    ],
)
def test_when(steps, rows, checks, at):
    assert [step for step in range(steps) if is_checked(step, steps, rows, checks)] == at


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(found, subprocess_env):
    text = re.search(r"^found (.*)$", run_ranks("gradients.py", subprocess_env), re.MULTILINE)[1]
    assert json.loads(text) == pytest.approx(found, rel=1e-4)
