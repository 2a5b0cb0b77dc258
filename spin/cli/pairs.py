"""``spin pairs``: shows, filters and exports the responses in a pair store."""

from __future__ import annotations

import argparse
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import OmegaConf

from spin import config
from spin.cli import parser_of
from spin.core.errors import ConfigError, StoreError
from spin.core.files import check_new_file, write_json_lines
from spin.core.terminal import counted, printable
from spin.types import Verdict

if TYPE_CHECKING:  # torch and pyarrow are loaded when a store is read
    from spin.data import Pair, PairStore, Response

    Item = tuple[Pair, int, Response]  # a pair, the number of one of its responses, the response

_QUANTILES = (0, 10, 50, 90, 100)  # per cent


def main(argv: Sequence[str]) -> None:
    """Shows, filters and exports a pair store."""
    parser = parser_of("pairs", "Count a pair store's responses, show a sample of them, export them as JSON Lines.")
    parser.epilog = (
        "A margin is the opponent's log-prob of the real less that of the generated response, in nats; it stands in "
        "scored stores (iteration_NNN/pairs). Filters hold for the counts, the sample and the export."
    )
    parser.add_argument("store", type=Path, help="such as runs/quickstart/iteration_000/pairs")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="show N responses, drawn at random")
    parser.add_argument("--check", action="store_true", help="only read every shard, and compare checksums and origin")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--min-margin", type=float, metavar="NATS")
    parser.add_argument("--max-margin", type=float, metavar="NATS")
    parser.add_argument("--min-length", type=int, metavar="TOKENS", help="of the generated response")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="of the generated response")
    parser.add_argument("--finish", choices=("stop", "length"), help="length: truncated responses")
    parser.add_argument("--verdict", choices=get_args(Verdict), help="of pairs.checker")
    parser.add_argument("--export", type=Path, metavar="FILE.jsonl", help="write the responses as JSON Lines")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's, if it is a ChatTokenizer")
    parser.add_argument("--trust", action="store_true", help="take that tokenizer from another user's run too")
    arguments = parser.parse_args(argv)
    if arguments.sample < 0:
        parser.error(f"--sample {arguments.sample}: expected 0 or more")
    if arguments.export:
        check_new_file(arguments.export, "Choose another name, or remove it.")

    from spin.data import PairStore

    store = PairStore.open(arguments.store)
    if arguments.check:
        faults = store.faults()
        if faults:
            raise StoreError("\n".join(faults))
        state = "sealed" if store.is_sealed else "not sealed"
        shards = f"{counted(store.num_shards, 'shard')} ({state})"
        print(f"{printable(store.path)}: {shards}, complete, unchanged, and of this store")
        return
    items = [item for item in _items(store) if _passes(item, arguments)]
    print(printable("\n".join(summary_lines(store, items))))
    if not arguments.sample and arguments.export is None:
        return
    decode = _decoder(arguments.store, arguments.tokenizer, arguments.trust)
    rows = [_row(item, decode) for item in items] if arguments.export else []
    for item in random.Random(arguments.seed).sample(items, min(arguments.sample, len(items))):
        row = _row(item, decode)
        margin = "" if row["margin"] is None else f", margin {row['margin']:.2f} nats"
        sample_id = printable(row["sample_id"], one_line=True)
        verdict = "" if row["verdict"] is None else f", verdict {row['verdict']}"
        print(f"\n--- {sample_id} #{row['k']}, finish reason {row['finish_reason']}{verdict}{margin}")
        for column in ("prompt", "real", "generated"):
            print(f"[{column}] {printable(row[column])}")
    if arguments.export:
        write_json_lines(arguments.export, rows)
        print(f"\n{counted(len(rows), 'response')} -> {printable(arguments.export)}")


