"""The data set of an iteration: prompts and real responses as token ids, made once."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal, TypeGuard

from torch import nn

from spin.core.errors import ConfigError, DataError
from spin.data.dataset import DatasetReport, Original, PromptDataset, PromptSource, check_is_dataset
from spin.data.messages import (
    ChatMessage,
    MessageTransform,
    RowNotes,
    Turns,
    check_row_format,
    row_to_messages,
    split_turns,
)
from spin.data.sources import Row, Source, describe_source, read_rows
from spin.data.stream import PromptStream, shuffled_rows
from spin.data.tokenizer import PromptTokenizer
from spin.data.torchtune_tokenizer import adapt_tokenizer
from spin.types import Prompt

log = logging.getLogger(__name__)

LongAction = Literal["error", "drop", "cut"]
_SHOWN = 20
_SHOWN_IN_WARNING = 5  # what was asked to be left out; the report has more
_CHUNK_ROWS = 512


def prompt_dataset(
    tokenizer: Any,
    *,
    source: Source,
    format: str = "auto",  # noqa: A002 - the name of the config's key
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    column_map: Mapping[str, str] | None = None,
    message_transform: MessageTransform | None = None,
    system_prompt: str | None = None,
    turns: Turns = "last",
    id_column: str = "id",
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    on_long_prompt: LongAction = "error",
    on_long_response: LongAction = "error",
    on_bad_row: Literal["error", "skip"] = "error",
    limit: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    shuffle_seed: int = 0,
    max_seq_len: int | None = None,
    keep_originals: bool = False,
) -> PromptSource:
    """Read a supervised data set and tokenize it: what a config's ``dataset`` section names.

    A sample's id is the row's own where it has one, else file stem and row number; it decides the sample's random
    numbers in generation, so give rows an id if their order may change. A row that cannot be used is an error unless
    the options say otherwise; all of them are found in one pass and reported together.

    Args:
        tokenizer (Any): a ``PromptTokenizer`` or a torchtune model tokenizer; the recipe supplies it.
        source (Source): file, glob, folder, Hugging Face data set, or a list of these (see ``read_rows``).
        format (str): ``messages``, ``sharegpt``, ``prompt_response``, ``alpaca`` or ``auto`` (see ``row_to_messages``).
        split (str | None): split of a Hugging Face data set.
        name (str | None): configuration of a Hugging Face data set.
        data_dir (str | None): sub-folder of a Hugging Face data set.
        revision (str | None): branch, tag or commit of a Hugging Face data set.
        column_map (Mapping[str, str] | None): the format's column name to the data set's.
        message_transform (MessageTransform | None): a torchtune message transform, in place of ``format``.
        system_prompt (str | None): put before conversations that have no system message.
        turns (Turns): ``last`` or ``all`` assistant turns are real responses; ``all`` adds ``#turn0``, ... to the id.
        id_column (str): column of the sample id. A missing ``id`` is fine; another name must be there in each row.
        max_prompt_tokens (int | None): None is ``max_seq_len - 1``, room for one token of response.
        max_response_tokens (int | None): None is what the prompt leaves of ``max_seq_len``, which limits in any case.
        on_long_prompt (LongAction): ``error``; ``drop`` the sample; ``cut`` keeps the prompt's last tokens, so that the
            template's beginning and the system prompt go first.
        on_long_response (LongAction): ``error``; ``drop`` the sample; ``cut`` keeps the response's first tokens and
            adds no stop token, since the response did not end there.
        on_bad_row (Literal["error", "skip"]): for rows that cannot be read, are no conversation, do not fit the
            template or repeat an id (the first one stays).
        limit (int | None): stop reading after this many samples; what lies behind is not checked.
        streaming (bool): ``limit`` is for each iteration, which gets the next samples of the source, and only these are
            in memory. Behind the source's end comes its beginning. Ids need be unique within an iteration only.
        shuffle_buffer (int): with ``streaming``, rows that are read at once and put into another order; 0 keeps the
            source's.
        shuffle_seed (int): decides that order.
        max_seq_len (int | None): greatest length of prompt and real response together, in tokens; None takes the
            tokenizer's, or no limit.
        keep_originals (bool): keep messages and row of each sample too, for those who judge answers by their text.

    Returns:
        PromptSource: the samples in the order of the source; ``report`` says what was left out. With
        ``streaming``, the source of each iteration's samples, of which nothing has been read.

    Raises:
        ConfigError: If an option has a value that cannot work.
        DataError: If the source or the tokenizer cannot be used, if a row cannot be used and no option allows for it
            (the first 20 are listed), or if no sample is left.
    """
    tokenizer = adapt_tokenizer(tokenizer)
    max_seq_len = tokenizer.max_seq_len if max_seq_len is None else max_seq_len
    _check_options(
        {
            "on_long_prompt": on_long_prompt,
            "on_long_response": on_long_response,
            "on_bad_row": on_bad_row,
            "turns": turns,
        },
        {
            "max_seq_len": max_seq_len,
            "max_prompt_tokens": max_prompt_tokens,
            "max_response_tokens": max_response_tokens,
            "limit": limit,
        },
    )
    check_row_format(format, column_map)
    if message_transform is not None and (column_map or format != "auto" or not callable(message_transform)):
        raise ConfigError(
            "dataset.message_transform takes the place of dataset.format and dataset.column_map and must be callable. "
            "Remove those, and give the transform its own column_map."
        )
    if not streaming and (shuffle_buffer or shuffle_seed):
        raise ConfigError(
            "dataset.shuffle_buffer and shuffle_seed are for dataset.streaming=true. Without it, each iteration draws "
            "its samples from the whole data set, and each epoch has an order of its own."
        )

    said: set[str] = set()  # unused columns that were logged

    def new_intake() -> _Intake:
        return _Intake(
            _Limits(max_seq_len, max_prompt_tokens, max_response_tokens),
            {
                "bad_row": on_bad_row,
                "duplicate_id": on_bad_row,
                "long_prompt": on_long_prompt,
                "long_response": on_long_response,
            },
            said,
        )

    def games(row: Row) -> list[_Game]:
        """The conversations in a row, or the one fault that stands for it."""
        notes = RowNotes(used={id_column: None})
        try:
            if row.error is not None:
                raise DataError(f"{row.error} or set dataset.on_bad_row=skip.")
            sample_id = _sample_id(row, id_column)
            messages = row_to_messages(
                row.data,
                row_format=format,
                column_map=column_map,
                message_transform=message_transform,
                system_prompt=system_prompt,
                from_arrow=row.from_arrow,
                notes=notes,
            )
        except DataError as error:
            return [_Game(row.where, row.default_id, fault=error)]
        parts = split_turns(messages, turns)
        return [_Game(row.where + mark, sample_id + mark, part, row=row.data, notes=notes) for mark, part in parts]

    originals: dict[str, Original] = {}

    def encoded(rows: Iterator[Row]) -> Iterator[list[_Encoded]]:
        """The games of each row with their token ids."""
        # In chunks, because a tokenizer that takes many texts at once uses all cores.
        while chunk := list(islice(rows, min(_CHUNK_ROWS, limit or _CHUNK_ROWS))):
            of_rows = [games(row) for row in chunk]
            ids = iter(_encode(tokenizer, [game for of_row in of_rows for game in of_row]))
            yield from ([(game, next(ids)) for game in of_row] for of_row in of_rows)

    where: dict[str, Any] = {"split": split, "name": name, "data_dir": data_dir, "revision": revision}
    if streaming:
        if limit is None or max_seq_len is None:
            raise ConfigError(
                "dataset.streaming=true needs dataset.limit, the samples of an iteration"
                f"{'' if max_seq_len is not None else ', and a max_seq_len'}. Set dataset.limit to global_batch_size "
                "times the steps that an epoch shall have."
            )
        if keep_originals:
            raise ConfigError("dataset.keep_originals=true keeps every row; dataset.streaming=true keeps none.")
        settings = {
            "source": describe_source(source, **where),
            **{"limit": limit, "shuffle_buffer": shuffle_buffer, "shuffle_seed": shuffle_seed, "turns": turns},
        }

        def again_and_again() -> Iterator[list[_Encoded] | None]:
            """The rows from the source's beginning to its end, marked by None, and so on without end."""
            for number in count():
                rows = read_rows(source, streaming=True, **where)
                yield from encoded(iter(shuffled_rows(rows, shuffle_buffer, shuffle_seed, number)))
                yield None

        return PromptStream(
            lambda: _windows(again_and_again(), new_intake, limit, source), limit, max_seq_len, settings
        )
    intake = new_intake()

    def samples() -> Iterator[Prompt]:
        for of_row in encoded(read_rows(source, **where)):
            intake.add_row(of_row)
            for game, ids in of_row:
                prompt = intake.admit(game, ids)
                if prompt is None:
                    continue
                if keep_originals:
                    originals[game.sample_id] = Original(game.messages, game.row)
                yield prompt

    dataset = PromptDataset(islice(samples(), limit))
    dataset.originals = originals
    dataset.report = intake.conclude(source, len(dataset))
    return dataset


