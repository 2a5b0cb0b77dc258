"""Adapters on two ranks: as on one. Arguments: the base's folder, the test's folder.

The folder holds ``expected.json`` and, per kind, a state, as one rank made them with the functions of this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2

from spin.checkpoint import LoRACheckpointer
from spin.core.ranks import World, init_world, shutdown
from spin.model.build import prepare_model
from spin.model.fingerprint import weights_fingerprint
from spin.model.lora import init_adapters, prepare_adapters, trainable
from spin.model.sharding import accumulating, named_full_tensors

SHAPE = {
    "vocab_size": 97,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 256,
    "intermediate_dim": 512,
    "max_seq_len": 64,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
    "scale_factor": 1,
    "tie_word_embeddings": True,
}
KINDS = {"dora": {"use_dora": True}, "qlora": {"quantize_base": True}}


def base() -> nn.Module:
    """The plain model whose weights are the base."""
    torch.manual_seed(3)
    return llama3_2(**SHAPE)


def checkpointer(base_dir: Path, folder: Path) -> LoRACheckpointer:
    return LoRACheckpointer(str(base_dir), str(folder), "LLAMA3_2", export_dtype="fp32", async_save=False)


def adapted(kind: str, world: World, loader: LoRACheckpointer, checkpointing: bool = False) -> nn.Module:
    """An adapted model, sharded, loaded and initialised."""
    with torch.device("meta"):
        model = lora_llama3_2(
            lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=3, lora_alpha=6, **SHAPE,
            **KINDS[kind],
        )  # fmt: skip
    prepare_adapters(model, torch.float32, world)
    prepare_model(model, world, compute_dtype=torch.float32, checkpointed_every=int(checkpointing))
    loader.load_model(model, world)
    init_adapters(model, seed=5)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, steps: range) -> list[float]:
    """Steps on four sequences, dealt out to the ranks; this rank's losses."""
    losses = []
    for step in steps:
        with accumulating(model, range(world.rank, 4, world.world_size)) as rows:
            for row in rows:
                generator = torch.Generator().manual_seed(10 * step + row)
                ids = torch.randint(SHAPE["vocab_size"], (1, 12), generator=generator)
                loss = F.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:]) * world.world_size / 4
                loss.backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def run(kind: str, base_dir: Path, folder: Path, world: World) -> dict:
    """A run of two steps and one more, saved between, with everything that one rank and two must agree on."""
    saver = checkpointer(base_dir, folder / kind)
    model = adapted(kind, world, saver)
    report = {"start": weights_fingerprint(model), "base": weights_fingerprint(model, frozen_only=True)}
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, world, range(2))
    report["state"] = str(saver.save(step=2, model=model, optimizer=optimizer, state={}, world=world))
    report["saved"] = weights_fingerprint(model)
    train(model, optimizer, world, range(2, 3))
    report["end"] = weights_fingerprint(model)
    report["merged"] = {name: tensor.double().sum().item() for name, tensor in named_full_tensors(model)}
    saver.export(model, 0, world)
    return report


def main() -> None:
    base_dir, folder = map(Path, sys.argv[1:])
    world = init_world("cpu")
    expected = json.loads((folder / "expected.json").read_text())
    for kind in KINDS:
        one = expected[kind]
        two = run(kind, base_dir, folder / "two", world)
        # the same base, NF4 included, and the same first adapter, to the last bit
        assert (two["start"], two["base"]) == (one["start"], one["base"]), kind
        for name, total in one["merged"].items():
            assert abs(two["merged"][name] - total) < 1e-2 + 1e-4 * abs(total), (kind, name, two["merged"][name], total)

        # the state of one rank, and their own; both go on
        saver = checkpointer(base_dir, folder / "two" / kind)
        for path, saved, end in ((one["state"], one["saved"], None), (two["state"], two["saved"], two["end"])):
            model = adapted(kind, world, saver)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
            saver.load(path, model=model, optimizer=optimizer, world=world)
            assert weights_fingerprint(model) == saved, (kind, path)
            train(model, optimizer, world, range(2, 3))
            assert end is None or weights_fingerprint(model) == end, kind
    shutdown()


if __name__ == "__main__":
    main()
