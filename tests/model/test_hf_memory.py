"""How much memory reading and writing a folder of many files takes, measured by the kernel."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.model.build import build_model
from spin.model.hf import MAX_FILE_BYTES, HFStream
from tests.ranks import run_ranks

MIB = 2**20
SHARDS = 30
# of the widest tensors: embeddings and head of 8,192 x 2,048 numbers; a rank of two ranks reads half of one
WIDEST_FP32 = 8192 * 2048 * 4
OTHER = 48 * MIB  # allocators' and the interpreter's own
SIZES = {
    **{"vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16},
    **{"num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 8, "max_position_embeddings": 2048},
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 2 GiB in fp32, in thirty files; every tensor is a view of the same random numbers."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SIZES))
    model = build_model({"_component_": "spin.model.from_hf", "path": str(path)}, torch.float32)
    numbers = torch.randn(WIDEST_FP32 // 4, generator=torch.Generator().manual_seed(0))
    named = ((name, numbers[: p.numel()].view(p.shape)) for name, p in model.named_parameters())
    tensors = dict(HFStream(model, path, None).convert(named))
    files, weight_map = [[] for _ in range(SHARDS)], {}
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
        min(files, key=lambda names: sum(tensors[each].numel() for each in names)).append(name)
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        save_file({name: tensors[name].clone() for name in names}, path / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    yield path, total
    shutil.rmtree(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's mark of a process's peak is Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_tensor_next_to_the_shards(ranks, folder, tmp_path, subprocess_env):
    """Reading: a shard's rows of one tensor in fp32, and the pages of the file that is mapped for it. Writing: one
    tensor in bf16. The exported file is 1 GiB. Between two ranks gloo keeps memory of its own for what it gathers, 0.3
    GiB here whatever becomes of the results; so there the limit is a part of the file."""
    source, total = folder
    assert 1.9 * 2**30 < total < 2.1 * 2**30 and total / 2 < MAX_FILE_BYTES
    largest_file = max(file.stat().st_size for file in source.glob("*.safetensors"))
    try:
        printed = run_ranks("bounded.py", subprocess_env, source, tmp_path / "out", ranks=ranks)
        found = re.findall(r"rank \d: (\d+) (\d+) (\d+)", printed)
        assert len(found) == ranks and sum(int(shards) for shards, *_ in found) == pytest.approx(total, rel=1e-3)
        for _, loading, exporting in found:
            assert int(loading) < WIDEST_FP32 / ranks + largest_file + OTHER
            assert int(exporting) < (WIDEST_FP32 / 2 + OTHER if ranks == 1 else total / 2 * 0.4)
        written = load_file(tmp_path / "out" / "model.safetensors")
        stored = load_file(next(source.glob("model-00007-*")))
        assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in stored.items())
    finally:
        shutil.rmtree(tmp_path)
