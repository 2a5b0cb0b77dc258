"""Several data sets in one: each with a fraction of every iteration's samples, or of its own rows."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from spin.config import Faults
from spin.config.components import KINDS, check_values
from spin.config.faults import nearest_or_known
from spin.core.errors import ConfigError, DataError
from spin.data.dataset import DatasetReport, Original, PromptDataset
from spin.data.order import permutation
from spin.data.read import prompt_dataset
from spin.data.torchtune_tokenizer import adapt_tokenizer
from spin.types import Prompt

_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what every metrics service takes
_WEIGHT = "weight"


class MixedPromptDataset(PromptDataset):
    """Data sets of which every iteration plays given fractions, to the sample.

    A sample's id is ``<source>/<its id there>``. Of ``n`` samples that an iteration needs, a source gives ``n`` times
    its fraction (rounded by largest remainder), others in each iteration. A source that has fewer gives all of them,
    and copies for the rest: these have ids of their own (``#copy1``, ...), so each gets a response of its own.

    Samples lie in an order in which every first part has about these fractions.

    Args:
        parts (Mapping[str, PromptDataset]): by name.
        weights (Mapping[str, float] | None): by the same names, of any sum; None takes the sizes, so that all samples
            are played alike.
        samples (int | None): samples of an iteration at most; None is as many as the weights allow without copies.

    Raises:
        ConfigError: If a weight is not above 0, if ``samples`` is not, or if the weights leave no sample.
    """

    def __init__(
        self, parts: Mapping[str, PromptDataset], weights: Mapping[str, float] | None = None, samples: int | None = None
    ) -> None:
        empty = [name for name, part in parts.items() if not len(part)]
        if empty or not parts:
            raise ConfigError(f"dataset.sources: no sample in {', '.join(empty) or 'no source'}. Leave it out.")
        self._sizes = {name: len(part) for name, part in parts.items()}
        given = {name: (weights or self._sizes)[name] for name in parts}
        faults = Faults()
        _check_numbers(given, samples, faults)
        faults.raise_if_any()
        self._fractions = _fractions(given)
        self._most = samples_without_copies(self._sizes, given) if samples is None else samples
        quotas = self._quotas(self._most)
        sizes = [max(1, math.ceil(quotas[name] / size)) * size for name, size in self._sizes.items()]  # with copies
        # sample k of a source belongs where it is the source's turn for the k-th time
        fractions = map(float, self._fractions.values())
        turns = [(np.arange(size) + 0.5) / fraction for fraction, size in zip(fractions, sizes, strict=True)]
        order = np.argsort(np.concatenate(turns), kind="stable")
        # the places of each source's samples among all, copy after copy
        self._places = dict(zip(parts, np.split(np.argsort(order), np.cumsum(sizes)[:-1]), strict=True))

        def mixed() -> Iterator[Prompt]:
            names, owners = list(parts), np.repeat(np.arange(len(sizes)), sizes)[order]
            numbers = np.concatenate([np.arange(size) for size in sizes])[order]
            for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True):
                name = names[owner]
                copy, index = divmod(number, len(parts[name]))
                prompt = parts[name][index]
                sample_id = f"{name}/{prompt.sample_id}" + (f"#copy{copy}" if copy else "")
                if prompt.sample_id in parts[name].originals:
                    originals[sample_id] = parts[name].originals[prompt.sample_id]
                yield Prompt(sample_id, prompt.prompt_ids, prompt.real_ids)

        originals: dict[str, Original] = {}
        super().__init__(mixed(), _joined({name: part.report for name, part in parts.items()}))
        self.originals = originals
        self._content = {name: part.fingerprint() for name, part in parts.items()}
        self.settings = {"weights": {name: float(each) for name, each in self._fractions.items()}, "samples": samples}
        self.settings |= {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.settings.items()
        }

    @property
    def samples_per_iteration(self) -> int:
        return self._most

    def iteration_samples(self, num_needed: int, seed: int, iteration: int) -> list[int]:
        # of each source its fraction, and no copy of a sample that was not drawn itself
        chosen: list[int] = []
        for name, quota in self._quotas(num_needed).items():
            size, places = self._sizes[name], self._places[name]
            passes = (
                places[copy * size + permutation(size, seed, "samples", name, copy, iteration)]
                for copy in range(len(places) // size)
            )
            chosen += np.concatenate(list(passes))[:quota].tolist()
        return [chosen[i] for i in permutation(len(chosen), seed, "mixture", iteration)]

    def count_sources(self, sample_ids: Iterable[str]) -> dict[str, float]:
        counts = Counter(sample_id.partition("/")[0] for sample_id in sample_ids)
        return {name: float(counts[name]) for name in self._fractions}

    def content_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, content in self._content.items():
            digest.update(f"{name}:{content}".encode())
        return digest.hexdigest()

    def _quotas(self, num_samples: int) -> dict[str, int]:
        """How many of so many samples each source gives; where remainders are equal, the first one gets more."""
        wanted = {name: fraction * num_samples for name, fraction in self._fractions.items()}
        quotas = {name: math.floor(value) for name, value in wanted.items()}
        by_remainder = sorted(wanted, key=lambda name: quotas[name] - wanted[name])
        for name in by_remainder[: num_samples - sum(quotas.values())]:
            quotas[name] += 1
        return quotas


def mixed_prompt_dataset(
    tokenizer: Any,
    *,
    sources: Mapping[str, Mapping[str, Any]],
    common: Mapping[str, Any] | None = None,
    samples: int | None = None,
    max_seq_len: int | None = None,
    keep_originals: bool = False,
) -> MixedPromptDataset:
    """Read several supervised data sets and mix them: for a config's ``dataset`` or ``validation_dataset``.

    Args:
        tokenizer (Any): a ``PromptTokenizer`` or a torchtune model tokenizer; the recipe supplies it.
        sources (Mapping[str, Mapping[str, Any]]): name to the arguments of ``prompt_dataset``, and ``weight``, for
            all or for none.
        common (Mapping[str, Any] | None): arguments of ``prompt_dataset`` for every source that does not give them.
        samples (int | None): samples of an iteration at most, with copies where a source has too few; None is as many
            as the weights allow without copies.
        max_seq_len (int | None): see ``prompt_dataset``.
        keep_originals (bool): see ``prompt_dataset``.

    Returns:
        MixedPromptDataset: the samples of all.

    Raises:
        ConfigError: If a source, its name, its arguments or its weight cannot work; all faults are named.
        DataError: If a source cannot be read; the message names it.
    """
    tokenizer, common = adapt_tokenizer(tokenizer), common or {}
    weights = check_sources(sources, common, samples)
    parts: dict[str, PromptDataset] = {}
    for name, options in sources.items():
        arguments = {key: value for key, value in {**common, **options}.items() if key != _WEIGHT}
        try:
            part = prompt_dataset(tokenizer, max_seq_len=max_seq_len, keep_originals=keep_originals, **arguments)
        except (ConfigError, DataError) as error:
            raise type(error)(f"dataset.sources.{name}: {error}") from error
        assert isinstance(part, PromptDataset)  # streams were refused
        parts[name] = part
    mixed = MixedPromptDataset(parts, weights, samples)
    held_out = {name: part.held_out for name, part in parts.items() if part.held_out is not None}
    if held_out:
        mixed.held_out = MixedPromptDataset(held_out, {name: weights[name] for name in held_out} if weights else None)
    return mixed


def check_sources(sources: Any, common: Any, samples: Any) -> dict[str, Any]:
    """The weights of sources that can work; a ConfigError with all that cannot."""
    if not isinstance(sources, Mapping) or not sources or not isinstance(common, Mapping):
        raise ConfigError(
            "dataset.sources: expected a name for each source with its arguments below, such as "
            "{chat: {source: chat.jsonl, weight: 0.7}}."
        )
    faults, weights = Faults(), {}
    known = [name for name in inspect.signature(prompt_dataset).parameters if name not in KINDS["dataset"].supplied]
    for name in sources:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            faults.add(f"dataset.sources.{name}: a name has letters, digits, dots, dashes and underscores only.")
    for name, options in ((None, common), *sources.items()):
        where, is_source = "dataset.common" if name is None else f"dataset.sources.{name}", name is not None
        if not isinstance(options, Mapping):
            faults.add(f"{where}: found {options!r}, expected arguments of prompt_dataset.")
            continue
        allowed = [*known, _WEIGHT] if is_source else known
        for key in options:
            if key not in allowed:
                faults.add(f"{where}.{key}: unknown key.{nearest_or_known(str(key), allowed)}")
        if options.get("streaming"):
            faults.add(f"{where}.streaming: streams cannot be mixed. Use limit, or write one mixed file.")
        if is_source and "source" not in {**common, **options}:
            faults.add(f"{where}: has no source.")
        if is_source and _WEIGHT in options:
            weights[name] = options[_WEIGHT]
        values = {key: value for key, value in options.items() if key in known and key != "source"}
        check_values(where, prompt_dataset, values, faults)
    without = [name for name, options in sources.items() if isinstance(options, Mapping) and name not in weights]
    if without and weights:
        faults.add(f"dataset.sources: {', '.join(without)} without a {_WEIGHT}, others with one. Give it to all.")
    _check_numbers(weights, samples, faults)
    faults.raise_if_any()
    return weights


def samples_without_copies(sizes: Mapping[str, int], weights: Mapping[str, float]) -> int:
    """Samples of an iteration: of sources of these sizes as many as the weights allow, or all if there are none."""
    if not weights:
        return sum(sizes.values())
    return min(math.floor(sizes[name] / fraction) for name, fraction in _fractions(weights).items())


def _fractions(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Of an iteration's samples, of each source."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # as written: 0.1 is a tenth
    return {name: weight / sum(exact.values()) for name, weight in exact.items()}


def _check_numbers(weights: Mapping[str, Any], samples: Any, faults: Faults) -> None:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            rule = "expected a number above 0. To play nothing of a source, leave it out."
            faults.add(f"dataset.sources.{name}.{_WEIGHT}={weight!r}: {rule}")
    if samples is not None and (type(samples) is not int or samples < 1):
        faults.add(f"dataset.samples={samples!r}: expected a whole number above 0, or null.")


def _joined(reports: Mapping[str, DatasetReport]) -> DatasetReport:
    counts: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    for report in reports.values():
        counts.update(report.counts)
        changes.update(report.changes)
    return DatasetReport(
        rows=sum(report.rows for report in reports.values()),
        samples=sum(report.samples for report in reports.values()),
        counts=dict(counts),
        examples=[f"{name}: {example}" for name, report in reports.items() for example in report.examples],
        changes=dict(changes),
        unused=[f"{name}: {column}" for name, report in reports.items() for column in report.unused],
    )
