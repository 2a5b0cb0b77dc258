"""The data set that a config names: what is kept, what is refused, and what is said about it."""

import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spin.core.errors import ConfigError, DataError
from spin.data import ChatTokenizer, PromptDataset, prompt_dataset
from spin.data.dataset import check_is_dataset
from spin.data.read import check_fits_model
from spin.types import Prompt


class Letters:
    """A tokenizer that can be counted by hand: one token a character, ``<`` before the response, 0 as stop token."""

    eos_ids = (0,)
    pad_id = 0
    vocab_size = 256
    max_seq_len = None
    fingerprint = "letters"

    def encode_prompt(self, messages):
        return [ord(char) for char in "".join(message["content"] for message in messages) + "<"]

    def encode_pair(self, messages):
        if "?" in messages[-1]["content"]:
            raise DataError("the template refuses question marks.")
        return self.encode_prompt(messages[:-1]), [*map(ord, messages[-1]["content"]), 0]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(token) for token in ids if token)


def pair(prompt="ab", response="xy", **more):
    return {"prompt": prompt, "response": response, **more}


def text(ids):
    return "".join(chr(token) if token else "." for token in ids)


def test_samples_in_order_with_ids(source):
    path = source(pair(id="one"), pair("cd", "z", id=7), pair("ef", "z"), pair("gh", "z", id=None))
    dataset = prompt_dataset(Letters(), source=path)
    assert dataset.sample_ids == ["one", "7", "data-3", "data-4"]
    assert dataset[0] == Prompt("one", [97, 98, 60], [120, 121, 0])
    assert dataset[-1].prompt_ids == [103, 104, 60]
    assert [prompt.sample_id for prompt in dataset] == dataset.sample_ids
    assert dataset.prompt_lengths.tolist() == [3, 3, 3, 3]
    assert dataset.real_lengths.tolist() == [3, 2, 2, 2]
    assert dataset.lengths.tolist() == [6, 5, 5, 5]
    assert (dataset.report.rows, dataset.report.samples, dataset.report.counts) == (4, 4, {})
    with pytest.raises(IndexError):
        dataset[4]


def test_originals_are_kept_on_request_and_of_kept_samples_only(source):
    path = source(
        pair(id="one", solution="7"), pair(id="bad", response="?"), pair("long" * 9, id="long"), pair(id="two")
    )
    options = {"source": path, "on_bad_row": "skip", "on_long_prompt": "drop", "max_prompt_tokens": 9}
    dataset = prompt_dataset(Letters(), **options, keep_originals=True)
    assert list(dataset.originals) == dataset.sample_ids == ["one", "two"]
    original = dataset.originals["one"]
    assert original.messages == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xy"}]
    assert original.row["solution"] == "7"
    assert prompt_dataset(Letters(), **options).originals == {}


def transform(row):
    return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": "z"}]}


TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
# The prompt "abcdef<" has 7 tokens, the response "vwxyz" and its stop token 6.
LONG = pair("abcdef", "vwxyz")


