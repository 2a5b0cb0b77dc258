"""The embedded generator on a GPU: kernels against PyTorch, recorded steps against steps as they are, and memory.

Greedy tokens in fp32 are compared one by one. Another number of rows can round a logit differently, so where two
runs part, the two tokens may be as good as equally probable (``_same``); anything else fails, with the place.
"""

import copy
import gc
import logging
from dataclasses import replace

import pytest
import torch

from spin.generators.fused import fused
from spin.generators.generator import GeneratorContext, SamplingParams
from spin.generators.sampling import sample_tokens
from spin.generators.slots import Slots
from spin.generators.torchtune import TorchtuneGenerator
from spin.model.attention import generation_kernels, patch_attention
from spin.model.gemma2 import fix_gemma2_softcap
from spin.model.modules import Rope
from tests.families import MAX_SEQ_LEN, MODELS, VOCAB_SIZE

pytestmark = pytest.mark.gpu

EOS = 2
TIE = 2e-3  # difference of two logits that rounding in fp32 may turn round
GREEDY = SamplingParams(temperature=0, max_new_tokens=48, stop_token_ids=(EOS,))


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained).cuda()


@pytest.fixture
def make(model, tokenizer):
    def build(model=model, max_seq_len=512, **arguments):
        context = GeneratorContext(model, torch.device("cuda", 0), max_seq_len, tokenizer.decode)
        return TorchtuneGenerator(context, **arguments)

    return build


@pytest.fixture
def many(prompts):
    """90 prompts of 2 to 100 tokens."""
    long = [token for prompt in prompts for token in prompt]
    return [(prompts[i % 9] + long[i:])[: 2 + 37 * i % 99] for i in range(90)]


def _ids(responses):
    return [response.token_ids for response in responses]


def _same(got, expected, model, prompts):
    """Equal, or apart from a token on whose logit in a forward of the whole sequence equals the other one's."""
    parted = 0
    for i, (prompt, left, right) in enumerate(zip(prompts, _ids(got), _ids(expected), strict=True)):
        if left == right:
            continue
        parted += 1
        place = next((t for t, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        assert place is not None, f"prompt {i}: one of {left} and {right} is longer"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + right[:place]], device="cuda"))[0, -1]
        gap = (logits[right[place]] - logits[left[place]]).abs().item()
        best = logits.topk(3)
        assert gap < TIE, (
            f"prompt {i} of {len(prompt)} tokens, token {place}: {left[place]} instead of {right[place]}, logits "
            f"{gap:.4f} apart; the best are {best.indices.tolist()} with {best.values.tolist()}. Before: {left[:place]}"
        )
    assert parted <= len(prompts) // 10, f"{parted} of {len(prompts)} responses part at a tie"


def _recorded(generator):
    """Sizes of the graphs; only while awake."""
    return sorted(size for size, _ in generator.slots.graphs)


