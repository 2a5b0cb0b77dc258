"""Prompt and response ids of a chat template: borders, stop tokens, and agreement with transformers."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from spin.config import SPINConfig, complete, load_config
from spin.core.errors import ConfigError, DataError
from spin.data.chat import ChatTokenizer
from spin.data.tokenizer import PromptTokenizer

END, START, ENDOFTEXT = 2, 1, 0  # the tiny model's <|im_end|>, <|im_start|>, <|endoftext|>
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a hacker?"},
    {"role": "assistant", "content": "A person."},
    {"role": "user", "content": "Which kind?"},
    {"role": "assistant", "content": "One who enjoys details,\n\nand naïve — 日本."},
]
PAIR = TALK[1:3]
NO_SYSTEM = TALK[1:]


@pytest.fixture(scope="module")
def chat(tiny_lm):
    return ChatTokenizer(tiny_lm)


@pytest.mark.parametrize("folder", ["tiny_lm", pytest.param("real_model", marks=pytest.mark.real_model)])
def test_ids_are_those_of_transformers_and_a_response_ends_with_the_only_stop_token(folder, request):
    path = request.getfixturevalue(folder)
    chat, reference = ChatTokenizer(path), AutoTokenizer.from_pretrained(str(path))
    assert isinstance(chat, PromptTokenizer)
    for messages in (TALK, PAIR, NO_SYSTEM) if folder == "tiny_lm" else (TALK,):
        prompt_ids, real_ids = chat.encode_pair(messages)
        asked, whole = (
            reference.apply_chat_template(part, return_dict=False, add_generation_prompt=part is not messages)
            for part in (messages[:-1], messages)
        )
        assert prompt_ids == chat.encode_prompt(messages[:-1]) == asked
        assert prompt_ids + real_ids + reference("\n", add_special_tokens=False)["input_ids"] == whole
        assert chat.decode(real_ids) == messages[-1]["content"] + "<|im_end|>"
        assert chat.decode(real_ids, skip_special_tokens=True) == messages[-1]["content"]
        assert [index for index, token in enumerate(real_ids) if token in chat.eos_ids] == [len(real_ids) - 1]
    if folder == "tiny_lm":
        assert (chat.eos_ids, chat.pad_id, chat.vocab_size, chat.max_seq_len) == ((END,), ENDOFTEXT, 1024, None)


def test_batch_is_the_single_calls_with_errors_in_place(chat):
    bad = [PAIR[0], {"role": "assistant", "content": "a<|im_end|>b"}]
    first, error, last = chat.encode_pairs([TALK, bad, PAIR])
    assert first == chat.encode_pair(TALK) and last == chat.encode_pair(PAIR)
    assert "holds the stop token '<|im_end|>' before its end, followed by 'b'" in str(error)
    assert isinstance(error, DataError) and chat.encode_pairs([]) == []


def test_a_token_never_reaches_from_the_prompt_into_the_response(tiny_lm):
    """A header that ends inside a word: the whole text has one token for "the", the opponent starts after "th"."""
    template = "{% for m in messages %}{{ 'th' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
    chat = ChatTokenizer(tiny_lm, chat_template=template + "{% if add_generation_prompt %}th{% endif %}")
    messages = [PAIR[0], {"role": "assistant", "content": "e end"}]
    prompt_ids, real_ids = chat.encode_pair(messages)
    reference = AutoTokenizer.from_pretrained(str(tiny_lm))
    whole = reference("What is a hacker?<|im_end|>the end<|im_end|>")["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids == chat.encode_prompt(messages[:-1])
    assert chat.decode(prompt_ids).endswith("<|im_end|>th")
    assert chat.decode(real_ids) == "e end<|im_end|>"


def test_template_without_end_token_gets_eos_appended(tiny_lm):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = ChatTokenizer(tiny_lm, chat_template=template + "{% if add_generation_prompt %}assistant: {% endif %}")
    prompt, response = map(chat.decode, chat.encode_pair(PAIR))
    assert (prompt, response) == ("user: What is a hacker?\nassistant: ", "A person.\n<|im_end|>")


def test_template_that_writes_bos_writes_it_once(folder):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    chat = ChatTokenizer(folder(bos_token="<|endoftext|>", chat_template=template, add_bos_token=True))
    prompt_ids, _ = chat.encode_pair(TALK)
    assert prompt_ids[0] == ENDOFTEXT and prompt_ids.count(ENDOFTEXT) == 1


def test_template_file(tiny_lm, tmp_path, chat):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    own = ChatTokenizer(tiny_lm, chat_template=str(file))
    assert own.decode(own.encode_prompt(PAIR[:1])) == "What is a hacker?<|im_end|>"
    assert own.fingerprint != chat.fingerprint


@pytest.mark.parametrize(
    ("generation", "changes", "eos_ids", "pad_id", "said"),
    [
        ([0, 2, 7], {}, (END, ENDOFTEXT, 7), ENDOFTEXT, ""),
        # Qwen's base models: EOS is <|endoftext|>, but the template closes turns with <|im_end|>
        (0, {"eos_token": "<|endoftext|>"}, (END, ENDOFTEXT), ENDOFTEXT, "closes a turn with it"),
        (2, {"pad_token": None}, (END,), END, "has no pad token; batches are filled with its stop token '<|im_end|>'"),
    ],
)
def test_stop_and_pad_tokens_come_from_template_tokenizer_and_generation_config(
    folder, caplog, generation, changes, eos_ids, pad_id, said
):
    with caplog.at_level(logging.WARNING):
        chat = ChatTokenizer(folder(generation={"eos_token_id": generation}, **changes))
    assert (chat.eos_ids, chat.pad_id) == (eos_ids, pad_id)
    assert said in caplog.text and bool(caplog.text) is bool(said)
    assert chat.encode_pair(PAIR)[1][-1] == END


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no folder. Download the model first"),
        ({}, "no tokenizer is here. Name the model's folder"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer is here. Name the model's folder"),  # a page on sentencepiece
        ({"tokenizer.json": "{}"}, "No tokenizer can be loaded from"),
        ({"tokenizer.json": '{"version": '}, "tokenizer.json: not valid JSON"),
    ],
)
def test_broken_and_missing_files(tmp_path, files, message):
    if files is not None:
        (tmp_path / "model").mkdir()
    for name, content in (files or {}).items():
        (tmp_path / "model" / name).write_text(content)
    with pytest.raises(DataError, match=message):
        ChatTokenizer(tmp_path / "model")


def test_a_path_that_is_no_text_is_a_fault_of_its_key():
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found 5, expected a text\.$"):
        complete(load_config("tests/assets/tiny.yaml", ["output_dir=out", "tokenizer.path=5"]), SPINConfig)


def test_fingerprint_follows_vocabulary_template_and_stop_tokens(folder, chat):
    assert ChatTokenizer(folder(generation={"eos_token_id": 2})).fingerprint == chat.fingerprint
    assert ChatTokenizer(folder(generation={"eos_token_id": [2, 7]})).fingerprint != chat.fingerprint
    assert ChatTokenizer(folder(), chat_template="{{ messages[-1].content }}").fingerprint != chat.fingerprint
    other = folder()
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert ChatTokenizer(other).fingerprint != chat.fingerprint


def test_no_word_start_is_put_before_a_response(tmp_path):
    """Llama 2 and Mistral: tokenized alone, the response would get a word-start mark that the model does not write."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{char: 4 + i for i, char in enumerate("abc[]/INST")}}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in ("<unk>", "<s>", "</s>")])
    inner.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    template += "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    chat = ChatTokenizer(tmp_path)
    prompt_ids, real_ids = chat.encode_pair([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert prompt_ids[0] == 1 and prompt_ids.count(1) == 1
    assert real_ids == [vocabulary["b"], 2]


def test_ids_that_the_folders_tokenizer_lacks_are_a_placeholder(chat):
    """transformers would leave them out."""
    assert chat.known_ids == frozenset(range(1024))
    real_ids = chat.encode_pair(PAIR)[1]
    assert chat.decode([*real_ids[:-1], 1024, 99999]) == "A person.\ufffd\ufffd"
    assert chat.decode([1024, *real_ids], skip_special_tokens=True) == "\ufffdA person."
    assert chat.decode([]) == ""
    assert chat.decode(real_ids[0]) == chat.decode(real_ids[:1])  # as transformers' streamers ask