def check_vocabulary(
    model: nn.Module, tokenizer: PromptTokenizer, stop_token_ids: Sequence[int], *datasets: PromptSource
) -> None:
    """Checks that the model has an embedding for every token that it will meet; a tokenizer may know more.

    Args:
        model (nn.Module): a torchtune decoder, on any device, with weights or without.
        tokenizer (PromptTokenizer): what made the token ids.
        stop_token_ids (Sequence[int]): these are looked up among the model's logits.
        *datasets (PromptSource): training and validation samples.

    Raises:
        DataError: If a sample or a stop token has an id beyond the model's vocabulary, or a data set is none.
    """
    rows = model.tok_embeddings.weight.shape[0]
    found = [f"stop token {token}" for token in stop_token_ids if not 0 <= token < rows]
    for dataset in datasets:
        check_is_dataset(dataset)
        outside = dataset.first_outside(rows)
        if outside is not None:
            found.append(f"sample {outside[0]!r} has the token id {outside[1]}")
    if found:
        raise DataError(
            f"the tokenizer knows {tokenizer.vocab_size} token ids, the model's vocabulary has {rows} (ids 0 to "
            f"{rows - 1}): {'; '.join(found)}. Does the tokenizer belong to this model? If tokens were added to it, "
            "start from a checkpoint whose embeddings were resized, and give the model's builder its vocab_size."
        )


