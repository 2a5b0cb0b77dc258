"""The gate that every response passes: from a generator of the user's own, a stream, a file, a server."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from spin.core.errors import GeneratorError
from spin.data import PairStore, Prompt, PromptDataset
from spin.generators import GeneratorContext, ReplayGenerator, Response, SamplingParams
from spin.generators.stage import Limits, PlayTask, play

STOP, VOCAB, MOST = 9, 50, 6
SAMPLING = SamplingParams(max_new_tokens=MOST, stop_token_ids=(STOP,))
PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, STOP]) for i in range(4)])
LIMITS = Limits(VOCAB, 16, lambda ids: "".join(chr(97 + i % 26) for i in ids))


class Own:
    """A generator of the user's own, whose second response is bad."""

    shares_policy_weights = True

    def __init__(self, bad):
        self.bad = bad

    def generate(self, prompts, sampling, seeds):
        good = Response([1, STOP], "stop", logprobs=[-1.0, -0.5] if sampling.logprobs else None)
        return [good, self.bad, *[good] * (len(prompts) - 2)]

    def update_weights(self, named_tensors):
        raise AssertionError

    sleep = wake = close = update_weights


class Streaming(Own):
    """The same, one response at a time; counts how many were taken."""

    def stream(self, requests, sampling):
        self.taken = 0
        for pair in enumerate(self.generate(list(requests), sampling, [])):
            self.taken += 1
            yield pair


def play_with(tmp_path, generator, limits=LIMITS, sampling=SAMPLING):
    store = PairStore.open_or_create(tmp_path / "store", {"opponent": "w"}, 2)
    play(store, [0, 1], PlayTask(PROMPTS, range(4), sampling, 5, limits=limits), generator)
    return [np.asarray(pair.generated[0].token_ids).tolist() for pair in store.pairs()]


BAD = {
    "too long": (Response([1] * 400, "length"), "has 400 tokens, expected at most max_new_tokens=6"),
    "enormous": (Response(range(10**15), "length"), "has 1000000000000000 tokens, expected at most"),
    "float": (Response([1, 2.5, STOP], "stop"), "has 2.5 of type float as token 1, expected whole numbers"),
    "whole float": (Response([1.0, STOP], "stop"), "has 1.0 of type float as token 0"),
    "bool": (Response([True, STOP], "stop"), "has True of type bool as token 0"),
    "none": (Response([None, STOP], "stop"), "has None of type NoneType as token 0"),
    "text": (Response("words", "stop"), "has token_ids 'words' of type str"),
    "number": (Response(7, "stop"), "has token_ids 7 of type int"),
    "floats of numpy": (Response(np.array([1.0, 9.0]), "stop"), "as token 0, expected whole numbers"),
    "tensor": (Response(torch.tensor([1, 9]), "stop"), "as token 0, expected whole numbers"),
    "nested": (Response([[1], STOP], "stop"), r"has \[1\] of type list as token 0"),
    "beyond": (Response([VOCAB, STOP], "stop"), "has the id 50 as token 0, expected 0 to 49"),
    "huge": (Response([10**30, STOP], "stop"), "has the id 1000000000000000000000000000000 as token 0"),
    "negative": (Response([1, -1, STOP], "stop"), "has the id -1 as token 1, expected 0 to 49"),
    "middle": (Response([1, STOP, 2, STOP], "stop"), "has stop token 9 as token 1 of 4, expected it at the end only"),
    "cut but ends": (Response([1, STOP], "length"), "'length' but ends with stop token 9"),
    "cut early": (Response([1, 2], "length"), "'length' with 2 tokens, expected 6 then"),
    "stop without": (Response([1, 2], "stop"), r"'stop' but ends with token 2, expected a stop token of \[9\]"),
    "reason": (Response([1, STOP], "eos"), "has finish reason 'eos' of type str, expected stop or length"),
    "no reason": (Response([1, STOP], None), "has finish reason None"),
    "few log-probs": (Response([1, STOP], "stop", logprobs=[-1.0]), "has 1 log-probs for 2 tokens"),
    "text log-prob": (Response([1, STOP], "stop", logprobs=["a", -1.0]), "has 'a' of type str as log-prob 0"),
    "a dict": ({"token_ids": [1, STOP]}, "is .* of type dict, expected a spin.generators.Response"),
}


