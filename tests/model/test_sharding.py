from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtune.models.phi3 import phi3

from spin.checkpoint import SPINCheckpointer
from spin.core import ranks
from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import init_world
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import (
    accumulating,
    clip_grad_norm,
    materialize,
    named_full_tensors,
    shard_model,
    sharded_modules,
    unsharded,
)
from tests.ranks import run_ranks
from tests.two_ranks.tiny import (
    backward,
    build,
    gradients,
    optimizer_digest,
    rows_reduced,
    sharded,
    tokens,
    use_own_head,
)


@pytest.fixture
def world() -> ranks.World:
    return init_world("cpu")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_init_world_makes_a_group_of_one_and_finds_it_again(world):
    again = init_world("cpu")
    assert (again.rank, again.world_size, again.local_rank, again.is_main) == (0, 1, 0, True)
    assert again.device == torch.device("cpu")
    ranks.shutdown()
    ranks.shutdown()
    assert init_world("cpu").world_size == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"device": device}, "expected 'cpu', 'cuda' or null") for device in ("cuda:1", "mps", "")),
        *(({"device": "cpu", "replicas": replicas}, "must divide") for replicas in (0, 2)),
        pytest.param(
            {"device": "cuda"},
            "sees no GPU. Set device=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_init_world_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        init_world(**arguments)


def test_sharded_gradients_are_those_of_a_plain_model(world):
    plain, model = build(), sharded(world)
    use_own_head(plain)
    use_own_head(model)
    backward(plain, world, step=0)
    backward(model, world, step=0)
    assert_equal(gradients(model), gradients(plain))


def test_bf16_compute_keeps_fp32_shards(world):
    model = sharded(world, torch.bfloat16)
    before = weights_fingerprint(model)
    backward(model, world, step=0)
    gradients(model)  # checks that they are float32
    assert weights_fingerprint(model) == before == weights_fingerprint(build())


@pytest.mark.parametrize("gather", [lambda model: contextlib.nullcontext(), unsharded])
def test_no_gathered_copy_survives_a_forward_without_gradients(world, gather):
    """It would be used in the next forward, stale."""
    model = sharded(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outputs = []
    for _ in range(2):
        with torch.no_grad(), gather(model):
            outputs.append(model(tokens(0, 0)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        backward(model, world, step=0)
        with torch.no_grad(), gather(model):
            model(tokens(0, 0))
        optimizer.step()
    assert not torch.equal(*outputs)


def number_gathered(model) -> int:
    return sum(not isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_to_accumulate_give_one_gradient(world, dtype):
    expected = None
    for reshard_after_forward in (True, False):
        for unsharded_gradients in (False, True):
            model = sharded(world, dtype, reshard_after_forward)
            backward(model, world, step=0, rows=3, unsharded_gradients=unsharded_gradients)
            found = gradients(model)
            expected = expected or found
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_what_stays_gathered_is_gathered_once_a_step(world):
    """The root (embeddings and last norm: 2 of 20 parameters) always, all with ``reshard_after_forward=False``."""
    for reshard_after_forward, kept in ((True, 2), (False, 20)):
        model = sharded(world, reshard_after_forward=reshard_after_forward)
        seen = []
        with accumulating(model, [0, 1, 2]) as each_row:
            for row in each_row:
                seen.append(number_gathered(model))
                model(tokens(0, row)).sum().backward()
        assert seen == [0, kept, kept] and number_gathered(model) == 0


def test_gradients_are_reduced_with_every_row_or_with_the_last(world):
    assert rows_reduced(sharded(world)) == [True, True, True]
    assert rows_reduced(sharded(world), unsharded_gradients=True) == [False, False, True]


@pytest.mark.parametrize("unsharded_gradients", [False, True])
def test_each_step_sees_the_weights_of_the_last(world, unsharded_gradients):
    """A gathered copy that survived the optimizer's step would give stale losses: compared with a plain model."""
    plain, model = build(), sharded(world, reshard_after_forward=False)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (plain, model)]
    for step in range(3):
        expected = backward(plain, world, step, rows=2)
        found = backward(model, world, step, rows=2, unsharded_gradients=unsharded_gradients)
        assert found == pytest.approx(expected, rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("ending", ["error", "break"])
@pytest.mark.parametrize("unsharded_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_ends_between_rows_leaves_nothing_behind(world, ending, unsharded_gradients, dtype):
    model = sharded(world, dtype, reshard_after_forward=False)
    backward(model, world, step=0)
    expected = gradients(model)
    with contextlib.suppress(KeyError), accumulating(model, [0, 1], unsharded_gradients=unsharded_gradients) as rows:
        for row in rows:
            model(tokens(1, row)).sum().backward()
            if ending == "break":
                break
            raise KeyError
    assert number_gathered(model) == 0
    for row in (tokens(0, 0), tokens(0, 1)):  # without the block: every row is reduced, and sharded again, by itself
        (F.cross_entropy(model(row)[:, :-1].float().flatten(0, 1), row[:, 1:].flatten()) / 2).backward()
        assert number_gathered(model) == 0
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert_equal(gradients(model), expected)


def test_clipping_is_that_of_a_plain_model(world):
    plain, model = build(), sharded(world)
    for each in (plain, model):
        backward(each, world, step=0)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    assert expected > 0.5
    torch.testing.assert_close(clip_grad_norm(model, None), expected)
    torch.testing.assert_close(clip_grad_norm(model, 0.5), expected)
    torch.testing.assert_close(clip_grad_norm(model, 1.0), torch.tensor(0.5))  # small enough by now
    clipped = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, clipped[name], msg=name)


def test_unsharded_gathers_once_and_leaves_everything_as_before(world):
    model = sharded(world)
    backward(model, world, step=0)
    expected = gradients(model)
    calls = []
    for module in sharded_modules(model):
        original = module.unshard
        module.unshard = lambda original=original: (calls.append(1), original())[1]
    with torch.inference_mode(), unsharded(model), unsharded(model):
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        model(tokens(0, 0))
        model(tokens(0, 1))
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert len(calls) == 3  # two layers and the root
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    backward(model, world, step=0)
    assert_equal(gradients(model), expected)
    with pytest.raises(KeyError), unsharded(model):
        raise KeyError
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with unsharded(build()):  # nothing to do for a plain model
        pass


@pytest.mark.parametrize("builder", [build, lambda: phi3(97, 2, 4, 4, 32, 51, 64)])
def test_meta_model_gets_memory_and_rotary_tables(world, builder):
    torch.manual_seed(0)
    plain = builder()
    with torch.device("meta"):
        model = builder()
    shard_model(model, world, compute_dtype=torch.float32)
    materialize(model, world)
    with torch.no_grad():
        for target, source in zip(model.parameters(), plain.parameters(), strict=True):
            target.to_local().copy_(source)
        assert torch.equal(model(tokens(0, 0)), plain(tokens(0, 0)))


def test_materialize_names_buffers_that_nothing_can_fill(world):
    with torch.device("meta"):
        model = build()
    model.layers[1].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    shard_model(model, world, compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"layers\.1\.table"):
        materialize(model, world)


def test_shard_model_refuses_what_it_cannot_do(world):
    with pytest.raises(ConfigError, match="no `layers`"):
        shard_model(torch.nn.Linear(2, 2), world, compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match="Set fsdp_cpu_offload=false"):
        shard_model(build(), world, compute_dtype=torch.float32, cpu_offload=True)


def test_named_full_tensors_are_those_of_a_plain_model(world):
    assert_equal(dict(named_full_tensors(sharded(world))), dict(build().named_parameters()))


def test_a_failing_block_names_the_cause(world):
    with ranks.raise_on_all_ranks(world, CheckpointError):
        pass
    with pytest.raises(CheckpointError, match="disk on fire") as caught:
        with ranks.raise_on_all_ranks(world, CheckpointError):
            raise OSError("disk on fire")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ZeroDivisionError):  # a defect stays what it is
        with ranks.raise_on_all_ranks(world, CheckpointError):
            1 / 0  # noqa: B018


def test_collectives_on_one_rank(world):
    assert ranks.all_reduce_sums({"b": 0.1, "a": 2.0}, world) == {"b": 0.1, "a": 2.0}
    assert ranks.gather_objects("x", world) == ["x"]
    assert ranks.broadcast_object("x", world) == "x"
    ranks.barrier(world)


@pytest.mark.slow
def test_two_ranks(subprocess_env):
    output = run_ranks("sharding.py", subprocess_env)
    assert f"fingerprint {weights_fingerprint(build())}" in output
    assert "RANK" not in os.environ


@pytest.mark.slow
def test_replicas_of_two_shards(subprocess_env, tmp_path, world):
    """They compute what four shards and one rank do, and one rank can go on from their checkpoint."""
    run_ranks("replicas.py", subprocess_env, tmp_path, ranks=4)
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    path = checkpointer.latest()
    model = sharded(world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpointer.load(path, model=model, optimizer=optimizer, world=world)
    state = checkpointer.read_state(path)
    assert weights_fingerprint(model) == state["weights"] != weights_fingerprint(build())
    assert optimizer_digest(model, optimizer) == state["optimizer"]
