"""Every family, from a folder to a folder: a random model by transformers, `spin validate`, one iteration by
the recipe's command line, and what transformers makes of the export."""

import json
import math
import sys

import pytest
import spin_recipe
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.cli import main
from spin.core.ranks import init_world, shutdown
from spin.data import PairStore
from spin.model.build import build_model, prepare_model
from spin.model.hf import load_hf_weights
from tests.hf_folders import ONE_OF_EACH, write_folder
from tests.recipes.helpers import REPO, logp_by_transformers, metrics_of

pytestmark = pytest.mark.slow

ROWS = 1088  # of the embeddings: more than the tokenizer has tokens, as Qwen's and Phi's
# How a turn is written: before all, before and behind the role, at its end, and the EOS of the folder.
CHATML = ("", "<|im_start|>", "\n", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<bos>", "<start_of_turn>", "\n", "<end_of_turn>", "<eos>")
TURNS = {
    "llama": LLAMA3, "mistral": ("", "<|", "|>\n", "</s>", "</s>"), "gemma2": GEMMA, "gemma3": GEMMA,
    "phi3": ("", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
}  # fmt: skip
WITH_ADAPTERS = ["llama", "qwen3", "qwen3_moe", "gemma3", "phi3", "olmo2", "glm4", "granite"]  # shapes of all kinds


def make_folder(name, tiny_lm, folder):
    """A random model whose responses end soon, with a family's turns over the tiny model's vocabulary."""
    bos, head, behind_role, end, eos = TURNS.get(name, CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    marks = [mark.strip() for mark in (bos, head, behind_role, end, eos) if mark.strip() and mark.strip() != "<|"]
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark != "|>"]})
    tokenizer.add_special_tokens({"eos_token": eos, "pad_token": "<|endoftext|>", "bos_token": bos or "<|im_start|>"})
    turn = "{% for m in messages %}HEAD{{ m['role'] }}BEHIND{{ m['content'] }}END\n{% endfor %}"
    template = "BOS" + turn + "{% if add_generation_prompt %}HEADassistantBEHIND{% endif %}"
    for word, text in {"BOS": bos, "HEAD": head, "BEHIND": behind_role, "END": end}.items():
        template = template.replace(word, text)
    tokenizer.chat_template = template
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = write_folder(name, folder, vocab_size=ROWS, max_position_embeddings=256, **ids)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(end)].mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(file, folder, output_dir, lora):
    data = {"source": str(REPO / "examples/quickstart/jargon_train.jsonl"), "on_long_response": "cut"}
    data |= {"max_response_tokens": 60, "max_prompt_tokens": 150}
    model = {"path": str(folder)}
    if lora:
        model |= {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4}
    content = {
        "output_dir": str(output_dir), "model": model, "device": "cpu", "compute_dtype": "fp32",
        "dataset": data | {"limit": 8},
        "validation_dataset": data | {"source": str(REPO / "examples/quickstart/jargon_val.jsonl"), "limit": 4},
        "checkpointer": {"export_dtype": "fp32", "async_save": False}, "sampling": {"max_new_tokens": 16},
        "generator": {"batch_size": 8}, "global_batch_size": 4, "max_iterations": 1, "max_epochs": 1,
        "pairs": {"row_tokens": 512, "row_multiple": 16}, "validation": {"spin": True}, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


def start(recipe, file, monkeypatch):
    """The recipe's command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", "--config", str(file)])
    with pytest.raises(SystemExit) as end:
        recipe.recipe_main()
    assert not end.value.code


def logps_of(model, pairs):
    """Summed log-probs of the real responses, by transformers."""
    return [logp_by_transformers(model, pair.prompt_ids, pair.real_ids) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "method"), [(name, "full") for name in ONE_OF_EACH] + [(name, "lora") for name in WITH_ADAPTERS]
)
def test_from_a_folder_to_a_folder(name, method, tiny_lm, tmp_path, monkeypatch, capsys):
    folder, out, file = make_folder(name, tiny_lm, tmp_path / "base"), tmp_path / "out", tmp_path / "my.yaml"
    write_config(file, folder, out, method == "lora")
    assert main(["validate", str(file)]) == 0, capsys.readouterr().out
    start(spin_recipe, file, monkeypatch)
    exported = out / "iteration_000/hf_model"
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, exported))
    first = next(row["loss"] for row in metrics_of(out) if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-6)

    # the run's model is transformers', before and after
    pairs = list(PairStore.open(out / "iteration_000/pairs").pairs())
    assert [pair.reference_real_logp for pair in pairs] == pytest.approx(logps_of(before, pairs), abs=2e-3)
    held_out = list(PairStore.open(out / "iteration_000/validation/pairs").pairs())
    tokens = sum(len(pair.real_ids) for pair in held_out)
    last = metrics_of(out)[-1]["val_loss"]
    assert last == pytest.approx(-sum(logps_of(after, held_out)) / tokens, abs=1e-4)
    assert abs(last + sum(logps_of(before, held_out)) / tokens) > 1e-6  # it was trained
    ids = torch.randint(3, 1000, (2, 60), generator=torch.Generator().manual_seed(1))
    world = init_world("cpu")
    try:
        own = build_model({"_component_": "spin.model.from_hf", "path": str(exported)}, torch.float32)
        prepare_model(own, world, compute_dtype=torch.float32)
        load_hf_weights(own, exported, None, world=world)
        with torch.no_grad():
            torch.testing.assert_close(own(ids), after(ids).logits, rtol=1e-4, atol=1e-4)
    finally:
        shutdown()

    # and it stops where a turn ends, asked by the folder alone
    tokenizer = AutoTokenizer.from_pretrained(exported)
    *_, end, eos = TURNS.get(name, CHATML)
    assert tokenizer.eos_token == end and tokenizer.pad_token == "<|endoftext|>"
    stops = tokenizer.convert_tokens_to_ids(list(dict.fromkeys([end, eos])))
    for file in ("config.json", "generation_config.json"):
        named = json.loads((exported / file).read_text())["eos_token_id"]
        assert (named if isinstance(named, list) else [named]) == stops
    talks = [[{"role": "user", "content": question}] for question in ("What is foo?", "Why?", "Define bar.") * 16]
    asked = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, return_tensors="pt", padding=True, padding_side="left", return_dict=True
    )
    for seed in range(6):  # until some end
        torch.manual_seed(seed)
        responses = after.generate(**asked, do_sample=True, max_new_tokens=40)[
            :, asked["input_ids"].shape[1] :
        ].tolist()
        if any(set(ids) & set(stops) for ids in responses):
            break
    else:
        pytest.fail("no response ends, so this test shows nothing")
    for ids in responses:
        at = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        assert set(ids[at + 1 :]) <= {tokenizer.pad_token_id}
