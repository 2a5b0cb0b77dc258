"""What a run exports stops where the run's responses ended: in transformers, peft and vLLM, and in the next run."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError
from spin.core.ranks import init_world, shutdown
from spin.data import ChatTokenizer, adapt_tokenizer
from tests.families import tiny_lm_model
from tests.recipes.helpers import run, run_adapters
from tests.torchao_versions import needs_peft

END, ENDOFTEXT = 2, 0  # ids of <|im_end|>, which the tiny model writes, and <|endoftext|>, at which a base model stops
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = ("max_iterations=1", "max_epochs=1", "limit_train_batches=1", "validation_dataset=null")


def edit(file, **changes):
    content = {**(json.loads(file.read_text()) if file.is_file() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def base_model(tiny_lm, folder):
    """The tiny model as a base model is published: no chat template, and <|im_end|> is in the vocabulary alone."""
    shutil.copytree(tiny_lm, folder)
    edit(folder / "tokenizer_config.json", chat_template=None, eos_token="<|endoftext|>")
    edit(folder / "config.json", eos_token_id=ENDOFTEXT)
    edit(folder / "generation_config.json", eos_token_id=ENDOFTEXT, temperature=0.7, do_sample=True)
    return folder


def trained_on(base, *changes):
    template = base.parent / "chatml.jinja"
    template.write_text(CHATML)
    where = (f"checkpointer.checkpoint_dir={base}", f"tokenizer.path={base}", f"tokenizer.chat_template={template}")
    return (*SHORT, *where, *changes)


@pytest.fixture(scope="module")
def full(tiny_lm, tmp_path_factory):
    """A run's export, and the run's tokenizer."""
    folder = tmp_path_factory.mktemp("full")
    run(folder / "run", *trained_on(base_model(tiny_lm, folder / "base")))
    tokenizer = ChatTokenizer(folder / "base", chat_template=str(folder / "chatml.jinja"))
    return folder / "run/iteration_000/hf_model", tokenizer


@pytest.fixture(scope="module")
def adapted(tiny_lm, tmp_path_factory):
    """The folders of a LoRA run on a base without generation_config.json, whose pad token is <|im_end|>."""
    folder = tmp_path_factory.mktemp("adapted")
    base = base_model(tiny_lm, folder / "base")
    (base / "generation_config.json").unlink()
    edit(base / "config.json", pad_token_id=END, eos_token_id=[ENDOFTEXT])
    edit(base / "tokenizer_config.json", pad_token="<|im_end|>")
    eos = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit(base / "special_tokens_map.json", eos_token=eos, pad_token="<|im_end|>", bos_token="<|im_start|>")
    run_adapters(folder / "run", *trained_on(base, "sampling.stop_token_ids=[7]"))
    return base, folder / "run/iteration_000"


def responses_of(model, folder, **options):
    """Texts of responses by transformers, sampled with the folder's own settings; as many tokens as they like."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = ["What is a hacker?", "Explain foo.", "What does bogus mean?", "Define grep."]
    talks = [[{"role": "user", "content": question}] for question in questions * 4]
    inputs = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, return_tensors="pt", padding=True, padding_side="left", return_dict=True
    )
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=120, **options)
    return [ids.tolist() for ids in out[:, inputs["input_ids"].shape[1] :]]


def check_they_stop(responses, pad):
    ended = [ids for ids in responses if END in ids]
    assert len(ended) >= 4, "the tiny model hardly ends a turn, so this test shows nothing"
    for ids in ended:
        assert set(ids[ids.index(END) + 1 :]) <= {pad}


