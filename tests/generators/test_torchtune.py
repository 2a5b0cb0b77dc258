"""The embedded generator: transformers' tokens, whatever the batch; faults; and a model that is left as it was
found."""

import copy
import gc
import json
import logging
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.core.errors import ConfigError, GeneratorError
from spin.generators.generator import Generator, GeneratorContext, SamplingParams
from spin.generators.slots import StepPlan
from spin.generators.torchtune import TorchtuneGenerator
from spin.model.build import checkpoint_activations
from spin.model.gemma2 import fix_gemma2_softcap
from tests.families import FAMILIES, MAX_SEQ_LEN, MODELS, VOCAB_SIZE, load_llama_weights
from tests.generators.conftest import TEXTS

EOS = 2
GREEDY = SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=(EOS,))
FEW = SamplingParams(max_new_tokens=4)


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def make(model, tokenizer):
    def build(model=model, max_seq_len=512, static=False, **arguments):
        kind = StaticGenerator if static else TorchtuneGenerator
        return kind(GeneratorContext(model, torch.device("cpu"), max_seq_len, tokenizer.decode), **arguments)

    return build


class StaticGenerator(TorchtuneGenerator):
    """Steps as a GPU runs them, but for the recording: slots without a sequence, rounded lengths, late tokens."""

    def step_plan(self, slots):
        sizes = {slots, -(-slots // 2), -(-slots // 4)}
        return StepPlan(sizes=tuple(sorted(sizes)), length_step=32, lag=1)


def _ids(responses):
    return [response.token_ids for response in responses]


def _hf_greedy(hf_model, prompt, new_tokens, **arguments):
    ids = torch.tensor([prompt])
    out = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=EOS,
        pad_token_id=0, **arguments,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


# --- the right tokens ---


@pytest.mark.parametrize("static", [False, True])
def test_greedy_equals_transformers(make, hf_model, prompts, static):
    generator = make(batch_size=4, static=static)
    assert isinstance(generator, Generator) and generator.shares_policy_weights
    responses = generator.generate(prompts, replace(GREEDY, max_new_tokens=60), [0] * 9)
    assert _ids(responses) == [_hf_greedy(hf_model, prompt, 60) for prompt in prompts]
    for response in responses:
        assert response.finish_reason == ("stop" if response.token_ids[-1] == EOS else "length")
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    penalized = replace(GREEDY, min_new_tokens=30, repetition_penalty=1.3)
    expected = [_hf_greedy(hf_model, p, 40, repetition_penalty=1.3, min_new_tokens=30) for p in prompts]
    assert _ids(make(batch_size=3, static=static).generate(prompts, penalized, [0] * 9)) == expected


@pytest.mark.parametrize("kind", [TorchtuneGenerator, StaticGenerator])
@pytest.mark.parametrize("name", MODELS)
def test_cached_greedy_equals_full_forwards(name, kind):
    """Rows of different length that come and go; the expected tokens come from whole sequences without a cache."""
    model = MODELS[name]()
    fix_gemma2_softcap(model)
    generator = kind(GeneratorContext(model, torch.device("cpu"), MAX_SEQ_LEN, str), batch_size=3)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB_SIZE, (n,), generator=draw).tolist() for n in (3, 30, 12, 1, 18)]
    got = generator.generate(prompts, SamplingParams(temperature=0, max_new_tokens=20), [0] * 5)
    for prompt, response in zip(prompts, got, strict=True):
        whole = torch.tensor([prompt + response.token_ids])
        with torch.no_grad():
            expected = model(whole)[0, len(prompt) - 1 : -1].argmax(-1)
        assert response.token_ids == expected.tolist()
        assert len(response.token_ids) == 20


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(max_new_tokens=40, stop_token_ids=(EOS,)),
        SamplingParams(
            temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, min_new_tokens=5, max_new_tokens=40,
            stop_token_ids=(EOS,),
        ),
    ],
    ids=["greedy", "plain", "filtered"],
)  # fmt: skip
def test_batch_and_order_do_not_matter(make, prompts, sampling):
    """Batches of 1, 3, 16 and 32, shuffled prompts, other groups of prompts: the same tokens for the same seed."""
    prompts = prompts + prompts[::-1]  # each prompt twice, with two seeds
    seeds = list(range(100, 100 + len(prompts)))
    expected = _ids(make(batch_size=1).generate(prompts, sampling, seeds))
    for static, batch_size, prefill_batch in (
        *((False, "auto", None), (False, 3, None), (False, 16, None), (False, 8, 8)),
        *((True, 1, None), (True, 5, None), (True, 16, None), (True, 8, 3)),
    ):
        generator = make(batch_size=batch_size, prefill_batch=prefill_batch, static=static)
        assert _ids(generator.generate(prompts, sampling, seeds)) == expected
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = make(batch_size=5).generate([prompts[i] for i in order], sampling, [seeds[i] for i in order])
    assert _ids(shuffled) == [expected[i] for i in order]
    if sampling.temperature:
        assert len({tuple(ids) for ids in expected}) > len(prompts) - 2  # the seeds do matter


