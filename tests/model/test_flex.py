"""FlexAttention over packed rows: the block structure, one compiled program per layer, and, on a GPU, its numbers."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from spin.core.errors import ConfigError
from spin.core.ranks import init_world, shutdown
from spin.data import Pair, Response, pack_batch, pack_row
from spin.model.attention import patch_attention
from spin.model.build import build_model, choose_attention, compile_each_layer, prepare_model, window_of
from spin.model.flex import flex_unsupported_reason
from spin.model.gemma2 import fix_gemma2_softcap
from spin.pairs.packing import RowLayout
from spin.pairs.row_mask import BLOCK, Segment, row_blocks
from spin.reference.logprobs import pair_objective, response_logps
from tests.families import FAMILIES, MODELS

CPU = torch.device("cpu")


def random_pairs(rng, num, longest, responses=1, vocab=150):
    def ids():
        return rng.integers(1, vocab, rng.integers(1, longest))

    return [
        Pair(f"s{i}", 0, ids(), ids(), [Response(ids(), "stop", -1.0) for _ in range(responses)], -2.0)
        for i in range(num)
    ]


def to_dense(counts, indices):
    """Blocks that lists of blocks name, bool, (nb, nb)."""
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for line, count in enumerate(counts[0, 0]):
        dense[line, indices[0, 0, line, :count].long()] = True
    return dense


@pytest.mark.parametrize("window", [None, 1, 40, 128, 300, 5000])
def test_blocks_are_those_of_the_mask(window):
    """A block is listed if and only if the mask has a True in it, and never as full if it has a False."""
    rng = np.random.default_rng(window or 0)
    for _ in range(15):
        pairs = random_pairs(rng, int(rng.integers(0, 5)), 300, int(rng.integers(1, 4)))
        used = sum(pair.num_tokens for pair in pairs)
        length = max(1, -(-used // BLOCK) + int(rng.integers(0, 2))) * BLOCK
        row = pack_row(pairs, length, RowLayout(flex=True, window=window))
        mask = row.dense_mask()
        blocks = row.blocks
        if window is not None:
            mask &= row.positions[:, None] - row.positions[None, :] < window
            blocks = row.window_blocks
        tiles = mask.view(length // BLOCK, BLOCK, length // BLOCK, BLOCK).transpose(1, 2).flatten(2)
        full = to_dense(blocks.full_kv_num_blocks, blocks.full_kv_indices)
        partial = to_dense(blocks.kv_num_blocks, blocks.kv_indices)
        assert not (partial & full).any()
        assert torch.equal(partial | full, tiles.any(-1))
        assert not (full & ~tiles.all(-1)).any()
        assert torch.equal(to_dense(blocks.q_num_blocks, blocks.q_indices), partial.T)
        assert torch.equal(to_dense(blocks.full_q_num_blocks, blocks.full_q_indices), full.T)


def test_blocks_equal_torchs_own_and_most_full_ones_are_found():
    """A prompt of 300 tokens and responses of 400 and 200: as create_block_mask finds by looking everywhere."""
    pair = Pair("a", 0, range(1, 301), range(1, 401), [Response(range(1, 201), "stop", -1.0)], -1.0)
    row = pack_row([pair], 1024, RowLayout(flex=True))
    mask = row.attention_mask().causal
    torchs = create_block_mask(mask.mask_mod, None, None, 1024, 1024, device="cpu")
    assert torch.equal(mask.to_dense(), torchs.to_dense())
    full = to_dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, to_dense(torchs.full_kv_num_blocks, torchs.full_kv_indices))
    assert full.sum() == 14


def test_a_row_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 128"):
        row_blocks([Segment(0, 100)], 200)


@pytest.mark.parametrize("family", MODELS)
def test_log_probs_equal_those_of_the_dense_mask(family):
    """On the CPU FlexAttention has a forward only; it shows that the mask means the same. fp32: 1e-5 relative."""
    model = prepared(family)
    rows = rows_of(model, flex=True)
    with torch.no_grad():
        for row, dense in zip(rows, rows_of(model, flex=False), strict=True):
            torch.testing.assert_close(response_logps(model, row), response_logps(model, dense), rtol=1e-5, atol=1e-4)


def prepared(family, longest_row=1024):
    model = MODELS[family]().train()
    model.max_seq_len = longest_row  # rows are longer than any position in them
    patch_attention(model)
    fix_gemma2_softcap(model)
    return model


def rows_of(model, flex, device=CPU, seed=0, row_tokens=512, responses=1):
    pairs = random_pairs(np.random.default_rng(seed), 12, 40, responses)
    layout = RowLayout(row_tokens, BLOCK, flex=flex, window=window_of(model))
    return [row.to(device) for row in pack_batch(pairs, layout)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_compile_whole_and_once(family):
    """No graph break (an error with fullgraph), one program for all layers that are alike and all rows of a length."""
    torch._dynamo.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    model = prepared(family)
    compile_each_layer(model, backend)
    kinds = 2 if family == "gemma2" else 1  # every second layer of Gemma 2 has a window
    with torch.no_grad():
        first = rows_of(model, flex=True)
        response_logps(model, first[0])
        assert len(programs) == kinds
    others = [*first[1:], *rows_of(model, flex=True, seed=1)]
    # Another row of the same length has another mask: nothing may be compiled again.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for row in others:
            if row.tokens.numel() == first[0].tokens.numel():
                response_logps(model, row)
    assert len(programs) == kinds


def test_dense_where_flex_cannot_and_says_so(caplog):
    from spin.core.ranks import init_world, shutdown

    model = prepared("llama3_2")
    world = init_world("cpu")
    try:
        with caplog.at_level("INFO"):
            assert choose_attention(model, world, torch.bfloat16) is False
        assert "dense masks, because FlexAttention has no backward on the CPU" in caplog.text
        with pytest.raises(ConfigError, match="attention=flex cannot work here: FlexAttention has no backward"):
            choose_attention(model, world, torch.bfloat16, "flex")
    finally:
        shutdown()


def test_reasons_against_flex():
    cuda, model = torch.device("cuda"), prepared("llama3_2")
    assert flex_unsupported_reason(model, cuda, torch.bfloat16) is None
    assert "fp32 compute" in flex_unsupported_reason(model, cuda, torch.float32)
    model.layers[1].attn.head_dim = 8
    assert "layers.1.attn has heads of 8 dimensions" in flex_unsupported_reason(model, cuda, torch.bfloat16)
    model.layers[0].attn.attn_dropout = 0.1
    assert "layers.0.attn has attn_dropout=0.1" in flex_unsupported_reason(model, cuda, torch.bfloat16)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_on_a_gpu_log_probs_and_gradients_equal_the_dense_mask(family, compiled):
    """bf16 against fp32 with dense masks: FlexAttention may be off by no more than bf16 with dense masks is, twice."""
    torch._dynamo.reset()
    device = torch.device("cuda")

    def results(dtype, flex):
        model = prepared(family).to(device, dtype)
        if flex and compiled:
            compile_each_layer(model)
        model.zero_grad()
        logps = []
        for row in rows_of(model, flex, device, responses=2):
            sign = torch.linspace(-1, 1, row.num_responses, device=device, dtype=torch.float64)
            total, row_logps = pair_objective(model, row, lambda x, sign=sign: (x * sign).sum(), 64)
            total.backward()
            logps.append(row_logps)
        return torch.cat(logps), torch.cat([p.grad.flatten().float() for p in model.parameters()])

    exact_logps, exact_grads = results(torch.float32, False)
    dense_logps, dense_grads = results(torch.bfloat16, False)
    flex_logps, flex_grads = results(torch.bfloat16, True)
    off = [relative(flex_logps, exact_logps), relative(flex_grads, exact_grads)]
    allowed = [relative(dense_logps, exact_logps), relative(dense_grads, exact_grads)]
    print(family, compiled, "flex", off, "dense", allowed)
    assert off[0] < 2 * allowed[0] + 1e-4
    assert off[1] < 2 * allowed[1] + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("compile_layers", [False, True])
def test_on_a_gpu_rows_may_have_any_number_of_lengths(compile_layers):
    """As in a run of many batches, with more lengths than torch compiles a function for by default."""
    torch._dynamo.reset()
    sizes = {"vocab_size": 160, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
    sizes |= {"intermediate_dim": 96, "max_seq_len": 4096}
    builder = {"_component_": "torchtune.models.llama3_2.llama3_2", **sizes}
    model = build_model(builder, torch.float32)
    world = init_world("cuda")
    try:
        prepare_model(model, world, compute_dtype=torch.bfloat16, compile_layers=compile_layers)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        pairs = random_pairs(np.random.default_rng(0), 1, 40)
        for length in range(BLOCK, 10 * BLOCK, BLOCK):
            row = pack_row(pairs, length, RowLayout(flex=True)).to(world.device)
            total, _ = pair_objective(model, row, torch.sum, 100)
            total.backward()
            assert total.isfinite()
    finally:
        shutdown()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama3_2", "gemma2"])
def test_on_a_gpu_nothing_is_compiled_again(family):
    torch._dynamo.reset()
    device = torch.device("cuda")
    model = prepared(family).to(device, torch.bfloat16)
    compile_each_layer(model)

    met = set()

    def step(seed):
        for row in rows_of(model, True, device, seed):
            if seed < 6 or row.tokens.numel() in met:
                met.add(row.tokens.numel())
                total, _ = pair_objective(model, row, lambda x: x.sum(), 100)
                total.backward()

    for seed in range(6):
        step(seed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(6, 16):
            step(seed)
