"""Reads a supervised data set into prompts and real responses as token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal

from spin.core.errors import ConfigError, DataError
from spin.data.dataset import Original, PromptDataset, PromptSource
from spin.data.messages import (
    ChatMessage,
    MessageTransform,
    RowNotes,
    Turns,
    check_row_format,
    check_text,
    row_to_messages,
    split_turns,
)
from spin.data.rows import Row, bad_row
from spin.data.samples import Conversation, EncodedRow, LongAction, SampleFilter, SampleRules
from spin.data.sources import Source, describe_source, label_of, read_rows
from spin.data.stream import PromptStream, iteration_windows, shuffled_rows
from spin.data.tokenizer import Encoded, PromptTokenizer, or_error
from spin.data.torchtune_tokenizer import adapt_tokenizer
from spin.types import Prompt

if TYPE_CHECKING:
    from torch import nn

_CHUNK_ROWS = 512  # encoded together, because a tokenizer that takes many texts at once uses all cores


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
    validation_fraction: float = 0.0,
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
        split (str | None): a split or parts of some, such as ``train[:1000]+test``. None: ``train``, or the only one.
        name (str | None): of a data set with several configurations, the one to read.
        data_dir (str | None): of a data set on huggingface.co or a folder, the sub-folder to read.
        revision (str | None): of a data set on huggingface.co, the branch, tag or commit.
        column_map (Mapping[str, str] | None): the format's column name to the data set's: ``{prompt: question}``.
        message_transform (MessageTransform | None): a torchtune message transform, in place of ``format``.
        system_prompt (str | None): put before conversations that have no system message.
        turns (Turns): ``last`` or ``all`` assistant turns are real responses; ``all`` adds ``#turn0``, ... to the id.
        id_column (str): column of the sample id. A missing ``id`` is fine; another name must be there in each row.
        max_prompt_tokens (int | None): None is ``max_seq_len - 1``, room for one token of response.
        max_response_tokens (int | None): None is what the prompt leaves of ``max_seq_len``, which limits in any case.
        on_long_prompt (LongAction): ``error``; ``drop`` the sample; ``cut`` keeps the prompt's last tokens. The
            template's beginning and the system prompt are cut off first.
        on_long_response (LongAction): ``error``; ``drop`` the sample; ``cut`` keeps the response's first tokens. No
            stop token is added, since the response did not end there.
        on_bad_row (Literal["error", "skip"]): ``error``; ``skip`` leaves out rows that cannot be used. These cannot be
            read, are no conversation, do not fit the template or repeat an id (the first one stays).
        limit (int | None): stop reading after this many samples; what lies behind is not checked.
        validation_fraction (float): of the samples, held out for validation. They are what is returned's ``held_out``.
            A hash of the id decides, with ``turns=all`` the row's, so a sample's part depends on no other sample.
        streaming (bool): ``limit`` is for each iteration, which gets the next samples of the source, and only these are
            in memory. Behind the source's end comes its beginning. Ids need be unique within an iteration only.
        shuffle_buffer (int): with ``streaming``, rows that are read at once and put into another order; 0 keeps the
            source's.
        shuffle_seed (int): decides that order.
        max_seq_len (int | None): greatest length of prompt and real response together, in tokens; None takes the
            tokenizer's, or no limit.
        keep_originals (bool): keep messages and row of each sample too, for those who judge responses by their text.

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
    rules = SampleRules(
        max_seq_len, max_prompt_tokens, max_response_tokens, on_long_prompt, on_long_response, on_bad_row
    )
    _check_options(rules, turns, limit, validation_fraction)
    check_row_format(format, column_map)
    if message_transform is not None and (column_map or format != "auto" or not callable(message_transform)):
        raise ConfigError(
            "dataset.message_transform takes the place of dataset.format and dataset.column_map and must be callable. "
            "Remove those, and give the transform its own column_map."
        )
    options = {"format": format, "column_map": column_map, "system_prompt": system_prompt}
    converse = row_parser(options | {"turns": turns, "id_column": id_column}, message_transform)
    chunk = min(_CHUNK_ROWS, limit or _CHUNK_ROWS)
    label = label_of(source)
    new_filter = partial(SampleFilter, label, rules, set())
    where: dict[str, Any] = {"split": split, "name": name, "data_dir": data_dir, "revision": revision}
    if streaming:
        if limit is None or max_seq_len is None:
            raise ConfigError(
                "dataset.streaming=true needs dataset.limit, the samples of an iteration"
                f"{'' if max_seq_len is not None else ', and a max_seq_len'}. Set dataset.limit to global_batch_size "
                "times the steps that an epoch shall have."
            )
        if validation_fraction:
            raise ConfigError(
                f"dataset.validation_fraction={validation_fraction} with streaming=true: samples of a stream are read "
                "as they are played, and a validation set is the same from the start. Name a validation_dataset."
            )
        if keep_originals:
            raise ConfigError("dataset.keep_originals=true keeps every row; dataset.streaming=true keeps none.")
        shuffle = {"shuffle_buffer": shuffle_buffer, "shuffle_seed": shuffle_seed}
        settings = {"source": describe_source(source, **where), "limit": limit, **shuffle, "turns": turns}

        def endless_rows() -> Iterator[EncodedRow | None]:
            """The rows from the source's beginning to its end, marked by None, and so on without end."""
            for number in count():
                rows = read_rows(source, streaming=True, **where)
                yield from _encoded(
                    shuffled_rows(rows, shuffle_buffer, shuffle_seed, number), tokenizer, converse, chunk
                )
                yield None

        return PromptStream(lambda: iteration_windows(endless_rows(), new_filter, limit), limit, max_seq_len, settings)

    if shuffle_buffer or shuffle_seed:
        raise ConfigError(
            "dataset.shuffle_buffer and shuffle_seed are for dataset.streaming=true. Without it, each iteration draws "
            "its samples from the whole data set, and each epoch has an order of its own."
        )
    originals: dict[str, Original] = {}
    kept = new_filter()

    def samples() -> Iterator[Prompt]:
        for of_row in _encoded(read_rows(source, **where), tokenizer, converse, chunk):
            kept.count_row(of_row)
            for conversation, ids in of_row:
                if (prompt := kept.accept(conversation, ids)) is not None:
                    if keep_originals:
                        originals[prompt.sample_id] = Original(conversation.messages, conversation.row)
                    yield prompt

    held_out: list[Prompt] = []

    def trained() -> Iterator[Prompt]:
        for prompt in islice(samples(), limit):
            if is_held_out(prompt.sample_id, validation_fraction, turns):
                held_out.append(prompt)
            else:
                yield prompt

    dataset = PromptDataset(trained())
    dataset.originals = originals
    dataset.report = kept.report(len(dataset) + len(held_out))
    if validation_fraction:
        if not len(dataset) or not held_out:
            found = f"of {dataset.report.samples} samples of {label} {len(held_out)} are held out"
            raise DataError(
                f"dataset.validation_fraction={validation_fraction}: {found}, expected some and not all. "
                "Change the fraction, or set 0 and name a validation_dataset."
            )
        dataset.held_out = PromptDataset(held_out)
        dataset.held_out.originals = originals
        dataset.settings = {"validation_fraction": validation_fraction}
    return dataset


