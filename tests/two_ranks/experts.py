"""A model with experts on two ranks: what is read, computed and written is that of one.

Arguments: a folder of tests/hf_folders.py, where ``in`` is ``qwen3_moe_mixed``. Its five experts are cut in the third.
"""

import json
import sys
from pathlib import Path

import torch

from spin.core.ranks import all_reduce_sums, init_world, shutdown
from spin.model import build_model, from_hf, prepare_model, weights_fingerprint
from spin.model.hf import export_hf, from_hf_tensors, load_hf_weights
from spin.model.sharding import full_tensor
from tests.hf_folders import forward_ids, stored_tensors
from tests.two_ranks.reading import bytes_read

world, folder = init_world("cpu"), Path(sys.argv[1])
stored = stored_tensors(folder / "in")
plain = from_hf(folder / "in")
from_hf_tensors(plain, stored, json.loads((folder / "in" / "config.json").read_text()), "HF")
model = build_model({"_component_": "spin.model.from_hf", "path": str(folder / "in")}, torch.float32)
prepare_model(model, world, compute_dtype=torch.float32)
load_hf_weights(model, folder / "in", "HF", world=world)
assert weights_fingerprint(model) == weights_fingerprint(plain)
size = sum(tensor.nbytes for tensor in stored.values())
mine = bytes_read()
assert all_reduce_sums({"bytes": float(mine)}, world)["bytes"] == size
assert mine < 0.51 * size  # five rows of a router cannot be halved

ids = forward_ids(rows=world.world_size)
(model(ids[world.rank, None]).square().mean()).backward()  # the mean over ranks is that over rows
(plain(ids).square().mean()).backward()
for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
    scale = theirs.grad.abs().max().item()
    torch.testing.assert_close(full_tensor(ours.grad), theirs.grad, rtol=0, atol=1e-5 * scale, msg=name)

export_hf(model, folder / "in", folder / "out", "HF", dtype=torch.float32, world=world)
written = stored_tensors(folder / "out")
assert written.keys() == stored.keys() and all(torch.equal(written[key], stored[key]) for key in stored)
shutdown()
