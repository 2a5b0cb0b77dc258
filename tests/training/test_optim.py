"""torchao's AdamW over shards: against torchao and torch, rounding, state, what is refused. One test compiles."""

from __future__ import annotations

import pytest
import torch
import torchao.optim
from torch import nn

from spin.checkpoint import SPINCheckpointer
from spin.core.errors import ConfigError
from spin.core.ranks import init_world
from spin.model.fingerprint import weights_fingerprint
from spin.training.optim import AdamW8bit, AdamWStochasticRounding
from tests.ranks import run_ranks
from tests.two_ranks.optimizers import OPTIMIZERS, digests
from tests.two_ranks.small import Small, small, train


@pytest.fixture
def world():
    return init_world("cpu")


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def one_step(optimizer: torch.optim.Optimizer, gradient: float | torch.Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) + gradient
    optimizer.step()


# ---- the step


def test_shards_step_as_torchao_steps_plain_tensors(world, eager):
    """Rows of 256 values are torchao's own blocks, so weights are equal bit for bit."""
    model = small(world, torch.float32)
    torch.manual_seed(0)
    plain = Small()
    train(model, AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1), range(4))
    train(plain, torchao.optim.AdamW8bit(plain.parameters(), lr=1e-2, weight_decay=0.1), range(4))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs)


def test_what_is_kept_in_8_bits(eager):
    """Blocks of at most 256 values that divide the row; small tensors, vectors and odd rows stay fp32."""
    shapes = {(64, 256): 256, (64, 896): 128, (8, 2, 512): 256, (15, 256): 0, (8192,): 0, (64, 100): 0}
    for shape, block in shapes.items():
        parameter = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        one_step(optimizer := AdamW8bit([parameter]), 1.0)
        state = optimizer.state[parameter]
        if block:
            assert state["exp_avg_codes"].dtype == torch.uint8 and state["exp_avg_codes"].shape == shape
            assert state["exp_avg_sq_scale"].numel() == parameter.numel() // block
        else:
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["step"].item() == 1