@pytest.mark.parametrize("static", [False, True])
def test_log_probs_are_those_of_the_unaltered_distribution(make, model, prompts, static):
    sampling = SamplingParams(temperature=0.5, top_k=5, max_new_tokens=12, repetition_penalty=1.2, logprobs=True)
    responses = make(batch_size=4, static=static).generate(prompts, sampling, list(range(len(prompts))))
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response.token_ids]))[0].log_softmax(-1)
        expected = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=1e-4, atol=1e-4)
    assert make(cache_dtype="bf16").generate(prompts[:1], FEW, [0])[0].logprobs is None


def test_cache_grows_and_long_rows_are_right(make, hf_model, tokenizer):
    """A prompt of 150 tokens and one of 5, 90 new tokens each: the cache grows while rows are in it."""
    ids = tokenizer(" ".join(TEXTS * 5)).input_ids
    prompts = [ids[:5], ids[:150], ids[3:20]]
    got = _ids(make(batch_size=2).generate(prompts, replace(GREEDY, max_new_tokens=90), [0] * 3))
    assert got == [_hf_greedy(hf_model, prompt, 90) for prompt in prompts]


# --- where a response ends ---


@pytest.mark.parametrize("static", [False, True])
def test_stop_string_across_tokens(make, tokenizer, prompts, static):
    """The string is the end of one token and the beginning of the next; the response ends with the token that completes
    it."""
    free = make().generate(prompts[:1], SamplingParams(temperature=0, max_new_tokens=24), [0])[0].token_ids
    texts = [tokenizer.decode(free[:n]) for n in range(len(free) + 1)]
    for n in range(3, 20):
        stop = texts[n][-2:] + texts[n + 1][len(texts[n]) :][:1]
        if len(texts[n + 1]) > len(texts[n]) and stop not in texts[n]:
            break
    sampling = SamplingParams(temperature=0, max_new_tokens=24, stop_strings=("never there", stop))
    got = make(static=static).generate(prompts[:1], sampling, [0])[0]
    assert got.token_ids == free[: n + 1]
    assert got.finish_reason == "stop"


def test_a_stop_token_at_the_limit_is_a_stop_and_so_is_its_text(make, hf_model, tokenizer, prompts):
    """The text that is looked at has special tokens, as vLLM's has with ``skip_special_tokens`` off."""
    greedy = [_hf_greedy(hf_model, prompt, 60) for prompt in prompts]
    prompt, expected = next((p, ids) for p, ids in zip(prompts, greedy, strict=True) if ids[-1] == EOS)
    for sampling in (
        replace(GREEDY, max_new_tokens=len(expected)),
        SamplingParams(temperature=0, max_new_tokens=60, stop_strings=(tokenizer.decode([EOS]),)),
    ):
        got = make().generate([prompt], sampling, [0])[0]
        assert (got.token_ids, got.finish_reason) == (expected, "stop")


