"""Adapters: the merged model computes what the adapted one does, and NF4 comes out the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from spin.core.ranks import init_world
from spin.model.adapters import (
    adapted_modules,
    dequantized,
    fill_nf4,
    full_magnitude,
    merged_weight,
    patch_dora,
    patch_nf4,
)
from spin.model.fingerprint import weights_fingerprint
from spin.model.gemma2 import fix_gemma2_softcap
from spin.model.sharding import named_full_tensors
from tests.families import FAMILIES, FROM_HF, HF_NF4_SHAPE, MODELS, NF4_SHAPE, lora_model

TOKENS = torch.arange(3, 23).reshape(2, 10)


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {"quantize_base": True, "shape": NF4_SHAPE},
    "qdora": {"quantize_base": True, "use_dora": True, "shape": NF4_SHAPE},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_computes_the_same(name, kind):
    """Every family: under the names of the plain builder, and with its logits (Qwen's biases included)."""
    shape = KINDS[kind].get("shape") and (HF_NF4_SHAPE if name in FROM_HF else NF4_SHAPE)
    if name == "hf/gemma3" and shape:
        pytest.skip("its sizes stand in a part of its config; hf/gemma3_text is the same decoder")
    if name == "hf/qwen3_moe" and shape:
        pytest.skip("experts are not quantized, and a model with experts neither")
    adapted = lora_model(name, **KINDS[kind] | {"shape": shape})
    plain = MODELS[name](**({"shape": shape} if name in FROM_HF else shape or {}))
    base = plain(TOKENS)
    plain.load_state_dict(dict(named_full_tensors(adapted)))
    logits = adapted(TOKENS)
    tolerance = 1e-4 * logits.abs().max().item()  # some families' logits are 280
    torch.testing.assert_close(plain(TOKENS), logits, rtol=0, atol=tolerance)
    assert (logits - base).abs().max() > 20 * tolerance


def test_the_merged_weight_of_lora_by_hand():
    """W + (alpha / rank) B A = [[1, 0], [0, 1]] + (6 / 1) [[1], [2]] [[3, 4]] = [[19, 24], [36, 49]]."""
    module = LoRALinear(2, 2, rank=1, alpha=6)
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
        module.lora_a.weight.copy_(torch.tensor([[3.0, 4.0]]))
        module.lora_b.weight.copy_(torch.tensor([[1.0], [2.0]]))
    assert torch.equal(merged_weight(module), torch.tensor([[19.0, 24.0], [36.0, 49.0]]))


def test_the_merged_weight_of_dora_by_hand():
    """W = 3 I; W + B A = [[3, 4], [0, 3]], rows of norm 5 and 3; m = 3 + (7, 3) = (10, 6) is twice these."""
    module = DoRALinear(2, 2, rank=1, alpha=1)
    patch_dora(module)
    with torch.no_grad():
        module.weight.copy_(3 * torch.eye(2))
        module.lora_a.weight.copy_(torch.tensor([[0.0, 4.0]]))
        module.lora_b.weight.copy_(torch.tensor([[1.0], [0.0]]))
        module.magnitude.copy_(torch.tensor([7.0, 3.0]))
    torch.testing.assert_close(merged_weight(module), torch.tensor([[6.0, 8.0], [0.0, 6.0]]))


def dora(bias: bool = False) -> DoRALinear:
    torch.manual_seed(5)
    module = DoRALinear(24, 16, rank=4, alpha=8, use_bias=bias)
    nn.init.normal_(module.lora_b.weight, std=0.3)
    module.initialize_dora_magnitude()
    return module


def test_doras_forward_is_torchtunes_with_another_origin():
    """The patched module holds m less the norm of W's rows; output and the gradient of the adapter are torchtune's."""
    x = torch.randn(5, 24)
    module = dora()
    expected = module(x)
    wanted = torch.autograd.grad(expected.square().sum(), [module.lora_b.weight, module.magnitude])
    patch_dora(module)
    with torch.no_grad():
        module.magnitude.sub_(module.weight.norm(dim=1))
    found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(found.square().sum(), [module.lora_b.weight, module.magnitude])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F.linear(x, merged_weight(module)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_adapter_at_zero_is_the_base_to_the_last_bit(dtype):
    module = dora(bias=True)
    patch_dora(module)
    nn.init.zeros_(module.lora_b.weight)
    nn.init.zeros_(module.magnitude)
    module.to(dtype)
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(module(x), F.linear(x, module.weight) + module.bias)


def test_a_small_step_of_the_magnitude_shows_in_bf16():
    """m is 0.4 to 1, where bf16 has a spacing of 2^-8 = 0.004; what it has moved is rounded by 2^-9 of itself."""
    module = dora()
    patch_dora(module)
    nn.init.constant_(module.magnitude, 0.005)
    module.to(torch.bfloat16)
    norms = module.weight.detach().float().norm(dim=1)
    torch.testing.assert_close(full_magnitude(module) - norms, torch.full((16,), 0.005), rtol=4e-3, atol=1e-6)
    assert norms.min() > 0.4 and norms.max() < 1
    rounded = (norms + 0.005).bfloat16().float() - norms
    assert (rounded - 0.005).abs().max() > 0.001


def test_lora_of_full_rank_follows_full_fine_tuning():
    """A = I, alpha = rank and B = 0: the gradient by B is that by W, and that by A is zero at first.

    So the first step of SGD is that of full fine-tuning exactly; later A drifts by O(rate^2), and the difference of
    both runs at equal time shrinks with the rate.
    """
    torch.manual_seed(0)
    dim, x = 6, torch.randn(32, 6, dtype=torch.float64)
    target = torch.randn(6, 6, dtype=torch.float64)

    def both(rate: float, steps: int) -> float:
        full = nn.Linear(dim, dim, bias=False).double()
        lora = LoRALinear(dim, dim, rank=dim, alpha=dim).double()
        with torch.no_grad():
            full.weight.copy_(torch.eye(dim))
            lora.weight.copy_(torch.eye(dim))
            lora.lora_a.weight.copy_(torch.eye(dim))
        start = full.weight.detach().clone()
        for _ in range(steps):
            for module, parameters in ((full, [full.weight]), (lora, [lora.lora_a.weight, lora.lora_b.weight])):
                loss = (module(x) - x @ target.t()).square().mean()
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(rate * gradient)
        moved = (full.weight - start).norm()
        assert moved > 0
        return ((merged_weight(lora) - full.weight).norm() / moved).item()

    assert both(0.1, 1) < 1e-14
    assert both(0.002, 10) < 0.05
    # the same time in steps half as long ends at the same place, so the difference is of the path, not of rounding
    assert both(0.001, 10) < 0.6 * both(0.002, 10)


# ---- NF4


def weight(rows: int = 256, columns: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return (values * torch.linspace(0.1, 3, rows)[:, None]).to(dtype)  # rows of different size, so scales differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_of_nf4_holds_the_values_of_the_full_weight(dtype):
    """Quantized by itself it would not: the scales are relative to the mean over all rows."""
    full = weight(dtype=dtype)
    expected = to_nf4(full).get_original_weight()
    halves = []
    for first_row in (0, 128):
        shard = to_nf4(torch.zeros(128, 128, dtype=dtype))
        fill_nf4(shard, full, first_row)
        halves.append(shard.get_original_weight())
    assert torch.equal(torch.cat(halves), expected)
    alone = torch.cat([to_nf4(part).get_original_weight() for part in full.split(128)])
    assert not torch.equal(alone, expected)


def test_an_nf4_base_is_merged_by_the_values_that_it_stands_for():
    module = LoRALinear(128, 128, rank=4, alpha=8, quantize_base=True)
    nn.init.normal_(module.lora_b.weight, std=0.1)
    x = torch.randn(3, 128)
    torch.testing.assert_close(F.linear(x, merged_weight(module)), module(x), rtol=1e-4, atol=1e-4)


def test_the_fingerprint_covers_the_adapter_and_can_leave_it_out():
    init_world("cpu")
    model = lora_model("llama3_2", use_dora=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = next(iter(adapted_modules(model).values()))
    for part in (adapter.lora_a.weight, adapter.lora_b.weight, adapter.magnitude):
        part.requires_grad_()
        full, base = weights_fingerprint(model), weights_fingerprint(model, frozen_only=True)
        with torch.no_grad():
            part[-1:].mul_(1.5)
        assert weights_fingerprint(model) != full
        assert weights_fingerprint(model, frozen_only=True) == base
    with torch.no_grad():
        model.norm.scale[0] += 1
    assert weights_fingerprint(model, frozen_only=True) != base


def test_gemma_2_keeps_its_caps():
    """The patches of spin.model.gemma2 find the LoRA builder's modules too."""
    adapted, plain = lora_model("gemma2"), FAMILIES["gemma2"]()
    plain.load_state_dict(dict(named_full_tensors(adapted)))
    for model in (adapted, plain):
        assert fix_gemma2_softcap(model)
    torch.testing.assert_close(adapted(TOKENS), plain(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_over_nf4_compute_what_torchtunes_do(compiled):
    """Result and gradient of LoRA and of a module without adapter, in compiled layers too."""
    torch.manual_seed(0)
    adapted = LoRALinear(256, 128, rank=4, alpha=8, use_bias=True, quantize_base=True)
    frozen = FrozenNF4Linear(256, 128, dtype=torch.bfloat16)
    nn.init.normal_(adapted.lora_b.weight)
    for module, dtype in ((adapted, torch.float32), (frozen, torch.bfloat16)):
        x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
        expected = module(x)
        expected.square().sum().backward()
        gradient, x.grad = x.grad, None
        patch_nf4(module)
        found = (torch.compile(module) if compiled else module)(x)
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)
        torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-4)


def test_compiled_layers_do_not_keep_the_values_that_nf4_stands_for():
    """Between forward and backward; a compiler would, if it took the two for the same."""
    module = LoRALinear(512, 384, rank=4, alpha=8, quantize_base=True)
    module.weight.requires_grad_(False)
    patch_nf4(module)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        torch.compile(module)(torch.randn(7, 512, requires_grad=True))
    assert max(kept) == 512 * 384 / 2, "two weights in a byte"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("device", "shape"),
    [
        ("cpu", (256, 384)),
        *[pytest.param("cuda", s, marks=pytest.mark.gpu) for s in ((128, 128), (1000, 1024 * 16), (4096, 4096))],
    ],
)
def test_nf4_stands_for_torchaos_values(dtype, device, shape):
    weight = to_nf4((torch.randn(shape, dtype=dtype) * 0.02).to(device))
    assert torch.equal(dequantized(weight), weight.get_original_weight())
