"""Two ranks: import and export give what one process gives. Arguments: source folder, output folder."""

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from spin.core.errors import CheckpointError
from spin.core.ranks import barrier, init_world, shutdown
from spin.model.fingerprint import weights_fingerprint
from spin.model.hf import export_hf, load_hf_weights
from spin.model.sharding import materialize, shard_model

source, out = Path(sys.argv[1]), Path(sys.argv[2])
world = init_world("cpu")
with torch.device("meta"):
    model = build()
shard_model(model, world, compute_dtype=torch.float32)
materialize(model, world)
load_hf_weights(model, source, "LLAMA3_2", world=world)
assert weights_fingerprint(model) == weights_fingerprint(build())

# The last row of a head next to tied embeddings, which only rank 1 compares, differs: both stop.
tensors = load_file(source / "model.safetensors")
head = tensors["model.embed_tokens.weight"].clone()
head[-1] += 1
untied = out.with_name("untied")
if world.is_main:
    untied.mkdir()
    save_file(tensors | {"lm_head.weight": head}, untied / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
barrier(world)
with pytest.raises(CheckpointError, match="(?s)rank 1.*lm_head.weight differs"):
    load_hf_weights(model, untied, "LLAMA3_2", world=world)

# Files of one layer each: rank 1 writes every second one.
export_hf(model, source, out, "LLAMA3_2", dtype=torch.float32, world=world, max_file_bytes=1)
written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
expected = load_file(source / "model.safetensors")
assert len(list(out.glob("*.safetensors"))) == 4  # embeddings, two layers, last norm
assert written.keys() == expected.keys()
assert all(torch.equal(written[name], expected[name]) for name in expected)

# Only rank 1 cannot write, in the middle of a file: both stop, nothing appears.
if world.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
with pytest.raises(CheckpointError, match="(?s)rank 1.*cannot write .*File too large"):
    export_hf(model, source, out.with_name("second"), "LLAMA3_2", dtype=torch.float32, world=world, max_file_bytes=1)
assert not out.with_name("second").exists()
shutdown()
