"""Run by test_torchtune.py under torchrun: a sharded model generates, ranks with different amounts of work."""

import json
import sys
from pathlib import Path

import torch

from spin.core.ranks import init_world, shutdown
from spin.generators.generator import GeneratorContext, SamplingParams
from spin.generators.torchtune import TorchtuneGenerator
from spin.model.sharding import shard_model
from tests.families import tiny_lm_model

folder = Path(sys.argv[1])
world = init_world("cpu")
model = tiny_lm_model()
shard_model(model, world, compute_dtype=torch.float32)
generator = TorchtuneGenerator(GeneratorContext(model, world.device, 512, str), batch_size=4)
weights = torch.load(folder / "weights.pt", weights_only=True)
generator.update_weights(weights.items())

work = json.loads((folder / "work.json").read_text())
prompts, sampling, seeds = work["prompts"], SamplingParams(**work["sampling"]), list(range(len(work["prompts"])))
mine = range(len(prompts)) if world.is_main else range(0)
alone = generator.generate([prompts[i] for i in mine], sampling, [seeds[i] for i in mine])
mine = range(1) if world.is_main else range(1, len(prompts))
split = generator.generate([prompts[i] for i in mine], sampling, [seeds[i] for i in mine])
# sharded again, and what was sent is what is there
updated = all(torch.equal(p.full_tensor(), weights[name]) for name, p in model.named_parameters())
model(torch.tensor([prompts[0]])).sum().backward()

result = {"alone": [c.token_ids for c in alone], "split": [c.token_ids for c in split], "updated": updated}
(folder / f"rank{world.rank}.json").write_text(json.dumps(result))
shutdown()
