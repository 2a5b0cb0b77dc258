from __future__ import annotations

import hashlib
import time

import pytest
import torch
from torch import nn

from spin.core.files import file_sha256, json_fingerprint
from spin.core.ranks import init_world
from spin.model.build import checkpoint_activations
from spin.model.fingerprint import CHUNK_ELEMENTS, position_weighted_sum, weights_fingerprint
from spin.model.sharding import unsharded
from tests.two_ranks.tiny import build, sharded


def test_fingerprint_does_not_depend_on_sharding_or_wrappers():
    """Two ranks: see test_distributed.test_two_ranks."""
    plain = weights_fingerprint(build())
    model = sharded(init_world("cpu"), torch.bfloat16)
    assert weights_fingerprint(model) == plain
    with unsharded(model):
        pass
    assert weights_fingerprint(model) == plain
    wrapped = build()
    checkpoint_activations(wrapped)
    assert weights_fingerprint(wrapped) == plain
    compiled = build()
    compiled.layers[0] = torch.compile(compiled.layers[0])
    assert weights_fingerprint(compiled) == plain


def _change_one_ulp(model: nn.Module) -> None:
    bits = model.layers[1].mlp.w2.weight.data.view(torch.int32)
    bits[-1, -1] += 1


def _change_sign_of_zero(model: nn.Module) -> None:
    model.norm.scale.data[3] *= -1


def _swap_elements(model: nn.Module) -> None:
    weight = model.tok_embeddings.weight.data
    weight[0, 0], weight[96, 31] = weight[96, 31].clone(), weight[0, 0].clone()


def _swap_tensors(model: nn.Module) -> None:
    one, other = model.layers[0].attn.q_proj.weight, model.layers[1].attn.q_proj.weight
    one.data, other.data = other.data, one.data


def _change_dtype(model: nn.Module) -> None:
    model.norm.scale.data = model.norm.scale.data.double()


@pytest.mark.parametrize(
    "change", [_change_one_ulp, _change_sign_of_zero, _swap_elements, _swap_tensors, _change_dtype]
)
def test_fingerprint_shows_every_change(change):
    model = build()
    before = weights_fingerprint(model)
    change(model)
    assert weights_fingerprint(model) != before


def test_fingerprint_covers_persistent_buffers_only():
    model = build()
    before = weights_fingerprint(model)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    assert weights_fingerprint(model) == before
    model.register_buffer("counts", torch.zeros(2, dtype=torch.bool))
    assert weights_fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_sum_is_the_same_in_any_pieces(dtype):
    """Across a chunk's border too: pieces that begin anywhere add up to the total."""
    bits = torch.randint(-100, 100, (2 * CHUNK_ELEMENTS + 77,), generator=torch.Generator().manual_seed(0))
    flat = bits.to(dtype)
    cuts = [0, 1, CHUNK_ELEMENTS - 3, CHUNK_ELEMENTS + 5, 2 * CHUNK_ELEMENTS, flat.numel()]
    pieces = [position_weighted_sum(flat[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert (sum(pieces) - position_weighted_sum(flat, 0)) % 2**64 == 0
    # the same position in two chunks has two weights
    one = torch.zeros(2 * CHUNK_ELEMENTS)
    one[5] = 1
    assert position_weighted_sum(one, 0) != position_weighted_sum(one.roll(CHUNK_ELEMENTS), 0)


def test_json_fingerprint():
    assert json_fingerprint({"b": [1, 2.5], "a": "é"}) == hashlib.sha256(rb'{"a":"\u00e9","b":[1,2.5]}').hexdigest()
    assert json_fingerprint({"a": 1, "b": 2}) == json_fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError):
        json_fingerprint(float("nan"))
    with pytest.raises(TypeError):
        json_fingerprint({1, 2})


def test_file_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"spin" * 1000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"spin" * 1000).hexdigest()


@pytest.mark.real_model
def test_fingerprint_is_fast(real_model):
    from safetensors.torch import load_file

    model = nn.Module()
    for name, tensor in load_file(real_model / "model.safetensors").items():
        model.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.float()))
    weights_fingerprint(model)  # makes the table of weights
    started = time.perf_counter()
    weights_fingerprint(model)
    assert time.perf_counter() - started < 2  # 0.2 s on one core, for 135M parameters