# --- the kernels ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("h", "n_kv", "head_dim", "capacity", "softcap", "window"),
    [
        (32, 8, 64, 700, None, None),  # Llama 3.2 1B
        (32, 8, 128, 300, None, None),
        (14, 2, 64, 300, None, None),  # Qwen2.5 0.5B
        (9, 3, 64, 70, None, None),  # SmolLM2
        (4, 4, 96, 130, None, None),  # Phi 3 mini
        (8, 4, 256, 300, 50.0, 100),  # Gemma 2 2B
        (8, 4, 256, 300, 50.0, None),
        (4, 2, 16, 40, None, 8),
    ],
)
def test_kernel_equals_pytorch(dtype, h, n_kv, head_dim, capacity, softcap, window):
    from spin.model.decode_kernels import attend_slots

    draw = torch.Generator("cuda").manual_seed(0)
    n, slots = 5, 7
    q = torch.randn(n, 1, h, head_dim, device="cuda", generator=draw).transpose(1, 2).to(dtype)
    k, v = (torch.randn(slots, n_kv, capacity, head_dim, device="cuda", generator=draw).to(dtype) for _ in "kv")
    positions = torch.tensor([0, capacity - 1, 1, capacity // 2, 17], device="cuda")
    indices = torch.arange(capacity, device="cuda")
    visible = indices <= positions[:, None]
    if window:
        visible &= indices > positions[:, None] - window
    # what nobody may see is not a number
    k[:n].masked_fill_(~visible[:, None, :, None], torch.nan)
    v[:n].masked_fill_(~visible[:, None, :, None], torch.nan)
    got = attend_slots(q, k, v, positions, scale=head_dim**-0.5, softcap=softcap, window=window)
    keys, values = (t[:n].nan_to_num().double().repeat_interleave(h // n_kv, 1) for t in (k, v))
    scores = q.double() @ keys.transpose(2, 3) * head_dim**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1) @ values
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("h", "n_kv", "head_dim", "pairs", "interleaved"),
    [
        (32, 8, 64, 32, True),  # Llama 3.2 1B
        (14, 2, 64, 32, False),  # Qwen2.5 0.5B
        (4, 4, 96, 48, False),  # Phi 3 mini
        (4, 2, 80, 10, False),  # some dimensions are not rotated
        (4, 2, 80, 10, True),
    ],
)
def test_rotation_into_the_cache_equals_separate_steps(dtype, cache_dtype, h, n_kv, head_dim, pairs, interleaved):
    """Bit for bit, for a group of prompts and for a step, whose rows are at positions of their own."""
    from spin.model.decode_kernels import rotate, rotate_into_cache

    draw = torch.Generator("cuda").manual_seed(0)
    theta = 1.0 / 10000 ** (torch.arange(pairs) / pairs)
    with torch.device("cuda"):
        rope = Rope(lambda: (theta, 1.1), 50, interleaved)
    rotary = {"table": rope.cache, "interleaved": interleaved}
    slots = torch.tensor([4, 0, 3], device="cuda")
    some = torch.tensor([[0], [49], [17]], device="cuda")
    for s, input_pos, into in ((7, None, 2), (7, None, slots), (1, some, 0)):
        q, k, v = (torch.randn(3, s, n, head_dim, device="cuda", generator=draw).to(dtype) for n in (h, n_kv, n_kv))
        keys, values = (torch.zeros(6, n_kv, 60, head_dim, device="cuda", dtype=cache_dtype) for _ in "kv")
        got = rotate_into_cache(q, k, v, input_pos, keys, values, into, **rotary)
        for rotated, x in zip(got, (q, k), strict=True):
            assert torch.equal(rotated, rotate(x, input_pos, **rotary))
            wide = rope(x.float(), input_pos=input_pos)
            torch.testing.assert_close(
                rotated.float(), wide.to(dtype).float(), rtol=1e-5 if x.itemsize > 2 else 1e-2, atol=1e-6
            )
        rows = into if isinstance(into, torch.Tensor) else torch.arange(into, into + 3, device="cuda")
        places = torch.arange(s, device="cuda").expand(3, s) if input_pos is None else input_pos
        for cache, new in ((keys, got[1]), (values, v)):
            expected = torch.zeros_like(cache)
            expected[rows[:, None], :, places] = new.to(cache_dtype)
            assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, min_new_tokens=2, stop_token_ids=(5, 128_000)),
        SamplingParams(banned_token_ids=(5, *range(100, 160))),
        SamplingParams(banned_token_ids=(*range(3, 49152, 999), *range(47_000, 49_152))),  # two blocks of the kernel
    ],
)
@pytest.mark.parametrize("vocab_size", [160, 49152, 128256])
def test_drawn_tokens_equal_pytorchs(sampling, vocab_size, dtype):
    """The same uniform numbers, 0 and the largest below 1 among them, and stop tokens that are probable."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, vocab_size, generator=draw).mul(2)
    logits[:, 5] += 14
    logits = logits.to(dtype)
    uniforms = torch.rand(200, dtype=torch.float64, generator=draw)
    uniforms[0], uniforms[1] = 0, 1 - 2**-53
    for name in ("stop_token_ids", "banned_token_ids"):
        sampling = replace(sampling, **{name: tuple(i for i in getattr(sampling, name) if i < vocab_size)})
    new_tokens = torch.arange(200) % 4
    expected = sample_tokens(logits, sampling, uniforms, new_tokens=new_tokens)
    got = sample_tokens(logits.cuda(), sampling, uniforms.cuda(), new_tokens=new_tokens.cuda()).cpu()
    different = (got != expected).nonzero()[:, 0].tolist()
    assert len(different) <= 1, [(i, uniforms[i].item(), got[i].item(), expected[i].item()) for i in different]
    assert not set(got.tolist()) & set(sampling.banned_token_ids)
    if sampling.min_new_tokens:
        assert not (got[new_tokens < 2] == 5).any() and (got[new_tokens >= 2] == 5).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", MODELS)
def test_fused_modules_equal_torchtunes(name, dtype, tolerance):
    """Logits of whole sequences, positions counted and given; bf16 is as near to fp32 as torchtune's own modules."""
    exact = MODELS[name]().cuda()
    model = MODELS[name]().to("cuda", dtype)
    for module in model.modules():  # tables stay fp32, as in a sharded model
        if hasattr(module, "rope_init"):
            with torch.device("cuda"):
                module.rope_init()
    patch_attention(exact)
    patch_attention(model)
    draw = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (3, 21), device="cuda", generator=draw)
    positions = torch.randint(0, MAX_SEQ_LEN, (3, 21), device="cuda", generator=draw)
    mask = torch.ones(3, 21, 21, dtype=torch.bool, device="cuda").tril()
    with torch.no_grad():
        for arguments in ({}, {"input_pos": positions, "mask": mask}):
            expected = exact(tokens, **arguments)
            own = model(tokens, **arguments)
            with fused(model, generation_kernels("cuda")):
                assert any("forward" in vars(module) for module in model.modules())
                got = model(tokens, **arguments)
            assert torch.equal(model(tokens, **arguments), own)  # as before
            scale = expected.std()
            assert (got - expected).std() < max(tolerance * scale, 1.2 * (own - expected).std())