def test_minimum_lets_early_stop_strings_pass(tokenizer):
    """Each token is a letter. "ab" is complete at tokens 2, 4 and 6; with a minimum of 3 the second one ends it. "aba"
    is at tokens 3, 5 and 7, each time beginning within the one before."""

    class Letters(TransformerDecoder):
        def forward(self, tokens, *, mask=None, input_pos=None):
            a_or_b = (torch.zeros(len(tokens)) if input_pos is None else input_pos[:, 0]).long() % 2
            return torch.nn.functional.one_hot(a_or_b, VOCAB_SIZE).float()

    model = FAMILIES["llama3_2"]()
    model.__class__ = Letters
    context = GeneratorContext(model, torch.device("cpu"), 64, lambda ids: "".join(chr(97 + i) for i in ids))
    for stop, minimum, expected in (
        *(("ab", 0, 2), ("ab", 1, 2), ("ab", 2, 4), ("ab", 3, 4)),
        *(("aba", 2, 3), ("aba", 3, 5), ("aba", 4, 5), ("aba", 5, 7)),
    ):
        sampling = SamplingParams(temperature=0, min_new_tokens=minimum, max_new_tokens=20, stop_strings=(stop,))
        response = TorchtuneGenerator(context).generate([[5]], sampling, [0])[0]
        assert (response.token_ids, response.finish_reason) == ([0, 1, 0, 1, 0, 1, 0][:expected], "stop")


def test_the_context_truncates_the_response(make, prompts):
    prompt = (prompts[4] * 10)[:37]
    got = make(max_seq_len=40).generate([prompt, prompts[2]], SamplingParams(max_new_tokens=9), [0, 1])
    assert [(len(c.token_ids), c.finish_reason) for c in got] == [(3, "length"), (9, "length")]
    # the model's own limit holds too
    got = make(max_seq_len=10_000).generate([(prompt * 20)[:511]], SamplingParams(max_new_tokens=9), [0])
    assert len(got[0].token_ids) == 1


# --- faults ---


def test_prompts_without_room_are_named(make, prompts):
    generator = make(max_seq_len=10)
    with pytest.raises(GeneratorError, match=r"prompt 1 has 10 tokens and leaves no room for a response.*at most 9"):
        generator.generate([[1] * 9, [1] * 10, [1] * 12], SamplingParams(), [0] * 3)
    with pytest.raises(GeneratorError, match="prompt 1 is empty"):
        generator.generate([[1], []], SamplingParams(), [0, 0])
    with pytest.raises(GeneratorError, match="2 prompts and 1 seeds"):
        generator.generate([[1], [1]], SamplingParams(), [0])
    assert generator.generate([], SamplingParams(), []) == []


def watch(model, runs_out=lambda shapes: False):
    """Shapes of the tokens of the model's forwards from now on; it runs out of memory where ``runs_out`` says so."""
    forward, shapes = model.forward, []

    def watched(tokens, **arguments):
        shapes.append(tuple(tokens.shape))
        if runs_out(shapes):
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB.")
        return forward(tokens, **arguments)

    model.forward = watched
    return shapes


def test_prompts_are_read_in_groups_of_so_many_tokens(make, model, prompts, monkeypatch):
    """Longest first, padded to the longest of a group; a group of one may be longer than the limit."""
    lengths = [20, 9, 8, 8, 8, 3, 2]
    shapes = watch(model)
    monkeypatch.setattr("spin.generators.torchtune._PREFILL_TOKENS", 18)
    make(batch_size=8, prefill_batch=8).generate([[5] * n for n in lengths], SamplingParams(max_new_tokens=1), [0] * 7)
    assert shapes == [(1, 20), (2, 9), (2, 8), (2, 3)]


def test_a_step_late_costs_no_step_at_the_limit(make, model, prompts):
    """Rows that reach their limit leave when the step is launched: 5 rows of 4 tokens take 1 + 3 forwards."""
    shapes = watch(model)
    got = make(static=True, prefill_batch=5).generate(prompts[:5], FEW, [0] * 5)
    assert [len(response.token_ids) for response in got] == [4] * 5
    assert [rows for rows, _ in shapes] == [5] * 4


