"""A data set that is read as it is played: every iteration gets the next samples of the source, and only those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from spin.core.errors import DataError
from spin.data.dataset import PromptDataset
from spin.data.order import iteration_samples, permutation
from spin.data.rows import Row
from spin.data.samples import MAX_FINDINGS, EncodedRow, SampleFilter
from spin.types import Prompt


class PromptStream:
    """Prompts and real responses, of which one iteration's are in memory: ``prompt_dataset`` with ``streaming: true``.

    What an iteration plays follows from the source and the iteration alone, so a restart reads up to there again, and
    an uninterrupted run reads nothing twice. Of iterations before the newest, only the samples' ids are kept.

    ``windows`` opens the source at its beginning, and gives the samples of iteration 0, 1, ... without end; the other
    arguments are those of :class:`~spin.data.PromptSource`.
    """

    def __init__(
        self,
        windows: Callable[[], Iterator[PromptDataset]],
        samples_per_iteration: int,
        longest: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.samples_per_iteration, self.longest, self.settings = samples_per_iteration, longest, settings
        self._open = windows
        self._windows = windows()
        self._newest: PromptDataset | None = None
        self._next = 0  # the iteration whose samples come next
        self._ids: dict[int, list[str]] = {}  # by iteration
        self._vocab_size: int | None = None

    def window(self, iteration: int) -> PromptDataset:
        if self._newest is not None and iteration == self._next - 1:
            return self._newest
        if iteration < self._next:
            self._windows, self._next = self._open(), 0
        while self._next <= iteration:
            self._newest = None  # so that no two windows are in memory
            self._newest = next(self._windows)
            self._ids[self._next] = self._newest.sample_ids
            self._next += 1
        assert self._newest is not None
        if self._vocab_size is not None and (outside := self._newest.first_outside(self._vocab_size)) is not None:
            where, beyond = f"sample {outside[0]!r} of iteration {iteration}", f"vocabulary of {self._vocab_size}"
            raise DataError(f"{where} has the token id {outside[1]}, beyond the model's {beyond}.")
        return self._newest

    def iteration_samples(self, num_needed: int, seed: int, iteration: int) -> list[int]:
        return iteration_samples(self.samples_per_iteration, num_needed, seed, iteration)

    def sample_id(self, iteration: int, index: int) -> str:
        if iteration not in self._ids:
            self.window(iteration)
        return self._ids[iteration][index]

    def first_outside(self, vocab_size: int) -> tuple[str, int] | None:
        found = self.window(0).first_outside(vocab_size)
        self._vocab_size = vocab_size
        return found

    def count_sources(self, sample_ids: Iterable[str]) -> dict[str, float]:
        return {}

    def content_fingerprint(self) -> str:
        """Constant: a stream's content is unknown before it is read."""
        return "streamed"


def iteration_windows(
    rows: Iterator[EncodedRow | None], new_filter: Callable[[], SampleFilter], size: int
) -> Iterator[PromptDataset]:
    """Consecutive windows of an endless stream of rows, where None marks the end of the source."""
    left: EncodedRow = []  # of a row whose first conversations filled the window before
    while True:
        window, repeats, ends = new_filter(), frozenset[str](), 0
        samples: list[Prompt] = []
        while len(samples) < size:
            if left:
                of_row, left = left, []
            elif (read := next(rows)) is not None:
                of_row = read
                window.count_row(of_row)
            else:
                window.raise_errors()
                ends, repeats = ends + 1, frozenset(prompt.sample_id for prompt in samples)
                if ends == 2:  # the whole source was read for this window
                    break
                continue
            for number, (conversation, ids) in enumerate(of_row):
                if len(samples) == size:
                    left = of_row[number:]
                    break
                if conversation.sample_id not in repeats and (prompt := window.accept(conversation, ids)) is not None:
                    samples.append(prompt)
            window.raise_errors(at_least=MAX_FINDINGS)  # not after the whole of a source of bad rows
        report = window.report(len(samples))
        if len(samples) < size:
            raise DataError(
                f"{window.label} has {len(samples)} usable samples, dataset.limit={size} asks for more in each "
                f"iteration. Set dataset.limit={len(samples)} or less."
            )
        yield PromptDataset(samples, report)


def shuffled_rows(rows: Iterable[Row], buffer: int, seed: int, pass_number: int) -> Iterator[Row]:
    """Rows in another order, a block of consecutive rows at a time; with a buffer of 0 or 1 the order stays.

    A block's order depends on its number and the pass over the source, not on what was read before. So the place in the
    stream is the number of rows that were taken, which the usual shuffle buffer does not offer.
    """
    if buffer < 2:
        yield from rows
        return
    rows = iter(rows)
    number = 0
    while block := list(islice(rows, buffer)):
        for index in permutation(len(block), seed, "rows", pass_number, number).tolist():
            yield block[index]
        number += 1