def is_held_out(sample_id: str, fraction: float, turns: Turns = "last") -> bool:
    """Whether ``validation_fraction`` holds a sample out."""
    if not fraction:
        return False
    of_row = re.sub(r"#turn\d+$", "", sample_id) if turns == "all" else sample_id
    digest = hashlib.blake2b(f"validation {of_row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_fits_model(
    model: nn.Module, tokenizer: PromptTokenizer, stop_token_ids: Sequence[int], *datasets: PromptSource
) -> None:
    """Checks that the model has an embedding for every token that it will meet, and a position; a tokenizer may know
    more. A DataError if a sample or a stop token has an id beyond the model's vocabulary, a sample is longer than its
    context."""
    rows = model.tok_embeddings.weight.shape[0]
    found = [f"stop token {token}" for token in stop_token_ids if not 0 <= token < rows]
    for dataset in datasets:
        if dataset.longest > model.max_seq_len:
            raise DataError(
                f"the longest sample has {dataset.longest:,} tokens, the model's context is {model.max_seq_len:,}: "
                "leave longer ones out. A function of your own is given that limit as max_seq_len."
            )
        if (outside := dataset.first_outside(rows)) is not None:
            found.append(f"sample {outside[0]!r} has the token id {outside[1]}")
    if found:
        raise DataError(
            f"the tokenizer knows {tokenizer.vocab_size} token ids, the model's vocabulary has {rows} (ids 0 to "
            f"{rows - 1}): {'; '.join(found)}. Does the tokenizer belong to this model? If tokens were added to it, "
            "start from a checkpoint whose embeddings were resized, and give the model's builder its vocab_size."
        )


