"""Folders as a run writes them, without the run: metrics with the shape of real ones, and small stores."""

import json
import math
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save

from spin.data import Pair, PairStore, Response

SCRIPT = "<script>document.title = 'owned'</script>"


def step_metrics(step, iteration, share, **changes):
    """One line of metrics.jsonl at a share of an iteration, from ln 2 and zero rewards to a won game."""
    margin = 2.0 * share
    return {
        "step": step, "iteration": iteration, "epoch": 0, "loss": math.log1p(math.exp(-margin)), "acc": min(0.9, share),
        "rewards_actual_mean": 0.75 * margin, "rewards_generated_mean": -0.25 * margin, "margin": margin,
        "avg_generated_lengths": 100 + 20 * math.sin(step), "truncated_fraction": 0.1, "real_logp_drift": 7.5 * margin,
        "generated_logp_drift": -2.5 * margin, "grad_norm": 10 + math.cos(step), "beta": 0.1, "updated_fraction": 0.99,
        "nonfinite_steps": 0, "step_time": 2.0, "pairs_per_second": 30.0, **changes,
    }  # fmt: skip


def write_run(folder, iterations=2, steps=10, finished=True, changes=None, prompt=f"Say {SCRIPT} & 'hello'", config=()):
    """A run's folder; ``changes`` is called with a line's step and gives what is different in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"output_dir": str(folder), "max_iterations": iterations, "max_steps": -1, "loss": {"beta": 0.1}}
    OmegaConf.save(values | dict(config), folder / "config.yaml")
    rows, samples = [{"step": 0, "val_loss": 3.0, "validation_step_time": 1.0}], []
    for iteration in range(iterations):
        for i in range(steps):
            step = iteration * steps + i + 1
            rows.append(step_metrics(step, iteration, i / max(1, steps - 1), **(changes(step) if changes else {})))
        rows[-1] |= {"val_loss": 2.9 - 0.1 * iteration, "validation_step_time": 1.5}
        for sample in ("a", "b"):
            samples.append(
                {
                    "step": rows[-1]["step"], "sample_id": sample, "iteration": iteration, "prompt": prompt,
                    "real": f"real response of {iteration}", "generated": f"generated <b>response</b> of {iteration}",
                    "finish_reason": "stop", "margin": 0.25,
                }
            )  # fmt: skip
        write_store(folder / f"iteration_{iteration:03d}" / "responses")
        if finished or iteration < iterations - 1:
            model = folder / f"iteration_{iteration:03d}" / "hf_model"
            model.mkdir(parents=True, exist_ok=True)
            (model / "config.json").write_text("{}")
            (model / "model.safetensors").write_bytes(save({"w": torch.zeros(1)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


CHAT = "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"


def write_fixed_prompts(folder, responses, prompt=CHAT):
    """The responses to one prompt before self-play and after each iteration; the last one is truncated."""
    with (folder / "fixed_prompts.jsonl").open("w") as file:
        for iteration, response in enumerate(responses):
            reason = "length" if iteration == len(responses) - 1 else "stop"
            row = {"iteration": iteration, "step": 10 * iteration, "sample_id": "a", "prompt": prompt}
            row |= {"real": "The real one.", "response": response, "finish_reason": reason}
            file.write(json.dumps(row) + "\n")


def write_store(path, scored=False, responses=(([7, 2], "stop", -30.0), ([7, 8, 9, 7], "length", -15.0))):
    """Two responses of 2 and 4 tokens in two shards, the second one cut; the margins are +10 and -5 nats."""
    store = PairStore.open_or_create(path, {"opponent": "0" * 64, "dataset": "d" * 64, "tokenizer": "t" * 64}, 2)
    for shard, (ids, reason, logp) in enumerate(responses):
        response = Response(ids, reason, logp if scored else None)
        pair = Pair(f"sample-{shard}", 0, [1, 5, 6], [8, 2], [response], -20.0 if scored else None)
        store.write_shard(shard, [pair])
    store.seal({"generator/logprob_gap": 0.004})
    return store