def unknown_ids(model: nn.Module, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """The ids of a model's vocabulary that no token of the tokenizer has: padding of the vocabulary, and holes in it.

    Args:
        model (nn.Module): a torchtune decoder, on any device, with weights or without.
        tokenizer (PromptTokenizer): its ``known_ids``, if it has any, else all ids below its ``vocab_size``.

    Returns:
        tuple[int, ...]: ascending; they are not to be sampled.
    """
    known = getattr(tokenizer, "known_ids", None) or range(tokenizer.vocab_size)
    return tuple(token for token in range(model.tok_embeddings.weight.shape[0]) if token not in known)


# --- Mechanics ---


@dataclass(frozen=True, slots=True)
class _Game:
    """One conversation to play, or the fault in its place."""

    where: str
    sample_id: str
    messages: list[ChatMessage] = field(default_factory=list)
    fault: DataError | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    notes: RowNotes = field(default_factory=RowNotes)  # the row's


_Encoded = tuple[_Game, "tuple[list[int], list[int]] | DataError"]


@dataclass(frozen=True, slots=True)
class _Limits:
    max_seq_len: int | None
    max_prompt_tokens: int | None
    max_response_tokens: int | None

    def prompt(self) -> tuple[int | None, str]:
        """The most tokens a prompt may have, and where that comes from."""
        if self.max_prompt_tokens is not None:
            return self.max_prompt_tokens, f"dataset.max_prompt_tokens={self.max_prompt_tokens}"
        if self.max_seq_len is not None:
            return self.max_seq_len - 1, f"max_seq_len={self.max_seq_len}, less one for the response"
        return None, ""

    def response(self, prompt_tokens: int) -> tuple[int | None, str]:
        """The most tokens a real response may have behind a prompt, and where that comes from."""
        room = None if self.max_seq_len is None else self.max_seq_len - prompt_tokens
        if self.max_response_tokens is not None and (room is None or self.max_response_tokens <= room):
            return self.max_response_tokens, f"dataset.max_response_tokens={self.max_response_tokens}"
        return room, f"max_seq_len={self.max_seq_len}, less {prompt_tokens} of the prompt"


def _windows(
    rows: Iterator[list[_Encoded] | None], new_intake: Callable[[], _Intake], size: int, source: Source
) -> Iterator[PromptDataset]:
    """Consecutive windows of an endless stream of rows, where None marks the end of the source."""
    left: list[_Encoded] = []  # of a row whose first games filled the window before
    while True:
        intake, repeats, ends = new_intake(), frozenset[str](), 0
        samples: list[Prompt] = []
        while len(samples) < size:
            if left:
                of_row, left = left, []
            else:
                read = next(rows)
                if read is None:
                    intake.raise_errors(source)
                    ends, repeats = ends + 1, frozenset(prompt.sample_id for prompt in samples)
                    if ends == 2:  # the whole source was read for this window
                        break
                    continue
                of_row = read
                intake.add_row(of_row)
            for number, (game, ids) in enumerate(of_row):
                if len(samples) == size:
                    left = of_row[number:]
                    break
                if game.sample_id not in repeats and (prompt := intake.admit(game, ids)) is not None:
                    samples.append(prompt)
            intake.raise_errors(source, at_least=_SHOWN)  # not after the whole of a source of bad rows
        report = intake.conclude(source, len(samples))
        if len(samples) < size:
            raise DataError(
                f"{_label(source)} has {len(samples)} usable samples, dataset.limit={size} asks for more in each "
                f"iteration. Set dataset.limit={len(samples)} or less."
            )
        yield PromptDataset(samples, report)


class _Intake:
    """Decides on each sample and keeps the books."""

    def __init__(self, limits: _Limits, actions: Mapping[str, str], said: set[str]) -> None:
        self.rows = 0
        self._said = said
        self._changes: Counter[str] = Counter()
        self._used: set[str] = set()
        self._unused: dict[str, None] = {}
        self._limits = limits
        self._actions = actions
        self._where_of: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._examples: list[str] = []
        self._errors: list[str] = []
        self._error_count = 0

    def add_row(self, of_row: list[_Encoded]) -> None:
        """Count a row, and what was changed and not used of it."""
        self.rows += 1
        for game, _ in of_row[:1]:
            self._changes.update(list(game.notes.changes))
            self._used.update(game.notes.used)
            self._unused.update(game.notes.unused)

    def admit(self, game: _Game, encoded: tuple[list[int], list[int]] | DataError) -> Prompt | None:
        """The sample as it enters the data set, or None if it does not."""
        if isinstance(encoded, DataError):
            self._refuse("bad_row", game, str(encoded))
            return None
        prompt_ids, real_ids = encoded
        if not prompt_ids:
            self._refuse("bad_row", game, "the prompt has no tokens. Use a chat template that marks turns.")
            return None
        if game.sample_id in self._where_of:
            self._refuse(
                "duplicate_id",
                game,
                f"id {game.sample_id!r} is taken by {self._where_of[game.sample_id]}. Give each row an id of its own, "
                "or name another dataset.id_column.",
            )
            return None
        most, origin = self._limits.prompt()
        if most is not None and len(prompt_ids) > most:
            if not self._shorten("long_prompt", "prompt", game, len(prompt_ids), most, origin):
                return None
            prompt_ids = prompt_ids[-most:]
        most, origin = self._limits.response(len(prompt_ids))
        if most is not None and len(real_ids) > most:
            if not self._shorten("long_response", "real response", game, len(real_ids), most, origin):
                return None
            real_ids = real_ids[:most]
        self._where_of[game.sample_id] = game.where
        return Prompt(game.sample_id, prompt_ids, real_ids)

    def _refuse(self, reason: str, game: _Game, fault: str) -> None:
        if self._actions[reason] == "error":
            self._error_count += 1
            if len(self._errors) < _SHOWN:
                self._errors.append(f"{game.where}: {fault}")
        else:
            self._note(reason, game, fault)

    def _shorten(self, reason: str, what: str, game: _Game, found: int, most: int, origin: str) -> bool:
        """Whether a sample that is too long is kept, cut."""
        action = self._actions[reason]
        fault = f"the {what} has {found} tokens, at most {most} fit ({origin})."
        if action == "error":
            self._refuse(reason, game, f"{fault} Raise the limit or set dataset.on_{reason}=drop or cut.")
        else:
            self._note(f"{reason}_{action}", game, fault)
        return action == "cut"

    def _note(self, reason: str, game: _Game, fault: str) -> None:
        self._counts[reason] += 1
        if len(self._examples) < _SHOWN:
            self._examples.append(f"{game.where}: {fault}")

    def raise_errors(self, source: Source, at_least: int = 1) -> None:
        """Raise what must be raised, if it is so many."""
        if self._error_count >= at_least:
            raise DataError(
                f"{self._error_count} samples in {self.rows} rows of {_label(source)} cannot be used:\n"
                f"{_listed(self._errors, self._error_count)}"
            )

    def conclude(self, source: Source, samples: int) -> DatasetReport:
        """Raise what must be raised, warn of what was done, and report."""
        self.raise_errors(source)
        label = _label(source)
        done = ", ".join(f"{reason} {count}" for reason, count in self._counts.items())
        total = sum(self._counts.values())
        if not samples:
            raise DataError(
                f"No sample is left of {self.rows} rows of {label} ({done}):\n{_listed(self._examples, total)}"
            )
        if total and os.environ.get("RANK", "0") == "0":
            log.warning(
                "%s: %d samples from %d rows; left out or cut: %s\n%s",
                label,
                samples,
                self.rows,
                done,
                _listed(self._examples[:_SHOWN_IN_WARNING], total),
            )
        unused = [name for name in self._unused if name not in self._used]
        self._log_notes(label, [name for name in unused if name not in self._said])
        self._said.update(unused)
        return DatasetReport(self.rows, samples, dict(self._counts), self._examples, dict(self._changes), unused)

    def _log_notes(self, label: str, unused: list[str]) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        if self._changes:
            changes = ", ".join(f"{name} {count}" for name, count in self._changes.items())
            log.warning("%s: rows that were read with a change: %s", label, changes)
        if "null_arguments_removed" in self._changes and "null_arguments_removed" not in self._said:
            self._said.add("null_arguments_removed")
            log.warning(
                "%s: Arrow fills up tools and calls with nulls; they were removed, and with them any null that was "
                "written on purpose, which cannot be told from these. JSON Lines keep theirs.",
                label,
            )
        if unused:
            log.info("%s: not used, neither in prompts nor in responses: %s", label, ", ".join(unused))


def _label(source: Source) -> str:
    if isinstance(source, str):
        return source
    return f"{len(source)} sources" if isinstance(source, list) else str(source)


def _listed(lines: list[str], total: int) -> str:
    more = [f"  ... and {total - len(lines)} more"] if total > len(lines) else []
    return "\n".join([*(f"  {line}" for line in lines), *more])


def _encode(tokenizer: PromptTokenizer, games: list[_Game]) -> list[tuple[list[int], list[int]] | DataError]:
    """Prompt and response ids of each game, or what is wrong with it."""
    playable = [game.messages for game in games if game.fault is None]
    batched = getattr(tokenizer, "encode_pairs", None)
    pairs = iter(batched(playable) if batched else (_encode_one(tokenizer, messages) for messages in playable))
    return [next(pairs) if game.fault is None else game.fault for game in games]


def _encode_one(tokenizer: PromptTokenizer, messages: list[ChatMessage]) -> tuple[list[int], list[int]] | DataError:
    try:
        return tokenizer.encode_pair(messages)
    except DataError as error:
        return error


def _sample_id(row: Row, id_column: str) -> str:
    value = row.data.get(id_column)
    if isinstance(value, str) and value.strip():
        _check_id(value)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and value != "":
        raise DataError(f"column {id_column!r} holds {value!r:.60}, expected a text or a whole number. Fix the row.")
    if id_column != "id":
        raise DataError(
            f"column {id_column!r} is empty or missing; found columns {', '.join(map(str, row.data)) or 'none'}. Fix "
            "the row or dataset.id_column."
        )
    return row.default_id


def _check_id(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the id {value!r} is no valid text (lone surrogate). Fix the row.") from error


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_options(choices: Mapping[str, str], counts: Mapping[str, int | None]) -> None:
    allowed = {
        "on_long_prompt": ("error", "drop", "cut"),
        "on_long_response": ("error", "drop", "cut"),
        "on_bad_row": ("error", "skip"),
        "turns": ("last", "all"),
    }
    faults = [
        f"dataset.{key}={value}: expected {' or '.join(allowed[key])}."
        for key, value in choices.items()
        if value not in allowed[key]
    ]
    for key, value in counts.items():
        label, least = (key, 2) if key == "max_seq_len" else (f"dataset.{key}", 1)
        if value is not None and not (_is_count(value) and value >= least):
            faults.append(f"{label}={value}: expected a whole number of {least} or more, or null.")
    longest, prompt = counts["max_seq_len"], counts["max_prompt_tokens"]
    if _is_count(longest) and _is_count(prompt) and prompt >= longest:
        faults.append(
            f"dataset.max_prompt_tokens={prompt} leaves no room for a response in max_seq_len={longest}; expected at "
            f"most {longest - 1}."
        )
    if faults:
        raise ConfigError("\n".join(faults))