def unknown_ids(model: nn.Module, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """The ids of a model's vocabulary that no token of the tokenizer has, ascending: padding of the vocabulary, and
    holes in it. They are not to be sampled. A tokenizer without ``known_ids`` knows all below its ``vocab_size``."""
    known = getattr(tokenizer, "known_ids", None) or range(tokenizer.vocab_size)
    return tuple(token for token in range(model.tok_embeddings.weight.shape[0]) if token not in known)


def row_parser(
    options: Mapping[str, Any], message_transform: MessageTransform | None
) -> Callable[[Row], list[Conversation]]:
    """What gives the conversations in a row, or the one fault that stands for it, by arguments of
    :func:`prompt_dataset`."""
    parse = partial(
        row_to_messages, row_format=options.get("format", "auto"), column_map=options.get("column_map"),
        message_transform=message_transform, system_prompt=options.get("system_prompt"),
    )  # fmt: skip
    return partial(_conversations_of, parse, options.get("id_column", "id"), options.get("turns", "last"))


def _conversations_of(parse: Callable[..., Any], id_column: str, turns: Turns, row: Row) -> list[Conversation]:
    notes = RowNotes(used={id_column: None})
    try:
        if row.error is not None:
            raise DataError(f"{row.error} or set dataset.on_bad_row=skip.")
        sample_id = _sample_id(row, id_column)
        messages = parse(row.data, from_arrow=row.from_arrow, notes=notes)
    except DataError as error:
        return [Conversation(row.where, row.default_id, fault=error)]
    return [
        Conversation(row.where + mark, sample_id + mark, part, row=row.data, notes=notes)
        for mark, part in split_turns(messages, turns)
    ]


def _encoded(
    rows: Iterator[Row], tokenizer: PromptTokenizer, converse: Callable[[Row], list[Conversation]], chunk: int
) -> Iterator[EncodedRow]:
    """The conversations of each row with their token ids, or what is wrong with them."""
    while of_rows := [converse(row) for row in islice(rows, chunk)]:
        usable = [each.messages for of_row in of_rows for each in of_row if each.fault is None]
        ids = iter(encode_all(tokenizer, usable))
        yield from ([(each, next(ids) if each.fault is None else each.fault) for each in of_row] for of_row in of_rows)


def encode_all(tokenizer: PromptTokenizer, conversations: Sequence[list[ChatMessage]]) -> list[Encoded | DataError]:
    """The token ids of conversations, at once where the tokenizer can, or what is wrong with each."""
    if batched := getattr(tokenizer, "encode_pairs", None):
        return list(batched(conversations))
    return [or_error(tokenizer.encode_pair, each) for each in conversations]


def _sample_id(row: Row, id_column: str) -> str:
    value = row.data.get(id_column)
    if isinstance(value, str) and value.strip():
        check_text(value, f"the id {value!r}")
        return value
    if type(value) is int:
        return str(value)
    if value is not None and value != "":
        raise bad_row(f"column {id_column!r} holds {value!r:.60}, expected a text or a whole number.")
    if id_column != "id":
        found = ", ".join(map(str, row.data)) or "none"
        raise DataError(
            f"column {id_column!r} is empty or missing; found columns {found}. Fix the row or dataset.id_column."
        )
    return row.default_id


def _check_options(rules: SampleRules, turns: str, limit: int | None, validation_fraction: float) -> None:
    longest, prompt, long_actions = rules.max_seq_len, rules.max_prompt_tokens, ("error", "drop", "cut")
    choices = (
        ("on_long_prompt", rules.on_long_prompt, long_actions),
        ("on_long_response", rules.on_long_response, long_actions),
        ("on_bad_row", rules.on_bad_row, ("error", "skip")),
        ("turns", turns, ("last", "all")),
    )
    numbers = (
        ("max_seq_len", longest, 2),
        ("dataset.max_prompt_tokens", prompt, 1),
        ("dataset.max_response_tokens", rules.max_response_tokens, 1),
        ("dataset.limit", limit, 1),
    )
    faults = [
        f"dataset.{key}={value}: expected {' or '.join(allowed)}."
        for key, value, allowed in choices
        if value not in allowed
    ] + [
        f"{label}={value}: expected a whole number of {least} or more, or null."
        for label, value, least in numbers
        if value is not None and not (type(value) is int and value >= least)
    ]
    if not (isinstance(validation_fraction, int | float) and 0 <= validation_fraction < 1):
        faults.append(f"dataset.validation_fraction={validation_fraction}: expected a number from 0 to below 1.")
    if type(longest) is int and type(prompt) is int and prompt >= longest:
        faults.append(
            f"dataset.max_prompt_tokens={prompt} leaves no room for a response in max_seq_len={longest}; expected at "
            f"most {longest - 1}."
        )
    if faults:
        raise ConfigError("\n".join(faults))
