"""Sparse MLPs: by hand, against transformers and against every expert computed for every token; loading, compiling and
what they refuse. Packed rows, cached generation, adapters and the export of peft: tests of all families."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from spin.core.dtypes import DTYPES
from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import init_world
from spin.generators import GeneratorContext, SamplingParams, TorchtuneGenerator
from spin.model import build_model, prepare_model, weights_fingerprint
from spin.model.build import compile_each_layer
from spin.model.float8 import Float8Linear, convert_float8
from spin.model.hf import HFStream, export_hf, load_hf_weights, stored_elements
from spin.model.hf_families import LAYOUTS, converter_arguments
from spin.model.moe import MoE, idle_parameters
from spin.model.sharding import full_tensor
from tests.hf_folders import VOCAB_SIZE, decoder, forward_ids, stored_tensors, write_folder
from tests.ranks import run_ranks

NAMES = ["qwen3_moe", "qwen3_moe_raw", "qwen3_moe_mixed"]
SIZES = {"width": 64, "hidden": 32, "experts": 8}


@pytest.fixture
def world():
    return init_world("cpu")


def sparse(top_k=3, normalized=True, dtype=torch.float32, device="cpu", **sizes):
    """Weights of the size that keeps values near 1."""
    model = MoE(**SIZES | sizes, top_k=top_k, normalized=normalized, activation=nn.SiLU())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
    return model.to(device, dtype)


def tokens(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(*shape, SIZES["width"], generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def every_expert(model, x):
    """The formula, in the dtype of its arguments: each expert for each token, times its probability or zero."""
    probabilities = F.linear(x, model.router).softmax(-1)
    shares, chosen = probabilities.topk(model.top_k, -1)
    if model.normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    weights = torch.zeros_like(probabilities).scatter(-1, chosen, shares)
    gate_up, down = (weight.unflatten(0, (model.experts, -1)) for weight in (model.gate_up, model.down))
    gate, up = torch.einsum("bsd,ehd->bseh", x, gate_up).chunk(2, -1)
    return torch.einsum("bse,bsed->bsd", weights, torch.einsum("bseh,edh->bsed", F.silu(gate) * up, down))


def gradients(model, forward, x):
    """Of the input and every parameter, for a loss that weighs each number differently."""
    x = x.detach().requires_grad_()
    out = forward(x)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    model.zero_grad()
    return found


def from_folder(folder, world, compute_dtype=torch.float32, **options):
    model = build_model({"_component_": "spin.model.from_hf", "path": str(folder)}, torch.float32)
    prepare_model(model, world, compute_dtype=compute_dtype, **options)
    load_hf_weights(model, folder, "HF", world=world)
    return model


def test_by_hand():
    """Logits (0, log 2, log 4) are probabilities 1/7, 2/7 and 4/7. Expert e gives e * relu(x) * x, its up being e: with
    x = 2, 0, 4 and 8; the two best sum to 4/7 * 8 + 2/7 * 4 = 40/7, and divided by 6/7 to 40/6."""
    for normalized, expected in ((False, 40 / 7), (True, 40 / 6)):
        model = MoE(1, 1, 3, 2, normalized, nn.ReLU())
        with torch.no_grad():
            model.router.copy_(torch.tensor([[1.0], [2.0], [4.0]]).log() / 2)
            model.gate_up.copy_(torch.tensor([[1.0], [0.0], [1.0], [1.0], [1.0], [2.0]]))  # gate and up of each
            model.down.fill_(1.0)
        torch.testing.assert_close(model(torch.full((1, 1, 1), 2.0)), torch.full((1, 1, 1), expected))


@pytest.mark.parametrize(("top_k", "normalized"), [(1, False), (3, True), (8, True)])
def test_values_and_gradients_are_those_of_every_expert(top_k, normalized):
    model, x = sparse(top_k, normalized), tokens(2, 7)
    torch.testing.assert_close(model(x), every_expert(model, x))
    torch.testing.assert_close(
        gradients(model, model, x), gradients(model, lambda x: every_expert(model, x), x), rtol=1e-4, atol=1e-5
    )


def test_experts_without_a_token_have_no_gradient():
    model, x = sparse(top_k=1), tokens(1, 1)
    found = gradients(model, model, x)
    used = F.linear(x[0, 0], model.router).argmax()
    for name in ("gate_up", "down"):
        rows = found[name].unflatten(0, (SIZES["experts"], -1)).abs().amax((1, 2))
        assert rows[used] > 0 and rows.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_the_others(dtype):
    """In another row, at another place, among other tokens."""
    model, x = sparse(dtype=dtype), tokens(1, 40, dtype=dtype)
    alone = torch.cat([model(x[:, i : i + 1]) for i in range(40)], 1)
    among = model(torch.cat([tokens(1, 9, dtype=dtype, seed=2), x.flip(1)], 1))[:, 9:].flip(1)
    tolerance = 4 * torch.finfo(dtype).eps
    for got in (model(x), among):
        torch.testing.assert_close(got, alone, rtol=tolerance, atol=tolerance)


def test_of_equally_probable_experts_the_first_ones_are_taken():
    model = sparse(top_k=2)
    with torch.no_grad():
        model.router[2:] = model.router[1]
        model.router[0] = -model.router[1]
    x = tokens(1, 64)
    x = x * F.linear(x, model.router[1:2]).sign()  # expert 0 is never among the best
    pair = sparse(top_k=2)
    with torch.no_grad():  # of experts that compute what 1 and 2 do
        for whole, part in zip(pair.parameters(), model.parameters(), strict=True):
            rows = part.unflatten(0, (SIZES["experts"], -1))
            whole.copy_(rows[[0, 1, 2, 1, 2, 1, 2, 1]].flatten(0, 1))
        pair.router[3:] = -pair.router[1]
        assert torch.equal(model(x), pair(x))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name, tmp_path, world):
    """Of every parameter, with checkpointing as well."""
    twin = write_folder(name, tmp_path)
    ids = forward_ids()
    loss = lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # noqa: E731
    loss(twin(input_ids=ids).logits).backward()
    config = json.loads((tmp_path / "config.json").read_text())
    stored = {key: parameter.grad for key, parameter in twin.named_parameters()}
    expected = LAYOUTS["HF"].to_tune(stored, **converter_arguments(config, "HF"))
    for options in ({}, {"checkpointed_every": 1}):
        model = from_folder(tmp_path, world, **options)
        loss(model(ids)).backward()
        found = {key.replace("_checkpoint_wrapped_module.", ""): p.grad for key, p in model.named_parameters()}
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(full_tensor(found[key]), gradient, rtol=0, atol=1e-4 * scale, msg=key)


def test_layers_compile_as_a_whole(tmp_path, world):
    """Without a break, forward and backward; inductor compiles what this backend traces."""
    write_folder("qwen3_moe", tmp_path)
    model, ids = from_folder(tmp_path, world), forward_ids()
    model(ids).square().mean().backward()
    expected = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compile_each_layer(model, backend="aot_eager")
    model(ids).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.to_local(), gradient)


@pytest.mark.parametrize("name", NAMES)
def test_files_with_all_experts_in_one_tensor(name, tmp_path, world):
    """As transformers 5 has them in memory."""
    twin = write_folder(name, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    single, stored = from_folder(tmp_path / "in", world), stored_tensors(tmp_path / "in")
    elements = stored_elements(tmp_path / "in")
    tensors = {key: tensor.contiguous() for key, tensor in twin.state_dict().items()}
    if name == "qwen3_moe_mixed":
        del tensors["lm_head.weight"]  # tied
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.experts.gate_up_proj" in tensors
    model = from_folder(tmp_path / "in", world)
    assert weights_fingerprint(model) == weights_fingerprint(single)
    assert stored_elements(tmp_path / "in") == elements
    export_hf(model, tmp_path / "in", tmp_path / "out", "HF", dtype=torch.float32, world=world)
    written = stored_tensors(tmp_path / "out")
    assert written.keys() == stored.keys() and all(torch.equal(written[key], stored[key]) for key in stored)


def test_a_stream_has_the_names_of_single_experts(tmp_path, world):
    write_folder("qwen3_moe", tmp_path)
    model, stored = from_folder(tmp_path, world), stored_tensors(tmp_path)
    named = ((name, full_tensor(parameter.detach())) for name, parameter in model.named_parameters())
    got = dict(HFStream(model, tmp_path, "HF").convert(named))
    assert got.keys() == stored.keys() and all(torch.equal(got[key], stored[key]) for key in stored)


@pytest.mark.slow
def test_two_ranks(tmp_path, subprocess_env):
    write_folder("qwen3_moe_mixed", tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    run_ranks("experts.py", subprocess_env, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_damaged_expert_is_named(damage, tmp_path, world):
    write_folder("qwen3_moe", tmp_path)
    key, tensors = "model.layers.1.mlp.experts.4.up_proj.weight", stored_tensors(tmp_path)
    if damage == "missing":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][1:].clone()
    else:
        tensors[key][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        from_folder(tmp_path, world)


def test_what_does_not_go_with_experts_is_refused(tmp_path):
    write_folder("qwen3_moe_mixed", tmp_path)
    section = {"_component_": "spin.model.from_hf", "path": str(tmp_path), "lora_attn_modules": ["q_proj"]}
    for key, words in (("apply_lora_to_mlp", "attention alone"), ("quantize_base", "base_dtype=bf16")):
        with pytest.raises(ConfigError, match=f"model.{key}=true: .*{words}"):
            build_model({**section, key: True}, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
    with pytest.raises((CheckpointError, ConfigError), match="num_experts_per_tok is 9; expected 1 to num_experts=5"):
        build_model(section, torch.float32)


def test_float8_leaves_router_and_experts_alone():
    model = decoder("qwen3_moe", {"moe_intermediate_size": 32, "num_experts": 16, "head_dim": 32})
    names = list(model.state_dict())
    assert convert_float8(model, torch.device("cpu")) == 8  # q, k, v and output of two layers
    assert not any(isinstance(module, Float8Linear) for layer in model.layers for module in layer.mlp.modules())
    assert list(model.state_dict()) == names


def test_idle_parameters():
    """Two layers, 3 of 6 experts idle, of three matrices of 24 * 64 numbers."""
    assert idle_parameters(decoder("qwen3_moe")) == 2 * 3 * 3 * 24 * 64
    assert idle_parameters(decoder("qwen3")) == 0


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [{}, {"width": 1024, "hidden": 256, "experts": 64}], ids=["small", "large"])
def test_grouped_products_equal_the_loop(sizes):
    """bf16 against fp32 with the same numbers, and logits that no rounding changes; most experts of the small row have
    no token."""
    model = sparse(dtype=torch.bfloat16, device="cuda", **sizes)
    exact = sparse(device="cuda", **sizes)
    experts, width = model.router.shape
    with torch.no_grad():
        model.router.copy_(torch.eye(experts, width))
        for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    draw = torch.Generator().manual_seed(4)
    for rows in (1, 300):
        x = torch.randn(1, rows, width, generator=draw).bfloat16().cuda()
        x[..., :experts] = torch.rand(rows, experts, generator=draw).argsort(-1).cuda() / 16
        found = gradients(model, model, x) | {"out": model(x).detach()}
        expected = gradients(exact, exact, x.float()) | {"out": exact(x.float()).detach()}
        for name, value in expected.items():
            error = (found[name].float() - value).norm() / value.norm()
            assert error < 0.015, (name, rows, error.item())
        idle = expected["down"].unflatten(0, (model.experts, -1)).abs().amax((1, 2)) == 0
        assert idle.any() == (rows == 1)
        assert not found["down"].unflatten(0, (model.experts, -1))[idle].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_steps_are_recorded_and_choose_what_whole_forwards_do(dtype, caplog):
    """bf16 takes the grouped product, fp32 reads every expert; neither waits for the GPU, which recording forbids."""
    model = decoder("qwen3_moe", {"moe_intermediate_size": 32, "hidden_size": 64, "head_dim": 32})
    model = model.to("cuda", DTYPES[dtype])
    for module in model.modules():  # tables stay fp32, as in a sharded model
        if hasattr(module, "rope_init"):
            with torch.device("cuda"):
                module.rope_init()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=draw).tolist() for n in (3, 30, 12, 1, 18, 25, 7)]
    generator = TorchtuneGenerator(GeneratorContext(model, torch.device("cuda", 0), 128, str), batch_size=3)
    generator.wake()
    got = generator.generate(prompts, SamplingParams(temperature=0, max_new_tokens=40), [0] * len(prompts))
    assert not caplog.records, caplog.text
    assert generator.slots.graphs
    for prompt, response in zip(prompts, got, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.token_ids], device="cuda"))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(response.token_ids, device="cuda")[:, None])[:, 0]
        gap = logits.amax(-1) - chosen
        if dtype == "fp32":
            assert gap.max() < 2e-3
        else:  # another expert may be as probable after rounding
            assert gap.median() < 0.02 and gap.quantile(0.9) < logits.std() / 4
