from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spin.core.ranks
import spin.model.hf
from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import init_world
from spin.model.fingerprint import weights_fingerprint
from spin.model.gemma2 import fix_gemma2_softcap
from spin.model.hf import HFStream, export_hf, load_hf_weights, stored_elements
from spin.model.hf_folder import read_hf_config, weight_files
from spin.model.sharding import materialize, named_full_tensors, shard_model
from tests.families import FAMILIES, MODEL_TYPES, edit_config, tiny_lm_model
from tests.ranks import run_ranks
from tests.two_ranks import tiny

INPUT = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def world():
    return init_world("cpu")


@pytest.fixture
def llama(copy_of) -> Path:
    """A copy of the tied Llama's folder, to damage."""
    return copy_of("llama3_2")


def empty(name: str, world, dtype: torch.dtype = torch.float32):
    """A family's model, sharded, with memory but without values."""
    model = FAMILIES[name]().to(dtype).to("meta")
    if name == "gemma2":
        fix_gemma2_softcap(model)
    shard_model(model, world, compute_dtype=dtype)
    materialize(model, world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name, folders, tmp_path, world, caplog):
    """transformers -> torchtune -> transformers -> torchtune: same weights, same logits on both sides."""
    model = empty(name, world)
    load_hf_weights(model, folders[name], MODEL_TYPES[name], world=world)
    assert not caplog.records
    original = FAMILIES[name]()
    assert weights_fingerprint(model) == weights_fingerprint(original)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        logits = model(INPUT)
    assert logits.isfinite().all()
    out = export_hf(model, folders[name], tmp_path / "out", MODEL_TYPES[name], dtype=torch.float32, world=world)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(theirs(INPUT).logits, logits, rtol=1e-4, atol=1e-4)

    again = empty(name, world)
    load_hf_weights(again, out, MODEL_TYPES[name], world=world)
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert {file.name for file in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (out / "model.py").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_of_tensors_is_what_a_folder_holds(name, folders, world):
    """Whatever engine loads these names loads what transformers wrote."""
    model = empty(name, world)
    load_hf_weights(model, folders[name], MODEL_TYPES[name], world=world)
    stream = HFStream(model, folders[name], MODEL_TYPES[name])
    converted = dict(stream.convert(named_full_tensors(model)))
    stored = load_file(folders[name] / "model.safetensors")
    assert converted.keys() == stored.keys()
    assert all(torch.equal(converted[key], stored[key]) for key in stored)


def test_a_stream_repeats_a_tied_head_where_the_folder_says_untied(folders, tmp_path, world):
    model = empty("llama3_2", world)
    load_hf_weights(model, folders["llama3_2"], "LLAMA3_2", world=world)
    folder = Path(shutil.copytree(folders["llama3_2"], tmp_path / "untied"))
    edit_config(folder, tie_word_embeddings=False)
    stream = HFStream(model, folder, "LLAMA3_2")
    converted = dict(stream.convert(named_full_tensors(model)))
    assert torch.equal(converted["lm_head.weight"], converted["model.embed_tokens.weight"])


def test_a_stream_notices_what_comes_twice_or_not_at_all(folders, world):
    model = empty("llama3_2", world)
    tensors = list(named_full_tensors(model))
    stream = HFStream(model, folders["llama3_2"], "LLAMA3_2")
    with pytest.raises(CheckpointError, match="'tok_embeddings.weight' left to convert"):
        list(stream.convert([*tensors[:3], tensors[0]]))
    with pytest.raises(CheckpointError, match="norm.scale did not come"):
        list(stream.convert([entry for entry in tensors if entry[0] != "norm.scale"]))


def test_bf16_rounds_once(folders, tmp_path, world):
    model = empty("llama3_2", world)
    load_hf_weights(model, folders["llama3_2"], "LLAMA3_2", world=world)
    out = export_hf(model, folders["llama3_2"], tmp_path / "out", "LLAMA3_2", dtype=torch.bfloat16, world=world)
    expected = load_file(folders["llama3_2"] / "model.safetensors")
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in expected.items())
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config.get("dtype", "bfloat16") == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    half = empty("llama3_2", world, torch.bfloat16)
    load_hf_weights(half, folders["llama3_2"], "LLAMA3_2", world=world)
    load_hf_weights(model, out, "LLAMA3_2", world=world)
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.full_tensor().bfloat16(), b.full_tensor())


