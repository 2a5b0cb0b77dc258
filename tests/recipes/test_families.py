"""Every family that has a packaged config, from a folder to a folder: a random model by transformers, `python -m spin
validate`, one iteration by the recipe's command line, and what transformers makes of the export."""

import json
import sys

import pytest
import spin_recipe
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin import config
from spin.cli import main
from spin.core.ranks import init_world, shutdown
from spin.data import PairStore
from spin.model.build import build_model, prepare_model
from spin.model.hf import load_hf_weights
from tests.recipes.helpers import REPO, logp_by_transformers, metrics_of

ROWS = 1088  # of the embeddings: more than the tokenizer has tokens, as Qwen's and Phi's
SHAPE = {
    "vocab_size": ROWS, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48,
    "max_seq_len": 256,
}  # fmt: skip
HF_SHAPE = {
    "vocab_size": ROWS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
}  # fmt: skip


def rope(theta, factor=None):
    if factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **limits}


LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|end_of_text|>")
CHATML = ("", "<|im_start|>", "\n", "<|im_end|>", "<|endoftext|>")
GEMMA = {"head_dim": 8, "hidden_capping_value": 50.0, "final_capping_value": 30.0, "sliding_window_size": 16}
HF_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "rms_norm_eps": 1e-6}
# packaged config: builder, its arguments besides the shape; transformers' config class, its arguments; how a turn is
# written: before all, before and behind the role, at its end, and the EOS of the folder
FAMILIES = {
    "llama3_1/8B": ("llama3_1.llama3_1", {}, "Llama", {"rope_parameters": rope(5e5, 8.0)}, LLAMA3),
    "llama3_2/1B": (
        "llama3_2.llama3_2", {}, "Llama", {"rope_parameters": rope(5e5, 32.0), "tie_word_embeddings": True}, LLAMA3
    ),
    "mistral/7B": (
        "mistral.mistral", {}, "Mistral", {"rope_parameters": rope(1e4)}, ("", "<|", "|>\n", "</s>", "</s>"),
    ),
    "gemma2/2B": (
        "gemma2.gemma2", GEMMA, "Gemma2", HF_GEMMA | {"rope_parameters": rope(1e4), "tie_word_embeddings": True},
        ("<bos>", "<start_of_turn>", "\n", "<end_of_turn>", "<eos>"),
    ),
    "phi4/14B": (
        "phi3.phi3", {"rope_base": 250_000}, "Phi3", {"rope_parameters": rope(2.5e5), "pad_token_id": 0},
        ("", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2_5/0.5B": (
        "qwen2.qwen2", {"tie_word_embeddings": True, "rope_base": 1_000_000, "norm_eps": 1e-6}, "Qwen2",
        {"rope_parameters": rope(1e6), "tie_word_embeddings": True, "rms_norm_eps": 1e-6}, CHATML,
    ),
    "qwen2_5/7B": (
        "qwen2.qwen2", {"tie_word_embeddings": False, "rope_base": 1_000_000, "norm_eps": 1e-6}, "Qwen2",
        {"rope_parameters": rope(1e6), "tie_word_embeddings": False, "rms_norm_eps": 1e-6}, CHATML,
    ),
    "smollm2/135M": (
        "llama3_2.llama3_2", {"rope_base": 100_000, "scale_factor": 1}, "Llama",
        {"rope_parameters": rope(1e5), "tie_word_embeddings": True}, CHATML,
    ),
}  # fmt: skip


def test_every_family_with_a_packaged_config_is_here():
    packaged = {name.split("/")[0] for name in config.packaged_configs() if name.endswith("_full")}
    assert packaged == {name.split("/")[0] for name in FAMILIES}


def make_folder(name, tiny_lm, folder):
    """A random model whose responses end soon, with the family's turns over the tiny model's vocabulary."""
    _, _, kind, arguments, (bos, head, behind_role, end, eos) = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    marks = [mark.strip() for mark in (bos, head, behind_role, end, eos) if mark.strip() and mark.strip() != "<|"]
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark != "|>"]})
    tokenizer.add_special_tokens({"eos_token": eos, "pad_token": "<|endoftext|>", "bos_token": bos or "<|im_start|>"})
    turn = "{% for m in messages %}HEAD{{ m['role'] }}BEHIND{{ m['content'] }}END\n{% endfor %}"
    template = "BOS" + turn + "{% if add_generation_prompt %}HEADassistantBEHIND{% endif %}"
    for word, text in {"BOS": bos, "HEAD": head, "BEHIND": behind_role, "END": end}.items():
        template = template.replace(word, text)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = HF_SHAPE | {"pad_token_id": 0} | ids | arguments
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, whose first values are all the same
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(end)].mul_(4)
    model.save_pretrained(folder)
    return folder