@pytest.mark.parametrize(
    ("rows", "options", "samples", "counts"),
    [
        (
            [{"q": "ab", "a": "xy", "key": "k"}],
            {"column_map": {"prompt": "q", "response": "a"}, "system_prompt": "S", "id_column": "key"},
            [("k", "Sab<", "xy.")],
            {},
        ),
        ([{"q": "ab"}], {"message_transform": transform}, [("data-1", "ab<", "z.")], {}),
        ([{"id": "m", "messages": TURNS}], {}, [("m", "abc<", "d.")], {}),
        ([{"id": "m", "messages": TURNS}], {"turns": "all"}, [("m#turn0", "a<", "b."), ("m#turn1", "abc<", "d.")], {}),
        ([pair(id="a"), pair(id="a")], {"on_bad_row": "skip"}, [("a", "ab<", "xy.")], {"duplicate_id": 1}),
        ([LONG], {"max_seq_len": 13}, [("data-1", "abcdef<", "vwxyz.")], {}),
        ([LONG], {"max_prompt_tokens": 7, "max_response_tokens": 6}, [("data-1", "abcdef<", "vwxyz.")], {}),
        (
            [pair(), LONG],
            {"max_seq_len": 7, "on_long_prompt": "drop"},
            [("data-1", "ab<", "xy.")],
            {"long_prompt_drop": 1},
        ),
        (  # the prompt's end, no stop token
            [LONG],
            {"max_seq_len": 9, "max_prompt_tokens": 5, "on_long_prompt": "cut", "on_long_response": "cut"},
            [("data-1", "cdef<", "vwxy")],
            {"long_prompt_cut": 1, "long_response_cut": 1},
        ),
        ([pair(), "broken"], {"limit": 1}, [("data-1", "ab<", "xy.")], {}),  # reading stops
    ],
)
def test_options(source, rows, options, samples, counts):
    dataset = prompt_dataset(Letters(), source=source(*rows), **options)
    assert [(each.sample_id, text(each.prompt_ids), text(each.real_ids)) for each in dataset] == samples
    assert dataset.report.counts == counts and dataset.report.rows == len(rows) - ("limit" in options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ["x", "y"],
            {"on_bad_row": "skip"},
            r"No sample is left of 2 rows of .* \(bad_row 2\):\n  data\.jsonl:1, data",
        ),
        ([pair(id="a"), pair(id="a")], {}, r"l:2: id 'a' is taken by data\.jsonl:1\. Give each row an id of its own"),
        ([pair()], {"id_column": "key"}, "column 'key' is empty or missing; found columns prompt, response"),
        *(
            ([pair(), LONG], limits, r"data\.jsonl:2 " + message + ".*=drop or cut")
            for limits, message in (
                (
                    {"max_seq_len": 7},
                    r"\(7 tokens\): the prompt is longer than 6 tokens \(max_seq_len=7, less one for the response\)",
                ),
                (
                    {"max_prompt_tokens": 5},
                    r"\(7 tokens\): the prompt is longer than 5 tokens \(dataset.max_prompt_tokens=5\)",
                ),
                (
                    {"max_seq_len": 12},
                    r"\(7 \+ 6 tokens\): prompt and real response are longer than 12 tokens \(max_seq_len=12\)",
                ),
                (
                    {"max_response_tokens": 4},
                    r"\(6 tokens\): the real response is longer than 4 tokens \(dataset.max_response_tokens=4\)",
                ),
                (
                    {"max_response_tokens": 5, "max_seq_len": 10},
                    r"\(7 \+ 6 tokens\): prompt and real response .* \(max_seq_len=10\)",
                ),
            )
        ),
        (
            [LONG, pair("abcdefg")],
            {"max_prompt_tokens": 5},
            r"\n  data\.jsonl:1 \(7 tokens\), data\.jsonl:2 \(8 tokens\): the prompt is longer than 5 tokens",
        ),
        ([pair()], {"message_transform": transform, "column_map": {"prompt": "q"}}, "takes the place of"),
        ([pair()], {"message_transform": transform, "format": "alpaca"}, "takes the place of"),
        (
            [pair()],
            {"max_seq_len": "long", "max_prompt_tokens": 3},
            "max_seq_len=long: expected a whole number of 2 or",
        ),
        ([pair()], {"format": "chatml"}, r"dataset\.format=chatml"),
        ([pair()], {"validation_fraction": 1.0}, r"validation_fraction=1\.0: expected a number from 0 to below 1"),
        ([pair()], {"validation_fraction": 0.1}, r"of 1 samples of .* 0 are held out, expected some and not all"),
        (
            [pair()],
            {"validation_fraction": 0.1, "streaming": True, "limit": 1, "max_seq_len": 9},
            "a validation set is the same from the start. Name a validation_dataset",
        ),
        (
            [pair()],
            {"on_long_prompt": "trim", "turns": "first", "limit": 0, "max_seq_len": 8, "max_prompt_tokens": 8},
            r"^dataset.on_long_prompt=trim: expected error or drop or cut\.\n"
            r"dataset.turns=first: expected last or all\.\n"
            r"dataset.limit=0: expected a whole number of 1 or more, or null\.\n"
            r"dataset.max_prompt_tokens=8 leaves no room for a response in max_seq_len=8; expected at most 7\.$",
        ),
    ],
)
def test_options_and_rows_that_are_refused(source, rows, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        prompt_dataset(Letters(), source=source(*rows), **options)


def test_held_out_samples_follow_from_their_ids_alone(source):
    """Every sample is in one part, the same one in any order and company; turns of a row stay together."""
    rows = [pair(f"a{i}", "x", id=f"row {i}") for i in range(200)]
    options = {"validation_fraction": 0.25}
    dataset = prompt_dataset(Letters(), source=source(*rows), keep_originals=True, **options)
    held_out = dataset.held_out
    assert sorted(dataset.sample_ids + held_out.sample_ids) == sorted(row["id"] for row in rows)
    assert 30 < len(held_out) < 70  # 50 expected, 6 the standard deviation
    assert [text(each.prompt_ids) for each in held_out] == [f"a{each.split()[1]}<" for each in held_out.sample_ids]
    assert dataset.report.samples == 200 and set(held_out.sample_ids) <= set(held_out.originals)
    some = prompt_dataset(Letters(), source=source(*rows[150::-1]), **options)
    assert set(some.sample_ids) < set(dataset.sample_ids)
    assert some.held_out.sample_ids == [row["id"] for row in rows[150::-1] if row["id"] in held_out.sample_ids]
    few = prompt_dataset(Letters(), source=source(*rows), limit=40, **options)  # of both parts
    assert len(few) + len(few.held_out) == 40
    larger = prompt_dataset(Letters(), source=source(*rows), validation_fraction=0.5)
    assert set(held_out.sample_ids) < set(larger.held_out.sample_ids)
    assert larger.content_fingerprint() != dataset.content_fingerprint()
    talks = source(*({"id": str(i), "messages": TURNS} for i in range(20)))
    turns = prompt_dataset(Letters(), source=talks, turns="all", validation_fraction=0.5)
    of_rows = [{each.partition("#")[0] for each in part.sample_ids} for part in (turns, turns.held_out)]
    assert not of_rows[0] & of_rows[1] and len(turns) == 2 * len(of_rows[0])


def test_tokenizers_limit_counts_when_the_recipe_gives_none(source):
    tokenizer = Letters()
    tokenizer.max_seq_len = 7
    with pytest.raises(DataError, match="max_seq_len=7"):
        prompt_dataset(tokenizer, source=source(LONG))
    assert len(prompt_dataset(tokenizer, source=source(LONG), max_seq_len=50)) == 1


def test_skipped_rows_are_counted_and_named(source, caplog):
    path = source(pair(), "broken", pair(response=""), pair("cd"))
    with caplog.at_level(logging.WARNING):
        dataset = prompt_dataset(Letters(), source=path, on_bad_row="skip")
    assert dataset.sample_ids == ["data-1", "data-4"]
    assert dataset.report.counts == {"bad_row": 2}
    assert dataset.report.examples[0].startswith("data.jsonl:2: not valid JSON")
    assert "2 samples from 4 rows; left out or truncated: bad_row 2" in caplog.text
    assert "data.jsonl:3: message 1" in caplog.text


def test_all_bad_rows_are_reported_at_once_with_place_reason_and_remedy(source):
    path = source(pair(), '{"prompt": ', pair(response=""), pair(response="why?"), {"messages": 5}, pair(id=[1]))
    with pytest.raises(DataError) as caught:
        prompt_dataset(Letters(), source=path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"5 samples in 6 rows of {path} cannot be used:"
    assert lines[1].startswith("  data.jsonl:2: not valid JSON") and "on_bad_row=skip" in lines[1]
    assert lines[2].startswith("  data.jsonl:3: message 1 (role 'assistant') has empty content")
    assert lines[3] == "  data.jsonl:4: the template refuses question marks."
    assert lines[4].startswith("  data.jsonl:5: messages is of type int")
    assert lines[5].startswith("  data.jsonl:6: column 'id' holds [1]")


def test_equal_faults_are_one_line_with_their_first_places_and_at_most_twenty_are_shown(source):
    with pytest.raises(DataError) as caught:
        prompt_dataset(Letters(), source=source(*[pair(response="")] * 23, pair(), pair(response="?")))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("24 samples in 25 rows") and len(lines) == 3
    assert lines[1].startswith("  data.jsonl:1, data.jsonl:2, data.jsonl:3 and 20 more: message 1 (role 'assistant')")
    assert lines[2].startswith("  data.jsonl:25: the template refuses")
    with pytest.raises(DataError) as caught:
        prompt_dataset(Letters(), source=source(*[pair(id=[number]) for number in range(23)]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[20].startswith("  data.jsonl:20: ") and lines[21] == "  ... and 3 more"


def test_fingerprint_follows_ids_tokens_and_their_border(source):
    def fingerprint(*prompts):
        return PromptDataset(Prompt(*prompt) for prompt in prompts).fingerprint()

    base = fingerprint(("a", [1, 2], [3]), ("b", [4], [5]))
    assert base == fingerprint(("a", [1, 2], [3]), ("b", [4], [5]))
    assert base != fingerprint(("b", [4], [5]), ("a", [1, 2], [3]))
    assert base != fingerprint(("a", [1, 2], [3]), ("c", [4], [5]))
    assert base != fingerprint(("a", [1], [2, 3]), ("b", [4], [5]))
    assert base != fingerprint(("a", [1, 2], [3]), ("b", [4], [6]))


def test_storage_is_flat_and_building_is_quick():
    """20 000 rows of 60 tokens in 5 s of a slow core, at 4 bytes a token: no object per token is kept."""
    rows = [pair("ab" * 15, "xy" * 15, id=index) for index in range(20_000)]
    start = time.process_time()
    dataset = prompt_dataset(Letters(), source=rows)
    assert time.process_time() - start < 5
    assert len(dataset) == 20_000
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 20_000 * (62 * 4 + 2 * 8) + 100


def test_with_the_tiny_models_tokenizer(source, tiny_lm):
    chat = ChatTokenizer(tiny_lm)
    path = source(pair("What is a bug?", "A fault."), pair("Stop?", "no<|im_end|>yes"), pair("And?", "Ok."))
    dataset = prompt_dataset(chat, source=path, on_bad_row="skip", max_seq_len=64)
    assert dataset.sample_ids == ["data-1", "data-3"]
    assert "holds the stop token" in dataset.report.examples[0]
    assert chat.decode(dataset[1].prompt_ids) == "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(dataset[1].real_ids) == "Ok.<|im_end|>"


# --- Token ids and the model's vocabulary ---


def check(*datasets, stop=()):
    """Of a model with 10 rows, and a tokenizer that knows 12 ids."""
    model = torch.nn.Module()
    with torch.device("meta"):
        model.tok_embeddings = torch.nn.Embedding(10, 4)
    model.max_seq_len = 8
    check_fits_model(model, SimpleNamespace(vocab_size=12), stop, *datasets)


@pytest.mark.parametrize(
    ("datasets", "stop", "message"),
    [
        ([[Prompt("a", [0, 9], [3]), Prompt("b", [1], [9])], []], (9,), None),
        (
            [[], [Prompt("a", [1], [2]), Prompt("b", [1, 10], [2]), Prompt("c", [11], [2])]],
            (),
            "'b' has the token id 10",
        ),
        ([[Prompt("a", [1], [2, 11]), Prompt("b", [10], [2])]], (), "'a' has the token id 11"),
        ([[Prompt("a", [-1], [2])]], (), "'a' has the token id -1"),
        ([[]], (9, 10), "stop token 10. Does the tokenizer belong to this model"),
    ],
)
def test_ids_beyond_the_vocabulary_name_the_first_sample(datasets, stop, message):
    if message is None:
        check(*map(PromptDataset, datasets), stop=stop)
        return
    with pytest.raises(DataError) as error:
        check(*map(PromptDataset, datasets), stop=stop)
    assert message in str(error.value) and "vocab_size" in str(error.value)
    assert "knows 12 token ids, the model's vocabulary has 10 (ids 0 to 9)" in str(error.value)


def test_what_is_no_data_set_is_refused():
    with pytest.raises(DataError, match=r"dataset: its _component_ gave a list, expected a spin.data.PromptDataset"):
        check_is_dataset([Prompt("a", [1], [2])])
    with pytest.raises(DataError, match="two samples have the id 'a'"):
        PromptDataset([Prompt("a", [1], [2]), Prompt("a", [1], [2])])
    with pytest.raises(DataError, match="the longest sample has 9 tokens, the model's context is 8: leave"):
        check(PromptDataset([Prompt("a", [1], [2] * 7), Prompt("b", [1] * 5, [2] * 4)]))
    assert len(PromptDataset()) == 0 and PromptDataset([Prompt("a", [1], [2])]).report.samples == 1


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Prompt("b", [1], []), "sample 'b' has no real_ids, expected one token at least"),
        (Prompt("b", [], [2]), "sample 'b' has no prompt_ids"),
        (
            Prompt(7, [1], [2]),
            r"sample 1 is Prompt\(sample_id=7, .*expected a spin.data.Prompt whose sample_id is a text",
        ),
        ("b", "sample 1 is 'b', expected a spin.data.Prompt"),
    ],
)
def test_a_sample_that_nothing_can_be_learned_from_is_refused_by_name(sample, message):
    with pytest.raises(DataError, match=message):
        check_is_dataset(PromptDataset([Prompt("a", [1], [2]), sample]))
