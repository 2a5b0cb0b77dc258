"""What `dataset` reads, refuses and ignores: one table, which is run here row by row and printed in docs/data.md.

``python -m tests.data.test_formats`` writes it there.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.core.errors import DataError
from spin.data import ChatTokenizer, mixed_prompt_dataset, prompt_dataset
from tests.data.test_read import Letters

# Shows system messages, tools, calls, results, reasoning (as Qwen3 does) and an option.
TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- if persona %}{{- '<|im_start|>system\\nYou are ' + persona + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    what: str  # first column of the documentation
    row: Any  # of a JSON Lines file, or the rows
    # what the model sees, ``role: content`` with bars between; where it is refused, a part of the message
    text: str
    result: str = "read"  # or refused, or ignored
    note: str = ""  # last column
    changes: tuple[str, ...] = ()  # names in the report
    unused: tuple[str, ...] = ()  # columns and keys in the report
    options: dict[str, Any] = field(default_factory=dict)  # of ``dataset``
    template: str = TEMPLATE
    parquet: bool = False  # where Arrow gives every struct all keys
    shown: str = ""  # the example in the documentation; empty shows the row


def refused(what: str, row: Any, text: str, note: str = "", **more: Any) -> Case:
    return Case(what, row, text, "refused", note, **more)


def said(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


Q, A, S = said("user", "Q"), said("assistant", "A"), said("system", "S")
Q2, A2 = said("user", "Q2"), said("assistant", "A2")
QA = "user: Q | assistant: A"
SQA = f"system: S | {QA}"
HQA = "user: Q | assistant: A | user: Q2 | assistant: A2"
PAIR = {"prompt": "Q", "response": "A"}
TOOL = {"name": "f", "parameters": {"type": "object"}}
SHOWN_TOOL = f"system: [{json.dumps({'type': 'function', 'function': TOOL})}]"
CALLS = [{"function": {"name": "f", "arguments": {"x": 1}}}]
RESULT = said("tool", "R", name="f")

# fmt: off
ROWS = [
    # columns
    Case("OpenAI, TRL, Tulu, SmolTalk: messages", {"messages": [S, Q, A]}, SQA),
    Case("`messages` and a `system` column", {"system": "S", "messages": [Q, A]}, SQA),
    Case("OpenOrca: a `system_prompt` column", {"system_prompt": "S", **PAIR}, SQA, note="an empty one is none"),
    Case("`system_prompt` next to `system`", {"system": "S", "system_prompt": "T", **PAIR}, SQA,
        unused=("system_prompt",)),
    Case("an empty `system_prompt`", {"system_prompt": "", **PAIR}, QA),
    Case("a `system` column next to a system message", {"system": "T", "messages": [S, Q, A]}, SQA,
        note="the message counts", changes=("second_system_message_left_out",)),
    Case("ShareGPT, OpenHermes, NeMo: conversations", {"conversations": [{"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"}], "system": "S"}, SQA),
    Case("prompt and response, or completion", {"prompt": "Q", "completion": "A"}, QA),
    Case("TRL: lists of messages", {"prompt": [S, Q], "completion": [A]}, SQA),
    Case("Alpaca", {"instruction": "Q", "input": "more", "output": "A"}, "user: Q\n\nmore | assistant: A"),
    Case("Alpaca, `input` alone", {"instruction": "", "input": "Q", "output": "A"}, QA),
    Case("LLaMA-Factory: `system` and `history`", {"instruction": "Q2", "output": "A2", "system": "S",
        "history": [["Q", "A"]]}, f"system: S | {HQA}"),
    Case("LLaMA-Factory: empty ones", {"instruction": "Q", "output": "A", "system": "", "history": []}, QA),
    Case("`history` of pairs", {"prompt": "Q2", "response": "A2", "history": [["Q", "A"]]}, HQA),
    Case("`history` of messages", {"prompt": "Q2", "response": "A2", "history": [Q, A]}, HQA),
    refused("`history` of another form", {**PAIR, "history": ["Q", "A"]},
        "'history' is no list of [user, assistant]"),
    Case("lists as JSON text", {"messages": json.dumps([Q, A])}, QA, changes=("json_text_parsed",)),
    Case("history as JSON text", {"prompt": "Q2", "response": "A2", "history": '[["Q", "A"]]'}, HQA,
        changes=("json_text_parsed",)),
    Case("both of TRL's lists as JSON text", {"prompt": json.dumps([Q]), "completion": json.dumps([A])}, QA,
        changes=("json_text_parsed",)),
    Case("a prompt that is other JSON", {"prompt": '["Q"]', "response": "[1]"}, 'user: ["Q"] | assistant: [1]'),
    refused("lists as Python text", {"messages": "[{'role': 'user'}]"}, "expected a list of messages, also as valid"),
    Case("your own names, by `column_map`", {"question": "Q", "answer": "A"}, QA,
        options={"column_map": {"prompt": "question", "response": "answer"}}),
    refused("other columns", {"question": "Q", "answer": "A"}, "Map your columns with dataset.column_map"),
    Case("columns that belong to no conversation", {**PAIR, "id": "1", "source": "web", "score": None}, QA, "ignored",
        note="named once", unused=("source",)),
    # what may not be read as a good response
    refused("preferences", {"prompt": "Q", "chosen": "A", "rejected": "B"}, "dataset.column_map={response: chosen}",
        "unless `column_map` names the chosen response"),
    refused("preferences of whole conversations", {"chosen": [Q, A], "rejected": [Q, A2]},
        "dataset.column_map={messages: chosen}"),
    Case("preferences, by `column_map`", {"prompt": "Q", "chosen": "A", "rejected": "B"}, QA, unused=("rejected",),
        options={"column_map": {"response": "chosen"}}),
    Case("KTO, desirable", {"prompt": "Q", "completion": "A", "label": True}, QA),
    refused("KTO, undesirable", {"prompt": "Q", "completion": "A", "label": False},
        "an example of what not to say"),
    refused("KTO of LLaMA-Factory", {"messages": [Q, A], "kto_tag": False}, "an example of what not to say"),
    refused("rendered `text`", {"text": "### Human: Q ### Assistant: A"},
        "A text does not say where the prompt ends"),
    refused("a row's `weight: 0`, `train: false`", {**PAIR, "weight": 0},
        "the response is marked as not to be trained on"),
    # messages
    Case("roles of other programs", {"conversations": [{"from": "user", "value": "Q"}, {"from": "bard",
        "value": "A"}]}, QA, note="also model, chatgpt, bing, bot, chatbot, ai, claude, prompter",
        changes=("role_bard_read_as_assistant",)),
    refused("unknown roles", {"messages": [said("owner", "Q"), A]}, "message 0 has role 'owner'; expected one of"),
    Case("content parts of type text", {"messages": [said("user", [{"type": "text", "text": "Q"}]), A]}, QA),
    refused("other parts", {"messages": [said("user", [{"type": "image_url"}]), A]}, "only text is supported"),
    refused("columns of images, videos, audios", {"messages": [Q, A], "images": ["a.png"]}, "has images; only text"),
    Case("an assistant's turn first", {"messages": [S, A2, Q, A]}, SQA, note="that turn is left out",
        changes=("leading_assistant_dropped",)),
    Case("a user's turn last", {"messages": [Q, A, Q2]}, QA, note="that turn is left out",
        changes=("trailing_user_dropped",)),
    refused("no response", {"messages": [Q]}, "last message has role 'user', expected 'assistant'"),
    Case("keys that no template reads", {"messages": [{**Q, "name": "Ann", "label": "x"}, A]}, QA, "ignored",
        note="named once", unused=("messages[].name", "messages[].label")),
    # what is not to be trained on
    *(Case(f"`{key}: {json.dumps(off)}`", {"messages": [Q, A, Q2, {**A2, key: off}]}, QA,
        note="not a real response; with `turns: last` the last other one is", changes=("untrained_turns_skipped",
        )) for key, off in (("weight", 0), ("train", False), ("loss", False), ("train_on_turn", False))),
    Case("the same with `turns: all`", {"messages": [Q, {**A, "weight": 0}, Q2, A2]}, HQA,
        note="only the others are played", changes=("untrained_turns_skipped",), options={"turns": "all"}),
    refused("no turn left", {"messages": [Q, {**A, "weight": 0}]}, "every assistant turn is marked"),
    refused("weights between", {"messages": [Q, {**A, "weight": 0.5}]}, "weight 0.5, expected 0 or 1"),
    refused("axolotl's `train_detail`", {"messages": [Q, {**A, "train_detail": [{"begin_offset": 0, "end_offset": 0,
        "train": False}]}]}, "parts of a response cannot be left out"),
    Case("NeMo's `mask` of users", {"conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant",
        "value": "A"}], "mask": "User"}, QA),
    refused("NeMo's `mask` of assistants", {"conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant",
        "value": "A"}], "mask": "Assistant"}, "every assistant turn is marked"),
    # reasoning
    *(Case(f"`{key}` of a message", {"messages": [Q, {**A, key: "T"}]},
        "user: Q | assistant: <think>\nT\n</think>\n\nA",
        note="the template writes it") for key in ("reasoning_content", "thinking", "reasoning")),
    Case("`reasoning_content` or `thinking` of a row", {**PAIR, "thinking": "T"},
        "user: Q | assistant: <think>\nT\n</think>\n\nA", note="the template writes it"),
    refused("reasoning that the template does not show", {"messages": [Q, {**A, "reasoning_content": "T"}]},
        "the chat template does not show it", template=CHATML),
    refused("two different ones", {"messages": [Q, {**A, "reasoning_content": "T", "thinking": "U"}]},
        "different texts in"),
    # options of the template
    Case("SmolTalk2's `chat_template_kwargs`", {"messages": [Q, A], "chat_template_kwargs": {"persona": "Ann",
        "other": None, "more": [], "off": False}}, f"system: You are Ann | {QA}",
        note="the row's options of the template"),
    refused("options that the template does not read", {"messages": [Q, A],
        "chat_template_kwargs": {"persona": "Ann"}},
        "chat_template_kwargs has persona, which the chat template does not read", template=CHATML),
    # tools
    Case("`tools`", {"messages": [Q, A], "tools": [TOOL]}, f"{SHOWN_TOOL} | {QA}"),
    Case("`tools` as JSON text", {"messages": [Q, A], "tools": json.dumps([TOOL])}, f"{SHOWN_TOOL} | {QA}"),
    Case("OpenAI's older `functions`", {"messages": [Q, A], "functions": [TOOL]}, f"{SHOWN_TOOL} | {QA}"),
    refused("`tools` and `functions`", {"messages": [Q, A], "tools": [TOOL], "functions": [TOOL]}, "expected one of"),
    Case("`tool_calls` and results", {"messages": [Q, said("assistant", "", tool_calls=CALLS), RESULT, A]},
        'user: Q | assistant: <call>f {"x": 1}</call> | tool: R | assistant: A'),
    Case("OpenAI's older `function_call`", {"messages": [Q, said("assistant", None, function_call={"name": "f",
        "arguments": '{"x": 1}'})]}, 'user: Q | assistant: <call>f {"x": 1}</call>'),
    Case("nulls in arguments, JSON Lines", {"messages": [Q, said("assistant", "", tool_calls=[{"name": "f",
        "arguments": {"x": None}}])]}, 'user: Q | assistant: <call>f {"x": null}</call>',
        note="kept: they are yours"),
    Case("nulls in tools and arguments, parquet and `datasets`", [{"messages": [Q, said("assistant", "",
        tool_calls=[{"name": "f", "arguments": {"x": 1}}])]}, {"messages": [Q, said("assistant", "",
        tool_calls=[{"name": "g", "arguments": {"y": 2}}])]}], 'user: Q | assistant: <call>f {"x": 1}</call>',
        note="removed: Arrow adds them, and they cannot be distinguished from yours",
        changes=("null_arguments_removed",),
        parquet=True, shown='`{"x": 1, "y": null}`'),
    refused("tools that the template does not show", {"messages": [Q, A], "tools": [TOOL]}, "would not see",
        template=CHATML),
]
# fmt: on


@dataclass(frozen=True)
class Files:
    """A line of the table of files."""

    what: str  # first column of the documentation
    # name and, behind a space, the responses of its rows, one letter each; those of README.md are its header
    files: tuple[str, ...]
    text: str  # the responses that are read; where it is refused, a part of the message
    source: str = ""  # what ``dataset.source`` names among them; empty is their folder
    result: str = "read"  # or refused
    note: str = ""  # last column
    options: dict[str, Any] = field(default_factory=dict)  # of ``dataset``


CONFIGS = "configs: [{config_name: default, data_files: [{split: train, path: data/x*}, {split: test, path: data/y*}]}]"
TWO = "configs: [{config_name: en, data_files: en/*}, {config_name: de, data_files: de/*}]"
# fmt: off
FILES = [
    *(Files(f"`{name}`", (f"{name} ab",), "ab", name, note=note) for name, note in (("rows.jsonl", "also `.ndjson`"),
        ("rows.jsonl.gz", "also `.bz2`, `.xz`, `.zst`; of JSON and CSV too"), ("rows.ndjson.zst", ""), ("rows.json",
        "a list, or an object that holds one under `data`, `rows`, `train`, ..."), ("rows.csv",
        "with a header; `messages` and the like as JSON text"), ("rows.tsv.xz", ""), ("rows.json.bz2", ""),
        ("rows.parquet", ""), ("rows.arrow", ""))),
    Files("other suffixes", ("rows.xlsx ab",), "has the suffix '.xlsx', expected one of", "rows.xlsx", "refused"),
    Files("glob", ("train-1.jsonl a", "train-2.jsonl b", "test.jsonl c"), "ab", "train-*.jsonl",
        note="all of `train`"),
    Files("folder", ("a.jsonl a", "b.jsonl b", "dataset_info.json", ".hidden.jsonl c"), "ab"),
    Files("two kinds of files", ("a.jsonl a", "a.parquet a"), "may be the same rows twice", result="refused"),
    Files("`split` of files", ("rows.jsonl abcd",), "ab", "rows.jsonl", options={"split": "train[:2]"}),
    Files("`split` in percent", ("rows.csv abcd",), "d", "rows.csv", options={"split": "train[75%:]"}),
    Files("splits by name", ("train.jsonl a", "test.jsonl b"), "a"),
    Files("the other one", ("train.jsonl a", "test.jsonl b"), "b", options={"split": "test"}),
    Files("parts of both", ("train.jsonl abc", "dev.jsonl def"), "abf",
        options={"split": "train[:2]+validation[-1:]"}),
    Files("splits by folder", ("train/x.jsonl a", "train/y.jsonl b", "val/x.jsonl c"), "ab"),
    Files("a file of no split", ("train.jsonl a", "test.jsonl b", "more.jsonl c"), "more.jsonl to none", "",
        "refused"),
    Files("no `train`", ("val.jsonl a", "test.jsonl b"), "has the splits test, validation; found", result="refused"),
    Files("an unknown split", ("rows.jsonl a",), "has the splits train", "rows.jsonl", "refused", "",
        {"split": "dev"}),
    Files("a data repository's folder", ("data/train-00000-of-00002.parquet a", "data/train-00001-of-00002.parquet b",
        "data/test-00000-of-00001.parquet c"), "ab"),
    Files("with splits of its own", ("data/train_sft-00000-of-00001.parquet a",
        "data/train_gen-00000-of-00001.parquet b"), "has the splits train_gen, train_sft; found dataset.split=None",
        result="refused"),
    Files("one of them", ("data/train_sft-00000-of-00001.parquet a", "data/train_gen-00000-of-00001.parquet b"), "a",
        options={"split": "train_sft"}),
    Files("`configs` in its README.md", (f"README.md {CONFIGS}", "data/x.jsonl a", "data/y.jsonl b"), "a"),
    Files("`name` of several", (f"README.md {TWO}", "en/x.jsonl a", "de/x.jsonl b"), "b", options={"name": "de"}),
    Files("none named", (f"README.md {TWO}", "en/x.jsonl a", "de/x.jsonl b"), "declares the configurations en, de", "",
        "refused"),
    Files("a path out of it", ("README.md configs: [{data_files: ../x.jsonl}]", "x.jsonl a"),
        "declares the path '../x.jsonl'", result="refused"),
    Files("`data_dir`", ("en/x.jsonl a", "de/x.jsonl b"), "a", options={"data_dir": "en"}),
    Files("`save_to_disk`", ("saved ab",), "a", "saved", options={"split": "train[:1]"}),
    Files("builders that unpickle", ("x.pkl",), "may unpickle or run what it reads", "pandas", "refused",
        "also sql, ..."),
]
# fmt: on


def write(path: Path, letters: str) -> None:
    """Rows with these responses, in the form that the suffix says."""
    rows = [{"id": letter, "prompt": "Q", "response": letter} for letter in letters]
    if path.suffix in (".gz", ".bz2", ".xz", ".zst"):
        write(path.with_suffix(""), letters)
        plain = path.with_suffix("").read_bytes()
        path.with_suffix("").unlink()
        packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(packers.get(path.suffix, partial(pa.compress, codec="zstd", asbytes=True))(plain))
    elif path.name == "README.md":
        path.write_text(f"---\n{letters}\n---\n# Data\n")
    elif path.suffix in (".parquet", ".arrow"):
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            return pq.write_table(table, path)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    elif not path.suffix:
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.what)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_every_line_of_the_table_of_files(case, streaming, tmp_path):
    for name, _, letters in (file.partition(" ") for file in case.files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, letters)
    source = case.source if case.source == "pandas" else str(tmp_path / case.source)
    options: dict[str, Any] = {"source": source, **case.options}
    if streaming and ".json" in Path(case.source).suffixes:
        case = replace(case, result="refused", text="a JSON list can only be read whole")
    if streaming:
        options |= {"streaming": True, "limit": len(case.text) if case.result == "read" else 1, "max_seq_len": 9}
    if case.result == "refused":
        with pytest.raises(DataError) as caught:
            prompt_dataset(Letters(), **options).window(0)
        assert case.text in str(caught.value)
        return
    data = prompt_dataset(Letters(), **options).window(0)
    assert "".join(data.sample_ids) == case.text


@pytest.fixture(scope="module")
def tokenizers(tiny_lm):
    return {template: ChatTokenizer(tiny_lm, chat_template=template) for template in (TEMPLATE, CHATML)}


def as_text(tokenizer: ChatTokenizer, sample: Any) -> str:
    """Prompt and response, ``role: content`` with bars between."""
    shown = tokenizer.decode(sample.prompt_ids + sample.real_ids).removesuffix("<|im_end|>")
    turns = shown.removeprefix("<|im_start|>").split("<|im_end|>\n<|im_start|>")
    return " | ".join(turn.replace("\n", ": ", 1) for turn in turns)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.what)
def test_every_row_of_the_table(case, tokenizers, tmp_path):
    rows = case.row if isinstance(case.row, list) else [case.row]
    path = tmp_path / ("rows.parquet" if case.parquet else "rows.jsonl")
    if case.parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers[case.template]
    if case.result == "refused":
        with pytest.raises(DataError) as caught:
            prompt_dataset(tokenizer, source=str(path), **case.options)
        assert "rows.jsonl:1: " in str(caught.value) and case.text in str(caught.value)
        return
    data = prompt_dataset(tokenizer, source=str(path), **case.options)
    assert as_text(tokenizer, data[0]) == case.text
    assert tuple(data.report.changes) == case.changes and tuple(data.report.unused) == case.unused
    assert (case.result == "ignored") <= bool(case.unused)


def test_what_was_changed_and_not_used_is_said_once_for_a_data_set(source, caplog):
    def row(number):
        return {"id": str(number), "messages": [Q, {**A, "name": "Ann"}, Q2], "score": number, "source": None}

    rows = [row(number) for number in range(6)]
    rows[5]["source"] = "web"
    with caplog.at_level(logging.INFO):
        data = prompt_dataset(Letters(), source=source(*rows))
    assert data.report.changes == {"trailing_user_dropped": 6}
    assert data.report.unused == ["messages[].name", "score", "source"]
    lines = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert lines == [
        "rows that were read with a change: trailing_user_dropped 6",
        "not used, neither in prompts nor in responses: messages[].name, score, source",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        stream = prompt_dataset(Letters(), source=source(*rows), streaming=True, limit=2, max_seq_len=9)
        reports = [stream.window(iteration).report for iteration in range(3)]
    assert [report.changes for report in reports] == [{"trailing_user_dropped": 2}] * 3
    said = [record.getMessage().partition("responses: ")[2] for record in caplog.records]
    assert [names for names in said if names] == ["messages[].name, score", "source"]  # the last row's comes later
    mixture = mixed_prompt_dataset(Letters(), sources={"x": {"source": source(*rows)}, "y": {"source": [PAIR]}})
    assert mixture.report.changes == {"trailing_user_dropped": 6}
    assert mixture.report.unused == ["x: messages[].name", "x: score", "x: source"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "save_to_disk", "repository"])
def test_nulls_of_arrow_are_removed_at_any_depth_and_in_the_response(kind, tokenizers, tmp_path, caplog):
    """The repository is one of the hub: the datasets library makes Arrow of whatever it holds."""

    def row(number, name, properties, arguments):
        function = {"name": name, "parameters": {"type": "object", "properties": properties}}
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [Q, said("assistant", None, tool_calls=[call]), said("tool", "R", tool_call_id="c")]
        return {"id": number, "messages": [*turns, A], "tools": [{"type": "function", "function": function}]}

    rows = [
        row(0, "f", {"city": {"type": "string", "enum": ["x", "y"]}}, {"city": {"name": "Rome"}}),
        row(1, "g", {"n": {"type": "integer", "minimum": 1}}, {"n": 2, "city": {"code": 3}}),
    ]
    table, source = pa.Table.from_pylist(rows), str(tmp_path / f"rows.{kind}")
    if kind == "parquet":
        pq.write_table(table, source)
    elif kind == "arrow":
        with pa.ipc.new_file(source, table.schema) as file:
            file.write_table(table)
    elif kind == "save_to_disk":
        pytest.importorskip("datasets").Dataset(table).save_to_disk(source)
    else:
        (tmp_path / "folder").mkdir()
        pq.write_table(table, tmp_path / "folder" / "train.parquet")
        source = f"hf:{tmp_path / 'folder'}"
    tokenizer = tokenizers[TEMPLATE]
    with caplog.at_level(logging.WARNING):
        data = prompt_dataset(tokenizer, source=source, turns="all")
    assert caplog.text.count("with them any null that was written on purpose") == 1
    shown = [as_text(tokenizer, sample) for sample in data]
    assert not any("null" in text for text in shown)
    responses = [tokenizer.decode(sample.real_ids) for sample in data]
    assert responses[0] == '<call>f {"city": {"name": "Rome"}}</call><|im_end|>'
    assert responses[2] == '<call>g {"city": {"code": 3}, "n": 2}</call><|im_end|>' and len(responses) == 4
    assert json.dumps(rows[0]["tools"]) in shown[0]


# --- The documentation ---

BEGIN, END = "<!-- tests/data/test_formats.py writes from here -->\n", "<!-- to here -->\n"


def rendered() -> str:
    """The tables of docs/data.md."""
    lines = ["| files | read as |", "|---|---|"]
    for files in FILES:
        names = (
            "" if files.what.startswith("`rows.") else ", ".join(f"`{file.partition(' ')[0]}`" for file in files.files)
        )
        options = ", ".join(f"`{key}: {value}`" for key, value in files.options.items())
        result = "refused" if files.result == "refused" else f"rows {', '.join(files.text)}"
        shown = ": ".join(filter(None, (files.what, ", ".join(filter(None, (names, options))))))
        lines.append(f"| {shown} | {'; '.join(filter(None, (result, files.note)))} |")
    lines += ["", "| rows | example | result |", "|---|---|---|"]
    for case in ROWS:
        shown = case.shown or f"`{as_example(case.row)}`"
        note = case.note or (f"`{', '.join(case.changes)}` is counted" if case.changes else "")
        options = "".join(f", `{key}: {as_example(value)}`" for key, value in case.options.items())
        lines.append(f"| {case.what} | {shown}{options} | {'; '.join(filter(None, (case.result, note)))} |")
    return "\n".join(lines) + "\n"


def as_example(value: Any) -> str:
    """A value as YAML writes it, and a message as ``{role: content}``."""
    if isinstance(value, dict):
        items = dict(value)
        if "role" in items and isinstance(items.get("content"), str):
            items = {items.pop("role"): items.pop("content"), **items}
        return "{" + ", ".join(f"{key}: {as_example(each)}" for key, each in items.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_example, value)) + "]"
    if isinstance(value, str):
        return value if value.replace(" ", "").isalnum() and not value.isdigit() else "'" + value + "'"
    return json.dumps(value)


def replaced(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + rendered() + END + rest.partition(END)[2]


def test_the_documentation_has_the_table(repo):
    page = (repo / "docs/data.md").read_text(encoding="utf-8")
    assert BEGIN in page and END in page
    assert page == replaced(page), "run: python -m tests.data.test_formats"


if __name__ == "__main__":
    PAGE = Path(__file__).parents[2] / "docs/data.md"
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
