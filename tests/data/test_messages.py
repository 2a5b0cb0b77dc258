"""What the parser does with rows beyond the table of test_formats.py: every fault, and torchtune's own transforms."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.data import InputOutputToMessages, OpenAIToMessages, ShareGPTToMessages

from spin.core.errors import ConfigError, DataError
from spin.data.messages import check_messages, check_row_format, detect_format, row_to_messages, split_turns

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
NEMO = {
    "mask": "User",
    "type": "VALUE_TO_TEXT",
    "conversations": [
        {"from": "User", "value": "Q", "label": None},
        {"from": "Assistant", "value": "A", "label": "quality:4"},
    ],
}
EMPTY = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("row", "row_format", "options", "messages"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages", {}, [USER, ASSISTANT]),
        ({"prompt": "Q", "response": "A"}, "prompt_response", {}, [USER, ASSISTANT]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_response", {}, [USER, ASSISTANT]),
        ({"instruction": "Q", "input": None, "output": "A"}, "alpaca", {}, [USER, ASSISTANT]),
        ({"prompt": "Q", "messages": [USER, ASSISTANT], "response": None}, "messages", {}, [USER, ASSISTANT]),
        # columns under names of their own, TRL's preferences with a prompt among them
        ({"real": [USER, ASSISTANT]}, "messages", {"column_map": {"messages": "real"}}, [USER, ASSISTANT]),
        ({"prompt": [USER], "chosen": [ASSISTANT]}, "prompt_response", {"column_map": {"response": "chosen"}},
            [USER, ASSISTANT]),
        # a system prompt stands first unless there is one
        ({"messages": [USER, ASSISTANT]}, "messages", {"system_prompt": "S"}, [SYSTEM, USER, ASSISTANT]),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", {"system_prompt": "T"}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "Q", "response": "A", "system": "S"}, "prompt_response", {}, [SYSTEM, USER, ASSISTANT]),
        # NeMo-Aligner: roles by from, with a capital; the preamble next to the turns, empty or not
        ({**NEMO, "system": "S"}, "sharegpt", {}, [SYSTEM, USER, ASSISTANT]),
        ({**NEMO, "system": ""}, "sharegpt", {}, [EMPTY, USER, ASSISTANT]),
        ({**NEMO, "system": None}, "sharegpt", {}, [USER, ASSISTANT]),
        ({**NEMO, "system": "T", "conversations": [{"from": "System", "value": "S"}, *NEMO["conversations"]]},
            "sharegpt", {}, [SYSTEM, USER, ASSISTANT]),
        ({**NEMO, "preamble": "S"}, "sharegpt", {"column_map": {"system": "preamble"}}, [SYSTEM, USER, ASSISTANT]),
        # texts are not touched
        ({"prompt": "  Q \n", "response": "\n\nA  "}, "prompt_response", {}, [{**USER, "content": "  Q \n"},
            {**ASSISTANT, "content": "\n\nA  "}]),
    ],
)  # fmt: skip
def test_a_format_is_found_or_given(row, row_format, options, messages):
    assert detect_format(row, options.get("column_map")) == row_format
    for name in ("auto", row_format):
        assert row_to_messages(row, row_format=name, **options) == messages
    check_messages(messages)


def test_options_that_name_columns_are_checked_before_rows():
    check_row_format("auto", {"messages": "chat"})
    for row_format, column_map, message in (
        ("alpacca", None, r"dataset\.format=alpacca: expected one of auto, messages"),
        ("prompt_response", {"question": "prompt"}, "the key 'question'; format prompt_response knows prompt, resp"),
        ("auto", {"prompt:question": None}, "has the key 'prompt:question'.* with a space behind the colon"),  # in YAML
        ("auto", 5, r"dataset\.column_map=5: expected the format's columns"),
        ("auto", {"prompt": 5}, r"dataset\.column_map=\{.prompt.: 5\}: expected the format.s columns"),
        ("auto", {5: "prompt"}, r"has the key 5; format auto knows"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_row_format(row_format, column_map)


FAULTS = [
    *(
        ({"messages": messages}, reason)
        for messages, reason in (
            ([], "the conversation is empty"),
            ([ASSISTANT], "message 0 has role 'assistant' and stands first, expected after 'user' or after 'tool'"),
            ([USER, SYSTEM, ASSISTANT], "message 1 has role 'system' and stands after 'user', expected first"),
            ([USER, USER, ASSISTANT], "message 1 has role 'user' and stands after 'user'"),
            ([USER, ASSISTANT, ASSISTANT], "message 2 has role 'assistant' and stands after 'assistant'"),
            ([SYSTEM, ASSISTANT], "message 1 has role 'assistant' and stands after 'system'"),
            ([{"role": "tool", "content": "x"}, ASSISTANT], "message 0 has role 'tool' and stands first"),
            ([USER, {"role": "assistant", "content": " \n"}], "message 1 (role 'assistant') has empty content"),
            ([{"role": "user", "content": ""}, ASSISTANT], "message 0 (role 'user') has empty content"),
            (
                [{"role": "user", "content": None}, ASSISTANT],
                "message 0 (role 'user'): content is null, expected a tex",
            ),
            ([USER, {"role": "assistant", "content": 5}], "message 1 (role 'assistant'): content is of type int"),
            ([{"role": "user", "content": "\ud800"}, ASSISTANT], "message 0 holds the lone surrogate"),
            ([{"role": ["user"], "content": "x"}, ASSISTANT], "message 0 has role ['user']"),
            ([{"text": "x"}, ASSISTANT], "message 0 has the keys text; expected role and content, or from and value"),
            (["hello", ASSISTANT], "message 0 is of type str, expected an object"),
            ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "message 1 calls {}, expected a func"),
        )
    ),
    ({"messages": "hi"}, "messages is of type str, expected a list of messages"),
    ({"prompt": 5, "response": "A"}, "prompt is of type int, expected a text or a list of messages"),
    ({"prompt": "Q", "response": [USER]}, "expected exactly one, of role 'assistant'"),
    ({"prompt": "Q", "response": {"a": 1}}, "the response is of type dict, expected a text"),
    ({"instruction": "Q", "output": 3}, "output is of type int"),
    (
        {"messages": [USER]},
        "last message has role 'user', expected 'assistant'. SPIN needs a real response to learn from. "
        "Fix the row or set dataset.on_bad_row=skip.",
    ),
    ({"prompt": "Q", "response": None, "source": None}, "columns prompt (null: response, source); expected messages"),
]


@pytest.mark.parametrize(("row", "reason"), FAULTS)
def test_faults_of_rows(row, reason):
    with pytest.raises(DataError) as caught:
        row_to_messages(row)
    assert reason in str(caught.value)


def test_a_column_that_is_null_goes_by_its_own_name():
    mapped = {"prompt": "question", "response": "answer"}
    with pytest.raises(DataError, match="column 'question' is null; found columns question, answer"):
        row_to_messages({"question": None, "answer": "A"}, row_format="prompt_response", column_map=mapped)


def test_turns():
    second = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    conversation = [SYSTEM, USER, ASSISTANT, *second]
    assert split_turns(conversation, "last") == [("", conversation)]
    assert split_turns(conversation, "all") == [("#turn0", conversation[:3]), ("#turn1", conversation)]


SHAREGPT = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
OPENAI = OpenAIToMessages(column_map={"messages": "chat"}, new_system_prompt="S")


@pytest.mark.parametrize(
    ("row", "transform", "expected"),
    [
        (SHAREGPT, ShareGPTToMessages(), [USER, ASSISTANT]),
        ({"chat": [USER, ASSISTANT]}, OPENAI, [SYSTEM, USER, ASSISTANT]),
        ({"input": "Q", "output": "A"}, InputOutputToMessages(), [USER, ASSISTANT]),
        (
            {"chat": []},
            ShareGPTToMessages(),
            "ShareGPTToMessages failed with KeyError: 'conversations'; the row has the",
        ),
        ({"a": 1}, lambda row: None, "transform"),
        ({"a": 1}, lambda row: {"tokens": [1]}, "transform"),
        ({"a": 1}, lambda row: {"messages": [5]}, "transform"),
    ],
)
def test_transforms(row, transform, expected):
    if isinstance(expected, list):
        assert row_to_messages(row, message_transform=transform) == expected
        return
    with pytest.raises(DataError, match=expected):
        row_to_messages(row, message_transform=transform)


def test_torchtune_transforms_load_no_image():
    """They would open what the row names, a file of this machine or any address, before anything could refuse it."""
    address = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    for row, transform in (
        ({"messages": [{"role": "user", "content": [address]}, ASSISTANT]}, OpenAIToMessages()),
        ({**SHAREGPT, "image": "/etc/hostname"}, ShareGPTToMessages(image_tag="<image>")),
        (
            {"input": "Q", "output": "A", "picture": "/etc/hostname"},
            InputOutputToMessages(column_map={"input": "input", "output": "output", "image": "picture"}),
        ),
    ):
        with pytest.raises(DataError, match="has an image; only text is supported, and nothing was loaded"):
            row_to_messages(row, message_transform=transform)


# Keys and values near those of real rows, so that the fuzz reaches the parsers and not only the detection.
_scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4) | st.just("user")
_KEYS = "role content from value type text tool_calls function_call weight train thinking"
_COLUMNS = (
    "messages conversations prompt response completion instruction input output system tools functions history "
    "thinking chat_template_kwargs mask label kto_tag images id"
)
_WORDS = "user assistant gpt human system tool function_call [] {}"
_turns = st.dictionaries(st.sampled_from(_KEYS.split()), _scalars | st.sampled_from(_WORDS.split()), max_size=3)
_values = _scalars | st.lists(_turns | _scalars, max_size=3) | _turns
_rows = st.dictionaries(st.sampled_from(_COLUMNS.split()), _values, max_size=5)


@settings(max_examples=400, deadline=None, database=None)
@given(
    row=_rows,
    row_format=st.sampled_from(["auto", "messages", "sharegpt", "prompt_response", "alpaca"]),
    from_arrow=st.booleans(),
)
def test_any_row_parses_or_is_a_data_error(row, row_format, from_arrow):
    try:
        messages = row_to_messages(row, row_format=row_format, system_prompt="S", from_arrow=from_arrow)
    except DataError as error:
        assert str(error)
        return
    for _, part in (*split_turns(messages, "last"), *split_turns(messages, "all")):
        assert part[-1]["role"] == "assistant" and not any("train" in message for message in part)
    assert messages[-1]["role"] == "assistant"
    assert all(isinstance(message["content"], str) for message in messages)
