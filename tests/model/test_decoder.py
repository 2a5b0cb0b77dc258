"""Decoders that are built from their folder compute what transformers computes, and write the folder back."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import init_world
from spin.model import build_model, prepare_model
from spin.model.hf import export_hf, load_hf_weights
from spin.model.hf_folder import text_name
from tests.families import FAMILIES, MODEL_TYPES, edit_config
from tests.hf_folders import FOLDERS, REFUSED, forward_ids, stored_tensors, write_folder


@pytest.fixture(scope="module")
def world():
    return init_world("cpu")


def from_folder(folder, world, **arguments):
    """The trained model as a run has it: built on the meta device, patched, sharded, filled."""
    model = build_model({"_component_": "spin.model.from_hf", "path": str(folder), **arguments}, torch.float32)
    prepare_model(model, world, compute_dtype=torch.float32)
    load_hf_weights(model, folder, "HF", world=world)
    return model.eval()


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_export(name, tmp_path, world):
    twin = write_folder(name, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    model = from_folder(tmp_path / "in", world)
    ids = forward_ids(min(40, model.max_seq_len))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        expected = twin(input_ids=ids).logits
        for logits in (model(ids), model(ids, input_pos=positions)):
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)

    export_hf(model, tmp_path / "in", tmp_path / "out", "HF", dtype=torch.float32, world=world)
    stored = {text_name(key): tensor for key, tensor in stored_tensors(tmp_path / "in").items()}
    stored.pop(None, None)  # of images
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in written.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_with_its_reason(name, tmp_path, world):
    write_folder(name, tmp_path)
    arguments = {"max_seq_len": 256} if name == "llama_dynamic" else {}
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        from_folder(tmp_path, world, **arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchtunes_builders_compute_the_same(name, folders, tmp_path, world):
    """Another layout of weights and another rotary embedding, or Gemma 2's own attention: the same logits and files."""
    other = FAMILIES[name]().to("meta")
    prepare_model(other, world, compute_dtype=torch.float32)
    load_hf_weights(other, folders[name], MODEL_TYPES[name], world=world)
    model = from_folder(folders[name], world)
    ids = forward_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other.eval()(ids), rtol=1e-5, atol=5e-5)
    for kind, each in ((None, model), (MODEL_TYPES[name], other)):
        export_hf(each, folders[name], tmp_path / str(kind), kind, dtype=torch.float32, world=world)
    files = [load_file(tmp_path / str(kind) / "model.safetensors") for kind in (None, MODEL_TYPES[name])]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


def test_a_multimodal_config_may_leave_out_sizes(tmp_path, world):
    """As Gemma 3 4B's: heads and vocabulary are the defaults of its family."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    model = build_model({"_component_": "spin.model.from_hf", "path": str(tmp_path)}, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_880_263_168


def test_two_rotated_dimensions(tmp_path, world):
    twin = write_folder("llama", tmp_path, head_dim=2)
    ids = forward_ids(20)
    with torch.no_grad():
        torch.testing.assert_close(from_folder(tmp_path, world)(ids), twin(input_ids=ids).logits, rtol=0, atol=2e-5)


def test_a_config_that_changed_since_is_not_exported(tmp_path, world):
    """The folder would say another rotation than that of the model that was trained."""
    write_folder("llama", tmp_path / "in")
    model = from_folder(tmp_path / "in", world)
    edit_config(tmp_path / "in", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    with pytest.raises(CheckpointError, match=r"rope"):
        export_hf(model, tmp_path / "in", tmp_path / "out", None, dtype=torch.float32, world=world)
    assert not (tmp_path / "out").exists()


def test_more_experts_than_any_model_has_are_refused_at_once(tmp_path, world):
    write_folder("qwen3_moe", tmp_path)
    edit_config(tmp_path, num_experts=2**20)
    with pytest.raises(CheckpointError, match=r"num_experts is 1048576, expected a whole number, 4,096 at most"):
        from_folder(tmp_path, world)


def test_a_pipe_is_no_file_of_weights(tmp_path, world):
    write_folder("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        from_folder(tmp_path, world)


def test_sizes_that_nf4_cannot_take_are_named(tmp_path, world):
    write_folder("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"w1 has 96 x 64 numbers, and NF4 takes multiples of 16,384"):
        from_folder(tmp_path, world, quantize_base=True, lora_attn_modules=["q_proj"])
