"""float8 bodies, emulated on CPU: what is converted, that scoring and training agree, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spin.core.errors import ConfigError
from spin.core.ranks import init_world
from spin.model.build import checkpoint_activations, compile_each_layer
from spin.model.float8 import Float8Linear, convert_float8, float8_off
from spin.model.sharding import materialize, shard_model
from tests.families import FAMILIES

CPU = torch.device("cpu")
IDS = torch.randint(160, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def world():
    return init_world("cpu")


def prepared(world, family="llama3_1", converted=True, compute_dtype=torch.float32):
    """As the recipe does it: meta device, converted, checkpointed, sharded, weights last."""
    weights = FAMILIES[family]().state_dict()
    model = FAMILIES[family]().to("meta")
    if converted:
        convert_float8(model, CPU)
    names = list(model.state_dict())
    checkpoint_activations(model)
    shard_model(model, world, compute_dtype=compute_dtype)
    materialize(model, world)
    assert names == list(weights)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights.values(), strict=True):
            parameter.to_local().copy_(value)
    return model


def logps(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_body_is_converted_and_head_is_not(family, caplog):
    model = FAMILIES[family]()
    names = list(model.state_dict())
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear and "layers." in name}
    assert convert_float8(model, CPU) == len(linears) >= 8
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert converted == linears
    assert not isinstance(model.output, Float8Linear)
    assert list(model.state_dict()) == names
    assert "emulated on CPU" in caplog.text


def test_odd_layers_are_left_alone():
    """w1 and w3 give 96 values, w2 takes them: with 100 the three do not fit, the 4 of attention do."""
    model = FAMILIES["llama3_1"]()
    for layer in model.layers:
        layer.mlp.w1, layer.mlp.w3, layer.mlp.w2 = nn.Linear(64, 100), nn.Linear(64, 100), nn.Linear(100, 64)
    assert convert_float8(model, CPU) == 2 * 4
    assert not isinstance(model.layers[0].mlp.w1, Float8Linear)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_scoring_is_training_bit_for_bit(compute_dtype, world):
    """With and without gradients, sharded: so the first loss of an iteration is that of two equal models."""
    model = prepared(world, compute_dtype=compute_dtype)
    with torch.no_grad():
        scored = logps(model)
    trained = logps(model)
    assert trained.requires_grad and torch.equal(scored, trained)
    assert not torch.equal(scored, logps(prepared(world, converted=False, compute_dtype=compute_dtype)))


def test_logps_do_not_depend_on_what_a_sequence_is_packed_with(world):
    """Beside tokens whose activations are a thousand times larger, which would ruin a scale for all."""
    model = prepared(world)
    small, large = IDS[:1] % 80, IDS[1:] % 80 + 80
    with torch.no_grad():
        model.tok_embeddings.weight.to_local()[80:] *= 1000
        alone, packed = logps(model, small), logps(model, torch.cat((small, large)))[:1]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_gradients_are_close_to_those_without_float8(world):
    """Measured: at most 10 % off in norm on tiny models (e4m3 has 4 significant bits: up to 6 % a value)."""
    gradients = []
    for model in (prepared(world), prepared(world, converted=False)):
        F.cross_entropy(model(IDS)[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten()).backward()
        gradients.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    for ours, exact in zip(*gradients, strict=True):
        assert 0 < (ours - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_off_is_the_plain_model(compute_dtype, world):
    model = prepared(world, "qwen2", compute_dtype=compute_dtype)
    plain = logps(prepared(world, "qwen2", converted=False, compute_dtype=compute_dtype))
    before = logps(model)
    with pytest.raises(KeyError), float8_off(model):
        assert torch.equal(logps(model), plain)
        raise KeyError
    assert torch.equal(logps(model), before) and not torch.equal(before, plain)


def test_off_reaches_compiled_layers():
    model, plain = FAMILIES["llama3_1"](), logps(FAMILIES["llama3_1"]())
    with float8_off(model):  # never converted
        assert torch.equal(logps(model), plain)
    convert_float8(model, CPU)
    for layer in model.layers:
        layer.compile(backend="eager")
    for _ in range(2):
        assert not torch.equal(logps(model), plain)
        with float8_off(model):
            assert torch.equal(logps(model), plain)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_tokens", [37, 64])
def test_products_of_what_float8_can_hold_are_exact(device, num_tokens):
    """Whole numbers up to 15 take 4 bits, sums of their products are exact, and rows differ by powers of two only: the
    linear layer itself is what to expect. Those of dy and x differ by 2**8 at most, so shifted values stay normal."""
    draw = torch.Generator().manual_seed(0)

    def rows(m: int, n: int, spread: int) -> torch.Tensor:
        values, powers = (
            torch.randint(low, high, (m, k), generator=draw) for low, high, k in ((-15, 16, n), (0, spread, 1))
        )
        return (values * 2.0 ** (powers - 20)).to(device)

    linear = nn.Linear(32, 48, device=device)
    linear.weight.data, x, dy = rows(48, 32, 1), rows(num_tokens, 32, 4), rows(num_tokens, 48, 4)
    linear.weight.data[:, 0], x[:, 0] = 443 * 2.0**-24, 0  # makes a weight's scales 2**-24, and multiplies zeros
    linear.bias.data.zero_()
    results = []
    for kind in (nn.Linear, Float8Linear):
        linear.__class__ = kind
        linear.zero_grad()
        leaf = x.clone()[None].requires_grad_()
        y = linear(leaf)
        y.backward(dy[None])
        results.append((y, leaf.grad, linear.weight.grad.clone(), linear.bias.grad.clone()))
        leaf.grad[..., 0] = 0  # 443 is rounded
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0 if device == "cpu" else 2**-8, atol=0)


def test_compiled_layers_have_the_same_gradients():
    """Several layers that read one input, as q, k and v do: torch 2.11 dropped gradients of such functions."""
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = FAMILIES["llama3_1"]()
        convert_float8(model, CPU)
        if compiled:
            compile_each_layer(model, backend="aot_eager_decomp_partition")
        logps(model)[..., 3].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(ours, eager) for ours, eager in zip(*gradients, strict=True))


def test_a_small_step_from_bf16_weights_stays_small():
    """With powers of two as scales one weight in 16 would be in the middle of two float8 values, and a step of 1e-6
    would move the model as one of 3e-5 does. The product with the identity shows the weights that are multiplied."""
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    linear.__class__ = Float8Linear
    linear.weight.data = 0.02 * torch.randn(256, 256, generator=draw).bfloat16().float()
    direction = torch.randn(256, 256, generator=draw).sign()
    with torch.no_grad():
        before = linear(torch.eye(256)).t()
        linear.weight += 1e-6 * direction
        moved = (linear(torch.eye(256)).t() - before) * direction
    assert moved.mean() == pytest.approx(1e-6, abs=1e-6)


def test_what_is_not_finite_stays_so_and_nothing_becomes_it():
    """A row of zeros, such as padding's gradient, has a scale; one with NaN or infinity spoils itself alone."""
    linear = nn.Linear(32, 16, bias=False)
    linear.__class__ = Float8Linear
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 5] = 0, float("inf")
    y = linear(x)
    assert (y[0] == 0).all() and not y[1].isfinite().any() and y[2].isfinite().all()
    linear(x[::2]).backward(torch.zeros(2, 16))
    assert (linear.weight.grad == 0).all()


def test_what_cannot_be_converted(monkeypatch):
    model = FAMILIES["llama3_1"]()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more .* found NVIDIA A100 with 8\.0"):
        convert_float8(model, torch.device("cuda"))
    odd = nn.Module()
    odd.layers, odd.output = nn.ModuleList([nn.Linear(64, 15)]), nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"no linear layer in `layers\.` whose dimensions are multiples of 16"):
        convert_float8(odd, CPU)
    assert not any(isinstance(module, Float8Linear) for module in [*model.modules(), *odd.modules()])
