"""The checks of ``spin validate``: everything about a run that can be known before a weight is loaded."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spin import config
from spin.checkpoint import SPINCheckpointer
from spin.config.checks import doubtful
from spin.config.schema import Checker, EvaluatedModel, Sampling
from spin.core.errors import CheckpointError, ConfigError, DataError, SpinError
from spin.core.files import check_can_be_made
from spin.core.terminal import counted, first_lines, plural
from spin.data import ChatTokenizer, PromptDataset, PromptSource, PromptTokenizer, adapt_tokenizer
from spin.data.dataset import check_is_dataset, evaluated_part
from spin.data.dates import known_date
from spin.data.messages import ChatMessage
from spin.data.read import check_fits_model, row_parser, unknown_ids
from spin.data.samples import unlogged
from spin.data.sources import read_rows
from spin.data.tokenizer import first_difference
from spin.evaluation import verdicts
from spin.evaluation.models import EvalModel, check_evaluation, shared_samples
from spin.generators import sampling_params, stage
from spin.model.adapters import adapted_modules
from spin.model.build import build_model
from spin.model.hf import check_hf_folder
from spin.model.lora import check_adapters, check_lora
from spin.run.plan import RunPlan
from spin.training.schedules import per_iteration
from spin.training.selftest import check_loss

COMPARED_ROWS = 200  # of the training set, whose token ids and texts are compared
_SHOWN = 20
_EMBEDDED = "the model has an embedding for every token of the data"
# What a template or a tokenizer may get wrong: white space at the ends, line breaks, code, other scripts, an emoji.
_PROBES = (
    "Hello, world!",
    "  two spaces, a tab\tand\n\nempty lines, at the end three \n",
    "def f(x):\n    return {'a': [1, 2.50, -3e-7]}  # 100 %",
    "Größe, 東京, Привет, שלום, नमस्ते 🎉",
)


def run_checks(cfg: Any, check: Callable[..., Any], with_logits: bool) -> None:
    """Makes every check of a complete config; ``check`` prints them (:class:`spin.cli.validate.Checks`)."""
    is_evaluation = isinstance(cfg, config.EvaluateConfig)
    with unlogged():  # what data sets warn of is printed below
        (_check_evaluation if is_evaluation else _check_training)(cfg, check, with_logits)


def _check_training(cfg: config.SPINConfig, check: Callable[..., Any], with_logits: bool) -> None:
    """The checks of a training config, in the order in which a run would meet the faults."""
    is_sft, only_generates = isinstance(cfg, config.SFTConfig), isinstance(cfg, config.GenerateConfig)
    checkpointer = check("checkpointer", partial(_checkpointer, cfg))
    if not only_generates:
        check("loss, optimizer", partial(_loss_and_optimizer, cfg))
    if cfg.pairs.checker is not None and not (is_sft or only_generates):
        check("checker", partial(_checker, cfg.pairs.checker))
    model = check("model", partial(_model, cfg))
    check("adapters", partial(_adapters, cfg), model=model)
    parameters = check("model folder", _folder, checkpointer=checkpointer, model=model)
    saved = () if only_generates else (checkpointer, parameters)
    check("output folder", partial(_output, cfg, *saved))
    if with_logits:
        check("logits", lambda made, _: _logits(cfg.model, made), checkpointer=checkpointer, model=model)
    tokenizer = check("tokenizer", partial(_tokenizer, cfg))
    check("round trip", _round_trip, tokenizer=tokenizer)
    context = None if model is None else model.max_seq_len
    prompts = check("data", partial(_data, cfg.dataset, context), tokenizer=tokenizer)
    validation = None
    if cfg.validation_dataset is not None and not only_generates:
        validation = check("validation data", partial(_data, cfg.validation_dataset, context), tokenizer=tokenizer)
    elif isinstance(prompts, PromptDataset) and prompts.held_out and not only_generates:
        validation = check("validation data", partial(_held_out, prompts.held_out))
    check("token ids", partial(_same_ids, cfg.dataset), tokenizer=tokenizer, data=prompts)
    sources = [source for source in (prompts, validation) if source is not None]
    check("vocabulary", partial(_vocabulary, cfg, sources), model=model, tokenizer=tokenizer)
    num_val = 0 if validation is None else validation.samples_per_iteration
    check("arithmetic", partial(_arithmetic, cfg, num_val), data=prompts)


def _check_evaluation(cfg: config.EvaluateConfig, check: Callable[..., Any], with_logits: bool) -> None:
    """The checks of a config of spin_evaluate, which has two or three models and does not train."""
    check("output folder", partial(_output, cfg))
    datasets: dict[str, PromptSource | None] = {}
    for role in cfg.roles:
        section = cfg[role]
        model = check(role, partial(_eval_model, role, section))
        if with_logits and section.checkpoint_dir is not None:
            check(f"{role} logits", partial(_logits, section.model, section))
        if role == "judge":  # whose prompts do not exist yet
            check("vocabulary", partial(_eval_vocabulary, cfg.judge.sampling), judge=model)
        else:
            data = datasets[f"{role} data"] = check(f"{role} data", partial(_eval_data, cfg), **{role: model})
            check("vocabulary", partial(_eval_vocabulary, cfg.sampling), **{role: model, "data": data})
    check("prompts of both", partial(_shared, cfg), **datasets)


# --- The checks: each returns its result and what to print, or raises a SpinError ---


def stage_of(cfg: config.Section) -> config.Section:
    """The config of what a recipe runs; a ConfigError if it refuses what a complete config asks for."""
    if isinstance(cfg, config.EvaluateConfig):
        check_evaluation(cfg)
    elif isinstance(cfg, config.SPINConfig):
        check_lora(cfg)
        return config.sft_stage(cfg) if isinstance(cfg, config.SFTConfig) else cfg
    return cfg


def _checkpointer(cfg: config.SPINConfig) -> tuple[SPINCheckpointer, str]:
    checkpointer: SPINCheckpointer = _built("checkpointer", lambda: config.instantiate(cfg.checkpointer))
    if (path := checkpointer.latest(cfg.resume)) is not None:
        return checkpointer, f"the run resumes from {path}"
    result = checkpointer.sft_result()
    return checkpointer, "a new run" if result is None else f"a new run, from the result of spin_sft, {result}"


def _loss_and_optimizer(cfg: config.SPINConfig) -> tuple[None, str]:
    """Builds them: a wrong argument would show hours later, when an iteration starts."""
    beta, lr = (per_iteration(value, 0, cfg.max_iterations) for value in (cfg.loss.beta, cfg.optimizer.lr))
    parameters = [torch.nn.Parameter(torch.zeros(8, 8))]
    loss = _built("loss", lambda: config.instantiate(cfg.loss, beta=beta))
    check_loss(loss, cfg.loss.component)
    optimizer = _built("optimizer", lambda: config.instantiate(cfg.optimizer, parameters, lr=lr))
    by_optimizer = f"{type(optimizer).__name__} with learning rate {cfg.optimizer.lr}"
    if isinstance(cfg, config.SFTConfig):  # which makes the loss of the run too, and does not use it
        return None, f"negative log-likelihood of the real responses, {by_optimizer}"
    doubts = doubtful(cfg)
    text = f"{type(loss).__name__} with beta {cfg.loss.beta}, {by_optimizer}"
    return None, "\n".join([text, *(f"warning: {doubt}" for doubt in doubts)])


def _checker(section: Checker) -> tuple[None, str]:
    weights = f"weight {section.right_weight:g} if right, 1 if wrong, {section.unknown_weight:g} if unknown"
    return None, f"{section.component} is there and takes what it is called with; responses have {weights}"


def _model(cfg: config.SPINConfig) -> tuple[torch.nn.Module, str]:
    model = _built("model", lambda: build_model(cfg.model, torch.float32))
    count = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = model.tok_embeddings.weight.shape[0]
    return model, f"{count:,} parameters, context {model.max_seq_len:,}, vocabulary {vocabulary:,}"


def _adapters(cfg: config.SPINConfig, model: torch.nn.Module) -> tuple[None, str]:
    adapters = f"{len(adapted_modules(model))} adapters" if check_adapters(cfg, model) else ""
    if isinstance(cfg, config.GenerateConfig):
        return None, adapters or "none"
    if adapters:
        return None, f"{adapters} are trained and saved; every other weight is frozen"
    return None, "none: every weight is trained and saved"


def _folder(checkpointer: SPINCheckpointer, model: torch.nn.Module) -> tuple[int, str]:
    check_hf_folder(model, checkpointer.checkpoint_dir, checkpointer.model_type)
    text = f"{checkpointer.checkpoint_dir} holds every weight in its shape, by the headers of its files"
    return checkpointer.check_source(), text


def _output(cfg: Any, checkpointer: SPINCheckpointer | None = None, parameters: int | None = None) -> tuple[None, str]:
    free = shutil.disk_usage(check_can_be_made(Path(cfg.output_dir))).free
    if checkpointer is not None and parameters is not None:
        checkpointer.check_space(parameters, cfg.max_iterations)
    return None, f"{cfg.output_dir} can be written, {free / 2**30:,.1f} GiB are free"


def _logits(section: config.Component, weights: Any) -> tuple[None, str]:
    from spin.model.logits_check import compare_logits

    report = compare_logits(section, weights.checkpoint_dir, weights.model_type)
    if report.is_fault:
        raise CheckpointError(str(report))
    return None, str(report)


def _tokenizer(cfg: config.SPINConfig) -> tuple[PromptTokenizer, str]:
    tokenizer = adapt_tokenizer(_built("tokenizer", lambda: config.instantiate(cfg.tokenizer)))
    if isinstance(tokenizer, ChatTokenizer) and tokenizer.reads_date:
        tokenizer.date = tokenizer.date or known_date(cfg.resume, cfg.output_dir)
    return tokenizer, f"{tokenizer.vocab_size:,} token ids; a response ends with {_stop_tokens(tokenizer)}"


def _stop_tokens(tokenizer: PromptTokenizer) -> str:
    return ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in tokenizer.eos_ids)


def _round_trip(tokenizer: PromptTokenizer) -> tuple[None, str]:
    asks_reasoning = isinstance(tokenizer, ChatTokenizer) and tokenizer.asks_reasoning
    reasoning = "<think>\nA greeting.\n</think>\n\n" if asks_reasoning else ""

    def turn(user: str, assistant: str) -> list[ChatMessage]:
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    found = ((text, compare_ids(tokenizer, turn(text, reasoning + text))) for text in _PROBES)
    faults = [f"{text!r}: {fault}" for text, fault in found if fault is not None]
    if faults:
        raise DataError("texts do not survive the chat template and the tokenizer:\n" + "\n".join(faults))
    taken = []
    system: list[ChatMessage] = [{"role": "system", "content": "Be brief."}]
    for label, earlier in (("system messages", system), ("several turns", turn("A", "B"))):
        try:
            tokenizer.encode_pair([*earlier, *turn("Hello", reasoning + "Hi")])
            taken.append(f"takes {label}")
        except DataError:
            taken.append(f"refuses {label}")
    return None, f"{len(_PROBES)} texts come back from their token ids; the template {' and '.join(taken)}"


def _data(
    section: config.Component, context: int | None, tokenizer: PromptTokenizer, **options: bool
) -> tuple[PromptSource, str]:
    read = partial(config.instantiate, section, tokenizer=tokenizer, max_seq_len=context, **options)
    data: PromptSource = _built("data set", read)
    check_is_dataset(data)
    prompts = data.window(0)
    report = prompts.report
    lines = [f"{counted(len(prompts), 'sample')} of {counted(report.rows, 'row')}"]
    if data is not prompts:
        lines[0] = f"a stream, of whose first {report.rows:,} rows iteration 0 takes {counted(len(prompts), 'sample')}"
    needed = data.samples_per_iteration
    chosen = (prompts.sample_ids[index] for index in data.iteration_samples(needed, 0, 0))
    counts = [f"{name} {count:,.0f}" for name, count in data.count_sources(chosen).items()]
    lines += [f"of {needed:,} that an iteration can take: {', '.join(counts)}"] if counts else []
    for what, lengths in (("prompts", prompts.prompt_lengths), ("real responses", prompts.real_lengths)):
        lines.append(f"{what}: {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
    lines += [f"dropped or truncated: {reason} {count:,}" for reason, count in report.counts.items()]
    lines += [f"  {example}" for example in report.examples[:3]]
    lines += [f"read with a change: {change} {count:,}" for change, count in report.changes.items()]
    lines += [f"not used: {', '.join(report.unused)}"] if report.unused else []
    return data, "\n".join(lines)


def _held_out(prompts: PromptSource) -> tuple[PromptSource, str]:
    return prompts, f"{counted(prompts.samples_per_iteration, 'sample')}, held out by dataset.validation_fraction"


def _same_ids(section: config.Component, tokenizer: PromptTokenizer, prompts: PromptSource) -> tuple[None, str]:
    compared = list(itertools.islice(_conversations(section), COMPARED_ROWS))
    found = ((where, compare_ids(tokenizer, messages)) for where, messages in compared)
    faults = [f"{where}: {fault}" for where, fault in found if fault is not None]
    first = f"the first {len(compared)} conversations"
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {first}:", *first_lines(faults, _SHOWN)]))
    if not compared:
        return None, "not compared: only the data sets of spin.data name their rows"
    return None, f"generation and training have the same prompts in {first}; texts read back"


def _vocabulary(
    cfg: config.SPINConfig, sources: Sequence[PromptSource], model: torch.nn.Module, tokenizer: PromptTokenizer
) -> tuple[None, str]:
    stop_ids = sampling_params(cfg.sampling, tokenizer.eos_ids).stop_token_ids
    check_fits_model(model, tokenizer, stop_ids, *sources)
    unknown = len(unknown_ids(model, tokenizer))
    text = _EMBEDDED + (f"; {unknown:,} of its ids have no token and are never sampled" if unknown else "")
    folder = cfg.checkpointer.get("checkpoint_dir")
    warning = tokenizer.foreign_tokens(folder) if folder and isinstance(tokenizer, ChatTokenizer) else None
    return None, f"{text}\nwarning: {warning}" if warning else text


def _arithmetic(cfg: config.SPINConfig, num_val_prompts: int, prompts: PromptSource) -> tuple[None, str]:
    plan = RunPlan(cfg, prompts, num_val_prompts)
    progress, iterations = plan.progress, range(cfg.max_iterations)
    played, steps = [len(plan.samples(i)) for i in iterations], [progress.steps_in_epoch(i) for i in iterations]
    samples, size = prompts.samples_per_iteration, cfg.global_batch_size
    searched = (range(size - 1, size // 2, -1), range(size + 1, 2 * size)) if 0 < samples - played[0] < size else ()
    nearest = [str(each) for sizes in searched for each in [each for each in sizes if samples % each == 0][:1]]
    even = f"; none with global_batch_size={' or '.join(nearest)}" if nearest else ""
    every = [
        f"{what} every {counted(interval, 'step')}" if interval else f"no {what} within an iteration"
        for what, interval in (("validation", plan.val_every), ("checkpoint", plan.save_every))
    ]
    total, epochs = counted(progress.total_steps, "step"), counted(cfg.max_epochs, "epoch")
    left = f"({samples - played[0]} left over{even})"
    in_iteration = f"{_numbers(played)} {plural('prompt', max(played))} in an iteration {left}"
    counts = [stage.num_shards(count, cfg.pairs.prompts_per_shard, 1) for count in played]
    in_iteration += f", in {_numbers(counts)} {plural('shard', max(counts))} (more with several engines)"
    if isinstance(cfg, config.GenerateConfig):
        worker = f"; this is worker {cfg.worker}, from 0, of {cfg.num_workers}" if cfg.num_workers > 1 else ""
        return None, in_iteration + worker
    in_epoch = f"{_numbers(steps)} {plural('step', max(steps))} of"
    last = f"{'; '.join(every)}; {counted(plan.num_val_samples, 'validation sample')}"
    if isinstance(cfg, config.SFTConfig):
        lines = [f"{total}: {epochs} x {in_epoch} {counted(size, 'real response')}", f"{played[0]} in an epoch {left}"]
    else:
        iterations_of = counted(cfg.max_iterations, "iteration")
        lines = [f"{total}: {iterations_of} x {epochs} x {in_epoch} {counted(size, 'prompt')}", in_iteration]
    return None, "\n".join([*lines, last])


def _numbers(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def _eval_model(role: str, section: EvaluatedModel) -> tuple[EvalModel, str]:
    model = _built(role, lambda: EvalModel(role, section))
    source = section.checkpoint_dir if model.has_weights else section.generator[config.COMPONENT]
    stops = _stop_tokens(model.tokenizer)
    return model, f"{model.name}, from {source}: every weight in its shape; a response ends with {stops}"


def _eval_data(cfg: config.EvaluateConfig, model: EvalModel) -> tuple[PromptSource, str]:
    data, text = _data(cfg.dataset, model.context, model.tokenizer, keep_originals=True)
    part = evaluated_part(data)
    return part, text if part is data else f"{text}\nof these {_held_out(part)[1]}"


def _eval_vocabulary(sampling: Sampling, model: EvalModel, *prompts: PromptSource) -> tuple[None, str]:
    model.check(sampling, *prompts)
    return None, _EMBEDDED


def _shared(cfg: config.EvaluateConfig, candidate: PromptDataset, baseline: PromptDataset) -> tuple[None, str]:
    originals = {sample_id: candidate.originals[sample_id] for sample_id in shared_samples(candidate, baseline)}
    text = f"{counted(len(originals), 'sample')} fit both models"
    if cfg.verdict == "judge":
        return None, text
    verdicts.right_answers(originals, cfg.exact_match.column, cfg.exact_match.reference_pattern)
    return None, f"{text} and have a right answer"


def _built(section: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except SpinError:
        raise
    except (AssertionError, KeyError, OSError, RuntimeError) as error:  # config.instantiate reports the others
        raise ConfigError(f"{section}: cannot be built: {type(error).__name__}: {error}") from error


# --- Token ids in generation and in training ---


def compare_ids(tokenizer: PromptTokenizer, messages: Sequence[ChatMessage]) -> str | None:
    """What differs between the prompt in training and in generation, or between the real response and what its token
    ids decode to; None if nothing does."""
    try:
        asked = tokenizer.encode_prompt(messages[:-1])
        trained, response = tokenizer.encode_pair(messages)
    except DataError as error:
        return str(error)
    if asked != trained:
        at = first_difference(asked, trained)
        return (
            f"the prompt's token ids differ from position {at} on: {len(asked)} in generation "
            f"({asked[at : at + 5]}...), {len(trained)} in training ({trained[at : at + 5]}...)."
        )
    if response[-1] not in tokenizer.eos_ids:
        return f"the response ends with token {response[-1]}, expected one of {tokenizer.eos_ids}."
    if messages[-1].get("tool_calls") or messages[-1].get("reasoning_content"):  # whose text is the template's
        return None
    # around reasoning templates set white space of their own
    found, expected = (
        text.rpartition("</think>")[2].strip() for text in (tokenizer.decode(response[:-1]), messages[-1]["content"])
    )
    if found != expected:
        at = first_difference(found, expected)
        return (
            f"from character {at} on the response decodes to {found[at : at + 40]!r}, "
            f"expected {expected[at : at + 40]!r}."
        )
    return None


def _conversations(section: config.Component) -> Iterator[tuple[str, list[ChatMessage]]]:
    """Place and messages of each conversation that can be read; the data check reports the others."""
    component = section[config.COMPONENT].rpartition(".")[2]
    if component == "prompt_dataset":
        yield from _conversations_of(section, config.plain(section))
    elif component == "mixed_prompt_dataset":
        for name, part in section.sources.items():
            for where, messages in _conversations_of(section, {**(section.get("common") or {}), **part}):
                yield f"{name}: {where}", messages


def _conversations_of(section: config.Component, options: Mapping[str, Any]) -> Iterator[tuple[str, list[ChatMessage]]]:
    node = config.nested(section, options.get("message_transform"), "message_transform")
    conversations_of = row_parser(options, config.instantiate(node))
    where = {key: options.get(key) for key in ("split", "name", "data_dir", "revision")}
    try:
        for row in read_rows(options["source"], streaming=options.get("streaming", False), **where):
            yield from ((each.where, each.messages) for each in conversations_of(row) if each.fault is None)
    except DataError:
        return
