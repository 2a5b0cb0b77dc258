"""What `dataset` reads, refuses and ignores: one table, which is run here row by row and printed in docs/data.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.data import ChatTokenizer, prompt_dataset
from spin.errors import DataError

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
    """A line of the table.

    Args:
        what (str): first column of the documentation.
        row (Any): a row of a JSON Lines file, or the rows.
        text (str): where it is read, prompt and response as the model sees them, ``role: content`` with bars between;
            where it is refused, a part of the message.
        result (str): ``read``, ``refused`` or ``ignored``.
        note (str): last column.
        changes (tuple[str, ...]): names in the report.
        unused (tuple[str, ...]): columns and keys in the report.
        options (dict[str, Any]): of ``dataset``.
        template (str): of the tokenizer.
        parquet (bool): write the rows as parquet, where Arrow gives every struct all keys.
        shown (str): the example in the documentation; empty shows the row.
    """

    what: str
    row: Any
    text: str
    result: str = "read"
    note: str = ""
    changes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    parquet: bool = False
    shown: str = ""


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

ROWS = [
    # columns
    Case("OpenAI, TRL, Tulu, SmolTalk: messages", {"messages": [S, Q, A]}, SQA),
    Case("`messages` and a `system` column", {"system": "S", "messages": [Q, A]}, SQA),
    Case(
        "a `system` column beside a system message",
        {"system": "T", "messages": [S, Q, A]},
        SQA,
        note="the message counts",
        changes=("system_column_beside_system_message_left_out",),
    ),
    Case(
        "ShareGPT, OpenHermes, NeMo: conversations",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
        SQA,
    ),
    Case("prompt and response, or completion", {"prompt": "Q", "completion": "A"}, QA),
    Case("TRL: lists of messages", {"prompt": [S, Q], "completion": [A]}, SQA),
    Case("Alpaca", {"instruction": "Q", "input": "more", "output": "A"}, "user: Q\n\nmore | assistant: A"),
    Case("Alpaca, `input` alone", {"instruction": "", "input": "Q", "output": "A"}, QA),
    Case(
        "LLaMA-Factory: `system` and `history`",
        {"instruction": "Q2", "output": "A2", "system": "S", "history": [["Q", "A"]]},
        f"system: S | {HQA}",
    ),
    Case("`history` of pairs", {"prompt": "Q2", "response": "A2", "history": [["Q", "A"]]}, HQA),
    Case("`history` of messages", {"prompt": "Q2", "response": "A2", "history": [Q, A]}, HQA),
    refused("`history` of another form", {**PAIR, "history": ["Q", "A"]}, "'history' is no list of [user, assistant]"),
    Case("lists as JSON text", {"messages": json.dumps([Q, A])}, QA, changes=("json_text_parsed",)),
    Case(
        "history as JSON text",
        {"prompt": "Q2", "response": "A2", "history": '[["Q", "A"]]'},
        HQA,
        changes=("json_text_parsed",),
    ),
    refused("lists as Python text", {"messages": "[{'role': 'user'}]"}, "expected a list of messages, also as valid"),
    Case(
        "your own names, by `column_map`",
        {"question": "Q", "answer": "A"},
        QA,
        options={"column_map": {"prompt": "question", "response": "answer"}},
    ),
    refused("other columns", {"question": "Q", "answer": "A"}, "Map your columns with dataset.column_map"),
    Case(
        "columns that belong to no conversation",
        {**PAIR, "id": "1", "source": "web", "score": None},
        QA,
        "ignored",
        note="named once",
        unused=("source",),
    ),
    # what may not be read as a good answer
    refused(
        "preferences",
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        "dataset.column_map={response: chosen}",
        "unless `column_map` names the chosen answer",
    ),
    refused(
        "preferences of whole conversations",
        {"chosen": [Q, A], "rejected": [Q, A2]},
        "dataset.column_map={messages: chosen}",
    ),
    Case(
        "preferences, by `column_map`",
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        QA,
        unused=("rejected",),
        options={"column_map": {"response": "chosen"}},
    ),
    Case("KTO, desirable", {"prompt": "Q", "completion": "A", "label": True}, QA),
    refused("KTO, undesirable", {"prompt": "Q", "completion": "A", "label": False}, "an example of what not to answer"),
    refused("KTO of LLaMA-Factory", {"messages": [Q, A], "kto_tag": False}, "an example of what not to answer"),
    refused("rendered `text`", {"text": "### Human: Q ### Assistant: A"}, "A text does not say where the prompt ends"),
    # messages
    Case(
        "roles of other programs",
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "bard", "value": "A"}]},
        QA,
        note="also model, chatgpt, bing, bot, chatbot, ai, claude, prompter",
        changes=("role_bard_read_as_assistant",),
    ),
    refused("unknown roles", {"messages": [said("owner", "Q"), A]}, "message 0 has role 'owner'; expected one of"),
    Case("content parts of type text", {"messages": [said("user", [{"type": "text", "text": "Q"}]), A]}, QA),
    refused("other parts", {"messages": [said("user", [{"type": "image_url"}]), A]}, "only text is supported"),
    refused("columns of images, videos, audios", {"messages": [Q, A], "images": ["a.png"]}, "has images; only text"),
    Case(
        "an assistant's turn first",
        {"messages": [S, A2, Q, A]},
        SQA,
        note="left out",
        changes=("leading_assistant_dropped",),
    ),
    Case("a user's turn last", {"messages": [Q, A, Q2]}, QA, note="left out", changes=("trailing_user_dropped",)),
    refused("no answer", {"messages": [Q]}, "last message has role 'user', expected 'assistant'"),
    Case(
        "keys that no template reads",
        {"messages": [{**Q, "name": "Ann", "label": "x"}, A]},
        QA,
        "ignored",
        note="named once",
        unused=("messages[].name", "messages[].label"),
    ),
    # what is not to be trained on
    *(
        Case(
            f"`{key}: {json.dumps(off)}`",
            {"messages": [Q, A, Q2, {**A2, key: off}]},
            QA,
            note="not a real response; with `turns: last` the last other one is",
            changes=("untrained_turns_skipped",),
        )
        for key, off in (("weight", 0), ("train", False), ("loss", False), ("train_on_turn", False))
    ),
    Case(
        "the same with `turns: all`",
        {"messages": [Q, {**A, "weight": 0}, Q2, A2]},
        HQA,
        note="only the others are played",
        changes=("untrained_turns_skipped",),
        options={"turns": "all"},
    ),
    refused("no turn left", {"messages": [Q, {**A, "weight": 0}]}, "every assistant turn is marked"),
    refused("weights between", {"messages": [Q, {**A, "weight": 0.5}]}, "weight 0.5, expected 0 or 1"),
    refused(
        "axolotl's `train_detail`",
        {"messages": [Q, {**A, "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}]},
        "parts of a response cannot be left out",
    ),
    Case(
        "NeMo's `mask` of users",
        {"conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}], "mask": "User"},
        QA,
    ),
    refused(
        "NeMo's `mask` of assistants",
        {"conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}], "mask": "Assistant"},
        "every assistant turn is marked",
    ),
    # reasoning
    *(
        Case(
            f"`{key}` of a message",
            {"messages": [Q, {**A, key: "T"}]},
            "user: Q | assistant: <think>\nT\n</think>\n\nA",
            note="by the template",
        )
        for key in ("reasoning_content", "thinking", "reasoning")
    ),
    Case(
        "`reasoning_content` or `thinking` of a row",
        {**PAIR, "thinking": "T"},
        "user: Q | assistant: <think>\nT\n</think>\n\nA",
        note="by the template",
    ),
    refused(
        "reasoning that the template does not show",
        {"messages": [Q, {**A, "reasoning_content": "T"}]},
        "the chat template does not show it",
        template=CHATML,
    ),
    refused(
        "two different ones", {"messages": [Q, {**A, "reasoning_content": "T", "thinking": "U"}]}, "different texts in"
    ),
    # options of the template
    Case(
        "SmolTalk2's `chat_template_kwargs`",
        {"messages": [Q, A], "chat_template_kwargs": {"persona": "Ann", "other": None}},
        f"system: You are Ann | {QA}",
        note="the row's options of the template",
    ),
    refused(
        "options that the template does not read",
        {"messages": [Q, A], "chat_template_kwargs": {"persona": "Ann"}},
        "chat_template_kwargs has persona, which the chat template does not read",
        template=CHATML,
    ),
    # tools
    Case("`tools`", {"messages": [Q, A], "tools": [TOOL]}, f"{SHOWN_TOOL} | {QA}"),
    Case("`tools` as JSON text", {"messages": [Q, A], "tools": json.dumps([TOOL])}, f"{SHOWN_TOOL} | {QA}"),
    Case("OpenAI's older `functions`", {"messages": [Q, A], "functions": [TOOL]}, f"{SHOWN_TOOL} | {QA}"),
    refused("`tools` and `functions`", {"messages": [Q, A], "tools": [TOOL], "functions": [TOOL]}, "expected one of"),
    Case(
        "`tool_calls` and results",
        {"messages": [Q, said("assistant", "", tool_calls=CALLS), RESULT, A]},
        'user: Q | assistant: <call>f {"x": 1}</call> | tool: R | assistant: A',
    ),
    Case(
        "OpenAI's older `function_call`",
        {"messages": [Q, said("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'})]},
        'user: Q | assistant: <call>f {"x": 1}</call>',
    ),
    Case(
        "nulls in arguments, JSON Lines",
        {"messages": [Q, said("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": None}}])]},
        'user: Q | assistant: <call>f {"x": null}</call>',
        note="kept: they are yours",
    ),
    Case(
        "nulls in tools and arguments, parquet and `datasets`",
        [
            {"messages": [Q, said("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": 1}}])]},
            {"messages": [Q, said("assistant", "", tool_calls=[{"name": "g", "arguments": {"y": 2}}])]},
        ],
        'user: Q | assistant: <call>f {"x": 1}</call>',
        note="removed: Arrow adds them, and they cannot be told from yours",
        changes=("null_arguments_removed",),
        parquet=True,
        shown='`{"x": 1, "y": null}`',
    ),
    refused(
        "tools that the template does not show", {"messages": [Q, A], "tools": [TOOL]}, "would not see", template=CHATML
    ),
]


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