def overrides(name, folder, output_dir, lora):
    builder, arguments, *_ = FAMILIES[name]
    module, _, function = builder.partition(".")
    shape = {**SHAPE, **arguments} | ({"tie_word_embeddings": True} if builder == "llama3_2.llama3_2" else {})
    data = {"source": REPO / "examples/quickstart/jargon_train.jsonl", "split": "null", "on_long_response": "cut"}
    data |= {"max_response_tokens": 60, "max_prompt_tokens": 150}
    val = data | {"source": REPO / "examples/quickstart/jargon_val.jsonl", "limit": 4}
    plain = {
        "output_dir": output_dir, "tokenizer.path": folder, "checkpointer.checkpoint_dir": folder, "device": "cpu",
        "model": f"torchtune.models.{module}.{'lora_' * lora}{function}", "checkpointer.export_dtype": "fp32",
        "compute_dtype": "fp32", "compile": "false", "sampling.max_new_tokens": 16, "generator.batch_size": 8,
        "global_batch_size": 4, "max_iterations": 1, "max_epochs": 1, "pairs.row_tokens": 512, "pairs.row_multiple": 16,
        "validation.spin": "true", "optimizer.lr": 1e-3, "dataset.limit": 8, "checkpointer.async_save": "false",
        **({"base_dtype": "fp32"} if lora else {}),
    }  # fmt: skip
    parts = {"model": shape, "dataset": data, "validation_dataset": val}
    plain |= {f"{section}.{key}": value for section, part in parts.items() for key, value in part.items()}
    return [f"{key}={value}" for key, value in plain.items()]


def start(recipe, name, changes, monkeypatch):
    """The recipe's command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", "--config", name, *changes])
    with pytest.raises(SystemExit) as end:
        recipe.recipe_main()
    assert not end.value.code


def logps_of(model, pairs):
    """Summed log-probs of the real responses, by transformers."""
    return [logp_by_transformers(model, pair.prompt_ids, pair.real_ids) for pair in pairs]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_a_folder_to_a_folder(name, method, tiny_lm, tmp_path, monkeypatch, capsys):
    folder, out = make_folder(name, tiny_lm, tmp_path / "base"), tmp_path / "out"
    changes = overrides(name, folder, out, method == "lora")
    assert main(["validate", f"{name}_{method}", *changes]) == 0, capsys.readouterr().out
    start(spin_recipe, f"{name}_{method}", changes, monkeypatch)
    exported = out / "iteration_000/hf_model"
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, exported))

    # the run's model is transformers', before and after
    pairs = list(PairStore.open(out / "iteration_000/pairs").pairs())
    assert [pair.reference_real_logp for pair in pairs] == pytest.approx(logps_of(before, pairs), abs=2e-3)
    held_out = list(PairStore.open(out / "iteration_000/validation/pairs").pairs())
    tokens = sum(len(pair.real_ids) for pair in held_out)
    last = metrics_of(out)[-1]["val_loss"]
    assert last == pytest.approx(-sum(logps_of(after, held_out)) / tokens, abs=1e-4)
    assert abs(last + sum(logps_of(before, held_out)) / tokens) > 1e-3  # it was trained
    cfg = config.load_config(f"{name}_full", overrides(name, folder, out, lora=False))
    ids = torch.randint(3, 1000, (2, 60), generator=torch.Generator().manual_seed(1))
    world = init_world("cpu")
    try:
        own = build_model(cfg.model, torch.float32)
        prepare_model(own, world, compute_dtype=torch.float32)
        load_hf_weights(own, exported, cfg.checkpointer.model_type, world=world)
        with torch.no_grad():
            torch.testing.assert_close(own(ids), after(ids).logits, rtol=1e-4, atol=1e-4)
    finally:
        shutdown()

    # and it stops where a turn ends, asked by the folder alone
    tokenizer = AutoTokenizer.from_pretrained(exported)
    *_, end, eos = FAMILIES[name][-1]
    assert tokenizer.eos_token == end and tokenizer.pad_token == "<|endoftext|>"
    stops = tokenizer.convert_tokens_to_ids(list(dict.fromkeys([end, eos])))
    for file in ("config.json", "generation_config.json"):
        named = json.loads((exported / file).read_text())["eos_token_id"]
        assert (named if isinstance(named, list) else [named]) == stops
    talks = [[{"role": "user", "content": question}] for question in ("What is foo?", "Why?", "Define bar.") * 4]
    asked = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, return_tensors="pt", padding=True, padding_side="left", return_dict=True
    )
    torch.manual_seed(0)
    responses = after.generate(**asked, do_sample=True, max_new_tokens=40)[:, asked["input_ids"].shape[1] :].tolist()
    ended = [next(i for i, token in enumerate(ids) if token in stops) for ids in responses if set(ids) & set(stops)]
    assert len(ended) >= 4, "no response ends, so this test shows nothing"
    for ids in responses:
        at = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        assert set(ids[at + 1 :]) <= {tokenizer.pad_token_id}