@pytest.mark.parametrize("kind", [Own, Streaming])
@pytest.mark.parametrize("bad", BAD)
def test_a_response_that_cannot_be_is_refused_by_name(tmp_path, kind, bad):
    response, message = BAD[bad]
    generator = kind(response)
    with pytest.raises(GeneratorError, match=rf"generator: .*{kind.__name__}, sample s1: the response .*{message}"):
        play_with(tmp_path, generator)
    assert PairStore.open(tmp_path / "store").missing_shards() == [0, 1], "nothing is kept of the shard"
    assert getattr(generator, "taken", 2) == 2, "refused when it arrives"


@pytest.mark.parametrize(
    ("response", "ids"),
    [
        (Response([1, 2, 3, 4, 5, 6], "length"), [1, 2, 3, 4, 5, 6]),
        (Response([1, 2, 3, 4, 5, STOP], "stop"), [1, 2, 3, 4, 5, STOP]),
        (Response([], "length"), []),
        (Response(np.array([1, STOP], np.int64), "stop"), [1, STOP]),
        (Response([np.int32(VOCAB - 1), STOP], "stop", logprobs=np.array([-1.0, 0.0]).tolist()), [VOCAB - 1, STOP]),
    ],
)
def test_good_responses_pass(tmp_path, response, ids):
    assert play_with(tmp_path, Own(response))[1] == ids


def test_the_context_limits_a_response_as_well(tmp_path):
    """5 tokens of context leave 3 to a prompt of 2: the model's own context, or that of a generator."""
    short, long = Response([1, 2, 3], "length"), Response([1, 2, 3, 4], "length")
    own = Own(short)
    own.max_seq_len = 5
    for name, generator, limits in (("a", Own(short), Limits(VOCAB, 5)), ("b", own, LIMITS)):
        assert play_with(tmp_path / name, generator, limits)[1] == [1, 2, 3]
        generator.bad = long
        with pytest.raises(GeneratorError, match="has 4 tokens, expected at most what the context leaves: 3"):
            play_with(tmp_path / f"{name} again", generator, limits)


def test_a_stop_string_ends_a_response_and_log_probs_that_were_asked_for_must_come(tmp_path):
    sampling = replace(SAMPLING, stop_strings=("cd",))
    assert play_with(tmp_path, Own(Response([1, 2, 3], "stop")), sampling=sampling)[1] == [1, 2, 3]  # "bcd"
    with pytest.raises(GeneratorError, match=r"ends with token 4, expected .* or a text with one of \['cd'\]"):
        play_with(tmp_path / "b", Own(Response([1, 2, 4], "stop")), sampling=sampling)
    with pytest.raises(GeneratorError, match="has logprobs None for 2 tokens, expected one each"):
        play_with(tmp_path / "c", Own(Response([1, STOP], "stop")), sampling=replace(SAMPLING, logprobs=True))


def test_a_stream_gives_numbered_responses_only(tmp_path):
    good = Response([1, STOP], "stop")
    for given, message in (
        (lambda: [good], "gave Response.*, expected .number of the request, its Response"),
        (lambda: [(0.0, good)], "gave .0.0"),
        (lambda: [(True, good)], "gave .True"),
        (lambda: [(math.inf, good)], "gave .inf"),
        (lambda: [(10**30, good)], "responded to request 10+ twice, or none such was asked; the 4 requests are 0 to 3"),
        (lambda: itertools.repeat((0, good)), "responded to request 0 twice"),
        (lambda: [(i, good) for i in (0, 1, 0)], "responded to request 0 twice"),
    ):
        generator = Streaming(good)
        generator.stream = lambda requests, sampling, given=given: (pair for pair in given())
        with pytest.raises(GeneratorError, match=f"generator: .*Streaming {message}"):
            play_with(tmp_path, generator)
        (tmp_path / "store" / "shard-00000.parquet").unlink(missing_ok=True)


def test_replayed_responses_pass_the_same_gate(tmp_path):
    """A file made elsewhere may have been cut at another limit; all else is as for every generator."""
    context = GeneratorContext(None, torch.device("cpu"), 16, lambda ids: "")

    def replay(ids, reason=None):
        rows = [{"prompt_ids": [1, i + 1], "generated_ids": ids, "finish_reason": reason} for i in range(4)]
        (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return ReplayGenerator(context, tmp_path / "responses.jsonl")

    assert play_with(tmp_path / "cut", replay([1, 2]))[1] == [1, 2]
    for ids, reason, message in (
        ([VOCAB, STOP], None, "has the id 50"),
        ([STOP, 1], None, "has stop token 9 as token 0 of 2"),
        ([1, 2], "stop", "append it: SPIN scores it"),
        ([1, STOP], "length", "must not be given an end"),
    ):
        with pytest.raises(GeneratorError, match=f"ReplayGenerator, sample s0: the response .*{message}"):
            play_with(tmp_path / message, replay(ids, reason))
