"""Every family loads what one rank loads, and the ranks share the reading.

Arguments: folder of a folder per family, then ``family=MODEL_TYPE`` each.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from spin.core.ranks import all_reduce_sums, init_world, shutdown
from spin.model.fingerprint import weights_fingerprint
from spin.model.hf import load_hf_weights
from spin.model.sharding import materialize, shard_model
from tests.families import FAMILIES
from tests.two_ranks.reading import bytes_read

world = init_world("cpu")
for family, model_type in (argument.split("=") for argument in sys.argv[2:]):
    folder = Path(sys.argv[1]) / family
    model = FAMILIES[family]().to("meta")
    shard_model(model, world, compute_dtype=torch.float32)
    materialize(model, world)
    load_hf_weights(model, folder, model_type, world=world)
    assert weights_fingerprint(model) == weights_fingerprint(FAMILIES[family]()), family

    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    mine = bytes_read()
    total = all_reduce_sums({"bytes": float(mine)}, world)["bytes"]
    # Even shards of whole heads are read once. Else rows are rounded up, and two ranks read a head that is cut through.
    slack = 1.0 if world.world_size == 2 else 1.15
    assert stored <= total <= slack * stored, (family, total / stored)
    assert mine <= slack * stored / world.world_size, (family, mine / stored)
shutdown()
