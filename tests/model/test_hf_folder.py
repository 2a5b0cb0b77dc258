"""Folders that are no Hugging Face model to train are called by their names, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.core.errors import CheckpointError
from spin.model.build import build_model
from spin.model.hf import check_hf_folder
from spin.model.hf_folder import read_hf_config
from tests.families import edit_config
from tests.model.test_hf_config import section_of

AGAIN = "Download the model again"


@pytest.fixture
def folder(copy_of) -> Path:
    """A Llama's config.json and model.safetensors, to damage."""
    folder = copy_of("llama2")
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    return folder


def check(folder: Path) -> None:
    check_hf_folder(build_model(section_of("llama2"), torch.float32), folder, "LLAMA2")


def only(folder: Path, **files: Any) -> None:
    """Empties the folder except for these; keys have __ for a dot."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)


def only_these(**files: Any) -> Callable[[Path], None]:
    return lambda folder: only(folder, **files)


def rename(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def adapter_with_config(folder: Path) -> None:
    rename("adapter_model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}")


def cache(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    only(folder)
    for name in ("refs", "blobs", "snapshots/abc"):
        (folder / name).mkdir(parents=True)
    for name, content in files.items():
        (folder / "snapshots/abc" / name).write_bytes(content)


def parent(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "checkpoint-500" / name)


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000\n")


def quantized(**quantization: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **quantization)


def method(name: str) -> Callable[[Path], None]:
    return quantized(quantization_config={"quant_method": name})


def stored(ending: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """Without a word in config.json: a weight under another name, in another type."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj"
        weight = tensors.pop(f"{name}.weight")
        save_file(tensors | {name + ending: weight.to(dtype)}, folder / "model.safetensors")

    return damage


def family(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, model_type=name, **changes)


ADAPTER = {"adapter_config__json": {"base_model_name_or_path": "org/base"}, "adapter_model__safetensors": ""}
META = {"params__json": {"dim": 64}, "consolidated__00__pth": "", "tokenizer__model": ""}
MISTRAL = {"params__json": {"dim": 64}, "consolidated__safetensors": ""}
KINDS: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    ("adapter", only_these(**ADAPTER), ("An adapter of peft of 'org/base'", "merge_and_unload()")),
    ("adapter-config", adapter_with_config, ("An adapter of peft", "merge_and_unload()")),
    ("gguf", only_these(model__Q4_K_M__gguf="GGUF"), ("is GGUF", 'gguf_file="model.Q4_K_M.gguf"')),
    ("gguf-config", rename("model.gguf"), ("model.gguf is GGUF", "Use the original's folder with safetensors")),
    ("meta", only_these(**META), ("Meta's own layout", "convert_llama_weights_to_hf")),
    ("meta-config", rename("consolidated.00.pth"), ("consolidated.*.pth is Meta's own layout",)),
    ("mistral", only_these(**MISTRAL), ("Mistral's own layout", "model-*.safetensors")),
    ("mistral-config", rename("consolidated.safetensors"), ("Mistral's own layout",)),
    ("pickle", rename("pytorch_model-00001-of-00001.bin"), ("-00001.bin, which can run code", "save_pretrained")),
    ("flax", rename("flax_model.msgpack"), ("flax_model.msgpack, of another framework",)),
    ("distcp", only_these(__metadata="", __0_0__distcp=""), ("A checkpoint of torch.dist", "iteration_NNN/hf_model")),
    ("cache", cache, ("A folder of the Hugging Face cache", "snapshots/abc")),
    ("parent", parent, ("Name the folder of a model in it", "checkpoint-500")),
    ("lfs", lfs, ("a pointer of Git LFS", "git lfs pull")),
    *[
        (name, method(name), (f"quantized ({name})", "Use the unquantized original", way))
        for name, way in {
            "fp8": "FineGrainedFP8Config(dequantize=True)", "fbgemm_fp8": "dequantize=True",
            "mxfp4": "Mxfp4Config(dequantize=True)", "bitsandbytes": "model.dequantize()", "gptq": "original",
            "awq": "original", "compressed-tensors": "run_compressed=False", "torchao": "original",
        }.items()
    ],
    ("mlx", quantized(quantization={"group_size": 64, "bits": 4}), ("quantized (MLX)",)),
    ("fp8-stored", stored(".weight", torch.float8_e4m3fn), ("quantized (fp8; model.layers.0.mlp.up_proj.weight",)),
    ("gptq-stored", stored(".qweight", torch.int32), ("quantized (gptq or awq; model.layers.0.mlp.up_proj.qweight",)),
    ("packed-stored", stored(".weight_packed", torch.int32), ("quantized (compressed-tensors",)),
    ("bnb-stored", stored(".weight.absmax", torch.uint8), ("quantized (bitsandbytes",)),
    *[
        (name, family(name), (f"model_type is '{name}'", "internlm3. Choose such"))
        for name in ("gpt_oss", "qwen3_next", "mixtral", "lfm2", "granitemoehybrid", "phi", "gpt2", "deepseek_v3", "t5")
    ],
    ("mllama", family("mllama", text_config={"hidden_size": 8}), ("is 'mllama'", "several parts (text, images")),
    ("head", quantized(architectures=["LlamaForSequenceClassification"]), ("its head is another one", "ForCausalLM")),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
def test_other_folders_are_named_with_what_to_do(damage, words, folder):
    check(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert AGAIN.lower() not in message.lower() and len(message.splitlines()) == 1
    assert message.startswith(str(folder))


def test_a_file_in_place_of_a_folder(folder):
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="a GGUF file, expected a folder. model.gguf is GGUF"):
        read_hf_config(file)
    with pytest.raises(CheckpointError, match="a file, expected a folder. Name the folder it is in"):
        read_hf_config(folder / "model.safetensors")


def test_the_originals_files_below_a_model_name_the_model(folder):
    original = folder / "original"
    original.mkdir()
    (original / "params.json").write_text("{}")
    (original / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"the Hugging Face model is {folder}: name that one"):
        read_hf_config(original)


def test_what_lies_beside_a_whole_model_is_left_alone(folder):
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "model.gguf", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    for name in ("adapter_config.json", "params.json"):
        (folder / name).write_text("{}")
    edit_config(folder, quantization_config=None, architectures=None)
    check(folder)


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
def test_only_a_broken_download_is_to_be_downloaded_again(part, folder):
    content = (folder / part).read_bytes()
    (folder / part).write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=f"{part}: .*[Dd]ownload the model again"):
        check(folder)
