"""Chat templates in the style of the model families: what is asked, what is trained, and which are refused.

The templates are small ones of our own that have the families' structure: where the system message goes, what is
trimmed, which defaults and dates are written, what the generation prompt ends in, what becomes of reasoning. Expected
texts are written out by hand; ``E`` is the tiny tokenizer's stop token.
"""

import json
import logging
import signal

import pytest
from transformers import AutoTokenizer

from spin.core.errors import DataError
from spin.data.chat import ChatTokenizer

E = "<|im_end|>"
DAY = "2026-01-31"
SYSTEM = {"role": "system", "content": "Be brief."}
USER, SO = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
AGAIN, LAST = {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes."}
REASONED = {"role": "assistant", "content": "<think>\nI look.\n</think>\n\nYes."}
TALK = [SYSTEM, USER, SO, AGAIN, LAST]

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN25 = "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3 = (
    "{%- if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{- '[system]Today Date: ' + date_string + ' ' + system + eos_token }}"
    "{%- for m in messages %}{{ '[' + m.role + ']\\n\\n' + m.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"
)
GRANITE = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system = \"Today's Date: \" + strftime_now('%B %d, %Y') + '.' %}"
    "{% set loop_messages = messages %}{% endif %}{% if thinking %}{% set system = system + ' Think.' %}{% endif %}"
    "{{ '[system]' + system + eos_token + '\\n' }}{% for m in loop_messages %}"
    "{{ '[' + m.role + ']' + m.content + eos_token + '\\n' }}{% if loop.last and add_generation_prompt %}"
    "{{ '[assistant]' }}{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + eos_token "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA3 = (
    "{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
    "+ (first if loop.first else '') }}{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
OLMO = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
MISTRAL1 = (  # the system message in front of the first user turn
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{ '<s>' }}"
    "{%- for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + m.content "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # in front of the last message, if that is the user's
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<s>' }}{%- for m in messages %}{% if m.role == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% endif %}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
MISTRAL_SMALL = (
    "{%- set today = strftime_now('%Y-%m-%d') %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% else %}"
    "{% set system = 'The current date is ' + today + '.' %}{% endif %}"
    "{{ '<s>[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
R1 = (  # the prompt opens a thinking block, responses are cut behind theirs
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<User>' + m.content }}{% else %}{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"
)
V31 = (  # a closed block in every prompt and response, or with thinking an open one in the prompt alone
    "{%- if not thinking is defined %}{% set thinking = false %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<User>' + m.content }}{% else %}"
    "{{ '<Assistant></think>' + m.content.split('</think>')[-1] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
QWEN3 = (  # reasoning of the last response stays, an empty block stands for none
    "{%- for m in messages %}{% if m.role == 'assistant' %}{% set reasoning = m.reasoning_content or '' %}"
    "{% set content = m.content %}{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}{{ content + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
QWEN3_THINKING = QWEN3.replace(  # of 2507: every prompt opens the block
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "{{ '<think>\\n' }}",
)
SMOLLM3 = (  # reasons unless switched off; an empty block in responses only then
    "{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' "
    "+ ('/think' if enable_thinking else '/no_think') }}{% if messages[0].role == 'system' %}"
    "{{ '\\n' + messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% else %}{% generation %}{{ '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') "
    "+ m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('' if enable_thinking else "
    "'<think>\\n\\n</think>\\n') }}{% endif %}"
)

IM = "<|im_start|>"
THINK = "<think>\n\n</think>"
IN_CHATML = f"{IM}system\nBe brief.{E}\n{IM}user\nWhy?{E}\n{IM}assistant\nSo.{E}\n{IM}user\nReally?{E}\n{IM}assistant\n"
IN_PHI3 = f"<|system|>\nBe brief.{E}\n<|user|>\nWhy?{E}\n<|assistant|>\nSo.{E}\n<|user|>\nReally?{E}\n<|assistant|>\n"
IN_LLAMA = f" Be brief.{E}[user]\n\nWhy?{E}[assistant]\n\nSo.{E}[user]\n\nReally?{E}[assistant]\n\n"
TURN = "<start_of_turn>"
# template, options, the prompt before the last response of TALK (None: refuses system messages), the response
# fmt: off
FAMILIES = {
    "chatml": (CHATML, {}, IN_CHATML, "Yes."),
    "qwen2.5": (QWEN25, {}, IN_CHATML, "Yes."),
    "zephyr": (ZEPHYR, {}, IN_PHI3, "Yes."),
    "llama 3": (LLAMA3, {}, "[system]Today Date: 31 Jan 2026" + IN_LLAMA, "Yes."),
    "llama 3 with its date": (LLAMA3, {"date_string": "1 May"}, "[system]Today Date: 1 May" + IN_LLAMA, "Yes."),
    "granite": (GRANITE, {}, f"[system]Be brief.{E}\n[user]Why?{E}\n[assistant]So.{E}\n[user]Really?{E}\n[assistant]",
        "Yes."),
    "gemma 2": (GEMMA2, {}, None, "Yes."),
    "gemma 3": (GEMMA3, {},
        f"{TURN}user\nBe brief.\n\nWhy?{E}\n{TURN}model\nSo.{E}\n{TURN}user\nReally?{E}\n{TURN}model\n", "Yes."),
    "phi 3": (PHI3, {}, IN_PHI3, "Yes."),
    "phi 4": (PHI4, {}, f"{IM}system<|im_sep|>Be brief.{E}{IM}user<|im_sep|>Why?{E}{IM}assistant<|im_sep|>So.{E}"
        f"{IM}user<|im_sep|>Really?{E}{IM}assistant<|im_sep|>", "Yes."),
    "olmo": (OLMO, {},
        f"<bos><|system|>\nBe brief.\n<|user|>\nWhy?\n<|assistant|>\nSo.{E}\n<|user|>\nReally?\n<|assistant|>\n",
        "Yes."),
    "mistral 1": (MISTRAL1, {}, f"<s> [INST] Be brief.\n\nWhy? [/INST] So.{E} [INST] Really? [/INST]", " Yes."),
    "mistral 3": (MISTRAL3, {}, f"<s>[INST] Why?[/INST] So.{E}[INST] Be brief.\n\nReally?[/INST]", " Yes."),
    "mistral small": (MISTRAL_SMALL, {},
        f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?[/INST]So.{E}[INST]Really?[/INST]", "Yes."),
    "r1 distilled": (R1, {}, f"<s>Be brief.<User>Why?<Assistant>So.{E}<User>Really?<Assistant><think>\n", "Yes."),
    "deepseek 3.1": (V31, {}, f"Be brief.<User>Why?<Assistant></think>So.{E}<User>Really?<Assistant></think>",
        "Yes."),
    "qwen 3": (QWEN3, {"enable_thinking": False}, f"{IN_CHATML}{THINK}\n\n", "Yes."),
    "smollm 3": (SMOLLM3, {"enable_thinking": False},
        f"{IM}system\nToday Date: 31 January 2026\nReasoning Mode: /no_think\nBe brief.{E}\n{IM}user\nWhy?{E}\n"
        f"{IM}assistant\n{THINK}\nSo.{E}\n{IM}user\nReally?{E}\n{IM}assistant\n{THINK}\n", "Yes."),
}
# fmt: on
DATED = ("llama 3", "llama 3 with its date", "granite", "mistral small", "smollm 3")


def family(tiny_lm, name, **changes):
    template, options, *_ = FAMILIES[name]
    date = {"date": DAY} if name in DATED else {}
    return ChatTokenizer(tiny_lm, chat_template=template, **{"template_options": options, **date, **changes})


def texts(chat, messages):
    return tuple(map(chat.decode, chat.encode_pair(messages)))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_response_of_a_family(tiny_lm, name, caplog):
    """And there is no warning where nothing is wrong."""
    with caplog.at_level(logging.WARNING):
        chat = family(tiny_lm, name)
    warning = "opens a thinking block in every prompt" if name == "r1 distilled" else ""
    assert warning in caplog.text and bool(caplog.text) is bool(warning)
    *_, prompt, expected = FAMILIES[name]
    if prompt is None:
        with pytest.raises(DataError, match="refuses the roles system, user, assistant, user"):
            chat.encode_pair(TALK)
    else:
        assert texts(chat, TALK) == (prompt, expected + E)
        assert chat.encode_prompt(TALK[:-1]) == chat.encode_pair(TALK)[0]
    asked, response = texts(chat, TALK[1:])
    assert response == expected + E and "Why?" in asked and "Really?" in asked


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_those_of_transformers(tiny_lm, name):
    """With today's date, which is the one that transformers has."""
    template, options, prompt, _ = FAMILIES[name]
    chat = family(tiny_lm, name, date=None)
    reference = AutoTokenizer.from_pretrained(str(tiny_lm))
    for messages in (TALK, TALK[1:], TALK[1:3]):
        if messages[0] is SYSTEM and prompt is None:
            continue
        expected = reference.apply_chat_template(
            messages[:-1], chat_template=template, add_generation_prompt=True, return_dict=False, **options
        )
        assert chat.encode_prompt(messages[:-1]) == expected


def test_a_response_that_begins_behind_the_generation_prompt(tiny_lm, caplog):
    """gpt-oss: the prompt ends before the channel. It has a generation prompt, and the warning does not deny it."""
    template = (
        "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') "
        "+ '<|message|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    chat = ChatTokenizer(tiny_lm, chat_template=template)
    assert texts(chat, TALK)[1] == "<|channel|>final<|message|>Yes." + E
    assert "begins every real response with '<|channel|>final<|message|>'" in caplog.text
    assert "no generation prompt" not in caplog.text


# --- Reasoning ---

THOUGHT = {**LAST, "reasoning_content": "I look."}
TAGS = {"role": "assistant", "content": "Write <think>a</think>, then </think>"}
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("template", "options", "last", "expected"),
    [
        (QWEN3, {}, REASONED, REASONED["content"]),
        (SMOLLM3, {}, REASONED, REASONED["content"]),
        (QWEN3, {}, THOUGHT, REASONED["content"]),
        (QWEN3, OFF, LAST, "Yes."),
        (SMOLLM3, OFF, LAST, "Yes."),
        # behind the block that the prompt opens, the row's own text
        (QWEN3_THINKING, {}, REASONED, "I look.\n</think>\n\nYes."),
        (R1, {}, REASONED, "I look.\n</think>\n\nYes."),
        (V31, {"thinking": True}, REASONED, "\nI look.\n</think>\n\nYes."),
        # tags that are part of a text
        *((template, {}, TAGS, TAGS["content"]) for template in (CHATML, LLAMA3, GEMMA3)),
    ],
)
def test_responses_with_reasoning_and_without(tiny_lm, template, options, last, expected):
    chat = ChatTokenizer(tiny_lm, chat_template=template, template_options=options)
    prompt, response = texts(chat, [USER, last])
    assert response == expected + E
    assert prompt.rstrip("\n").endswith("<think>") == ("<think>" not in expected and "</think>" in expected)


def test_options_of_a_row(tiny_lm):
    """They go before the config's; where they switch reasoning off, a response needs none."""
    for template in (QWEN3, SMOLLM3):
        chat = ChatTokenizer(tiny_lm, chat_template=template)
        asked = ChatTokenizer(tiny_lm, chat_template=template, template_options={"enable_thinking": False})
        row = [{**SYSTEM, "chat_template_kwargs": {"enable_thinking": False}}, *TALK[1:]]
        assert chat.encode_pair(row) == asked.encode_pair(TALK)
        row = [{**SYSTEM, "chat_template_kwargs": {"enable_thinking": True}}, *TALK[1:-1], REASONED]
        assert asked.encode_pair(row) == chat.encode_pair([*TALK[:-1], REASONED])
        for name in ("persona", "messages"):
            with pytest.raises(DataError, match=f"chat_template_kwargs has {name}, which the chat template does not"):
                chat.encode_pair([{**SYSTEM, "chat_template_kwargs": {name: "Ann"}}, *TALK[1:]])
        for row in ({"enable_thinking": True}, {}):
            with pytest.raises(DataError, match="the real response has no reasoning"):
                chat.encode_pair([{**SYSTEM, "chat_template_kwargs": row}, *TALK[1:]])


# --- Options, dates, named templates ---


HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CONSTANT = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}" + CHATML
)


def chosen(messages):
    return "{% for m in " + messages + " %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + HEAD


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("no/such/file.jinja", {}, "neither a file nor a Jinja template"),
        ("{{ raise_exception('never') }}", {}, "refuses the roles user, assistant"),
        ("{% for m in messages %}\n{{ m.content ", {}, r"not valid Jinja, line 2: .* Fix tokenizer\.chat_template"),
        *(
            (chosen(f"messages if m.role != '{role}'"), {}, f"the chat template does not show what the {role} says")
            for role in ("user", "assistant")
        ),
        (QWEN3, {"template_options": {"enable_thinkin": 1}}, r"\.enable_thinkin: .* it; it reads enable_thinking\."),
        (None, {"template_options": {"messages": []}}, r"never reads it; it reads none\."),
        *(
            (LLAMA3, {"date": date}, rf"tokenizer\.date='?{date}'?: expected a day as YYYY-MM-DD")
            for date in ("31.1.2026", "2026-02-30", 7)
        ),
        (None, {"date": DAY}, r"never asks for the date\. Remove it"),
        (CONSTANT, {"date": DAY}, r"never asks for the date\. Set tokenizer\.template_options\.date_string"),
    ],
)
def test_a_template_its_options_or_its_date_that_cannot_be(tiny_lm, template, options, message):
    with pytest.raises(DataError, match=message):
        ChatTokenizer(tiny_lm, chat_template=template, **options)


@pytest.mark.parametrize(
    ("template", "options", "messages", "message"),
    [
        ("{{ messages|length }}" + chosen("messages"), {}, TALK, r"does not begin with its own prompt.* to one that"),
        (CHATML, {}, [USER, {"role": "assistant", "content": f"A{E} or so"}], "the stop token .* followed by 'or so'"),
        (CHATML, {}, [USER, {"role": "assistant", "content": E}], "has no tokens but its stop token"),
        # the opponent would reason and the data set would not
        (QWEN3, {}, TALK, r"template_options\.enable_thinking=false, or give the real responses with"),
        (SMOLLM3, {}, [USER, LAST], r"template_options\.enable_thinking=false, or give the real responses with"),
        (QWEN3_THINKING, {}, TALK, r"has no reasoning: .*Set tokenizer\.chat_template to a template that goes with"),
        (V31, {"thinking": True}, TALK, r"template_options\.thinking=false"),
        (CHATML, {}, [USER, THOUGHT], r"has reasoning \('I look\.'\), and the chat template does not show it"),
        (QWEN3, OFF, [USER, REASONED], r"tokenizer\.template_options"),
        (V31, {"thinking": False}, [USER, REASONED], r"tokenizer\.template_options"),
        # what does not reach the prompt
        (chosen("messages[-1:]"), {}, TALK, "has a system message, .* does not show it"),
        (chosen("messages[-1:]"), {}, TALK[1:], "has several turns, .* does not show the earlier ones"),
        (chosen("messages if m.role != 'system'"), {}, TALK, "has a system message, .* does not show it"),
        (chosen("messages[:1] + messages[-1:]"), {}, TALK, "has several turns, and the chat template does not show"),
        (chosen("messages[-6:]"), {}, TALK[1:], "has several turns, and the chat template does not show the earlier"),
        (CHATML.replace("m.content", "m.content[:1000]"), {}, TALK[1:], "has several turns, .* does not show the ear"),
    ],
)
def test_a_conversation_that_a_template_cannot_show(tiny_lm, template, options, messages, message):
    chat = ChatTokenizer(tiny_lm, chat_template=template, template_options=options)
    with pytest.raises(DataError, match=message):
        chat.encode_pair(messages)
    if "does not show the earlier" in message or "system message" in message:
        with pytest.raises(DataError, match=message):
            chat.encode_prompt(messages[:-1])


def test_an_empty_system_message_says_that_there_is_none(tiny_lm):
    chat = ChatTokenizer(tiny_lm, chat_template=chosen("messages if m.role != 'system'"))
    assert chat.encode_pair([{"role": "system", "content": ""}, USER, SO]) == chat.encode_pair([USER, SO])


def test_a_template_without_a_generation_prompt_gets_a_warning(tiny_lm, caplog):
    ChatTokenizer(tiny_lm, chat_template=chosen("messages"))
    assert "no generation prompt" not in caplog.text
    ChatTokenizer(tiny_lm, chat_template=chosen("messages").removesuffix(HEAD))
    assert r"writes no generation prompt: prompts end before '<|im_start|>assistant\n'" in caplog.text


def test_options_and_date_are_part_of_the_fingerprint_where_they_count(tiny_lm):
    plain = ChatTokenizer(tiny_lm, chat_template=QWEN3)
    without = ChatTokenizer(tiny_lm, chat_template=QWEN3, template_options={"enable_thinking": False})
    assert plain.fingerprint != without.fingerprint and not plain.reads_date
    days = [ChatTokenizer(tiny_lm, chat_template=LLAMA3, date=day) for day in (DAY, DAY, "2026-02-01")]
    first, again, other = (each.fingerprint for each in days)
    assert first == again != other and DAY in first


def test_named_templates(tiny_lm, folder):
    named = [{"name": "rag", "template": PHI4}, {"name": "chat", "template": CHATML}]
    model = folder(chat_template=named)
    with pytest.raises(DataError, match=r"several chat templates, .* Choose one: tokenizer\.chat_template=rag or chat"):
        ChatTokenizer(model)
    with pytest.raises(DataError, match=r"neither a file nor .* named templates are rag, chat"):
        ChatTokenizer(model, chat_template="rga")
    chosen = ChatTokenizer(model, chat_template="chat")
    assert chosen.encode_pair(TALK) == ChatTokenizer(tiny_lm).encode_pair(TALK)
    assert chosen.chat_template == CHATML  # which an export gets
    default = folder(chat_template=[*named, {"name": "default", "template": CHATML}])
    assert ChatTokenizer(default).encode_pair(TALK) == chosen.encode_pair(TALK)


# --- Limits and broken files ---

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("begin", "found"),
    [
        (ENDLESS, "s of processor time"),
        ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "characters or fills the memory"),
        ("{{ 'x' * 10 ** 10 }}", "characters or fills the memory"),
        ("{{ 'x'.center(10 ** 10) }}", "characters or fills the memory"),
        ("{{ 1 / 0 }}", "fails on the roles user, assistant: ZeroDivisionError: division by zero"),
        ("{{ messages.nothing.at_all }}", "refuses the roles user, assistant: .*has no attribute"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on .* RecursionError"),
        (r"{{ '\ud800' }}", r"writes the lone surrogate '\\ud800'"),
        ("{{ messages.__class__.__mro__ }}", "refuses .* unsafe"),
        (5, r"\(default\) is 5, expected a Jinja text"),
        ([{"name": "x"}], "No tokenizer can be loaded from"),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_breaks(tiny_lm, folder, begin, found):
    """Each says where the template stands; what came before and after works."""
    template = begin + CHATML if isinstance(begin, str) else begin
    where = "tokenizer_config.json: chat_template:? .*" if begin and not isinstance(begin, list) else ""
    with pytest.raises(DataError, match=where + found):
        ChatTokenizer(folder(chat_template=template))
    assert texts(ChatTokenizer(tiny_lm), TALK[1:3])[1] == "So." + E


def test_a_template_that_breaks_on_one_row(tiny_lm):
    """A row's fault is the row's; an endless loop is the template's, and ends the reading at once."""
    chat = ChatTokenizer(tiny_lm, chat_template="{% if 'zero' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + CHATML)
    good, bad = chat.encode_pairs([TALK, [{"role": "user", "content": "zero"}, SO]])
    assert good == ChatTokenizer(tiny_lm).encode_pair(TALK)
    assert isinstance(bad, DataError) and "ZeroDivisionError" in str(bad)
    many = "{% if 'many' in messages[0].content %}{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endif %}"
    chat = ChatTokenizer(tiny_lm, chat_template=many + CHATML)
    with pytest.raises(DataError, match="characters or fills the memory"):
        chat.encode_pairs([TALK, [{"role": "user", "content": "many"}, SO]])


def test_ctrl_c_while_a_template_renders(tiny_lm):
    """What it would have rendered is not taken for the next conversation."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            ChatTokenizer(tiny_lm, chat_template=ENDLESS + CHATML)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert texts(ChatTokenizer(tiny_lm, chat_template=PHI4), TALK)[1] == "Yes." + E


def test_a_template_file_that_is_not_utf8(tiny_lm, folder, tmp_path):
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(DataError, match=r"tokenizer\.chat_template=.*own\.jinja: not UTF-8 text"):
        ChatTokenizer(tiny_lm, chat_template=str(tmp_path / "own.jinja"))
    (folder() / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(DataError, match=r"/chat_template\.jinja: not UTF-8 text"):
        ChatTokenizer(tmp_path / "model")


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_tokenizer_with_a_bad_regex(folder, part):
    model = folder()
    content = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "(["}, "content": ""}
    parts = {"pretokenizers": [split]} if part == "pre_tokenizer" else {"normalizers": [replace]}
    content[part] = {"type": "Sequence", **parts}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=rf"tokenizer\.json: {part}\.\w+\[0\]\.pattern\.Regex is '\(\[', no valid regular"
    ):
        ChatTokenizer(model)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer.json", "model", None),
        ("tokenizer.json", "added_tokens", 5),
        ("tokenizer.json", "added_tokens", [{"id": -1, "content": "x"}]),
        ("tokenizer.json", "decoder", {"type": "Nope"}),
        ("tokenizer_config.json", "tokenizer_class", 5),
        ("tokenizer_config.json", "eos_token", ["a"]),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("generation_config.json", "eos_token_id", [2, "x"]),
        ("config.json", "eos_token_id", -1),
    ],
)
def test_a_tokenizer_with_a_bad_value(folder, file, key, value):
    model = folder()
    content = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    (model / file).write_text(json.dumps(content | {key: value}))
    where = model if key == "model_max_length" else model / file
    with pytest.raises(DataError, match=str(where)):
        ChatTokenizer(model).encode_pair(TALK)
