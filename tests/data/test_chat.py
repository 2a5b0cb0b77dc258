"""Prompt and response ids of both adapters: borders, stop tokens, and agreement with the libraries they wrap."""

import base64
import io
import json
import logging
import shutil

import pytest
from transformers import AutoTokenizer

from spin.core.errors import DataError
from spin.data.chat import ChatTokenizer
from spin.data.tokenizer import PromptTokenizer
from spin.data.torchtune_tokenizer import TorchtuneTokenizer, adapt_tokenizer

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


@pytest.fixture
def folder(tiny_lm, tmp_path):
    """A copy of the tiny tokenizer whose files a test may change; called with changes of tokenizer_config.json."""

    def make(generation=None, **changes):
        target = tmp_path / "model"
        target.mkdir(exist_ok=True)
        shutil.copy(tiny_lm / "tokenizer.json", target)
        config = json.loads((tiny_lm / "tokenizer_config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        if generation is not None:
            (target / "generation_config.json").write_text(json.dumps(generation))
        return target

    return make


# --- ChatTokenizer ---


def test_ids_are_those_of_transformers(chat, tiny_lm):
    reference = AutoTokenizer.from_pretrained(str(tiny_lm))

    def ids(messages, **options):
        return reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    for messages in (TALK, PAIR, NO_SYSTEM):
        prompt_ids, real_ids = chat.encode_pair(messages)
        assert prompt_ids == chat.encode_prompt(messages[:-1]) == ids(messages[:-1], add_generation_prompt=True)
        newline = reference("\n", add_special_tokens=False)["input_ids"]
        assert prompt_ids + real_ids + newline == ids(messages)


def test_response_ends_with_the_only_stop_token(chat):
    _, real_ids = chat.encode_pair(TALK)
    assert chat.decode(real_ids) == TALK[-1]["content"] + "<|im_end|>"
    assert chat.decode(real_ids, skip_special_tokens=True) == TALK[-1]["content"]
    assert [index for index, token in enumerate(real_ids) if token in chat.eos_ids] == [len(real_ids) - 1]


def test_attributes(chat):
    assert isinstance(chat, PromptTokenizer)
    assert (chat.eos_ids, chat.pad_id, chat.vocab_size, chat.max_seq_len) == ((END,), ENDOFTEXT, 1024, None)


def test_batch_is_the_single_calls_with_errors_in_place(chat):
    bad = [PAIR[0], {"role": "assistant", "content": "a<|im_end|>b"}]
    first, error, last = chat.encode_pairs([TALK, bad, PAIR])
    assert first == chat.encode_pair(TALK) and last == chat.encode_pair(PAIR)
    assert isinstance(error, DataError)
    assert chat.encode_pairs([]) == []


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
    prompt_ids, real_ids = chat.encode_pair(PAIR)
    assert chat.decode(prompt_ids) == "user: What is a hacker?\nassistant: "
    assert chat.decode(real_ids) == "A person.\n<|im_end|>"


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
    with pytest.raises(DataError, match="neither a file nor a Jinja template"):
        ChatTokenizer(tiny_lm, chat_template="no/such/file.jinja")


def test_conversation_that_does_not_begin_with_its_prompt(tiny_lm):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}{{ messages|length }}<|im_start|>assistant\n{% endif %}"
    chat = ChatTokenizer(tiny_lm, chat_template="{{ messages|length }}" + template)
    with pytest.raises(
        DataError, match=r"does not begin with its own prompt.*tokenizer\.chat_template to one that does"
    ):
        chat.encode_pair(PAIR)


def test_stop_token_inside_a_response(chat):
    with pytest.raises(DataError, match=r"holds the stop token '<\|im_end\|>' before its end, followed by 'or so'"):
        chat.encode_pair([PAIR[0], {"role": "assistant", "content": "A<|im_end|> or so"}])


def test_template_that_refuses_a_role(tiny_lm):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat = ChatTokenizer(tiny_lm, chat_template=template + "{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(DataError, match="refuses the roles system, user, assistant, user: no system role"):
        chat.encode_pair(TALK)
    with pytest.raises(DataError, match="refuses the roles user, assistant"):
        ChatTokenizer(tiny_lm, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"not valid Jinja, line 2: .* Fix tokenizer\.chat_template"):
        ChatTokenizer(tiny_lm, chat_template="{% for m in messages %}\n{{ m.content ")


def test_template_that_leaves_out_system_messages(tiny_lm):
    """It would play without the system prompt, and nobody would know. An empty one says that there is none."""
    template = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = ChatTokenizer(tiny_lm, chat_template=template)
    with pytest.raises(DataError, match=r"has a system message, and the chat template does not show it"):
        chat.encode_pair(TALK)
    silent = [{"role": "system", "content": ""}, *PAIR]
    assert chat.encode_pair(silent) == chat.encode_pair(PAIR)


def test_template_without_a_generation_prompt_is_told(tiny_lm, caplog):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ChatTokenizer(tiny_lm, chat_template=template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert "no generation prompt" not in caplog.text
    ChatTokenizer(tiny_lm, chat_template=template)
    assert r"writes no generation prompt: prompts end before '<|im_start|>assistant\n'" in caplog.text


def test_stop_tokens_come_from_template_tokenizer_and_generation_config(folder, caplog):
    chat = ChatTokenizer(folder(generation={"eos_token_id": [0, 2, 7]}))
    assert chat.eos_ids == (END, ENDOFTEXT, 7)
    # Qwen's base models: EOS is <|endoftext|>, but the template closes turns with <|im_end|>.
    with caplog.at_level(logging.WARNING):
        chat = ChatTokenizer(folder(generation={"eos_token_id": 0}, eos_token="<|endoftext|>"))
    assert chat.eos_ids == (END, ENDOFTEXT)
    assert "closes a turn with it" in caplog.text
    assert chat.encode_pair(PAIR)[1][-1] == END


def test_no_pad_token_is_an_explicit_logged_choice(folder, caplog):
    with caplog.at_level(logging.WARNING):
        chat = ChatTokenizer(folder(pad_token=None))
    assert chat.pad_id == END
    assert caplog.text.count("has no pad token") == 1 and "'<|im_end|>' (id 2)" in caplog.text
    assert chat.encode_pair(PAIR)[1][-1] == END


def test_broken_and_missing_files(folder, tmp_path):
    with pytest.raises(DataError, match="is no folder. Download the model first"):
        ChatTokenizer(tmp_path / "missing")
    with pytest.raises(DataError, match="has no chat template"):
        ChatTokenizer(folder(chat_template=None))
    broken = folder()
    (broken / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(DataError, match="tokenizer.json: not valid JSON"):
        ChatTokenizer(broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no tokenizer is here. Name the model's folder"):
        ChatTokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer_config.json").write_text(
        "{}"
    )  # alone, the library says a page about sentencepiece
    with pytest.raises(DataError, match="empty: no tokenizer is here. Name the model's folder"):
        ChatTokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="No tokenizer can be loaded from"):
        ChatTokenizer(tmp_path / "empty")


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


@pytest.mark.real_model
def test_real_tokenizer(real_model):
    chat = ChatTokenizer(real_model)
    prompt_ids, real_ids = chat.encode_pair(TALK)
    reference = AutoTokenizer.from_pretrained(str(real_model))
    assert prompt_ids == reference.apply_chat_template(
        TALK[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert chat.decode(real_ids) == TALK[-1]["content"] + "<|im_end|>"


def test_ids_that_the_folders_tokenizer_lacks_are_a_placeholder(chat):
    """transformers would leave them out."""
    assert chat.known_ids == frozenset(range(1024))
    real_ids = chat.encode_pair(PAIR)[1]
    assert chat.decode([*real_ids[:-1], 1024, 99999]) == "A person.\ufffd\ufffd"
    assert chat.decode([1024, *real_ids], skip_special_tokens=True) == "\ufffdA person."
    assert chat.decode([]) == ""


# --- torchtune's tokenizers, one per family ---


@pytest.fixture(scope="module")
def bpe_files(tiny_lm, tmp_path_factory):
    """The tiny model's vocabulary as vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("bpe")
    model = json.loads((tiny_lm / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    model = io.BytesIO()
    text = [message["content"] for message in TALK] + ["[INST] [/INST] <<SYS>>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=320, byte_fallback=True, hard_vocab_limit=False,
        model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,  # as Llama's and Mistral's
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return str(file)


def llama3(tmp_path_factory):
    from torchtune.models.llama3 import Llama3Tokenizer

    file = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    return Llama3Tokenizer(str(file), max_seq_len=16)


def qwen2_5(bpe_files):
    from torchtune.models.qwen2_5._tokenizer import Qwen2_5Tokenizer

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = {name: index for index, name in enumerate(names)} | {"<tool_call>": 1024, "</tool_call>": 1025}
    return Qwen2_5Tokenizer(*bpe_files, special_tokens=special, max_seq_len=16)


def phi4(bpe_files):
    from torchtune.models.phi4._tokenizer import Phi4Tokenizer

    vocab, merges = bpe_files
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|im_sep|>": 1024, "<|dummy_85|>": 1025}
    return Phi4Tokenizer(merges_path=merges, vocab_path=vocab, special_tokens=special, max_seq_len=16)


@pytest.fixture(scope="module")
def families(tmp_path_factory, bpe_files, sentencepiece_file):
    """Family name to tokenizer and the stop tokens expected; all with a max_seq_len that would cut every row."""
    from torchtune.data import PromptTemplate
    from torchtune.models.gemma import GemmaTokenizer
    from torchtune.models.llama2 import Llama2ChatTemplate, Llama2Tokenizer
    from torchtune.models.mistral import MistralTokenizer
    from torchtune.models.phi3 import Phi3MiniTokenizer

    turns = {"system": ("", "\n"), "user": ("<user>", "\n<model>"), "assistant": ("", "\n")}
    special = {"<|endoftext|>": 2000, "<|system|>": 2001, "<|user|>": 2002, "<|assistant|>": 2003, "<|end|>": 2004}
    spm = sentencepiece_file
    return {
        "llama3": (llama3(tmp_path_factory), (128009, 128001, 128008)),
        "qwen2_5": (qwen2_5(bpe_files), (END, ENDOFTEXT)),
        "phi4": (phi4(bpe_files), (END,)),
        "phi3": (Phi3MiniTokenizer(spm, special_tokens=special, max_seq_len=16), (2004, 2000)),
        "mistral": (MistralTokenizer(spm, max_seq_len=16), (2,)),
        "llama2": (Llama2Tokenizer(spm, max_seq_len=16, prompt_template=Llama2ChatTemplate()), (2,)),
        "gemma": (GemmaTokenizer(spm, max_seq_len=16), (2,)),
        "gemma with template": (GemmaTokenizer(spm, max_seq_len=16, prompt_template=PromptTemplate(turns)), (2,)),
    }


FAMILIES = ["llama3", "qwen2_5", "phi4", "phi3", "mistral", "llama2", "gemma", "gemma with template"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [TALK, PAIR, NO_SYSTEM], ids=["system", "one turn", "two turns"])
def test_every_family(families, family, messages):
    tokenizer, eos_ids = families[family]
    adapted = adapt_tokenizer(tokenizer)
    assert adapted.eos_ids == eos_ids
    assert adapted.max_seq_len == tokenizer.max_seq_len == 16  # reported, not applied, and the user's object unchanged
    if family == "mistral" and messages is TALK:
        with pytest.raises(DataError, match="refuses the roles system, .*System prompts are not supported"):
            adapted.encode_pair(messages)
        return
    prompt_ids, real_ids = adapted.encode_pair(messages)
    assert prompt_ids == adapted.encode_prompt(messages[:-1])
    assert real_ids[-1] in eos_ids
    assert not set(real_ids[:-1]) & set(eos_ids)
    assert adapted.decode(real_ids, skip_special_tokens=True).strip() == messages[-1]["content"]
    assert max(prompt_ids + real_ids) < adapted.vocab_size
    if len(messages) > 2:
        # The earlier answer stands in the prompt as it was learned, stop token included.
        earlier_prompt, earlier_real = adapted.encode_pair(messages[:-2])
        assert prompt_ids[: len(earlier_prompt) + len(earlier_real)] == earlier_prompt + earlier_real


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_that_a_tokenizer_lacks_are_a_placeholder(families, family):
    """A model may have more rows than its tokenizer has tokens, and a vocabulary holes (Llama 3's 128011)."""
    adapted = adapt_tokenizer(families[family][0])
    size = adapted.vocab_size + 64
    lacking = [token for token in range(size) if token not in adapted.known_ids]
    assert len(lacking) >= 64 and not set(adapted.eos_ids) & set(lacking)
    assert (128011 in lacking) == (family == "llama3")
    real_ids = adapted.encode_pair(PAIR)[1]
    assert adapted.known_ids.issuperset(real_ids)
    for token in {*lacking[:300], *lacking[-300:]}:
        assert adapted.decode([token]) == adapted.decode([token], skip_special_tokens=True) == "\ufffd"
    text = adapted.decode([*real_ids, *lacking[:2], *real_ids])
    assert text.count("\ufffd\ufffd") == 1 and text.count("person") == 2
    for token in sorted(adapted.known_ids)[:300]:
        assert isinstance(adapted.decode([token]), str)


def test_llama3_layout(families):
    adapted = adapt_tokenizer(families["llama3"][0])
    prompt_ids, real_ids = adapted.encode_pair(PAIR)
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is a hacker?<|eot_id|>"
    assert adapted.decode(prompt_ids) == head + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert adapted.decode(real_ids) == "A person.<|eot_id|>"
    assert real_ids == [*b"A person.", 128009]
    assert (adapted.pad_id, adapted.vocab_size) == (128004, 128257)


def test_qwen2_5_ids_are_those_of_the_hugging_face_tokenizer(families, chat):
    adapted = adapt_tokenizer(families["qwen2_5"][0])
    assert adapted.encode_pair(PAIR) == chat.encode_pair(PAIR)
    assert adapted.encode_pair(TALK) == chat.encode_pair(TALK)
    assert adapted.encode_pair(PAIR)[1][-1] == END  # the token that torchtune masks when it truncates
    with pytest.raises(DataError, match="holds the stop token"):
        adapted.encode_pair([PAIR[0], {"role": "assistant", "content": "A<|im_end|>B"}])


def test_phi3_answers_end_with_the_end_of_turn_token(families):
    adapted = adapt_tokenizer(families["phi3"][0])
    assert adapted.encode_pair(PAIR)[1][-1] == 2004


def test_tool_results_are_torchtunes_ipython(families):
    adapted = adapt_tokenizer(families["llama3"][0])
    talk = [PAIR[0], PAIR[1], {"role": "tool", "content": "42"}, {"role": "assistant", "content": "A"}]
    prompt_ids, real_ids = adapted.encode_pair(talk)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n42" in adapted.decode(prompt_ids)
    assert adapted.decode(real_ids) == "A<|eot_id|>"
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages in ([PAIR[0], calling], [{**PAIR[0], "tools": []}, PAIR[1]]):
        with pytest.raises(DataError, match=r"has tools, which Llama3Tokenizer cannot write\. Use spin\.data\.ChatTok"):
            adapted.encode_pair(messages)


def test_fingerprints_differ_between_families_and_templates(families):
    prints = [adapt_tokenizer(families[family][0]).fingerprint for family in FAMILIES]
    assert len(set(prints)) == len(prints)
    again = [adapt_tokenizer(families[family][0]).fingerprint for family in FAMILIES]
    assert again == prints


def test_adapt_passes_what_fits_and_refuses_what_does_not(chat, families):
    assert adapt_tokenizer(chat) is chat
    adapted = adapt_tokenizer(families["llama3"][0])
    assert isinstance(adapted, TorchtuneTokenizer) and isinstance(adapted, PromptTokenizer)
    with pytest.raises(DataError, match="is a dict without tokenize_messages"):
        adapt_tokenizer({})
