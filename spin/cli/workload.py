"""What an iteration works on: how many prompts, and pairs of how many tokens.

Counted in the data where they are on this machine; else as many prompts as the config's limits let through, and the
pairs that rates were measured with.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from spin.cli.timing import MEASURED_PAIR, PairTokens
from spin.config import SPINConfig, component_of, instantiate, plain
from spin.config.schema import Component
from spin.core.errors import ConfigError, DataError, SpinError
from spin.core.terminal import counted
from spin.data.dataset import PromptSource
from spin.data.lengths import LengthTokenizer
from spin.data.mixture import check_sources, mixed_prompt_dataset, samples_without_copies
from spin.data.read import prompt_dataset
from spin.data.samples import unlogged
from spin.data.sources import label_of, missing
from spin.data.survey import MOST_ENCODED
from spin.data.torchtune_tokenizer import adapt_tokenizer
from spin.run.progress import compute_num_steps_per_epoch

_ASSUMED_PROMPTS = 1000
_SLICE = re.compile(r"[\w.]+\[(\d*):(\d+)\]")  # of a split, in rows
# What a run would refuse does not end an estimate; spin validate names it.
_LENIENT = {"on_bad_row": "skip", "on_long_prompt": "cut", "on_long_response": "cut"}


@dataclass(frozen=True)
class Workload:
    """Of an iteration."""

    prompts: int
    pair: PairTokens | None  # mean of the data; None: not read
    note: str  # where both come from, in lines


def workload(cfg: SPINConfig, context: int, prompts: int | None = None, pair_tokens: int | None = None) -> Workload:
    """What an iteration works on, by the data that the config names if they are here.

    Args:
        cfg (SPINConfig): of training.
        context (int): of the model, in tokens.
        prompts (int | None): as the user names them; of the data only the beginning is read, for lengths.
        pair_tokens (int | None): as the user names them; the data are read for the number of samples alone.

    Returns:
        Workload: with what is assumed of data that are not here, or cannot be read.

    Raises:
        ConfigError: If an option of the data cannot work, or the samples are no step.
    """
    most = most_prompts(cfg, prompts)
    number, note, found, reason = most or _ASSUMED_PROMPTS, "", None, ""
    if prompts is None or pair_tokens is None:
        try:
            found = _read(cfg, context, prompts is not None, pair_tokens is None)
            note, reason = f"{found}\n", found.without_lengths
        except DataError as error:
            reason = _in_a_line(error)
    assumed = []
    if prompts is None and found is not None:
        number = _in_batches(cfg, found.samples, f"{found.count} (--prompts N counts others)")
    elif prompts is None:
        by_limits = ", as many as the config's limits let through" if most else ""
        assumed.append(f"{counted(number, 'prompt')}{by_limits} (or --prompts N)")
    if pair_tokens is None and (found is None or found.pair is None):
        assumed.append(f"pairs of {mean_pair(cfg, context).total:,} tokens (or --pair-tokens N)")
    if assumed:
        note += f"{reason.rstrip('.')}. Assumed: {' and '.join(assumed)}\n"
    return Workload(number, None if found is None else found.pair, note)


def _in_a_line(error: SpinError) -> str:
    return textwrap.shorten(" ".join(str(error).split("\n")[:2]), 300, placeholder=" [...]")


# --- By the data ---


@dataclass(frozen=True)
class _Data:
    """What was read of a data set."""

    samples: int  # that an iteration can play
    pair: PairTokens | None  # mean; None: no tokenizer
    count: str  # of what, in words
    lengths: str
    without_lengths: str  # why there is no tokenizer

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.count, self.lengths]))


def _read(cfg: SPINConfig, context: int, only_lengths: bool, with_lengths: bool) -> _Data:
    """Reads the data as a run does, but encodes a part of many; a ``DataError`` if they are not here or of no use."""
    sources = _sources(cfg)
    if component_of(cfg.dataset) not in (prompt_dataset, mixed_prompt_dataset):
        raise DataError(f"{cfg.dataset.component} is not read")
    if absent := [location for options in sources.values() for location in missing(options["source"])]:
        raise DataError(f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not here")
    tokenizer, without_lengths = None, ""
    if with_lengths:
        try:
            tokenizer = adapt_tokenizer(instantiate(cfg.tokenizer))
        except SpinError as error:
            without_lengths = _in_a_line(error)

    lengths = LengthTokenizer(tokenizer)
    with unlogged():
        data: PromptSource = instantiate(_lenient(cfg, sources, only_lengths), tokenizer=lengths, max_seq_len=context)
        window = data.window(0)
    samples, report = data.samples_per_iteration, window.report
    rows = f"the first {counted(report.rows, 'row')}"
    if not only_lengths:
        rows = f"{counted(samples, 'sample')} for an iteration, of {counted(report.rows, 'row')}"
    count = f"{', '.join(label_of(options['source']) for options in sources.values())}: {rows}"
    if report.counts:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in report.counts.items())
        count += f"; left out or truncated: {reasons} (spin validate says which)"
    if tokenizer is None:
        return _Data(samples, None, count, "", without_lengths)
    played, longest = data.iteration_samples(samples, 0, 0), cfg.sampling.max_new_tokens
    answers = cfg.pairs.responses_per_prompt
    pair = pair_of(window.prompt_lengths[played], window.real_lengths[played], longest, answers)
    of = f" of {counted(lengths.encoded, 'sample')}" if lengths.is_sampled else ""
    mean = (
        f"on average{of} a prompt has {pair.prompt:.0f} tokens and a real response {pair.real:.0f}; a generated one is "
        f"taken to have as many, up to {longest}"
    )
    return _Data(samples, pair, count, mean, "")


def _lenient(cfg: SPINConfig, sources: dict[str, dict[str, Any]], only_lengths: bool) -> Component:
    """The data set with the samples that a run would refuse left out or truncated, and only the first of each source if
    lengths alone are asked for."""
    changes: dict[str, dict[str, Any]] = {}
    for name, options in sources.items():
        changes[name] = {key: way for key, way in _LENIENT.items() if options.get(key, "error") == "error"}
        if only_lengths:
            changes[name]["limit"] = min(options.get("limit") or MOST_ENCODED, MOST_ENCODED)
    if component_of(cfg.dataset) is prompt_dataset:
        return cfg.dataset.model_copy(update=changes[""])
    parts = {name: options | changes[name] for name, options in sources.items()}
    return cfg.dataset.model_copy(update={"common": {}, "sources": parts})


def pair_of(prompt_lengths: np.ndarray, real_lengths: np.ndarray, max_new_tokens: int, responses: int) -> PairTokens:
    """The mean pair of samples, with lengths of shape (n,). A generated response is about as long as the real one, if
    it may be."""
    generated = responses * np.minimum(real_lengths, max_new_tokens)
    return PairTokens(*(float(lengths.mean()) for lengths in (prompt_lengths, real_lengths, generated)))


# --- By the config's limits ---


def data_limit(cfg: SPINConfig, key: str) -> Any:
    """A limit of the tokens of the data set's samples, in a mixture the largest; None if a source has none."""
    limits: list[Any] = [part.get(key) for part in _sources(cfg).values()]
    return None if None in limits else max(limits)