# --- recorded steps ---


def test_recorded_steps_equal_steps_as_they_are(make, model, many, caplog):
    """64 slots for 90 prompts: refills, then fewer and fewer rows, so that all three sizes are used."""
    assert generation_kernels("cuda")
    expected = make(batch_size=64, cuda_graphs=False).generate(many, GREEDY, [0] * 90)
    generator = make(batch_size=64)
    generator.wake()
    with caplog.at_level(logging.WARNING):
        got = generator.generate(many, GREEDY, [0] * 90)
    assert not caplog.records, caplog.text
    assert _recorded(generator) == [16, 32, 64]
    _same(got, expected, model, many)
    again = generator.generate(many, GREEDY, [0] * 90)
    assert _ids(again) == _ids(got)  # replayed from the first step on
    generator.sleep()


def test_gpu_equals_cpu(make, model, trained, tokenizer, many):
    context = GeneratorContext(trained, torch.device("cpu"), 512, tokenizer.decode)
    expected = TorchtuneGenerator(context, batch_size=32).generate(many[:30], GREEDY, [0] * 30)
    _same(make(batch_size=16).generate(many[:30], GREEDY, [0] * 30), expected, model, many[:30])


def test_batch_does_not_matter(make, model, many):
    expected = make(batch_size=64).generate(many, GREEDY, [0] * 90)
    for batch_size in (1, 3, 16, 50):
        _same(make(batch_size=batch_size).generate(many, GREEDY, [0] * 90), expected, model, many)


FILTERED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "min_new_tokens": 5}