def summary_lines(store: PairStore, items: Sequence[Item]) -> list[str]:
    """Counts, lengths and margins of some of a store's responses."""
    import numpy as np

    present = sum(map(store.has_shard, range(store.num_shards)))
    state = "sealed" if store.is_sealed else "not sealed: being written, or its run ended"
    lines = [
        f"{store.path}: {present} of {counted(store.num_shards, 'shard')}, {state}",
        f"opponent        {store.opponent}",
    ]
    pairs = {pair.key for pair, _, _ in items}
    lines.append(f"responses       {len(items):,} to {counted(len(pairs), 'prompt')}")
    if not items:
        return lines
    truncated = sum(response.truncated for _, _, response in items)
    equal = sum(np.array_equal(response.token_ids, pair.real_ids) for pair, _, response in items)
    lines.append(f"truncated       {truncated} ({truncated / len(items):.1%})")
    lines.append(f"equal to real   {equal}")
    for verdict, count in Counter(response.verdict for _, _, response in items).items():
        lines += [] if verdict is None else [f"{verdict:<15} {count} ({count / len(items):.1%})"]
    columns: dict[str, list[float]] = {
        "prompt": [len(pair.prompt_ids) for pair, _, _ in items],
        "real": [len(pair.real_ids) for pair, _, _ in items],
        "generated": [len(response.token_ids) for _, _, response in items],
    }
    margins = [margin for item in items if (margin := margin_of(item)) is not None]
    if margins:
        columns["margin"] = margins
    lines.append("                 " + "".join(f"{f'{q} %':>9}" for q in _QUANTILES) + f"{'mean':>9}")
    for name, values in columns.items():
        unit, digits = ("nats", 2) if name == "margin" else ("tokens", 0)
        numbers = [*np.percentile(values, _QUANTILES), np.mean(values)]
        lines.append(f"{f'{name}, {unit}':<17}" + "".join(f"{number:>9.{digits}f}" for number in numbers))
    return lines


def margin_of(item: Item) -> float | None:
    """The opponent's log-prob of the real less that of the generated response, in nats."""
    pair, _, response = item
    if pair.reference_real_logp is None or response.reference_logp is None:
        return None
    return pair.reference_real_logp - response.reference_logp


def _items(store: PairStore) -> Iterator[Item]:
    for shard in range(store.num_shards):
        if store.is_sealed or store.has_shard(shard):
            for pair in store.read_shard(shard):
                yield from ((pair, k, response) for k, response in enumerate(pair.generated))


def _passes(item: Item, arguments: argparse.Namespace) -> bool:
    _, _, response = item
    margin = margin_of(item)
    if margin is None and (arguments.min_margin, arguments.max_margin) != (None, None):
        raise StoreError(f"{arguments.store}: is not scored, so no margin is known. Look into iteration_NNN/pairs.")
    limits = (
        (margin, arguments.min_margin, arguments.max_margin),
        (len(response.token_ids), arguments.min_length, arguments.max_length),
    )
    is_within = all((least is None or n >= least) and (most is None or n <= most) for n, least, most in limits)
    asked = ((arguments.finish, response.finish_reason), (arguments.verdict, response.verdict))
    return is_within and all(wanted in (None, found) for wanted, found in asked)


def _decoder(store: Path, folder: Path | None, trust: bool) -> Callable[[Sequence[int]], str]:
    """The tokenizer that was given, else the ChatTokenizer of the run around a store; nothing else is built."""
    from spin.data import ChatTokenizer
    from spin.run.folder import read_config

    if folder is not None:
        return ChatTokenizer(folder).decode
    for parent in store.resolve().parents:
        cfg = read_config(parent)
        if cfg is None:
            continue
        section = config.plain(cfg).get("tokenizer")
        section = section if isinstance(section, dict) else {}
        file = parent / "config.yaml"
        if section.get(config.COMPONENT) != "spin.data.ChatTokenizer" or not isinstance(section.get("path"), str):
            raise ConfigError(
                f"{file}: tokenizer is no spin.data.ChatTokenizer with a path, and looking at a run builds nothing "
                "else. Give --tokenizer FOLDER, a Hugging Face folder with the same tokenizer."
            )
        if not trust and any(path.stat().st_uid != os.getuid() for path in (parent, file)):
            raise ConfigError(
                f"{parent}: belongs to another user, so the tokenizer that its config names ({section['path']}) is not "
                "opened. Give --tokenizer FOLDER, or --trust if you trust that user."
            )
        path = OmegaConf.create({"path": section["path"]}).path  # of the environment, perhaps
        return ChatTokenizer(path).decode
    raise ConfigError(f"{store}: no config.yaml of a run in the folders above it. Give --tokenizer.")


def _row(item: Item, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    pair, k, response = item
    ids = {"prompt": pair.prompt_ids, "real": pair.real_ids, "generated": response.token_ids}
    return {
        "sample_id": pair.sample_id,
        "iteration": pair.iteration,
        "k": k,
        **{name: decode(list(map(int, tokens))) for name, tokens in ids.items()},
        **{f"{name}_tokens": len(tokens) for name, tokens in ids.items()},
        "finish_reason": response.finish_reason,
        "verdict": response.verdict,
        "reference_real_logp": pair.reference_real_logp,
        "reference_generated_logp": response.reference_logp,
        "margin": margin_of(item),
    }
