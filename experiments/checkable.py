"""Does self-play add anything to a model that is fine-tuned already?  Problems whose answers a program checks.

    python experiments/checkable.py                                          # a CPU: no download, minutes
    python experiments/checkable.py --form full --model FOLDER --gpus 0 --per-gpu 7    # SmolLM2-135M-Instruct

The second takes the model that `spin demo --only-model` makes. The arms are in checkable.yaml: each is the product's
own recipe with some settings changed. Every job (an arm and a seed) writes its figures to `OUT/FORM/jobs` after each
iteration; the same command continues with what is missing. At the end all figures are put into one JSON file (--docs),
which those of some --arms or --seeds are added to.
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
from checkable_problems import VERDICTS, verdict, write_problems
from checkable_report import SHORT, arms_table, measured_at_the_end
from jobs import add_arguments, added, compact, run_plan

from spin.core.files import write_json

PLAN = Path(__file__).with_name("checkable.yaml")
TEXT = PLAN.parents[1] / "configs" / "quickstart" / "jargon_val.jsonl"  # that no arm is trained on
SAMPLES = 4  # responses to a problem at temperature 1


def measure(recipe: Any) -> dict[str, Any]:
    """How many problems a policy solves, what is wrong with its other responses, and what it makes of other texts.

    Args:
        recipe (Any): a ``measured.Measured``.

    Returns:
        dict[str, Any]: JSON values; none of a start, nor before the end of a run. ``verdicts`` has a text for the
        greedy responses and each of the sampled ones, with a letter of ``VERDICTS`` for each problem.
    """
    if recipe.is_start or not recipe.is_over:  # a start is measured by an arm of its own
        return {}
    plain = replace(recipe.sampling, temperature=1.0, top_p=1.0)
    greedy = replace(plain, temperature=0.0)
    val, unseen = recipe.val_prompts, recipe.others["unseen"]

    def judged(prompts: Sequence[Any], responses: Sequence[Any]) -> str:
        return "".join(
            verdict(recipe.text(prompt.real_ids), recipe.text(each.token_ids), each.finish_reason == "length")
            for prompt, each in zip(prompts, responses, strict=True)
        )

    with recipe.policy():
        (responses,) = recipe.respond([*val, *unseen], greedy)
        at_1 = [judged(val, each) for each in recipe.respond(val, plain, range(SAMPLES))]
    at_0, of_unseen = judged(val, responses[: len(val)]), judged(unseen, responses[len(val) :])
    return {
        "greedy": share("r", at_0),
        "families": by_family(val, at_0),
        "response_tokens": sum(len(each.token_ids) for each in responses[: len(val)]) / len(val),
        "unseen": share("r", of_unseen),
        "unseen_families": by_family(unseen, of_unseen),
        **{f"nll_{name}": sum(nlls := recipe.nll(prompts)) / len(nlls) for name, prompts in recipe.others.items()},
        "sampled": share("r", "".join(at_1)),
        "pass_4": sum("r" in letters for letters in zip(*at_1, strict=True)) / len(at_0),
        **{f"errors_{letter}": share(letter, "".join(at_1)) for letter in VERDICTS if letter != "r"},
        "verdicts": [at_0, *at_1],
    }


def share(letter: str, letters: Sequence[str]) -> float:
    """The fraction of letters that are this one."""
    return sum(each == letter for each in letters) / len(letters)


def by_family(prompts: Sequence[Any], letters: str) -> dict[str, float]:
    """The fraction of right responses to the problems of each family."""
    found: dict[str, str] = {}
    for prompt, letter in zip(prompts, letters, strict=True):
        family = prompt.sample_id.split(":")[0]
        found[family] = found.get(family, "") + letter
    return {family: round(share("r", of_family), 4) for family, of_family in found.items()}


def tiny_model(folder: Path) -> None:
    """Makes the Hugging Face folder of a Llama of 100,000 random weights with a token for each character."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["<pad>", "<s>", "<user>", "<assistant>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=4, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else '' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the figures; 1 if a job did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN, help="the arms (default: %(default)s)")
    parser.add_argument("--form", default="small", help="of the plan (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (--form small: one is made)")
    add_arguments(parser, out="runs/checkable")
    args = parser.parse_args(arguments)
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    if args.form not in plan["forms"]:
        parser.error(f"--form {args.form}: expected {', '.join(plan['forms'])}")
    if args.model is None and args.form != "small":
        parser.error(
            f"--form {args.form} takes --model, a Hugging Face folder: the model that is made here is a small one"
        )
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: expected a Hugging Face folder, but it has no config.json")
    args.out /= args.form
    model, data = args.model or args.out / "model", args.out / "problems"
    write_problems(data, **plan["forms"][args.form]["problems"])
    if args.model is None:
        tiny_model(model)
    paths = {"${model}": str(model.resolve()), "${data}": str(data.resolve()), "${text}": str(TEXT)}
    results, failed = run_plan(plan, args.form, paths, args)
    file = (args.docs or args.out) / f"checkable_{args.form}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    results = compact(results)
    if (args.arms or args.seeds) and file.is_file():
        results = added(json.loads(file.read_text(encoding="utf-8")), results)
    write_json(file, results)
    print(arms_table(measured_at_the_end(results), plan["forms"][args.form]["arms"], SHORT), file, sep="\n\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
