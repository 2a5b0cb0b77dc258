"""What a data set holds, before there is a config for it: the columns of its rows, their faults, lengths in tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from spin.core.errors import DataError
from spin.data.messages import MessageTransform, detect_format
from spin.data.read import encode_all, is_held_out, row_parser
from spin.data.rows import Row
from spin.data.samples import Conversation, Findings
from spin.data.sources import read_rows
from spin.data.tokenizer import PromptTokenizer

MOST_ENCODED = 2000  # samples whose lengths stand for all
_HEAD_ROWS = 100  # that columns are looked for in
# Names of columns that no format has, the likelier ones first
_TALKS = ("conversation", "dialogue", "dialog", "chat", "chosen")
_PROMPTS = ("prompt", "question", "query", "problem", "input", "user", "human")
_RESPONSES = ("response", "completion", "answer", "output", "solution", "assistant", "target", "chosen")


@dataclass(frozen=True)
class Survey:
    """What is known of a data set whose rows were all read, and of which some samples were tokenized."""

    formats: dict[str | None, int]  # rows that were read in each, most first; None: by a message transform
    column_map: dict[str, str]
    rows: int
    sample_ids: list[str]  # of the samples that were tokenized; of all if there are more
    prompt_lengths: np.ndarray  # of those that were tokenized, shape (n,)
    real_lengths: np.ndarray  # shape (n,)
    faults: Findings

    @property
    def is_complete(self) -> bool:
        """Every sample was tokenized."""
        return len(self.sample_ids) == len(self.prompt_lengths)

    def within(self, max_prompt_tokens: int, max_response_tokens: int, max_seq_len: int) -> np.ndarray:
        """Which of the tokenized samples are within limits, shape (n,) bool."""
        prompts, real = self.prompt_lengths, self.real_lengths
        fit = (prompts <= max_prompt_tokens) & (real <= max_response_tokens)
        return fit & (prompts + real <= max_seq_len)

    def split(self, fraction: float, fit: np.ndarray, turns: Any = "last") -> tuple[int, int]:
        """Samples for training, and those held out, of the ones that fit; estimates unless all were tokenized."""
        held_out = np.array([is_held_out(sample_id, fraction, turns) for sample_id in self.sample_ids])
        if self.is_complete:
            return int((fit & ~held_out).sum()), int((fit & held_out).sum())
        return int(fit.mean() * (~held_out).sum()), int(fit.mean() * held_out.sum())


def survey(
    tokenizer: PromptTokenizer, options: Mapping[str, Any], message_transform: MessageTransform | None = None
) -> Survey:
    """Reads the data set that arguments of ``prompt_dataset`` name, and finds its columns unless they are given.

    A DataError names the first row and its columns if no format fits, and the faults if no row can be used.
    """
    source = options["source"]
    where: dict[str, Any] = {key: options.get(key) for key in ("split", "name", "data_dir", "revision")}
    rows = read_rows(source, **where)
    head = list(islice(rows, _HEAD_ROWS))
    column_map = dict(options.get("column_map") or {})
    if message_transform is None and options.get("format", "auto") == "auto":
        column_map = _columns(head, column_map)
    conversations_of = row_parser({**options, "column_map": column_map}, message_transform)
    faults, place_of, formats = Findings(), dict[str, str](), Counter[str | None]()
    sample: list[Conversation] = []
    chance, number = random.Random(0), 0  # nosec B311 - a sample of rows
    for number, row in enumerate(chain(head, rows), start=1):  # noqa: B007 - how many there are
        conversations = conversations_of(row)
        if conversations[0].fault is None:
            formats[conversations[0].notes.row_format] += 1
        for each in conversations:
            if each.fault is not None:
                faults.add(each.where, str(each.fault))
            elif each.sample_id in place_of:
                faults.add(each.where, f"id {each.sample_id!r} is taken by {place_of[each.sample_id]}.")
            else:
                place_of[each.sample_id] = each.where
                if len(sample) < MOST_ENCODED:
                    sample.append(each)
                elif (place := chance.randrange(len(place_of))) < MOST_ENCODED:
                    sample[place] = each
        if len(place_of) >= (options.get("limit") or len(place_of) + 1):
            break
    encoded, lengths = [], []
    for each, ids in zip(sample, encode_all(tokenizer, [each.messages for each in sample]), strict=True):
        if isinstance(ids, DataError):
            faults.add(each.where, str(ids))
        else:
            encoded.append(each.sample_id)
            lengths.append([len(ids[0]), len(ids[1])])
    if not encoded:
        columns = ", ".join(map(str, head[0].data)) or "none"
        raise DataError(
            f"{source}: none of its {number:,} rows can be used; the first one has the columns {columns}.\n"
            f"{faults.text(5)}"
        )
    prompt_lengths, real_lengths = np.array(lengths).T
    ids_of_all = encoded if len(place_of) == len(sample) else list(place_of)
    return Survey(dict(formats.most_common()), column_map, number, ids_of_all, prompt_lengths, real_lengths, faults)


def _columns(rows: Sequence[Row], column_map: dict[str, str]) -> dict[str, str]:
    """Which columns are meant, of the first row that has a format, where names are not the format's."""
    faults = []
    for row in rows:
        try:
            if row.error is not None:
                raise DataError(row.error)
            detect_format(row.data, column_map)
            return column_map
        except DataError as error:
            faults.append(f"{row.where}: {error}")
            guessed = {} if column_map or row.error is not None else _guessed(row.data)
            if guessed:
                return guessed
    if rows[0].error is not None:
        raise DataError(faults[0])
    texts = [key for key, value in rows[0].data.items() if isinstance(value, str)]
    prompt, response = texts if len(texts) == 2 else ("COLUMN", "COLUMN")
    raise DataError(f"{faults[0]} For example: 'dataset.column_map={{prompt: {prompt}, response: {response}}}'.")


def _guessed(data: Mapping[str, Any]) -> dict[str, str]:
    """What the columns of a row mean by their names: a conversation, or a prompt and a response; empty if unknown."""
    names = {str(name).lower(): str(name) for name, value in data.items() if value}

    def first(known: Sequence[str], kind: type) -> str | None:
        return next((names[each] for each in known if each in names and isinstance(data[names[each]], kind)), None)

    if (talk := first(_TALKS, list)) is not None and len(data[talk]) > 1:
        return {"messages": talk}
    response = first(_RESPONSES, str)
    if response is None:
        return {}
    if (instruction := first(("instruction",), str)) is not None:
        found = {"instruction": instruction, "output": response, "input": "context" if "context" in data else "input"}
    elif (prompt := first([each for each in _PROMPTS if names.get(each) != response], str)) is not None:
        found = {"prompt": prompt, "response": response}
    else:
        return {}
    return {column: name for column, name in found.items() if column != name}