@pytest.mark.parametrize("static", [False, True])
def test_cache_outlives_a_call_while_awake(make, model, prompts, static):
    """Shards of prompts one after another, weights changed in place in between, then a longer prompt, then other
    sampling; the expected tokens are those of a generator that keeps nothing."""
    sampling, other = SamplingParams(max_new_tokens=12, stop_token_ids=(EOS,)), replace(GREEDY, max_new_tokens=7)
    generator, fresh = make(batch_size=4, static=static), make(batch_size=4)
    longer = prompts[:3] + [(prompts[4] * 20)[:290]]

    def check(prompts, sampling):
        seeds = list(range(len(prompts)))
        assert _ids(generator.generate(prompts, sampling, seeds)) == _ids(fresh.generate(prompts, sampling, seeds))
        return generator.slots

    generator.wake()
    first = check(prompts, sampling)
    assert check(prompts[::-1], sampling) is first
    assert all(layer.attn.spin_kv is None for layer in model.layers)  # other forwards find no cache
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert check(prompts, sampling) is first
    second = check(longer, sampling)
    assert second is not first
    assert check(prompts, sampling) is second
    assert check(prompts, other) is not second
    model.layers[0].attn.q_proj.weight.data = model.layers[0].attn.q_proj.weight.data.clone()  # at another address
    last = generator.slots
    assert check(prompts, other) is not last
    gc.disable()  # the cache goes at once, not when Python looks for cycles: training wants the memory now
    try:
        caches = [weakref.ref(tensor) for layer in generator.slots.view.layers for tensor in (layer.k, layer.v)]
        del first, second, last
        assert caches and all(cache() is not None for cache in caches)
        generator.sleep()
        assert generator.slots is None and all(cache() is None for cache in caches)
    finally:
        gc.enable()
    check(prompts, sampling)
    assert generator.slots is None  # not awake: gone with the call


@pytest.mark.parametrize("static", [False, True])
def test_out_of_memory_halves_the_batch(make, model, prompts, caplog, static):
    sampling = SamplingParams(max_new_tokens=30, stop_token_ids=(EOS,))
    seeds = list(range(9))
    expected = _ids(make().generate(prompts, sampling, seeds))
    shapes = watch(model, runs_out=lambda shapes: shapes[-1][0] > 3)
    generator = make(batch_size=8, static=static)
    with caplog.at_level(logging.WARNING):
        assert _ids(generator.generate(prompts, sampling, seeds)) == expected
    assert generator.batch_size == 2
    assert "batch_size=4" in caplog.text and "batch_size=2" in caplog.text
    assert sorted({rows for rows, _ in shapes}) == [1, 2, 4, 8]  # prompts are read one at a time
    assert generator.slots is None
    assert all(layer.attn.spin_kv is None for layer in model.layers)


def test_finished_responses_survive_running_out_of_memory(make, model, prompts):
    """Two rows fit for 16 forwards; from then on one: what is done by then is not done again."""
    sampling = SamplingParams(temperature=0, max_new_tokens=6)
    expected = _ids(make().generate(prompts, sampling, [0] * 9))
    shapes = watch(model, runs_out=lambda shapes: len(shapes) > 16 and shapes[-1][0] > 1)
    assert _ids(make(batch_size=2).generate(prompts, sampling, [0] * 9)) == expected
    prefills = sum(length > 1 for _, length in shapes)
    assert len(prompts) < prefills <= len(prompts) + 2  # one for each prompt, and again for the rows that were lost


def test_out_of_memory_with_one_row_gives_advice(make, model, prompts):
    """Prompt 4 is the longest of the first eight, which are sorted together."""
    watch(model, runs_out=lambda shapes: True)
    with pytest.raises(GeneratorError, match=r"one sequence at a time, prompt 4 of .*9 GiB.*Lower max_new_tokens"):
        make(batch_size=2).generate(prompts, FEW, [0] * 9)
    assert all(layer.attn.spin_kv is None for layer in model.layers)