def test_files_are_split_by_layer_and_indexed(folders, tmp_path, world):
    model = FAMILIES["qwen2_5"]()
    out = export_hf(
        model, folders["qwen2_5"], tmp_path / "out", "QWEN2", dtype=torch.float32, world=world, max_file_bytes=150_000
    )
    files = weight_files(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    numbers = range(1, len(files) + 1)
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in numbers]
    sizes = {file: sum(t.numel() * 4 for t in load_file(file).values()) for file in files}
    assert len(files) > 2 and all(size <= 150_000 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for file in files:
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(load_file(file))
    AutoModelForCausalLM.from_pretrained(out)
    (out / "model.safetensors.index.json").unlink()  # optional
    again = empty("qwen2_5", world)
    load_hf_weights(again, out, "QWEN2", world=world)
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert stored_elements(out) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_reads_every_row_once(name, folders, world, monkeypatch):
    read, pieces = spin.model.hf.read_rows, []
    monkeypatch.setattr(
        spin.model.hf, "read_rows", lambda *args: (pieces.append((args[0].name, *args[1:])), read(*args))[1]
    )
    load_hf_weights(empty(name, world), folders[name], MODEL_TYPES[name], world=world)
    rows = {key: [] for key, _, _ in pieces}
    for key, first, end in pieces:
        rows[key].extend(range(first, end))
    stored = load_file(folders[name] / "model.safetensors")
    assert {key: sorted(numbers) for key, numbers in rows.items()} == {
        key: list(range(len(tensor))) for key, tensor in stored.items()
    }


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.slow
def test_ranks_share_the_reading(ranks, folders, subprocess_env):
    """Three ranks have uneven shards, which split heads."""
    root = folders["llama2"].parent
    run_ranks("load_families.py", subprocess_env, root, *map("=".join, MODEL_TYPES.items()), ranks=ranks)


def test_rotary_tables_of_old_folders_are_ignored(llama, world):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, llama / "model.safetensors")
    load_hf_weights(empty("llama3_2", world), llama, "LLAMA3_2", world=world)


def test_other_layouts_beside_the_model_are_ignored(llama, world):
    save_file({"output.weight": torch.ones(2)}, llama / "consolidated.safetensors")
    assert [file.name for file in weight_files(llama)] == ["model.safetensors"]
    load_hf_weights(empty("llama3_2", world), llama, "LLAMA3_2", world=world)


def test_a_tied_model_drops_an_equal_head(llama, world):
    tensors = load_file(llama / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, llama / "model.safetensors")
    load_hf_weights(empty("llama3_2", world), llama, "LLAMA3_2", world=world)


def test_every_tensor_at_fault_is_named_before_anything_is_read(llama, world, monkeypatch):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 64)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)
    save_file(tensors, llama / "model.safetensors")
    monkeypatch.setattr(spin.model.hf, "read_rows", lambda *_: pytest.fail("read a weight"))
    with pytest.raises(CheckpointError) as caught:
        load_hf_weights(empty("llama3_2", world), llama, "LLAMA3_2", world=world)
    for fault in (
        "missing: model.layers.1.mlp.up_proj.weight [96, 64]",
        "model.layers.0.mlp.up_proj.weight in model.safetensors is [3, 64], the model needs [96, 64]",
        "unexpected: model.layers.0.self_attn.q_norm.weight [16] in model.safetensors",
        "model.norm.weight in model.safetensors has dtype I8",
    ):
        assert fault in str(caught.value)


