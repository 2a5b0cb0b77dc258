"""Which of two models is better: the win rate of iteration t against t - 1, or of any model against any other.

Both respond to the same held-out prompts; a judge model compares the responses, shown to it in both orders, or they are
checked against the data set's own (exact match).

One machine:         spin run spin_evaluate --config evaluate candidate.checkpoint_dir=A baseline.checkpoint_dir=B ...
Eight GPUs:          spin run --nproc_per_node 8 spin_evaluate --config evaluate ...
The quickstart's:    spin run spin_evaluate --config quickstart/evaluate

Writes, into output_dir:

    responses/<name>/                     a pair store for each model, used again while its weights are the same
    <candidate>_vs_<baseline>/            rows.jsonl (prompt, responses, verdicts), summary.json, judgements/

Models are loaded one after the other. The same command resumes a run that was killed: finished responses and judgements
stay. Not here: benchmarks with fixed tasks, see docs/evaluation.md on lm-eval.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spin import config, run
from spin.config import EvaluateConfig
from spin.config.schema import Sampling
from spin.core import progress
from spin.core.errors import DataError
from spin.core.files import as_output_error, write_json, write_json_lines
from spin.core.ranks import barrier, broadcast_object, init_world, shutdown
from spin.core.terminal import get_logger, show
from spin.data import Prompt, PromptDataset
from spin.data.dataset import evaluated_part
from spin.data.dates import fix_date
from spin.evaluation import verdicts
from spin.evaluation.models import EvalModel, check_evaluation, shared_samples
from spin.generators import engine_group, policy_loaded, sampling_params, stage
from spin.pairs import RowLayout
from spin.pairs.shards import missing_shards, open_store, seal
from spin.reference import check_generator_logprobs
from spin.types import Response

log = get_logger("INFO")

ROLES = ("candidate", "baseline")


class SPINEvaluate:
    """Compares two models on held-out prompts; a ``ConfigError`` if its config cannot work."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        check_evaluation(cfg)
        self._cfg = cfg
        self._output_dir = Path(cfg.output_dir)

    def setup(self) -> None:
        """Reads the data as each model sees them, and checks the folders; loads no weights."""
        cfg = self._cfg
        self._world = init_world(cfg.device, **run.inputs_of_config(cfg))
        progress.begin_run()
        self._lock = run.lock_output_dir(self._output_dir, self._world)
        self._models = {role: EvalModel(role, cfg[role]) for role in cfg.roles}
        for model in self._models.values():
            fix_date(model.tokenizer, self._output_dir, self._world, cfg.candidate.checkpoint_dir)
        datasets = {}
        for role in ROLES:
            model = self._models[role]
            options = {"tokenizer": model.tokenizer, "max_seq_len": model.context, "keep_originals": True}
            datasets[role] = evaluated_part(config.instantiate(cfg.dataset, **options))
            model.check(cfg.sampling, datasets[role])
        if "judge" in self._models:
            self._models["judge"].check(cfg.judge.sampling)
        shared = set(shared_samples(*datasets.values()))
        dropped = sum(len(dataset) - len(shared) for dataset in datasets.values())
        if dropped:
            log.warning(f"{dropped} samples fit one of the two models only and are dropped.")
        self._originals = datasets["candidate"].originals
        self._prompts = {
            role: PromptDataset(each for each in read if each.sample_id in shared) for role, read in datasets.items()
        }
        for role, model in self._models.items():
            read = {f"dataset of {role}": self._prompts.get(role), f"tokenizer of {role}": model.tokenizer}
            run.check_files_agree(read, model.section, self._world, f" of {role}")
        self._right_answers: dict[str, str] = {}
        if cfg.verdict == "exact_match":
            originals = {sample_id: self._originals[sample_id] for sample_id in self._prompts["candidate"].sample_ids}
            section = cfg.exact_match
            self._right_answers = verdicts.right_answers(originals, section.column, section.reference_pattern)

    def evaluate(self) -> dict[str, Any]:
        """Generates the responses that are missing, has them judged, writes the results. Gives the content of
        ``summary.json``; a ``DataError`` if not one verdict of the judge can be read."""
        cfg, models = self._cfg, self._models
        # --- 1. Both models respond to every prompt ---
        responses = {}
        for role in ROLES:
            folder = self._output_dir / "responses" / models[role].name
            responses[role] = self._generate(models[role], self._prompts[role], cfg.sampling, folder)
        rows = [self._row(sample_id, responses) for sample_id in self._prompts["candidate"].sample_ids]
        # --- 2. Verdicts ---
        folder = self._output_dir / f"{models['candidate'].name}_vs_{models['baseline'].name}"
        if cfg.verdict == "judge":
            self._judge(rows, folder / "judgements")
        else:
            self._match(rows)
        # --- 3. Results ---
        summary = self._summary(rows)
        if self._world.is_main:
            with as_output_error(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_json_lines(folder / "rows.jsonl", rows)
            write_json(folder / "summary.json", summary)
            show(f"{verdicts.summary_table(summary)}\n\nrows and summary: {folder}")
        barrier(self._world)
        if summary["win_rate"] is None:
            example = json.dumps(next(row["judge_texts"][0] for row in rows if row["outcome"] is None))
            raise DataError(
                f"no verdict of the judge could be read by judge.pattern={cfg.judge.pattern!r}. It wrote, for example, "
                f"{example:.500}. Change judge.pattern or judge.template, raise judge.sampling.max_new_tokens, or take "
                "another judge."
            )
        return summary

    def cleanup(self) -> None:
        """Leaves the process group and unlocks the folder."""
        shutdown()
        if self._lock is not None:
            self._lock.release()

    # --- Responses ---

    def _generate(
        self, who: EvalModel, prompts: PromptDataset, section: Sampling, folder: Path
    ) -> dict[str, tuple[str, Response]]:
        """Text and response of one model to each sample. Those of an earlier run are used if nothing changed."""
        cfg, world = self._cfg, self._world
        sampling = sampling_params(section, who.tokenizer.eos_ids, who.unknown_ids)
        generator = None if who.has_weights else who.generator(None, world)  # it has the fingerprint
        fingerprint = {
            "opponent": broadcast_object(who.fingerprint(generator) if world.is_main else None, world),
            "prompts": prompts.fingerprint(),
            "tokenizer": who.tokenizer.fingerprint,
            "sampling": asdict(sampling),
            "seed": cfg.seed,
            "generator": who.section.generator.component,
            "compute_dtype": cfg.compute_dtype,
        }
        who.weights = fingerprint["opponent"]
        task = stage.PlayTask(prompts, range(len(prompts)), sampling, cfg.seed, limits=who.limits)
        num_shards = stage.num_shards(len(prompts), cfg.prompts_per_shard, world.world_size)
        store = open_store(folder, fingerprint, num_shards, world)
        missing = missing_shards(store, world)
        if missing:
            model = who.load(world, cfg.compute_dtype) if who.has_weights else None
            generator = generator or who.generator(model, world)
            group = engine_group(generator, world)
            with policy_loaded(generator, model) if model is not None else nullcontext():
                if model is not None:
                    layout = RowLayout(min(8192, who.context))
                    check_generator_logprobs(
                        generator, model, world, prompts, sampling, layout=layout, chunk_tokens=2048
                    )
                kept, total = stage.count_kept(task, store) if world.is_main else (0, 0)
                with progress.stage("generate", "response", total, kept, f"{who.name}: generate") as bar:
                    stage.play_shards(store, missing, task, generator, world, group, bar)
        if generator is not None:
            generator.close()
        model = generator = None
        gc.collect()  # sharded models refer to themselves; the next one needs the memory
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        seal(store, world, is_asked_to_stop=False)
        decode = who.tokenizer.decode
        found = ((pair.sample_id, pair.generated[0]) for pair in store.pairs())
        return {key: (decode(list(map(int, r.token_ids)), skip_special_tokens=True), r) for key, r in found}

    # --- Verdicts ---

    def _row(self, sample_id: str, responses: dict[str, dict[str, tuple[str, Response]]]) -> dict[str, Any]:
        messages = self._originals[sample_id].messages
        row: dict[str, Any] = {
            "sample_id": sample_id,
            "prompt": verdicts.conversation_text(messages[:-1]),
            "reference": verdicts.message_text(messages[-1]),
        }
        for role in ROLES:
            text, response = responses[role][sample_id]
            row |= {role: text, f"{role}_tokens": len(response.token_ids), f"{role}_finish": response.finish_reason}
        return row

    def _judge(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Adds the judge's texts, its verdicts and the outcome to each row; equal responses are a tie unasked."""
        cfg, judge = self._cfg.judge, self._models["judge"]
        prompts = PromptDataset(self._questions([row for row in rows if row["candidate"] != row["baseline"]]))
        texts = {}
        if len(prompts):
            judge.check(cfg.sampling, prompts)
            texts = self._generate(judge, prompts, cfg.sampling, folder)
        for row in rows:
            if row["candidate"] == row["baseline"]:
                row |= {"judge_texts": [], "verdicts": [], "outcome": "tie"}
                continue
            said = [texts[f"{row['sample_id']}#{first}"][0] for first in ROLES]
            found = [verdicts.read_verdict(text, cfg.pattern) for text in said]
            row |= {"judge_texts": said, "verdicts": found, "outcome": verdicts.outcome_of(*found)}

    def _questions(self, rows: Iterable[dict[str, Any]]) -> Iterable[Prompt]:
        """The judge's prompts: each pair of responses in both orders."""
        cfg, judge = self._cfg.judge, self._models["judge"]
        room = judge.context - cfg.sampling.max_new_tokens
        system = [] if cfg.system_prompt is None else [{"role": "system", "content": cfg.system_prompt}]
        for row in rows:
            for first, second in (ROLES, ROLES[::-1]):
                fields = {"prompt": row["prompt"], "reference": row["reference"]}
                text = verdicts.fill_template(cfg.template, first=row[first], second=row[second], **fields)
                ids = judge.tokenizer.encode_prompt([*system, {"role": "user", "content": text}])
                if len(ids) > room:
                    raise DataError(
                        f"sample {row['sample_id']!r}: the judge's prompt has {len(ids)} tokens, at most {room} leave "
                        f"room for its verdict (context {judge.context}, judge.sampling.max_new_tokens="
                        f"{cfg.sampling.max_new_tokens}). Lower dataset.max_prompt_tokens, sampling.max_new_tokens or "
                        "judge.sampling.max_new_tokens, or take a judge with a longer context."
                    )
                yield Prompt(f"{row['sample_id']}#{first}", ids, [])

    def _match(self, rows: list[dict[str, Any]]) -> None:
        """Adds the answer extracted from each response, whether it is right, and the outcome to each row."""
        for row in rows:
            row["right_answer"] = self._right_answers[row["sample_id"]]
            for role in ROLES:
                row[f"{role}_answer"] = verdicts.extract(row[role], self._cfg.exact_match.pattern)
                row[f"{role}_right"] = row[f"{role}_answer"] == row["right_answer"]
            row["outcome"] = verdicts.outcome_of_match(row["candidate_right"], row["baseline_right"])

    def _summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        cfg = self._cfg
        summary: dict[str, Any] = {}
        for role in ROLES:
            model = self._models[role]
            summary[role] = {
                "name": model.name,
                "checkpoint_dir": model.section.checkpoint_dir,
                "weights": model.weights,
                "mean_tokens": sum(row[f"{role}_tokens"] for row in rows) / len(rows),
                "truncated_fraction": sum(row[f"{role}_finish"] == "length" for row in rows) / len(rows),
            }
            if cfg.verdict == "exact_match":
                summary[role] |= verdicts.accuracy_summary([row[f"{role}_right"] for row in rows])
        summary |= {"verdict": cfg.verdict, **verdicts.win_summary([row["outcome"] for row in rows])}
        if cfg.verdict == "judge":
            found = [tuple(row["verdicts"]) for row in rows if row["verdicts"]]
            summary["judge"] = {
                "name": self._models["judge"].name,
                "weights": self._models["judge"].weights,
                "equal_responses": len(rows) - len(found),
                **verdicts.bias_summary(found),
            }
        return summary | {"sampling": config.plain(cfg.sampling), "seed": cfg.seed}


@config.parse(config.EvaluateConfig)
def recipe_main(cfg: EvaluateConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINEvaluate(cfg)
    recipe.setup()
    recipe.evaluate()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