def test_impossible_arguments(make):
    for arguments, message in (
        ({"batch_size": 0}, "batch_size=0: expected auto, or 1 or more"),
        ({"batch_size": "most"}, "batch_size=most: expected auto, or 1 or more"),
        ({"prefill_batch": 0}, "prefill_batch=0"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8': expected one of fp32, bf16, fp16"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**arguments)
    with pytest.raises(ConfigError, match="no model"):
        TorchtuneGenerator(GeneratorContext(None, torch.device("cpu"), 8, str))


# --- the model is left as it was found ---


def test_model_is_as_before(make, model, prompts):
    generator = make(batch_size=2)
    model.train()
    model.layers[0].eval()  # part of a model may be frozen on purpose

    def unembed(h):
        return h

    model.unembed = unembed
    names, modes = list(model.state_dict()), [module.training for module in model.modules()]
    hidden = model(torch.tensor([prompts[0]]))
    generator.generate(prompts[:3], FEW, [0] * 3)
    assert model.unembed is unembed
    assert list(model.state_dict()) == names
    assert [module.training for module in model.modules()] == modes
    assert all(layer.attn.spin_kv is None for layer in model.layers)
    again = model(torch.tensor([prompts[0]]))
    assert torch.equal(again, hidden)
    again.sum().backward()
    assert all(layer.attn.q_proj.weight.grad is not None for layer in model.layers)


@pytest.mark.parametrize("wrapped", ["checkpointed", "compiled"])
def test_wrapped_layers_are_run_plainly(make, model, prompts, monkeypatch, wrapped):
    """A checkpoint wrapper may save the state of random numbers for every layer of every step; a compiled layer would
    be compiled again for every length of the cache."""

    def never(*args, **arguments):
        raise AssertionError("a wrapper ran")

    expected = _ids(make().generate(prompts, FEW, [0] * 9))
    if wrapped == "checkpointed":
        checkpoint_activations(model)
        monkeypatch.setattr(CheckpointWrapper, "forward", never)
    else:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, backend=never)
    modules = list(model.named_modules())
    assert _ids(make().generate(prompts, FEW, [0] * 9)) == expected
    assert list(model.named_modules()) == modules
    with pytest.raises(Exception, match="a wrapper ran"):  # afterwards they are as before
        model(torch.tensor([prompts[0]]))


# --- weights ---


def test_update_weights_by_name(make, model):
    generator = make()
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    generator.update_weights(other.items())
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    del other["norm.scale"]
    for weights, message in (
        ([("lm_head.weight", torch.zeros(1))], "no parameter 'lm_head.weight'"),
        ([("norm.scale", torch.zeros(3))], r"norm.scale has shape \(3,\), the model's \(128,\)"),
        (other.items(), "norm.scale did not come"),
    ):
        with pytest.raises(GeneratorError, match=message):
            generator.update_weights(weights)
    generator.close()


# --- sharded ---


@pytest.mark.slow
def test_two_ranks_with_different_work(tmp_path, subprocess_env, prompts, trained, make):
    """FSDP2 on 2 ranks in float32, 6 prompts against none, then all on one: the tokens of the plain model."""
    sampling = {"temperature": 0.9, "max_new_tokens": 12, "stop_token_ids": [EOS]}
    expected = _ids(make().generate(prompts[:6], SamplingParams(**sampling), list(range(6))))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "work.json").write_text(json.dumps({"prompts": prompts[:6], "sampling": sampling}))
    script = Path(__file__).with_name("two_ranks_generate.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    rank_0, rank_1 = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert rank_0 == {"alone": expected, "split": expected[:1], "updated": True}
    assert rank_1 == {"alone": [], "split": expected[1:], "updated": True}


# --- a real model ---


@pytest.mark.real_model
@pytest.mark.slow
def test_real_model_greedy_equals_transformers(real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    hf = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    model = llama3_2(
        vocab_size=49152, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, intermediate_dim=1536,
        max_seq_len=8192, rope_base=100_000, norm_eps=1e-5, scale_factor=1, tie_word_embeddings=True,
    )  # fmt: skip
    load_llama_weights(model, real_model)
    questions = [
        "What is a hacker?", "Name three colours.", "How do I boil an egg?", "Write a line about rain.", "2 + 2 =",
        "Who was Ada Lovelace?", "Explain recursion to a child in two sentences.", "List the planets.",
    ]  # fmt: skip
    turns = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]
    prompts = tokenizer(turns).input_ids
    generator = TorchtuneGenerator(GeneratorContext(model, torch.device("cpu"), 8192, tokenizer.decode), batch_size=5)
    got = _ids(generator.generate(prompts, replace(GREEDY, max_new_tokens=64), [0] * len(prompts)))
    assert got == [_hf_greedy(hf, prompt, 64) for prompt in prompts]