def _sources(cfg: SPINConfig) -> dict[str, dict[str, Any]]:
    """The options of each source of the data set, by its name in a mixture."""
    options = plain(cfg.dataset)
    if component_of(cfg.dataset) is not mixed_prompt_dataset:
        return {"": options}
    sources, common = options["sources"], options.get("common") or {}
    check_sources(sources, common, options.get("samples"))
    return {name: {**common, **each} for name, each in sources.items()}


def most_prompts(cfg: SPINConfig, prompts: int | None = None) -> int | None:
    """Prompts of an iteration: as many as the limits of the data and ``limit_train_batches`` leave, in whole batches,
    or ``prompts`` if these are fewer. None if neither is known. How many samples ``validation_fraction`` holds out is
    known on average."""
    if prompts is not None and prompts < 1:
        raise ConfigError(f"prompts={prompts}: expected those of an iteration, 1 or more.")
    size, limit, parts = cfg.global_batch_size, cfg.limit_train_batches, _sources(cfg)
    samples = trained = cfg.dataset.get("samples")
    read = {name: n for name, part in parts.items() if (n := _most_samples(part)) is not None}
    if samples is None and len(read) == len(parts):
        weights = {name: part["weight"] for name, part in parts.items() if "weight" in part}
        held_out = {name: round(n * (parts[name].get("validation_fraction") or 0.0)) for name, n in read.items()}
        samples = samples_without_copies(read, weights)
        trained = samples_without_copies({name: n - held_out[name] for name, n in read.items()}, weights)
    if samples is None and (limit == 0 or (isinstance(limit, int) and limit > 0)):
        samples = trained = int(limit) * size
    if samples is None:
        return prompts
    _in_batches(cfg, samples, f"The config's limits leave {counted(samples, 'sample')} at most")
    most = max(1, compute_num_steps_per_epoch(trained, size, limit)) * size
    return most if prompts is None else min(prompts, most)


