"""Frozen bases, deterministic adapters, states without the base, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spin.checkpoint import SPINCheckpointer
from spin.config import SPINConfig, load_config
from spin.core.errors import CheckpointError, ConfigError
from spin.core.ranks import World, init_world
from spin.model.adapters import adapted_modules
from spin.model.build import build_model
from spin.model.fingerprint import weights_fingerprint
from spin.model.hf import export_hf
from spin.model.lora import check_adapters, check_lora, init_adapters, prepare_adapters, trainable
from tests.families import EVERYWHERE, FAMILIES, lora_model
from tests.ranks import run_ranks
from tests.two_ranks import lora as runs

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def world():
    return init_world("cpu")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A Hugging Face folder with the weights of ``runs.base()``."""
    folder = tmp_path_factory.mktemp("base")
    shape = runs.SHAPE
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["intermediate_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=shape["max_seq_len"],
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
    )
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(folder / "config")
    export_hf(
        runs.base(), folder / "config", folder / "model", "LLAMA3_2", dtype=torch.float32, world=init_world("cpu")
    )
    return folder / "model"


@pytest.fixture(scope="module")
def one_rank(base_dir, tmp_path_factory) -> tuple[Path, dict]:
    """Both kinds of run of ``runs``, by one rank."""
    folder = tmp_path_factory.mktemp("one")
    report = {kind: runs.run(kind, base_dir, folder / "one", init_world("cpu")) for kind in runs.KINDS}
    (folder / "expected.json").write_text(json.dumps(report))
    return folder, report


@pytest.mark.slow
def test_two_ranks_do_what_one_does(base_dir, one_rank, subprocess_env):
    """Base (NF4 too), first adapter, training, states that cross, exact resume, exports: see the script."""
    run_ranks("lora.py", subprocess_env, base_dir, one_rank[0])
    for kind in runs.KINDS:
        for part in ("hf_model/model.safetensors", "adapter/adapter_model.safetensors"):
            one, two = (load_file(one_rank[0] / n / kind / "iteration_000" / part) for n in ("one", "two"))
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_resumed_run_is_the_unbroken_one(kind, base_dir, one_rank, world):
    report = one_rank[1][kind]
    saver = runs.checkpointer(base_dir, one_rank[0] / "one" / kind)
    model = runs.adapted(kind, world, saver)
    assert weights_fingerprint(model) == report["start"]
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    saver.load(report["state"], model=model, optimizer=optimizer, world=world)
    assert weights_fingerprint(model) == report["saved"] != report["start"]
    runs.train(model, optimizer, world, range(2, 3))
    assert weights_fingerprint(model) == report["end"] != report["saved"]
    assert weights_fingerprint(model, frozen_only=True) == report["base"]


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_checkpoint_holds_the_adapter_and_its_optimizer_only(kind, one_rank):
    """3 numbers a trained weight (itself and two moments), and a step for each tensor; nothing of the base."""
    from spin.checkpoint.tensors import read_metadata

    metadata = read_metadata(Path(one_rank[1][kind]["state"])).state_dict_metadata
    assert all(".lora_" in name or ".magnitude" in name for name in metadata)
    numbers = sum(entry.size.numel() for name, entry in metadata.items() if not name.endswith(".step"))
    modules = 2 * 5  # layers times query, value, and three of the MLP
    lora = 2 * 3 * (2 * (256 + 256) + 3 * (256 + 512))
    magnitudes = 2 * (2 * 256 + 2 * 512 + 256) if kind == "dora" else 0
    assert numbers == 3 * (lora + magnitudes)
    assert sum(name.endswith("lora_a.weight") for name in metadata) == modules


