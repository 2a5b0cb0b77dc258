"""Self-play with a real model: SmolLM2-135M-Instruct on prompts with human-written responses; measured on others.

    python experiments/real_model.py --form small --model FOLDER --data FOLDER              # a CPU, minutes
    python experiments/real_model.py --model FOLDER --data FOLDER --gpus 0,1 --per-gpu 4    # GPUs, all arms and seeds

The model is what `spin demo --only-model` makes, the data what experiments/real_data.py makes. The arms are in
real_model.yaml: each is the product's own recipe with some settings changed. Every job (an arm and a seed) writes its
figures to `OUT/jobs` after each iteration; the same command continues with what is missing. At the end the figures of
all jobs are put into one JSON file, a page and pictures (--docs), which those of some --arms or --seeds are added to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jobs import add_arguments, added, compact, run_plan
from real_report import PLAN, write_report

SUM_TOKENS = 48  # of a response to a sum


def measure(recipe: Any) -> dict[str, Any]:
    """What a policy's responses to held-out prompts look like, and how many questions it answers correctly.

    Args:
        recipe (Any): a ``measured.Measured``.

    Returns:
        dict[str, Any]: JSON values.
    """
    from real_metrics import chosen_right, classifier_accuracy, distinct_fraction, repeated_fraction, says_number

    prompts, sums, choices = recipe.val_prompts, recipe.others["sums"], recipe.others["choices"]
    with recipe.policy():
        (responses,) = recipe.respond(prompts, recipe.sampling)
        # greedy, as for a sum
        short = replace(recipe.sampling, temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=SUM_TOKENS)
        (results,) = recipe.respond(sums, short)
    real = [recipe.text(prompt.real_ids) for prompt in prompts]
    generated = [recipe.text(response.token_ids) for response in responses]
    tokens = [response.token_ids for response in responses]
    right = [
        says_number(recipe.text(response.token_ids), recipe.text(question.real_ids))
        for response, question in zip(results, sums, strict=True)
    ]
    scores = {each.sample_id: -nll for each, nll in zip(choices, recipe.nll(choices), strict=True)}
    return {
        **{
            f"classifier_{features}": classifier_accuracy(real, generated, features)
            for features in ("text", "opening", "length")
        },
        "response_tokens": sum(map(len, tokens)) / len(tokens),
        "real_tokens": sum(len(prompt.real_ids) for prompt in prompts) / len(prompts),
        "truncated_fraction": sum(response.finish_reason == "length" for response in responses) / len(responses),
        "repeated_4grams": repeated_fraction(tokens),
        "distinct_2grams": distinct_fraction(tokens),
        "choices_accuracy": chosen_right(scores),
        "sums_accuracy": sum(right) / len(right),
        "example": {"prompt": prompts[0].sample_id, "real": real[0], "generated": generated[0]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the report; 1 if a job did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN, help="the arms (default: %(default)s)")
    parser.add_argument("--form", default="full", help="of real_model.yaml: full, for GPUs, or small, for a CPU")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder made by real_data.py")
    add_arguments(parser, out="runs/real_model")
    args = parser.parse_args(arguments)
    files = [args.model / "config.json", *(args.data / f"{name}.jsonl" for name in ("train", "val", "choices", "sums"))]
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"{', '.join(missing)}: no such file. See the head of {Path(__file__).name}.")
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    if args.form not in plan["forms"]:
        parser.error(f"--form {args.form}: expected {', '.join(plan['forms'])}")
    paths = {"${model}": str(args.model.resolve()), "${data}": str(args.data.resolve())}
    results, failed = run_plan(plan, args.form, paths, args)
    file = (args.docs or args.out) / "real_model.json"
    if (args.arms or args.seeds) and file.is_file():  # beside those of this form that are there
        earlier = [job for job in json.loads(file.read_text(encoding="utf-8"))["jobs"] if job["form"] == args.form]
        results = added(earlier, compact(results))
    write_report(results, args.docs or args.out, list(plan["forms"][args.form]["arms"]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
