"""Kills runs at random points, starts them again, and compares them with the unbroken run.

    killed_runs.py FOLDER RANKS SEED KILLS

A run is the recipe's command line in processes forked from this one, which has imported everything: a start costs
milliseconds. A process counts the events it passes (files opened for writing, renamed, removed, synced; collectives;
forwards; optimizer steps; in its background thread too) by the stage it is in, and at the chosen one it sends itself
SIGKILL. The other ranks are then killed, as torchrun would. Prints one JSON line for each kill.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

import pyarrow.parquet as pq  # noqa: E402
import spin_recipe  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchtune.models.llama3_2  # noqa: E402, F401
import torchtune.training.metric_logging  # noqa: E402, F401
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402
from torchtune.modules import TransformerDecoder  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402, F401

import spin.checkpoint.checkpointer  # noqa: E402, F401
import spin.data  # noqa: E402, F401
import spin.generators  # noqa: E402, F401
from spin.core.files import file_sha256  # noqa: E402
from tests.recipes.helpers import CONFIG, TINY_LM, free_port, metrics_of, step_of, tiny_overrides  # noqa: E402

STAGES = {
    "_play": "generation",
    "_score": "scoring",
    "train_single_step": "training",
    "run_validation": "validation",
    "save_checkpoint": "saving",
    "_finish_iteration": "boundary",
    "setup": "setup",
}
OVERRIDES = [
    "model.num_layers=1", "dataset.limit=8", "validation_dataset.limit=2", "pairs.prompts_per_shard=3",
    "sampling.max_new_tokens=6", "val_check_interval=1", "save_interval=1", "checkpointer.keep_last=2",
    "validation.table_rows=1", "generator.batch_size=4",
]  # fmt: skip


class Events:
    """Counts events by stage; sends SIGKILL at one of them."""

    def __init__(self, folder, plan):
        self.folder, self.plan = str(folder), plan
        self.counts, self.kinds = Counter(), {}
        self.stages = ["start"]
        self.lock = threading.RLock()

    def happened(self, kind):
        with self.lock:
            in_background = threading.current_thread() is not threading.main_thread()
            stage = "background" if in_background else self.stages[-1]
            if self.plan is not None and stage == self.plan["stage"] and self.counts[stage] == self.plan["event"]:
                os.kill(os.getpid(), signal.SIGKILL)
            self.kinds.setdefault(stage, []).append(kind)
            self.counts[stage] += 1

    def audit(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            kind = "open"
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            kind = event
        else:
            return
        if str(args[0]).startswith(self.folder):
            self.happened(kind)

    def install(self):
        sys.addaudithook(self.audit)
        for module, names in (
            (os, ["fsync"]),
            (dist, ["all_reduce", "all_gather_object", "broadcast_object_list", "gather_object", "barrier"]),
        ):
            for name in names:
                setattr(module, name, self.before(getattr(module, name), name))
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: self.happened("forward") if isinstance(module, TransformerDecoder) else None
        )
        register_optimizer_step_pre_hook(lambda *_: self.happened("before optimizer step"))
        register_optimizer_step_post_hook(lambda *_: self.happened("after optimizer step"))
        for name, stage in STAGES.items():
            setattr(spin_recipe.SPINRecipe, name, self.during(getattr(spin_recipe.SPINRecipe, name), stage))

    def before(self, function, kind):
        def counted(*args, **kwargs):
            self.happened(kind)
            return function(*args, **kwargs)

        return counted

    def during(self, method, stage):
        def staged(recipe, *args, **kwargs):
            is_last = stage == "training" and step_of(recipe) >= 6  # 2 iterations x 2 epochs x 2 steps
            inner = "boundary" if self.stages[-1] == "boundary" else "last epoch" if is_last else stage
            self.stages.append(inner)
            try:
                return method(recipe, *args, **kwargs)
            finally:
                self.stages.pop()

        return staged


def run(folder, ranks, plan=None):
    """One run of all ranks; ``plan`` names rank, stage and event of the kill. Gives the exit codes."""
    folder.mkdir(exist_ok=True)
    port, children = free_port(), {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            run_rank(folder, rank, ranks, port, plan if plan is not None and plan["rank"] == rank else None)
        children[child] = rank
    codes = {}
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if plan is not None and codes.get(plan["rank"]) == -signal.SIGKILL:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return codes


def run_rank(folder, rank, ranks, port, plan):
    """Never returns: what is flushed here is what a process would leave."""
    log = os.open(f"{folder}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    events = Events(folder, plan)
    events.install()
    model = folder.parent / "model"
    sys.argv = ["spin_recipe.py", "--config", str(CONFIG), *tiny_overrides(folder), *OVERRIDES]
    sys.argv += [f"checkpointer.checkpoint_dir={model}"]
    code = 1
    try:
        spin_recipe.recipe_main()
    except SystemExit as end:
        code = end.code or 0
        Path(f"{folder}.events{rank}.json").write_text(json.dumps(events.kinds))
        Path(f"{folder}.modules{rank}.json").write_text(json.dumps([*sys.modules]))
    except BaseException:  # noqa: BLE001 - for the log that the caller prints
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_model(folder):
    """The first layer of the tests' model: a run of seconds in tenths."""
    shutil.copytree(TINY_LM, folder)
    tensors = load_file(TINY_LM / "model.safetensors")
    one = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(one, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY_LM / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def results(folder):
    """What a run has made: metrics, pairs and responses by value, weights by the bytes of the exported models."""
    stores = {}
    for file in sorted(folder.glob("iteration_*/*/shard-*.parquet")):
        stores.setdefault(file.parent.relative_to(folder).as_posix(), []).extend(pq.read_table(file).to_pylist())
    exported = sorted(folder.glob("iteration_*/hf_model/*.safetensors"))
    weights = {file.relative_to(folder).as_posix(): file_sha256(file) for file in exported}
    samples = (folder / "samples.jsonl").read_text().splitlines()
    return {"metrics": metrics_of(folder), "samples": samples, "stores": stores, "weights": weights}


def leftovers(folder):
    """Names of what a finished run must not leave."""
    patterns = ("**/.*.part", "**/*.old", "**/rows*", "**/.*.tmp")
    return [str(path) for pattern in patterns for path in folder.glob(pattern)]


def main(root, ranks, seed, kills):
    make_model(root / "model")
    codes = run(root / "unbroken", ranks)
    assert set(codes.values()) == {0}, (root / "unbroken.log0").read_text()[-4000:]
    expected = results(root / "unbroken")
    assert len(expected["weights"]) == 2 and len(expected["metrics"]) == 9
    kinds = {rank: json.loads((root / f"unbroken.events{rank}.json").read_text()) for rank in range(ranks)}
    for name in json.loads((root / "unbroken.modules0.json").read_text()):  # what a run imports on its way
        if name not in sys.modules and importlib.util.find_spec(name):
            importlib.import_module(name)
    choose = random.Random(seed)
    stages = sorted(kinds[0])
    folder, starts = None, 0
    for number in range(kills):
        stage = stages[number % len(stages)]
        rank = choose.randrange(ranks)
        if stage not in kinds[rank]:
            rank = 0
        event = choose.randrange(len(kinds[rank][stage]))
        plan = {"stage": stage, "rank": rank, "event": event}
        if folder is None:
            folder, starts = root / f"run{number}", 0
        began = time.monotonic()
        codes = run(folder, ranks, plan)
        starts += 1
        found = plan | {"kind": kinds[rank][stage][event], "killed": codes[rank] == -signal.SIGKILL, "starts": starts}
        # one in three is killed once more on its way, unless it came to its end
        if found["killed"] and starts == 1 and number % 3 == 0 and number + 1 < kills:
            print(json.dumps(found), flush=True)
            continue
        codes = run(folder, ranks)
        assert set(codes.values()) == {0}, f"{found}\n" + Path(f"{folder}.log0").read_text()[-4000:]
        actual = results(folder)
        found["same"] = {name: actual[name] == expected[name] for name in expected}
        found["leftovers"] = leftovers(folder)
        found["seconds"] = round(time.monotonic() - began, 2)
        print(json.dumps(found), flush=True)
        shutil.rmtree(folder)
        folder = None


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