@pytest.mark.parametrize("changes", [{}, {**FILTERED, "logprobs": True}], ids=["plain", "filtered"])
def test_seeds_alone_decide(make, many, changes, caplog):
    seeds, sampling = list(range(90)), SamplingParams(max_new_tokens=24, stop_token_ids=(EOS,), **changes)
    with caplog.at_level(logging.WARNING):
        expected = make(batch_size=64, cuda_graphs=False).generate(many, sampling, seeds)
        got = make(batch_size=32).generate(many[::-1], sampling, seeds[::-1])[::-1]
    assert not caplog.records, caplog.text  # top_k, top_p and the rest can be recorded
    different = [i for i in range(90) if got[i].token_ids != expected[i].token_ids]
    # a uniform number may fall between two roundings of a cumulative probability, hardly ever
    assert len(different) <= 2, [(i, got[i].token_ids, expected[i].token_ids) for i in different[:3]]
    for i in set(range(90)) - set(different) if sampling.logprobs else ():
        assert got[i].logprobs == pytest.approx(expected[i].logprobs, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_families(name, caplog):
    model = MODELS[name]()
    fix_gemma2_softcap(model)
    model = model.cuda()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB_SIZE, (n,), generator=draw).tolist() for n in (3, 30, 12, 1, 18, 25, 7)]
    sampling = SamplingParams(temperature=0, max_new_tokens=40)
    context = GeneratorContext(model, torch.device("cuda", 0), MAX_SEQ_LEN, str)
    generator = TorchtuneGenerator(context, batch_size=3)
    generator.wake()
    with caplog.at_level(logging.WARNING):
        got = generator.generate(prompts, sampling, [0] * 7)
    assert not caplog.records, caplog.text
    assert _recorded(generator) == [3]
    for prompt, response in zip(prompts, got, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.token_ids], device="cuda"))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(response.token_ids, device="cuda")[:, None])[:, 0]
        gap = (logits.amax(-1) - chosen).max().item()
        assert gap < TIE, f"prompt of {len(prompt)} tokens: a token {gap:.4f} below the best"


def test_without_the_kernel(make, model, many, monkeypatch):
    """PyTorch's attention over rounded lengths, a graph for each of them; rows of up to 148 tokens."""
    expected = make(batch_size=32).generate(many, GREEDY, [0] * 90)
    monkeypatch.setattr("spin.generators.torchtune.generation_kernels", lambda kind: None)
    monkeypatch.setattr("spin.generators.torchtune._LENGTH_STEP", 64)
    generator = make(batch_size=32)
    generator.wake()
    _same(generator.generate(many, GREEDY, [0] * 90), expected, model, many)
    assert len({length for _, length in generator.slots.graphs}) > 1
    generator.sleep()


def test_changed_weights_and_longer_prompts(make, model, many):
    """Graphs outlive a call; weights that change in place are seen, and a longer prompt makes a larger cache."""
    generator = make(batch_size=16)

    def check(prompts):
        seeds = [0] * len(prompts)
        expected = make(batch_size=16, cuda_graphs=False).generate(prompts, GREEDY, seeds)
        _same(generator.generate(prompts, GREEDY, seeds), expected, model, prompts)
        return generator.slots

    generator.wake()
    slots = check(many[:40])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert check(many[:40]) is slots
    assert check(many[:20] + [(many[88] * 400)[:400]]) is not slots
    generator.sleep()


def test_memory_is_given_back(make, many):
    generator = make(batch_size=64)
    generator.generate(many, GREEDY, [0] * 90)  # libraries take their workspaces once
    gc.collect()  # what earlier tests left
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    generator.wake()
    generator.generate(many, GREEDY, [0] * 90)
    layers = generator.slots.view.layers
    cache = sum(kv.nbytes for layer in layers for kv in (layer.k, layer.v))
    assert cache == 4 * 2 * 64 * 256 * 2 * 32 * 4  # layers, k and v, slots, capacity, heads, head_dim, float32
    assert torch.cuda.memory_allocated() >= allocated + cache
    generator.sleep()
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + 2 * 2**20


