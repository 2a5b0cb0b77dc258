"""Conversations with tools: a call is a response of the model, what a tool returns is part of the prompt only."""

import json

import pytest

from spin.core.errors import DataError
from spin.data import ChatTokenizer, PairStore, prompt_dataset
from spin.data.messages import row_to_messages, split_turns
from tests.recipes.helpers import run

# In the manner of Qwen 2.5: JSON between tags, results in a user turn, adjacent ones together.
TAGGED = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# In the manner of Llama 3.1: one call a turn, results under a role of their own, as JSON.
ROLES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|im_start|>assistant
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>ipython
{{ message.content | tojson }}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
TALK = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21}'},
    {"role": "assistant", "content": "It is 21 degrees."},
]


@pytest.fixture
def chat(tiny_lm):
    return lambda template: ChatTokenizer(tiny_lm, chat_template=template)


TAGGED_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROLES_CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("template", "call", "result"),
    [(TAGGED, TAGGED_CALL, '{"celsius": 21}'), (ROLES, ROLES_CALL, json.dumps('{"celsius": 21}'))],
    ids=["tags", "roles"],
)
def test_results_are_in_the_prompt_and_never_in_a_response(chat, source, template, call, result):
    tokenizer = chat(template)
    path = source({"id": "w", "messages": TALK, "tools": [WEATHER]})
    samples = prompt_dataset(tokenizer, source=path, turns="all")
    assert samples.sample_ids == ["w#turn0", "w#turn1"]
    shown = [(tokenizer.decode(sample.prompt_ids), tokenizer.decode(sample.real_ids)) for sample in samples]
    (asked, called), (after, response) = shown
    assert called == f"{call}<|im_end|>" and response == "It is 21 degrees.<|im_end|>"
    assert '"name": "get_weather"' in asked and "celsius" not in asked and "celsius" not in called + response
    assert after.endswith("<|im_start|>assistant\n") and after.startswith(asked + call)
    assert after.count(result) == 1 and after.index(call) < after.index(result)
    # what is asked in generation is what stands before the response in training
    parts = split_turns(row_to_messages({"messages": TALK, "tools": [WEATHER]}), "all")
    assert [sample.prompt_ids for sample in samples] == [tokenizer.encode_prompt(part[:-1]) for _, part in parts]
    last = prompt_dataset(tokenizer, source=path)
    assert [(sample.sample_id, tokenizer.decode(sample.real_ids)) for sample in last] == [("w", response)]


def test_several_results_and_calls_of_a_turn(chat):
    calls = [{"id": f"c{i}", "function": {"name": "f", "arguments": {"i": i}}} for i in range(2)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"r{i}"} for i in range(2)]
    talk = [TALK[0], {"role": "assistant", "content": "Let me see.", "tool_calls": calls}, *results, TALK[3]]
    tokenizer = chat(TAGGED)
    prompt_ids, _ = tokenizer.encode_pair(row_to_messages({"messages": talk}))
    prompt = tokenizer.decode(prompt_ids)
    assert "assistant\nLet me see.\n<tool_call>" in prompt and prompt.count("<tool_call>") == 2
    assert "<tool_response>\nr0\n</tool_response>\n<tool_response>\nr1\n</tool_response><|im_end|>" in prompt
    with pytest.raises(DataError, match="the chat template refuses the roles .*: one call at a time"):
        chat(ROLES).encode_pair(row_to_messages({"messages": talk}))


def test_other_spellings_mean_the_same():
    expected = row_to_messages({"messages": TALK, "tools": [WEATHER]})
    assert expected[0]["tools"] == [{"type": "function", "function": WEATHER}]
    assert expected[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": TALK[0]["content"]},
            {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": {"city": "Paris"}})},
            {"from": "observation", "value": TALK[2]["content"]},
            {"from": "gpt", "value": TALK[3]["content"]},
        ],
        "tools": json.dumps([WEATHER]),
    }
    old = [
        TALK[0],
        {"role": "assistant", "function_call": CALL["function"]},
        {"role": "function", "content": TALK[2]["content"]},
    ]
    for row in (sharegpt, {"messages": [*old, TALK[3]], "tools": [{"type": "function", "function": WEATHER}]}):
        found = row_to_messages(row)
        for message in (*found, *expected):
            message.pop("tool_call_id", None)
            for call in message.get("tool_calls", ()):
                call.pop("id", None)
        assert found == expected
    # as parquet gives it: every message has every key
    filled = [{"content": None, "tool_calls": None, "tool_call_id": None, "name": None} | turn for turn in TALK]
    assert row_to_messages({"messages": filled, "tools": None})[3] == TALK[3]


