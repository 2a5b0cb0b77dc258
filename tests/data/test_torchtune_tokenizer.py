"""torchtune's tokenizers, one per family, as prompt tokenizers."""

import base64
import io
import json

import pytest

from spin.core.errors import DataError
from spin.data import ChatTokenizer, PromptTokenizer, TorchtuneTokenizer, adapt_tokenizer
from tests.data.test_chat import END, ENDOFTEXT, NO_SYSTEM, PAIR, TALK


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
    assert real_ids[-1] == eos_ids[0]  # which closes a turn
    assert not set(real_ids[:-1]) & set(eos_ids)
    assert adapted.decode(real_ids, skip_special_tokens=True).strip() == messages[-1]["content"]
    assert max(prompt_ids + real_ids) < adapted.vocab_size
    if len(messages) > 2:
        # The earlier response stands in the prompt as it was learned, stop token included.
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


def test_qwen2_5_ids_are_those_of_the_hugging_face_tokenizer(families, tiny_lm):
    chat = ChatTokenizer(tiny_lm)
    adapted = adapt_tokenizer(families["qwen2_5"][0])
    assert adapted.encode_pair(PAIR) == chat.encode_pair(PAIR)
    assert adapted.encode_pair(TALK) == chat.encode_pair(TALK)
    assert adapted.encode_pair(PAIR)[1][-1] == END  # the token that torchtune masks when it truncates
    with pytest.raises(DataError, match="holds the stop token"):
        adapted.encode_pair([PAIR[0], {"role": "assistant", "content": "A<|im_end|>B"}])


def test_what_a_template_writes_behind_the_stop_token_is_no_part_of_the_response(bpe_files):
    from torchtune.data import PromptTemplate

    turns = {"user": ("<|im_start|>", "<|im_end|>"), "assistant": ("", "<|im_end|>next")}
    tokenizer = qwen2_5(bpe_files)
    tokenizer.prompt_template = PromptTemplate(turns)
    adapted = adapt_tokenizer(tokenizer)
    assert adapted.decode(adapted.encode_pair(PAIR)[1]) == "A person.<|im_end|>"


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


def test_adapt_passes_what_fits_and_refuses_what_does_not(tiny_lm, families):
    chat = ChatTokenizer(tiny_lm)
    assert adapt_tokenizer(chat) is chat
    adapted = adapt_tokenizer(families["llama3"][0])
    assert isinstance(adapted, TorchtuneTokenizer) and isinstance(adapted, PromptTokenizer)
    with pytest.raises(DataError, match="is a dict without tokenize_messages"):
        adapt_tokenizer({})