def test_running_out_of_memory(make, model, many, caplog):
    """The cache of 1024 slots does not fit, nor do all of its halves; nothing but the log tells."""
    expected = make(batch_size=64).generate(many, GREEDY, [0] * 90)
    work, seeds = many * 12, [0] * 1080  # 1080 prompts, so that all 1024 slots are asked for
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
    generator = make(batch_size=1024)  # a cache of 512 MiB
    try:
        with caplog.at_level(logging.WARNING):
            got = generator.generate(work, GREEDY, seeds)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "batch_size=512" in caplog.text
    assert generator.batch_size <= 256
    _same(got, expected * 12, model, work)


@pytest.mark.parametrize(("free_mib", "slots"), [(10**6, 1024), (400, 576), (1, 32)])
def test_auto_takes_what_is_free(make, model, many, monkeypatch, caplog, free_mib, slots):
    """A slot takes 512 KiB for 256 tokens (4 layers, k and v, 2 heads of 32, float32) and 40 for logits (1,024 tokens
    of 40 bytes): 0.8 x 400 MiB hold 593, which is nine times 64."""
    expected = make(batch_size=64).generate(many, GREEDY, [0] * 90)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_mib * 2**20, 10**12))
    generator = make(batch_size="auto")
    with caplog.at_level(logging.INFO):
        _same(generator.generate(many, GREEDY, [0] * 90), expected, model, many)
    assert generator.batch_size == slots
    assert (f"{slots} sequences" in caplog.text) == (slots != 32)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_sharded_compiled_model(make, trained, tokenizer, many, caplog, checkpointed):
    """FSDP2 on one rank in bf16, as recipes prepare a model: recorded without a complaint, and fit for training."""
    from spin.core.ranks import init_world, shutdown
    from spin.generators.engines import policy_loaded
    from spin.model.build import checkpoint_activations, compile_each_layer
    from spin.model.sharding import shard_model

    world = init_world("cuda")
    try:
        model = copy.deepcopy(trained).cuda()
        patch_attention(model)
        if checkpointed:
            checkpoint_activations(model)
        compile_each_layer(model, backend="eager")
        shard_model(model, world, compute_dtype=torch.bfloat16)
        generator = TorchtuneGenerator(GeneratorContext(model, world.device, 512, tokenizer.decode), batch_size=32)
        for _ in range(2):  # two iterations, a training step in between
            with caplog.at_level(logging.WARNING), policy_loaded(generator, model):
                first = generator.generate(many, GREEDY, [0] * 90)
                slots = generator.slots
                assert _recorded(generator) == [16, 32]
                assert _ids(generator.generate(many, GREEDY, [0] * 90)) == _ids(first)
                assert generator.slots is slots
            assert not [r for r in caplog.records if "recorded" in r.getMessage()], caplog.text
            assert generator.slots is None
            del slots
            model(torch.tensor([many[0]], device="cuda")).float().sum().backward()
            for parameter in model.parameters():
                assert parameter.grad.to_local().isfinite().all()
                parameter.grad = None
        exact = _ids(make(model=copy.deepcopy(trained).cuda()).generate(many, GREEDY, [0] * 90))
        agree = sum(a[0] == b[0] for a, b in zip(_ids(first), exact, strict=True))
        assert agree > 75, f"only {agree} of 90 first tokens in bf16 are those of fp32"
    finally:
        shutdown()


def test_what_cannot_be_recorded_runs_as_it_is(make, model, many, monkeypatch, caplog):
    """Last in this file: what a recording that fails leaves behind could disturb another one."""
    expected = make(batch_size=16).generate(many, GREEDY, [0] * 90)
    advance = Slots._advance

    def waits(self, n, length):
        advance(self, n, length)
        self._last.sum().item()

    monkeypatch.setattr(Slots, "_advance", waits)
    with caplog.at_level(logging.WARNING):
        got = make(batch_size=16).generate(many, GREEDY, [0] * 90)
    assert caplog.text.count("cannot be captured as a CUDA graph") == 1
    _same(got, expected, model, many)
    monkeypatch.undo()
    _same(make(batch_size=16).generate(many, GREEDY, [0] * 90), expected, model, many)