INDEX = "model.safetensors.index.json"
DAMAGES = [
    (shutil.rmtree, "no such folder"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "holds a JSON list"),
    (lambda folder: (folder / "config.json").write_text("{}"), "no hidden_size, num_attention_heads, num_hidden_lay"),
    (
        lambda folder: (folder / INDEX).write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}})
        ),
        "names 2 files, but model-00001-of-00002.safetensors is missing",
    ),
    (
        lambda folder: (
            shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"),
            (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})),
        ),
        r"two models, model\.safetensors and that of .*index\.json \(1 file\)",
    ),
    (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}})),
        "outside the folder",
    ),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "1 of 2 safetensors files",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:20] for _, message in DAMAGES])
def test_damaged_folders_are_refused_before_weights(damage, message, llama):
    read_hf_config(llama)
    damage(llama)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(llama)


def test_a_runs_folder_is_told_where_its_models_are(tmp_path):
    (tmp_path / "iteration_000" / "hf_model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"config.json: no such file. A run's folder; name one of .*000/hf_model"):
        read_hf_config(tmp_path)


def test_truncated_file_is_named(llama, world):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        load_hf_weights(empty("llama3_2", world), llama, "LLAMA3_2", world=world)


def test_unknown_model_type_and_foreign_names(llama, tmp_path, world):
    with pytest.raises(ConfigError, match="expected one of LLAMA2, LLAMA3, "):
        load_hf_weights(FAMILIES["llama3_2"](), llama, "LLAMA4", world=world)
    model = FAMILIES["llama3_2"]()
    model.layers[0].register_parameter("lora_a", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match="LLAMA3_2 converter does not accept"):
        export_hf(model, llama, tmp_path / "out", "LLAMA3_2", dtype=torch.float32, world=world)


@pytest.mark.parametrize("point", ["sync", "write_companions", "write_json", "commit_atomic_dir"])
def test_interrupted_export_shows_nothing_and_keeps_the_old_one(point, llama, tmp_path, world, monkeypatch):
    model = FAMILIES["llama3_2"]()
    out = tmp_path / "run" / "hf_model"
    export_hf(model, llama, out, "LLAMA3_2", dtype=torch.float32, world=world)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    fresh = tmp_path / "run" / "fresh"

    def fail(*args, **kwargs):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(spin.core.ranks if point == "commit_atomic_dir" else spin.model.hf, point, fail)
        for target in (fresh, out):
            with pytest.raises(CheckpointError, match="killed"):
                export_hf(FAMILIES["llama3_2"](), llama, target, "LLAMA3_2", dtype=torch.float32, world=world)
    assert not fresh.exists()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not list(out.parent.glob(".*"))
    export_hf(model, llama, fresh, "LLAMA3_2", dtype=torch.float32, world=world)
    export_hf(model, llama, out, "LLAMA3_2", dtype=torch.float32, world=world)
    assert sorted(path.name for path in out.parent.iterdir()) == ["fresh", "hf_model"]


def test_export_never_replaces_its_source(llama, world):
    with pytest.raises(CheckpointError, match="would replace the model"):
        export_hf(FAMILIES["llama3_2"](), llama, llama, "LLAMA3_2", dtype=torch.float32, world=world)


def test_two_ranks(tmp_path, subprocess_env):
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=51,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    source = tmp_path / "source"
    LlamaForCausalLM(config).save_pretrained(source)
    export_hf(tiny.build(), source, tmp_path / "one", "LLAMA3_2", dtype=torch.float32, world=init_world("cpu"))
    run_ranks("convert.py", subprocess_env, tmp_path / "one", tmp_path / "two")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    with torch.no_grad():
        ids = tiny.tokens(0, 0)
        torch.testing.assert_close(theirs(ids).logits, tiny.build()(ids), rtol=1e-4, atol=1e-4)


def test_trained_model_of_the_repository(tiny_lm, tmp_path, world):
    """bf16 -> fp32 -> bf16 is the identity, and torchtune's logits are transformers'."""
    model = tiny_lm_model()
    load_hf_weights(model, tiny_lm, "LLAMA3_2", world=world)
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model.eval()(ids), theirs, rtol=1e-4, atol=1e-4)
    out = export_hf(model, tiny_lm, tmp_path / "out", "LLAMA3_2", dtype=torch.bfloat16, world=world)
    source, written = load_file(tiny_lm / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], source[name]) for name in written)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_lm / name).read_bytes()