def test_8_bit_moments_learn_as_fp32_moments_do(eager):
    """Least squares: after 60 steps the losses of both are within 10 % of each other, and a tenth of the first."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    target = x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    last = {}
    for make in (torch.optim.AdamW, AdamW8bit):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = make([weight], lr=3e-2)
        losses = []
        for _ in range(60):
            loss = (x @ weight - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 10
        last[make] = losses[-1]
    assert last[AdamW8bit] == pytest.approx(last[torch.optim.AdamW], rel=0.1)


def test_rounding_moves_weights_by_the_step_on_average(eager):
    """Weights of 1, steps of 1e-4: next below 1 lies 1 - 2**-8, so a fraction of 1e-4 * 256 = 0.0256 moves there.

    Of 65536 weights that is 1678 +- 40 (one standard deviation); rounded to the nearest, none moves.
    """
    parameter = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
    one_step(AdamWStochasticRounding([parameter], lr=1e-4, weight_decay=0.0), 1.0)
    assert set(parameter.unique().tolist()) == {1 - 2**-8, 1.0}
    assert 1678 - 200 < (parameter != 1).sum() < 1678 + 200
    nearest = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
    one_step(AdamW8bit([nearest], lr=1e-4, weight_decay=0.0, stochastic_rounding=False), 1.0)
    assert (nearest == 1).all()


def test_rounding_is_drawn_from_seed_and_step(eager):
    """Not from torch's generator, which stays as it was."""
    results = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamWStochasticRounding([parameter], lr=1e-3, weight_decay=0.0, seed=seed)
        one_step(optimizer, 1.0)
        first = parameter.detach().clone()
        parameter.data.fill_(1.0)
        one_step(optimizer, 1.0)  # the same update of the same weights
        assert not torch.equal(parameter, first)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(parameter.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@torch._dynamo.config.patch("error_on_recompile", True)
def test_compiled_once_and_resumed_bit_for_bit():
    """A new learning rate at each step does not compile again, which would fail here; nor does a second optimizer."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 256, generator=generator).bfloat16()
    gradients = [torch.randn(16, 256, generator=generator).bfloat16() for _ in range(4)]

    def run(parameter, optimizer, steps):
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            one_step(optimizer, gradients[step])

    unbroken = nn.Parameter(start.clone())
    run(unbroken, AdamW8bit([unbroken]), range(4))

    parameter = nn.Parameter(start.clone())
    first = AdamW8bit([parameter])
    run(parameter, first, range(2))
    second = AdamW8bit([parameter])
    second.state[parameter] = {key: value.clone() for key, value in first.state[parameter].items()}
    torch._dynamo.reset()  # as in a new process, which compiles at another step
    torch.manual_seed(99)
    run(parameter, second, range(2, 4))
    assert torch.equal(parameter, unbroken) and not torch.equal(unbroken, start)


def test_closure_groups_and_parameters_without_gradient(eager):
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW8bit([{"params": [moved], "lr": 0.5}, {"params": [still]}], weight_decay=0.0)

    def closure():
        loss = moved.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.allclose(moved, torch.tensor(0.5)) and still.eq(1).all()
    assert still not in optimizer.state


# ---- state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(name, tmp_path, world, eager):
    make, dtype = OPTIMIZERS[name]
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    model = small(world, dtype)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    saved = digests(model, optimizer)
    path = checkpointer.save(step=3, model=model, optimizer=optimizer, state={}, world=world)
    train(model, optimizer, range(3, 6))
    unbroken = digests(model, optimizer)
    checkpointer.wait()

    model = small(world, dtype)
    optimizer = make(model.parameters())
    checkpointer.load(path, model=model, optimizer=optimizer, world=world)
    assert digests(model, optimizer) == saved
    train(model, optimizer, range(3, 6))
    assert digests(model, optimizer) == unbroken != saved


@pytest.mark.slow
def test_two_ranks_and_one_exchange_checkpoints(tmp_path, world, subprocess_env, eager):
    """The head's one row is on the first rank alone. 8-bit AdamW steps alike on any number of ranks, bit for bit."""
    for name, (make, dtype) in OPTIMIZERS.items():
        one = SPINCheckpointer("unused", str(tmp_path / "one" / name), "LLAMA3_2")
        model = small(world, dtype)
        optimizer = make(model.parameters())
        train(model, optimizer, range(2))
        one.save(step=2, model=model, optimizer=optimizer, state=digests(model, optimizer), world=world)
        one.wait()

    run_ranks("optimizers.py", subprocess_env, tmp_path)

    for name, (make, dtype) in OPTIMIZERS.items():
        two = SPINCheckpointer("unused", str(tmp_path / "two" / name), "LLAMA3_2")
        path = two.latest()
        model = small(world, dtype)
        optimizer = make(model.parameters())
        two.load(path, model=model, optimizer=optimizer, world=world)
        assert digests(model, optimizer) == two.read_state(path), name
        if name == "AdamW8bit":
            alone = small(world, dtype)
            train(alone, make(alone.parameters()), range(4))
            assert weights_fingerprint(alone) == weights_fingerprint(model)


# ---- refused


def test_numbers_that_cannot_be():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        for make in (AdamW8bit, AdamWStochasticRounding):
            with pytest.raises(ConfigError, match=rf"spin\.training\.{make.__name__}: found .*{next(iter(wrong))}="):
                make([parameter], **wrong)


def test_nothing_to_round():
    with pytest.raises(ConfigError, match=r"found only torch\.float32.*dtype=bf16, or use torch\.optim\.AdamW"):
        AdamWStochasticRounding([nn.Parameter(torch.ones(2))])


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ConfigError, match=r"its step is compiled, but no-such-compiler -O2 was not found.*set CXX"):
        AdamW8bit([nn.Parameter(torch.ones(2))])
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"(clang|g)\+\+ was not found"):
        AdamW8bit([nn.Parameter(torch.ones(2))])