def test_transformers_stops_where_the_run_did(full, tiny_lm, tmp_path):
    """Which it would not with the settings of the folder that training began from, on the same weights."""
    folder, _ = full
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_they_stop(responses_of(model, folder), pad=0)
    config, generation = (json.loads((folder / f).read_text()) for f in ("config.json", "generation_config.json"))
    assert config["eos_token_id"] == generation["eos_token_id"] == [END, ENDOFTEXT]
    assert (generation["temperature"], generation["do_sample"], generation["pad_token_id"]) == (0.7, True, 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|endoftext|>", 1024)
    base = base_model(tiny_lm, tmp_path / "base")
    shutil.copy(folder / "model.safetensors", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert any(set(ids[ids.index(END) + 1 :]) - {0} for ids in responses_of(model, folder) if END in ids)


def test_the_next_run_finds_the_same_stop_tokens(full, tiny_lm, tmp_path):
    """The export is a checkpoint_dir and a tokenizer; its own export says the same again, byte by byte, as does that of
    a folder which says all of it already."""
    folder, tokenizer = full
    again = ChatTokenizer(folder)
    for name in ("eos_ids", "pad_id", "fingerprint"):
        assert getattr(again, name) == getattr(tokenizer, name)
    run(tmp_path, *SHORT, f"checkpointer.checkpoint_dir={folder}", f"tokenizer.path={folder}")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "iteration_000/hf_model" / name).read_bytes() == (folder / name).read_bytes()
    run(tmp_path / "whole", *SHORT)
    for name in ("generation_config.json", "tokenizer_config.json"):
        copied = (tmp_path / "whole/iteration_000/hf_model" / name).read_text()
        assert json.loads(copied) == json.loads((tiny_lm / name).read_text())


@pytest.mark.parametrize("kind", ["hf_model", pytest.param("adapter", marks=needs_peft)])
def test_adapters_stop_too(adapted, kind):
    """Merged, and by peft with the settings that lie with the adapter; 7 is a stop token of the config."""
    base, iteration = adapted
    folder = iteration / kind
    assert (folder / "config.json").is_file() == (kind == "hf_model")
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [END, ENDOFTEXT, 7] and settings.pad_token_id == ENDOFTEXT
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    mapped = json.loads((folder / "special_tokens_map.json").read_text())
    assert (mapped["eos_token"]["content"], mapped["bos_token"]) == ("<|im_end|>", "<|im_start|>")
    model = AutoModelForCausalLM.from_pretrained(base if kind == "adapter" else folder, dtype=torch.float32)
    if kind == "adapter":
        import peft

        model = peft.PeftModel.from_pretrained(model, folder)
    check_they_stop(responses_of(model, folder, generation_config=settings, do_sample=True), pad=ENDOFTEXT)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_an_export_could_not_change_is_refused_before_weights_load(tiny_lm, tmp_path, name):
    base = base_model(tiny_lm, tmp_path / "base")
    (base / name).write_text("[1, 2")
    with pytest.raises(CheckpointError, match=f"{name}: not valid JSON"):
        SPINCheckpointer(str(base), str(tmp_path / "run"), "LLAMA3_2").validate()


def test_a_torchtune_tokenizers_stop_tokens_are_exported_too(tiny_lm, tmp_path):
    """Qwen's closes a turn with <|im_end|>; the folder's own EOS is <|endoftext|>, and its files are what is copied."""
    from torchtune.models.qwen2 import qwen2_tokenizer

    base = base_model(tiny_lm, tmp_path / "base")
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    files = (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), str(base / "tokenizer.json"))
    tokenizer = adapt_tokenizer(qwen2_tokenizer(*files))
    checkpointer = SPINCheckpointer(str(base), str(tmp_path / "run"), "LLAMA3_2")
    world = init_world("cpu")
    try:
        folder = checkpointer.export(tiny_lm_model(), 0, world, tokenizer)
    finally:
        shutdown()
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [END, ENDOFTEXT]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM; `make vllm` installs it")
def test_vllm_stops_where_the_run_did(full, subprocess_env, tmp_path):
    """Asked as its documentation asks, with nothing said of stop tokens."""
    folder, _ = full
    code = f"""
import json
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM({str(folder)!r}, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=64 << 20,
              block_size=32)
    talks = [[{{"role": "user", "content": q}}] for q in ("What is a hacker?", "Explain foo.", "Define grep.")] * 4
    found = llm.chat(talks, SamplingParams(max_tokens=120, seed=1))
    responses = [(list(each.outputs[0].token_ids), each.outputs[0].finish_reason) for each in found]
    open({str(tmp_path / "responses.json")!r}, "w").write(json.dumps(responses))
"""
    env = subprocess_env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    responses = json.loads((tmp_path / "responses.json").read_text())
    assert sum(reason == "stop" for _, reason in responses) >= 4
    for ids, reason in responses:
        assert END not in ids[:-1] and (ids[-1] in (END, ENDOFTEXT)) == (reason == "stop")
