"""Runs the recipe in this process or by its command line, and reads what it wrote."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import spin_evaluate
import spin_generate
import spin_recipe
import torch

from spin.config import EvaluateConfig, GenerateConfig, SPINConfig, complete, instantiate, load_config
from spin.data import ChatTokenizer, PairStore
from spin.model.fingerprint import weights_fingerprint

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "tests" / "assets" / "tiny.yaml"
TINY_LORA = CONFIG.with_name("tiny_lora.yaml")
TINY_EVALUATE = CONFIG.with_name("tiny_evaluate.yaml")
TINY_LM = CONFIG.with_name("tiny_lm")
# not the same in two runs
TIMES = ("compile_time/", "step_time", "pairs_per_second", "tokens_per_second", "validation_step_time")


def tiny_overrides(output_dir):
    return [
        f"output_dir={output_dir}",
        f"tokenizer.path={TINY_LM}",
        f"checkpointer.checkpoint_dir={TINY_LM}",
        f"dataset.source={REPO / 'examples/quickstart/jargon_train.jsonl'}",
        f"validation_dataset.source={REPO / 'examples/quickstart/jargon_val.jsonl'}",
    ]


def tiny_config(output_dir, *overrides, config=CONFIG, model=SPINConfig):
    """The test config, complete, as the command line would hand it to the recipe."""
    return complete(load_config(str(config), [*tiny_overrides(output_dir), *overrides]), model)


def run(output_dir, *overrides, recipe_class=spin_recipe.SPINRecipe, config=CONFIG):
    """One run from start to end in this process."""
    recipe = recipe_class(tiny_config(output_dir, *overrides, config=config))
    recipe.setup()
    recipe.train()
    recipe.final_weights = weights_of(recipe)
    recipe.cleanup()
    return recipe


def weights_of(recipe, **options):
    """Fingerprint of a recipe's policy as it is now."""
    return weights_fingerprint(recipe._model, **options)


def step_of(recipe):
    """Optimizer steps that a run has behind it."""
    return recipe.state_dict()["progress"]["step"]


def dies(recipe_class, output_dir, *overrides):
    """A run of a recipe that raises KeyboardInterrupt."""
    recipe = recipe_class(tiny_config(output_dir, *overrides))
    recipe.setup()
    with pytest.raises(KeyboardInterrupt):
        recipe.train()
    recipe.cleanup()


def dies_before_training(output_dir, *overrides):
    """A run that ends between the scoring of its pairs and its first step."""

    class Dies(spin_recipe.SPINRecipe):
        def train_single_step(self, batch):
            raise KeyboardInterrupt

    dies(Dies, output_dir, *overrides)


def generate(output_dir, *overrides):
    """One worker of spin_generate in this process; the folder of its store."""
    recipe = spin_generate.SPINGenerate(tiny_config(output_dir, *overrides, model=GenerateConfig))
    recipe.setup()
    recipe.generate()
    recipe.cleanup()
    return output_dir / "iteration_000" / "responses"


def evaluate_config(output_dir, *overrides):
    return complete(load_config(str(TINY_EVALUATE), [f"output_dir={output_dir}", *overrides]), EvaluateConfig)


def evaluate(output_dir, *overrides):
    """One evaluation in this process; the summary."""
    recipe = spin_evaluate.SPINEvaluate(evaluate_config(output_dir, *overrides))
    try:
        recipe.setup()
        return recipe.evaluate()
    finally:
        recipe.cleanup()


def tiny_prompts(section="dataset"):
    """The samples that the test config names."""
    node = tiny_config("unused")[section]
    return list(instantiate(node, tokenizer=ChatTokenizer(TINY_LM), max_seq_len=512))


def adapters_config(output_dir, *overrides):
    return tiny_config(output_dir, *overrides, config=TINY_LORA)


def run_adapters(output_dir, *overrides, recipe_class=spin_recipe.SPINRecipe):
    return run(output_dir, *overrides, recipe_class=recipe_class, config=TINY_LORA)


def stops_at(step, recipe_class=spin_recipe.SPINRecipe):
    """A recipe that gets SIGTERM in the middle of its ``step``-th step."""

    class StopsAt(recipe_class):
        def train_single_step(self, batch):
            if step_of(self) + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_single_step(batch)

    return StopsAt


def changing_loss(change, recipe_class=spin_recipe.SPINRecipe):
    """A recipe whose losses are ``change(recipe, losses)`` of those of the config's loss."""

    class ChangesLoss(recipe_class):
        def _begin_training(self, iteration):
            super()._begin_training(iteration)
            loss = self._loss

            def changed(*logps):
                losses, *rewards = loss(*logps)
                return change(self, losses), *rewards

            self._loss = changed

    return ChangesLoss


@contextmanager
def forged_references(monkeypatch):
    """The stores of scored pairs say of the real responses what no model computed."""
    read = PairStore.pairs

    def forged(store):
        shift = 0.01 if store.path.name == "pairs" else 0.0
        for pair in read(store):
            yield replace(pair, reference_real_logp=pair.reference_real_logp - shift) if shift else pair

    with monkeypatch.context() as patch:
        patch.setattr(PairStore, "pairs", forged)
        yield


def metrics_of(output_dir, with_times=False):
    """The lines of metrics.jsonl; without what no two runs share."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return rows if with_times else [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def logp_by_transformers(model, prompt, response):
    """The summed log-prob of a response, by a model of transformers."""
    ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
    with torch.no_grad():
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum().item()


def free_port():
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_line(output_dir, *overrides, recipe="spin_recipe", nproc=1, config=CONFIG, program=None):
    """``spin run``, unless a program is given, with the paths of the test model and data."""
    launcher = [sys.executable, "-m", "spin", "run"]
    ranks = ["--nproc_per_node", str(nproc)] if nproc > 1 else []
    base = tiny_overrides(output_dir) if recipe != "spin_evaluate" else [f"output_dir={output_dir}"]
    return [*(program or [*launcher, *ranks, recipe]), "--config", str(config), *base, *overrides]


def environment():
    """For a command that imports this checkout: one thread a process, no launcher's variables."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    paths = [str(REPO), str(REPO / "recipes"), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(output_dir, *overrides, cwd=None, timeout=240, code=0, **how):
    """One run by the command line that ends with an exit code; the finished process."""
    words = command_line(output_dir, *overrides, **how)
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def flip_bit(file, position=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 4
    file.write_bytes(content)


def start(words, **options):
    """A process whose stdout and stderr are one text, the one that ``communicate`` gives."""
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(words, **options)


def wait_for(process, moment, seconds=200):
    """Until a process is so far, or has ended."""
    deadline = time.monotonic() + seconds
    while not moment() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def signalled(words, signal_number, moment, **options):
    """Starts a process and signals it at a moment: its exit code, and what it wrote."""
    process = start(words, **options)
    wait_for(process, moment)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def steps_done(output_dir):
    """Lines of metrics.jsonl so far."""
    return len(metrics_of(output_dir)) if (output_dir / "metrics.jsonl").exists() else 0


def descendants(pid):
    """Processes below a process, deepest first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (*descendants(child), child)]


def ranks_of(process):
    """Process ids of a launcher's ranks, by rank."""
    found = {}
    for pid in descendants(process.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found |= {int(each.removeprefix("RANK=")): pid for each in variables if each.startswith("RANK=")}
    return found
