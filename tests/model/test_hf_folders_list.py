"""transformers writes, reads and runs every folder of tests/hf_folders.py, and what sets a folder apart shows."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf_folders import FOLDERS, REFUSED, folder_config, forward_ids, stored_tensors, write_folder

pytestmark = pytest.mark.slow

WITHOUT = {  # a key of config.json to its value where it does nothing, or something else
    "sliding_window": 99, "no_rope_layers": [1, 1, 1, 1], "clip_qkv": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "norm_topk_prob": False, "num_experts_per_tok": 1, "max_window_layers": 0,
    "partial_rotary_factor": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    "attention_multiplier": 0.25, "logit_scale": 1.0, "query_pre_attn_scalar": 24, "hidden_act": "silu",
    "rope_parameters": None,
}  # fmt: skip


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(forward_ids()).logits


@pytest.mark.parametrize("name", FOLDERS | REFUSED)
def test_transformers_runs_the_folder(name, tmp_path):
    logits = _logits(write_folder(name, tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(_logits(again), logits, rtol=0, atol=0)
    assert logits.isfinite().all() and 0.1 < logits.std() < 3
    assert all(t.numel() == 1 or t.min() < t.max() for t in stored_tensors(tmp_path).values())


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in FOLDERS.items() for key in keys if keys[key] and key in WITHOUT]
)
def test_each_setting_changes_the_logits(name, key, tmp_path):
    """A decoder that ignores the setting cannot pass a comparison of logits."""
    model = write_folder(name, tmp_path)
    value = WITHOUT[key]
    if key == "rope_parameters":
        rope = FOLDERS[name][key]
        kept = {part: rope[part] for part in rope if part.startswith(("llama_4", "original"))}
        theta = 123.0 if rope.get("rope_type") == "default" else rope.get("rope_theta", 1e4)
        value = {"rope_type": "default", "rope_theta": theta} | kept
    config = folder_config(name, **{key: value})
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    assert (_logits(other) - _logits(model)).abs().max() > 0.02