def test_a_system_prompt_stands_before_and_keeps_the_tools():
    messages = row_to_messages({"messages": TALK, "tools": [WEATHER]}, system_prompt="Be brief.")
    assert messages[0]["role"] == "system" and "tools" in messages[0] and "tools" not in messages[1]


def calling(call):
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (
            [calling(CALL), {**TALK[2], "tool_call_id": "x"}, TALK[3]],
            None,
            "is the result of call 'x', expected 'call_1'",
        ),
        ([calling({"function": {}})], None, "message 1 calls {'function': {}}, expected"),
        ([calling(5)], None, "message 1 calls 5, expected a function"),
        ([calling({"name": "f", "arguments": "{"})], None, "message 1, arguments of f: '{' is not valid JSON"),
        ([calling({"name": "f", "arguments": [1]})], None, "message 1 calls f with arguments [1], expected a JSON obj"),
        ([TALK[3], {**TALK[0], "tool_calls": [CALL]}, TALK[3]], None, "(role 'user') calls tools, which only the assi"),
        ([TALK[3]], ["hammer"], "tools: entry 0 is 'hammer', expected a function"),
        ([TALK[3]], "hammer", "tools: 'hammer' is not valid JSON"),
        ([calling(CALL), {**TALK[2], "content": {"a": 1}}, TALK[3]], None, "content is of type dict, expected a text"),
        (TALK[1:3], None, "last message has role 'tool', expected 'assistant'"),
    ],
)
def test_faults_name_the_row(chat, source, messages, tools, reason):
    with pytest.raises(DataError) as caught:
        prompt_dataset(chat(TAGGED), source=source({"messages": [TALK[0], *messages], "tools": tools}))
    assert "data.jsonl:1: " in str(caught.value) and reason in str(caught.value)


def test_a_column_of_that_name_that_holds_no_tools_can_be_left_out():
    assert row_to_messages({"messages": [TALK[0], TALK[3]], "tools": ["hammer"]}, column_map={"tools": "unused"})


# Knows users and assistants, and writes nothing of others.
SILENT = (
    "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "lost"), [(None, "tools and calls"), (SILENT, "tools and calls and results")], ids=["chatml", "silent"]
)
def test_a_template_that_leaves_tools_out_is_refused(chat, template, lost):
    """The prompt would lack what the response rests on, and nobody would know."""
    with pytest.raises(DataError, match=f"does not show their {lost}: the model would not see them"):
        chat(template).encode_pair(row_to_messages({"messages": TALK, "tools": [WEATHER]}))


def test_results_after_calls_in_plain_text_need_a_role_only(chat):
    talk = [TALK[0], {"role": "assistant", "content": "CALL get_weather"}, TALK[2], TALK[3]]
    tokenizer = chat(None)
    prompt_ids, real_ids = tokenizer.encode_pair(row_to_messages({"messages": talk}))
    assert "CALL get_weather" in tokenizer.decode(prompt_ids) and "celsius" in tokenizer.decode(prompt_ids)
    assert "celsius" not in tokenizer.decode(real_ids)


def test_the_opponent_is_asked_with_the_results_and_responds_itself(tiny_lm, tmp_path):
    """The pairs of a run on disk have the tool's text in the prompt alone."""
    (tmp_path / "tools.jinja").write_text(TAGGED)
    rows = [{"messages": [{**TALK[0], "content": f"Weather {i}?"}, *TALK[1:]], "tools": [WEATHER]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        tmp_path / "run",
        f"dataset.source={tmp_path / 'rows.jsonl'}",
        "dataset.turns=all",
        f"tokenizer.chat_template={tmp_path / 'tools.jinja'}",
        "validation_dataset=null",
        "max_iterations=1",
        "max_epochs=1",
    )
    tokenizer = ChatTokenizer(tiny_lm)
    pairs = list(PairStore.open(tmp_path / "run/iteration_000/pairs").pairs())
    assert len(pairs) == 8
    for pair in pairs:
        prompt, real = (tokenizer.decode(ids.tolist()) for ids in (pair.prompt_ids, pair.real_ids))
        assert ("celsius" in prompt) == pair.sample_id.endswith("#turn1") and "celsius" not in real