@pytest.mark.parametrize("kind", runs.KINDS)
def test_the_merged_export_is_the_adapted_model(kind, base_dir, one_rank, world):
    """transformers on the merged folder has the logits of the policy, whose base may be NF4."""
    report = one_rank[1][kind]
    saver = runs.checkpointer(base_dir, one_rank[0] / "one" / kind)
    model = runs.adapted(kind, world, saver)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    saver.load(report["state"], model=model, optimizer=optimizer, world=world)
    runs.train(model, optimizer, world, range(2, 3))
    ids = torch.arange(3, 23)[None]
    theirs = AutoModelForCausalLM.from_pretrained(one_rank[0] / "one" / kind / "iteration_000" / "hf_model")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_no_gradient_of_the_base_is_stored(base_dir, tmp_path, world):
    model = runs.adapted("dora", world, runs.checkpointer(base_dir, tmp_path))
    model(torch.arange(5)[None]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "magnitude" in name), name


def test_another_base_is_refused(base_dir, one_rank, tmp_path, world):
    """Another folder, with one number changed; the adapter would load and the policy be wrong."""
    model = runs.base()
    with torch.no_grad():
        model.norm.scale[7] *= 1.25
    export_hf(model, base_dir, tmp_path / "other", "LLAMA3_2", dtype=torch.float32, world=world)
    saver = runs.checkpointer(tmp_path / "other", tmp_path)
    adapted = runs.adapted("dora", world, saver)
    with pytest.raises(CheckpointError, match="trained on another base"):
        saver.load(one_rank[1]["dora"]["state"], model=adapted, optimizer=None, world=world)


def test_adapters_depend_on_the_seed_and_the_module(base_dir, tmp_path, world):
    """A is uniform in +-1/sqrt(in), of variance 1 / (3 in); no two modules have the same."""
    model = runs.adapted("dora", world, runs.checkpointer(base_dir, tmp_path))
    first = {name: module.lora_a.weight.full_tensor().clone() for name, module in adapted_modules(model).items()}
    assert len({tensor[0, 0].item() for tensor in first.values()}) == len(first)
    numbers = torch.cat([tensor.flatten() * tensor.shape[1] ** 0.5 for tensor in first.values()])
    assert numbers.abs().max() <= 1 and numbers.var().item() == pytest.approx(1 / 3, rel=0.05)
    for module in adapted_modules(model).values():
        assert not module.lora_b.weight.full_tensor().any() and not module.magnitude.full_tensor().any()
    init_adapters(model, seed=6)
    other = {name: module.lora_a.weight.full_tensor() for name, module in adapted_modules(model).items()}
    assert all((other[name] != first[name]).float().mean() > 0.99 for name in first)
    init_adapters(model, seed=5)
    assert all(torch.equal(m.lora_a.weight.full_tensor(), first[n]) for n, m in adapted_modules(model).items())


def test_a_wrapped_model_starts_with_the_same_adapters(base_dir, one_rank, tmp_path, world):
    """Activation checkpointing puts itself into the modules' names."""
    model = runs.adapted("dora", world, runs.checkpointer(base_dir, tmp_path), checkpointing=True)
    assert weights_fingerprint(model) == one_rank[1]["dora"]["start"]


# ---- refusals and checks

SECTIONS = {
    "output_dir": "out",
    "tokenizer": {"_component_": "spin.data.ChatTokenizer"},
    "checkpointer": {"_component_": "spin.checkpoint.LoRACheckpointer"},
}
MODEL = {"_component_": "torchtune.models.llama3_2.lora_llama3_2"}
SAVING_ADAPTERS = SPINConfig.model_validate(SECTIONS | {"model": MODEL})


def meta(**arguments):
    with torch.device("meta"):
        return lora_llama3_2(**EVERYWHERE, **runs.SHAPE, lora_rank=2, lora_alpha=4, **arguments)


def test_what_is_trained_is_counted_by_hand(world):
    """Rank 2 in each of 2 layers: 4 attention weights of 256 + 256, 3 of the MLP of 256 + 512."""
    lora = 2 * 2 * (4 * 512 + 3 * 768)
    model = meta()
    base = sum(parameter.numel() for parameter in runs.base().parameters())
    summary = prepare_adapters(model, torch.float32, world)
    assert summary == (f"parameters: {lora:,} trainable ({lora / (lora + base):.2%}) in 14 adapters, {base:,} frozen")


