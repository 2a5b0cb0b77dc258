"""Two ranks of the recipe, one of which fails: both end with the same error. Argument: the test's folder."""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import spin_generate
from spin_recipe import SPINRecipe

from spin.config import GenerateConfig
from spin.core.errors import CheckerError, GeneratorError, NonFiniteError, SpinError, StoreError
from spin.core.ranks import barrier, gather_objects, init_world, shutdown
from spin.data import ChatTokenizer, Pair, PairStore, Response
from spin.generators import TorchtuneGenerator, check_responses
from spin.pairs.lookup import share_lookup
from spin.pairs.shards import missing_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import TINY_LM, changing_loss, step_of, tiny_config, weights_of  # noqa: E402

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "pairs.prompts_per_shard=5")
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


def poison(recipe, losses):
    """Rank 1's rows have it, in the second step."""
    return losses * (math.nan if step_of(recipe) == 1 and rank == 1 else 1.0)


class OneLossIsNan(changing_loss(poison)):
    """Notes the batch, and the weights before it."""

    def train_single_step(self, batch):
        self.samples = [pair.sample_id for pair in batch.pairs]
        self.before = weights_of(self)
        return super().train_single_step(batch)


def error_of(recipe):
    recipe.setup()
    with pytest.raises(SpinError) as error:
        recipe.train()
    return error.value


recipe = OneLossIsNan(tiny_config(folder / "nan", *SHORT))
error = error_of(recipe)
world = init_world("cpu")
assert isinstance(error, NonFiniteError) and "step 1: loss sum nan" in str(error), error
assert weights_of(recipe) == recipe.before
lines = (folder / "nan" / "nonfinite.jsonl").read_text().splitlines()
assert [json.loads(line)["samples"] for line in lines] == [recipe.samples]
assert len(set(gather_objects(str(error), world))) == 1


stream = TorchtuneGenerator.stream


def dies(*args):
    number = 0
    for response in stream(*args):
        number += response is not None  # between steps there is none
        if rank == 1 and number == 10:  # its last
            raise GeneratorError("The engine ended with code -9; its last words: Killed.")
        yield response


TorchtuneGenerator.stream = dies
generate = spin_generate.SPINGenerate(tiny_config(folder / "alone", *SHORT, model=GenerateConfig))
generate.train = generate.generate
for name, recipe in (("generator", SPINRecipe(tiny_config(folder / "generator", *SHORT))), ("alone", generate)):
    error = error_of(recipe)
    assert isinstance(error, GeneratorError), error
    assert str(error) == "rank 1: The engine ended with code -9; its last words: Killed.", error
    store = PairStore.open(folder / name / "iteration_000" / "responses")
    assert not store.is_sealed and len(store.missing_shards()) == 1  # of two for each rank
barrier(world)


if world.is_main:
    played = PairStore.open_or_create(folder / "it" / "responses", {"opponent": "w"}, 4)
    for shard in range(4):  # rank 1 has the second and the last
        played.write_shard(shard, [Pair(f"s{shard}{i}", 0, [5], [6], [Response([7], "length")]) for i in range(3)])
    played.seal()
    (folder / "own_checker.py").write_text("says = []\ndef check(**given):\n    return says.pop()\n")
barrier(world)
os.environ["SPIN_ALLOW_COMPONENTS"] = "own_checker"
sys.path.insert(0, str(folder))
section = tiny_config(folder, "pairs.checker=own_checker.check").pairs.checker
check = partial(check_responses, [folder / "it"], section, ChatTokenizer(TINY_LM), world, lambda: False)
says = sys.modules["own_checker"].says
says[:] = [True, None, "no" if rank == 1 else False, True, True, True]  # from the last to the first
with pytest.raises(
    CheckerError, match="^rank 1: pairs.checker: sample s30: own_checker.check returned 'no' of type str"
):
    check()
assert len(says) == 2 * rank  # rank 1 was asked the first of its last shard
says[:] = [True, None, False] * (1 - rank)  # the last shard is rank 0's now
assert check() == {"right_fraction": 8 / 12, "wrong_fraction": 2 / 12, "unknown_fraction": 2 / 12}
assert says == []


disk = folder if world.is_main else folder / "of_another_host"
with pytest.raises(StoreError, match="^rank 1: .*of_another_host/rows"):
    share_lookup(disk / "rows", store.read_shard(0), world)
if world.is_main:
    (store.path / "shard-00000.parquet").unlink(missing_ok=True)
    (store.path / "shard-00000.parquet").mkdir()
assert 0 in missing_shards(store, world)  # what cannot be read is kept aside, and missing on both
assert not (store.path / "shard-00000.parquet").exists()
shutdown()
