"""bf16 on a CPU without instructions for it is many times slower than fp32: that is known before a run, and said."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from spin.core.dtypes import has_fast_bf16
from spin.core.ranks import init_world
from spin.model import build as models

INFO = Path("/proc/cpuinfo")
SIZES = {"vocab_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 8}
MODEL = OmegaConf.create({"_component_": "torchtune.models.llama2.llama2", **SIZES})


@pytest.mark.skipif("avx2" not in (INFO.read_text() if INFO.is_file() else ""), reason="not an x86 CPU of today")
def test_a_cpu_without_avx512_has_no_fast_product():
    flags = INFO.read_text().split()
    if "avx512bw" not in flags:
        assert not has_fast_bf16()
    elif {"avx512_bf16", "amx_bf16"} & set(flags):
        assert has_fast_bf16()


def test_a_torch_without_onednn_has_none(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not has_fast_bf16()


@pytest.mark.parametrize(
    ("compute_dtype", "fast", "warned"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_a_model_that_would_be_slow_says_so(monkeypatch, caplog, compute_dtype, fast, warned):
    monkeypatch.setattr(models, "has_fast_bf16", lambda: fast)
    model = models.build_model(MODEL, torch.float32)
    models.prepare_model(model, init_world("cpu"), compute_dtype=compute_dtype)
    assert ("Set compute_dtype=fp32" in caplog.text) is warned