def test_adapters_have_a_dtype_of_their_own(world):
    model = meta().to(torch.bfloat16)
    prepare_adapters(model, torch.float32, world)
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ConfigError, match="has no adapter.*lora_llama3_2_1b"):
        check_adapters(SAVING_ADAPTERS, FAMILIES["llama3_2"]())


def test_dropout_and_an_adapted_output_are_refused():
    with pytest.raises(ConfigError, match="lora_dropout=0"):
        check_adapters(SAVING_ADAPTERS, meta(lora_dropout=0.1))
    with pytest.raises(ConfigError, match="apply_lora_to_output"):
        check_adapters(SAVING_ADAPTERS, lora_model("llama3_1", apply_lora_to_output=True))


def test_weights_that_nf4_does_not_take_are_refused():
    """Two key heads of 32 by 128 are 8,192 numbers, half a block of scales."""
    section = load_config(str(REPO / "tests/assets/tiny_lora.yaml"), ["model.quantize_base=true"]).model
    with pytest.raises(ConfigError, match=r"lora_llama3_2 does not take these sizes .*divisible by scaler block size"):
        build_model(section, torch.float32)


def test_ranks_that_cannot_share_nf4_blocks_are_refused():
    """A query weight of 256 by 256 has 4 blocks of 16,384."""

    class Mesh:
        ndim = 1

        def size(self, dim):
            return 8

    with pytest.raises(ConfigError, match=r"\[256, 256\] has 4 NF4 blocks of 16384 weights, which 8 ranks cannot"):
        prepare_adapters(meta(quantize_base=True), torch.float32, World(0, 8, 0, torch.device("cpu"), Mesh()))


def test_all_faults_of_a_config_are_reported_at_once():
    faulty = MODEL | {"lora_dropout": 0.1, "apply_lora_to_output": True, "quantize_base": True}
    keys = {"enable_float8_training": True, "replicas": 2, "fsdp_cpu_offload": True, "base_dtype": "bf16"}
    with pytest.raises(ConfigError) as error:
        check_lora(SPINConfig.model_validate(SECTIONS | keys | {"model": faulty}))
    assert str(error.value).startswith("5 faults:") and len(str(error.value).splitlines()) == 6
    check_lora(SPINConfig.model_validate(SECTIONS | {"model": MODEL | {"lora_dropout": 0.0}}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lora_attn_modules": ["q_proj", "k_porj"]}, "found 'k_porj', expected a list of q_proj, .*mean 'k_proj'"),
        ({"lora_attn_modules": [5]}, "lora_attn_modules: found 5, expected a list of q_proj, k_proj, v_proj, output"),
        ({"lora_attn_modules": "q_proj v_proj"}, "lora_attn_modules: found 'q_proj v_proj', expected a list"),
        ({"lora_attn_modules": []}, r"lora_attn_modules: found \[\], expected a list of q_proj"),
        ({"lora_attn_modules": None}, "lora_attn_modules: found null, expected a list of q_proj"),
        ({"lora_alpha": 0}, "lora_alpha=0: .* expected above 0"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0: .* expected above 0"),
        ({"attn_dropout": 0.5}, "attn_dropout=0.5: policy and opponent would drop different weights"),
    ],
)
def test_arguments_that_torchtune_takes_without_a_word_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        check_lora(SPINConfig.model_validate(SECTIONS | {"model": MODEL | arguments}))


def test_a_checkpoint_of_full_fine_tuning_still_holds_every_weight(tmp_path, world):
    """Nothing is frozen there, so nothing is left out."""
    from spin.checkpoint.tensors import read_metadata

    model = llama3_2(**runs.SHAPE)
    saver = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", async_save=False)
    path = saver.save(step=1, model=model, optimizer=None, state={}, world=world)
    assert set(read_metadata(path).state_dict_metadata) == {f"model.{name}" for name in model.state_dict()}