def _in_batches(cfg: SPINConfig, samples: int, found: str) -> int:
    """Of so many samples, those that an epoch trains on; a ConfigError that begins with ``found`` if they are none."""
    size, limit = cfg.global_batch_size, cfg.limit_train_batches
    steps = compute_num_steps_per_epoch(samples, size, limit)
    if not steps:
        raise ConfigError(
            f"global_batch_size={size}: an epoch has no step, so nothing would be trained. {found}, and "
            f"limit_train_batches is {limit}. Lower the batch size, raise the limit or add data."
        )
    return steps * size


def _most_samples(part: dict[str, Any]) -> int | None:
    """Of a source, by its limit and by the rows that its split takes, as ``train[:1000]``; None if neither says."""
    slices = [_SLICE.fullmatch(each.strip()) for each in str(part.get("split") or "").split("+")]
    rows = None if None in slices else sum(max(0, int(each[2]) - int(each[1] or 0)) for each in slices if each)
    found = [part.get("limit"), rows if part.get("turns", "last") == "last" else None]
    return min((n for n in found if n is not None), default=None)


def _limits(cfg: SPINConfig, context: int) -> tuple[int, int, int]:
    """The most tokens of a prompt, of a real response, and of all generated ones of a pair."""
    prompt, real = (data_limit(cfg, f"max_{part}_tokens") or context for part in ("prompt", "response"))
    generated = cfg.pairs.responses_per_prompt * min(cfg.sampling.max_new_tokens, context - 1)
    return min(prompt, context - 1), min(real, context - 1), generated


def longest_pair(cfg: SPINConfig, context: int) -> int | None:
    """The most tokens of a pair; None if the data set has no limits, where a context says too little."""
    if None in (data_limit(cfg, "max_prompt_tokens"), data_limit(cfg, "max_response_tokens")):
        return None
    prompt, real, generated = _limits(cfg, context)
    return min(prompt + real, context) + generated


def mean_pair(cfg: SPINConfig, context: int, pair_tokens: int | None = None) -> PairTokens:
    """What times are counted for: the pairs that rates were measured with, or ``pair_tokens`` divided as theirs, but no
    part of more tokens than the config and a model of ``context`` tokens let through."""
    answers = cfg.pairs.responses_per_prompt
    parts = dict(zip(PairTokens._fields, MEASURED_PAIR[:2] + (answers * MEASURED_PAIR.generated,), strict=True))
    limits = dict(zip(PairTokens._fields, _limits(cfg, context), strict=True))
    if pair_tokens is None:
        found = {name: min(tokens, limits[name]) for name, tokens in parts.items()}
    else:  # what one part may not have, those after it do
        found, rest, weight = {}, float(pair_tokens), sum(parts.values())
        for name in sorted(parts, key=lambda name: limits[name] / parts[name]):
            found[name] = min(rest * parts[name] / weight, limits[name])
            rest, weight = rest - found[name], weight - parts[name]
    shrink = min(1.0, context / (found["prompt"] + found["real"]))
    return PairTokens(shrink * found["prompt"], shrink * found["real"], found["generated"])
