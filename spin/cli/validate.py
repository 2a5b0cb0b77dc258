"""``python -m spin validate``: everything about a run that can be known before a weight is loaded."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig

from spin import config
from spin.config.catalog import load_recipe, recipe_of
from spin.config.checks import check_run
from spin.core.errors import CheckpointError, ConfigError, DataError, SpinError
from spin.core.terminal import printable
from spin.data import ChatTokenizer, PromptDataset, PromptSource, PromptTokenizer, adapt_tokenizer
from spin.data.dataset import check_is_dataset
from spin.data.dates import known_date
from spin.data.messages import ChatMessage, row_to_messages, split_turns
from spin.data.read import check_vocabulary, unknown_ids
from spin.data.sources import read_rows
from spin.evaluation.models import EvalModel, check_evaluation, eval_model_roles
from spin.generators import sampling_params
from spin.generators import stage as selfplay
from spin.model.build import build_model
from spin.model.hf import check_hf_folder
from spin.model.lora import check_lora
from spin.run.plan import RunPlan
from spin.training.schedules import per_iteration

COMPARED_ROWS = 200  # of the training set, whose token ids and texts are compared
_SHOWN = 20
# What a template or a tokenizer may get wrong: white space at the ends, line breaks, code, other scripts, an emoji.
_PROBES = (
    "Hello, world!",
    "  two spaces, a tab\tand\n\nempty lines, at the end three \n",
    "def f(x):\n    return {'a': [1, 2.50, -3e-7]}  # 100 %",
    "Größe, 東京, Привет, שלום, नमस्ते 🎉",
)


def main(argv: Sequence[str]) -> int:
    """Checks a config, its model folder, its tokenizer, its data and its arithmetic; loads no weights."""
    parser = argparse.ArgumentParser(
        prog="python -m spin validate",
        usage="%(prog)s CONFIG [key=value ...] [~key ...] [--recipe NAME_OR_FILE] [--logits]",
        description="Check a config, its data and its arithmetic. Loads no weights and writes nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a YAML file, or a packaged config such as llama3_2/1B_full")
    parser.add_argument("--recipe", help="the recipe whose config it is; default: the one that its header launches")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="build the folder's architecture in transformers, with few layers and random weights, and compare logits",
    )
    arguments, overrides = config.parse_overrides(parser, argv)
    log = logging.getLogger("spin.data.samples")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of is printed below
    try:
        return Validation(arguments.config, overrides, arguments.recipe, arguments.logits).run()
    finally:
        log.setLevel(level)


class Validation:
    """The checks of a config, in the order in which a run would meet the faults."""

    def __init__(
        self, name: str, overrides: Sequence[str] = (), recipe: str | None = None, logits: bool = False
    ) -> None:
        self._name, self._overrides, self._recipe, self._with_logits = name, overrides, recipe, logits
        self._faults = 0

    def run(self) -> int:
        """Runs all checks; one that needs what another one could not give is passed over, and said to be."""
        cfg = self._check("config", self._complete)
        if cfg is None:
            return self._conclude()
        if "candidate" in cfg:
            return self._run_evaluation(cfg)
        self._check("loss, optimizer", lambda: self._parts(cfg))
        model = self._check("model", lambda: self._model(cfg))
        self._check("model folder", lambda: self._folder(cfg, model), needs={"model": model})
        if self._with_logits:
            folder, kind = cfg.checkpointer.checkpoint_dir, cfg.checkpointer.model_type
            self._check("logits", lambda: self._logits(cfg.model, folder, kind), {"model": model})
        tokenizer = self._check("tokenizer", lambda: self._tokenizer(cfg))
        needs = {"tokenizer": tokenizer}
        self._check("round trip", lambda: self._round_trip(tokenizer), needs)
        context = None if model is None else model.max_seq_len
        prompts = self._check("data", lambda: self._data(cfg.dataset, tokenizer, context), needs)
        val_prompts = PromptDataset()
        if cfg.validation_dataset is not None:
            val_prompts = self._check(
                "validation data", lambda: self._data(cfg.validation_dataset, tokenizer, context), needs
            )
        self._check("token ids", lambda: self._parity(cfg.dataset, tokenizer), needs)
        found = [each for each in (prompts, val_prompts) if each is not None]
        self._check("vocabulary", lambda: self._vocabulary(cfg, model, tokenizer, found), {"model": model, **needs})
        num_val = 0 if val_prompts is None else val_prompts.samples_per_iteration
        self._check("arithmetic", lambda: (None, "\n".join(plan_lines(cfg, prompts, num_val))), {"data": prompts})
        return self._conclude()

    def _run_evaluation(self, cfg: DictConfig) -> int:
        """The checks of a config of spin_evaluate, which has two or three models and does not train."""
        for role in eval_model_roles(cfg):
            model = self._check(role, partial(self._eval_model, role, cfg[role]))
            section = cfg[role]
            if self._with_logits and section.checkpoint_dir is not None:
                shape = partial(self._logits, section.model, section.checkpoint_dir, section.model_type)
                self._check(f"{role} logits", shape)
            if role == "judge":
                continue  # its prompts do not exist yet
            prompts = self._check(f"{role} data", partial(self._eval_data, cfg, model), {role: model})
            needs = {role: model, "data": prompts}
            self._check("vocabulary", partial(self._eval_vocabulary, model, prompts), needs)
        return self._conclude()

    def _eval_model(self, role: str, section: DictConfig) -> tuple[EvalModel, str]:
        model = _built(role, lambda: EvalModel(role, section))
        stops = ", ".join(f"{token} {model.tokenizer.decode([token])!r}" for token in model.tokenizer.eos_ids)
        source = section.checkpoint_dir if model.has_weights else section.generator[config.COMPONENT]
        return model, f"{model.name}, from {source}: every weight in its shape; an answer ends with {stops}"

    def _eval_data(self, cfg: DictConfig, model: EvalModel) -> tuple[PromptSource, str]:
        return self._data(cfg.dataset, model.tokenizer, model.context, keep_originals=True)

    def _eval_vocabulary(self, model: EvalModel, prompts: PromptSource) -> tuple[None, str]:
        model.check(prompts)
        return None, "the model has an embedding for every token of the data"

    def _check(
        self, label: str, check: Callable[[], tuple[Any, str]], needs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        missing = [name for name, result in needs.items() if result is None]
        if missing:
            print(f"{label:<16} {'-':<6} not checked, for want of the {' and '.join(missing)}", flush=True)
            return None
        try:
            result, text = check()
            verdict = "ok"
        except SpinError as error:
            result, text, verdict = None, str(error), "FAULT"
            self._faults += 1
        head, *rest = printable(text).split("\n")
        print(f"{label:<16} {verdict:<6} {head}", *(f"{'':<23} {line}" for line in rest), sep="\n", flush=True)
        return result

    def _conclude(self) -> int:
        if self._faults:
            print(f"error: {self._faults} {'check' if self._faults == 1 else 'checks'} failed.", file=sys.stderr)
        return 1 if self._faults else 0

    def _complete(self) -> tuple[DictConfig, str]:
        name = self._recipe or recipe_of(config.find_config(self._name))
        recipe = load_recipe(name)
        cfg = config.complete(config.load_config(self._name, self._overrides), recipe.DEFAULTS)
        text = f"{self._name} for {name}: every key is known, and their values go together"
        if "candidate" in cfg:  # of spin_evaluate
            check_evaluation(cfg)
            return cfg, text
        check_run(cfg)
        if "base_dtype" in cfg:  # of the LoRA recipe
            check_lora(cfg)
        if cfg.output_dir is None:
            raise ConfigError("output_dir: not set. Give the folder that the run writes to.")
        return cfg, text

    def _parts(self, cfg: DictConfig) -> tuple[None, str]:
        """Builds what costs nothing to build: a wrong argument would show hours later, when an iteration starts."""
        beta = per_iteration(config.plain(cfg.loss.beta), 0, cfg.max_iterations)
        loss = _built("loss", lambda: config.instantiate(cfg.loss, beta=beta))
        lr = per_iteration(config.plain(cfg.optimizer.lr), 0, cfg.max_iterations)
        parameter = torch.nn.Parameter(torch.zeros(8, 8))
        optimizer = _built("optimizer", lambda: config.instantiate(cfg.optimizer, [parameter], lr=lr))
        return None, f"{type(loss).__name__} with beta {config.plain(cfg.loss.beta)}, {type(optimizer).__name__}"

    def _model(self, cfg: DictConfig) -> tuple[torch.nn.Module, str]:
        model = _built("model", lambda: build_model(cfg.model, torch.float32))
        count = sum(parameter.numel() for parameter in model.parameters())
        vocabulary = model.tok_embeddings.weight.shape[0]
        return model, f"{count:,} parameters, context {model.max_seq_len:,}, vocabulary {vocabulary:,}"

    def _folder(self, cfg: DictConfig, model: torch.nn.Module) -> tuple[None, str]:
        check_hf_folder(model, cfg.checkpointer.checkpoint_dir, cfg.checkpointer.model_type)
        return None, f"{cfg.checkpointer.checkpoint_dir} holds every weight in its shape, by the headers of its files"

    def _logits(self, section: DictConfig, folder: str, model_type: str) -> tuple[None, str]:
        from spin.model.logits_check import compare_logits

        report = compare_logits(section, folder, model_type)
        if report.is_fault:
            raise CheckpointError(str(report))
        return None, str(report)

    def _tokenizer(self, cfg: DictConfig) -> tuple[PromptTokenizer, str]:
        tokenizer = adapt_tokenizer(_built("tokenizer", lambda: config.instantiate(cfg.tokenizer)))
        if isinstance(tokenizer, ChatTokenizer) and tokenizer.reads_date:
            tokenizer.date = tokenizer.date or known_date(cfg.resume, cfg.output_dir)
        stops = ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in tokenizer.eos_ids)
        return tokenizer, f"{tokenizer.vocab_size:,} token ids; an answer ends with {stops}"

    def _round_trip(self, tokenizer: PromptTokenizer) -> tuple[None, str]:
        faults, others = [], []
        asks_reasoning = isinstance(tokenizer, ChatTokenizer) and tokenizer.asks_reasoning
        reasoning = "<think>\nA greeting.\n</think>\n\n" if asks_reasoning else ""
        for text in _PROBES:
            messages: list[ChatMessage] = [
                {"role": "user", "content": text},
                {"role": "assistant", "content": reasoning + text},
            ]
            fault = compare_ids(tokenizer, messages)
            if fault is not None:
                faults.append(f"{text!r}: {fault}")
        for label, messages in (
            ("system messages", [{"role": "system", "content": "Be brief."}]),
            ("several turns", [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]),
        ):
            probe = [
                *messages,
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": reasoning + "Hi"},
            ]
            try:
                tokenizer.encode_pair(probe)
                others.append(f"takes {label}")
            except DataError:
                others.append(f"refuses {label}")
        if faults:
            raise DataError("texts do not survive the chat template and the tokenizer:\n" + "\n".join(faults))
        return None, f"{len(_PROBES)} texts come back from their token ids; the template {' and '.join(others)}"

    def _data(
        self, section: DictConfig, tokenizer: PromptTokenizer, context: int | None, **options: bool
    ) -> tuple[PromptSource, str]:
        read = partial(config.instantiate, section, tokenizer=tokenizer, max_seq_len=context, **options)
        data: PromptSource = _built("data set", read)
        check_is_dataset(data)
        prompts = data.window(0)
        report = prompts.report
        lines = [f"{len(prompts):,} samples of {report.rows:,} rows"]
        if data is not prompts:
            lines[0] = f"a stream, of whose first {report.rows:,} rows iteration 0 plays {len(prompts):,} samples"
        needed = data.samples_per_iteration
        chosen = (prompts.sample_ids[index] for index in data.iteration_samples(needed, 0, 0))
        shares = [f"{name} {count:,.0f}" for name, count in data.count_sources(chosen).items()]
        lines += [f"of {needed:,} that an iteration can play: {', '.join(shares)}"] if shares else []
        for what, lengths in (("prompts", prompts.prompt_lengths), ("real responses", prompts.real_lengths)):
            lines.append(f"{what}: {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
        lines += [f"left out or truncated: {reason} {count:,}" for reason, count in report.counts.items()]
        lines += [f"  {example}" for example in report.examples[:3]]
        lines += [f"read with a change: {change} {count:,}" for change, count in report.changes.items()]
        lines += [f"not used: {', '.join(report.unused)}"] if report.unused else []
        return data, "\n".join(lines)

    def _parity(self, section: DictConfig, tokenizer: PromptTokenizer) -> tuple[None, str]:
        compared, faults = 0, []
        for where, messages in itertools.islice(conversations(section), COMPARED_ROWS):
            compared += 1
            fault = compare_ids(tokenizer, messages)
            if fault is not None:
                faults.append(f"{where}: {fault}")
        if faults:
            more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            raise DataError(
                f"{len(faults)} of the first {compared} conversations:\n" + "\n".join([*faults[:_SHOWN], *more])
            )
        if not compared:
            return None, "not compared: only the data sets of spin.data name their rows"
        return None, f"what is asked is what is trained on, in the first {compared} conversations; answers read back"

    def _vocabulary(
        self, cfg: DictConfig, model: torch.nn.Module, tokenizer: PromptTokenizer, datasets: list[Any]
    ) -> tuple[None, str]:
        stop_ids = sampling_params(cfg.sampling, tokenizer.eos_ids).stop_token_ids
        check_vocabulary(model, tokenizer, stop_ids, *datasets)
        text, unknown = "the model has an embedding for every token of the data", len(unknown_ids(model, tokenizer))
        return None, text + (f"; {unknown:,} of its ids have no token and are never sampled" if unknown else "")


def compare_ids(tokenizer: PromptTokenizer, messages: Sequence[ChatMessage]) -> str | None:
    """Whether training sees the prompt that generation is given, and whether the answer survives tokenization."""
    try:
        asked = tokenizer.encode_prompt(messages[:-1])
        trained, answer = tokenizer.encode_pair(messages)
    except DataError as error:
        return str(error)
    if asked != trained:
        at = _first_difference(asked, trained)
        return (
            f"the prompt's token ids differ from position {at} on: {len(asked)} in generation "
            f"({asked[at : at + 5]}...), {len(trained)} in training ({trained[at : at + 5]}...)."
        )
    if answer[-1] not in tokenizer.eos_ids:
        return f"the answer ends with token {answer[-1]}, expected one of {tokenizer.eos_ids}."
    if messages[-1].get("tool_calls") or messages[-1].get("reasoning_content"):  # whose text is the template's
        return None
    # around reasoning templates set white space of their own
    found, expected = (
        text.rpartition("</think>")[2].strip() for text in (tokenizer.decode(answer[:-1]), messages[-1]["content"])
    )
    if found != expected:
        at = _first_difference(found, expected)
        back, text = found[at : at + 40], expected[at : at + 40]
        return f"from character {at} on the answer reads back as {back!r}, expected {text!r}."
    return None


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def conversations(section: DictConfig) -> Iterator[tuple[str, list[ChatMessage]]]:
    """The conversations of a data set that can be read; what is wrong with others the data check says."""
    component = section[config.COMPONENT].rpartition(".")[2]
    if component == "prompt_dataset":
        yield from _conversations_of(config.plain(section), config.instantiate(section.get("message_transform")))
    elif component == "mixed_prompt_dataset":
        common = section.get("common") or {}
        for name, part in section.sources.items():
            transform = config.instantiate(part.get("message_transform", common.get("message_transform")))
            for where, messages in _conversations_of({**config.plain(common), **config.plain(part)}, transform):
                yield f"{name}: {where}", messages


def _conversations_of(options: Mapping[str, Any], transform: Any) -> Iterator[tuple[str, list[ChatMessage]]]:
    try:
        rows = read_rows(
            options["source"],
            streaming=options.get("streaming", False),
            **{key: options.get(key) for key in ("split", "name", "data_dir", "revision")},
        )
        for row in rows:
            try:
                messages = row_to_messages(
                    row.data,
                    row_format=options.get("format", "auto"),
                    column_map=options.get("column_map"),
                    message_transform=transform,
                    system_prompt=options.get("system_prompt"),
                    from_arrow=row.from_arrow,
                )
            except DataError:
                continue
            for mark, part in split_turns(messages, options.get("turns", "last")):
                yield row.where + mark, part
    except DataError:
        return


def plan_lines(cfg: DictConfig, prompts: PromptSource, num_val_prompts: int) -> list[str]:
    """Steps, iterations, intervals and shards of a run, in words."""
    plan = RunPlan(cfg, prompts, num_val_prompts)
    progress, iterations = plan.progress, range(cfg.max_iterations)
    per_epoch = [progress.steps_in_epoch(i) for i in iterations]
    played = [len(plan.samples(i)) for i in iterations]
    shards = [selfplay.num_shards(count, cfg.pairs.prompts_per_shard, teams=1) for count in played]
    every = [
        f"{what} every {interval} steps" if interval else f"no {what} within an iteration"
        for what, interval in (("validation", plan.val_every), ("state", plan.save_every))
    ]
    left_over = prompts.samples_per_iteration - played[0]
    return [
        f"{progress.total_steps} steps: {cfg.max_iterations} iterations x {cfg.max_epochs} epochs x "
        f"{_numbers(per_epoch)} steps of {cfg.global_batch_size} prompts",
        f"{_numbers(played)} prompts answered in an iteration ({left_over} left over), in "
        f"{_numbers(shards)} shards (more with several engines)",
        f"{'; '.join(every)}; {plan.num_val_samples} validation samples",
    ]


def _numbers(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def _built(section: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except SpinError:
        raise
    except (AssertionError, KeyError, OSError, RuntimeError) as error:  # the others config.instantiate tells
        raise ConfigError(f"{section}: cannot be built: {type(error).__name__}: {error}") from error
