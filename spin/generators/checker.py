"""After play, a function of the user's own may say of each response whether it is right (``pairs.checker``).

This is information from outside, which self-play alone does not have. Verdicts are kept in a pair store of their own:
so a checker is called once for a response, and one that has changed does not cost the responses.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from spin.config import code_of, component_of
from spin.config.components import raised_in
from spin.config.schema import Checker
from spin.core.errors import CheckerError, OutputError, StoreError
from spin.core.files import json_fingerprint
from spin.core.heartbeat import set_stage
from spin.core.progress import Stage, stage
from spin.core.ranks import CountOfRanks, World, any_rank_soon, broadcast_object, raise_on_all_ranks
from spin.core.redact import redacted
from spin.data.tokenizer import PromptTokenizer
from spin.pairs.shards import missing_shards, open_store, seal
from spin.pairs.store import PairStore
from spin.types import Pair, Response, Verdict

log = logging.getLogger(__name__)


def check_responses(
    folders: Sequence[Path],
    section: Checker | None,
    tokenizer: PromptTokenizer,
    world: World,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """The checker says of the responses that were played into folders whether they are right, into the store
    ``checked`` of each, which is ``responses`` with verdicts; those that are there stay. Collective.

    Gives the fractions of the last folder's responses by verdict, as the log names them; nothing without a checker.
    Raises Stopped if any rank was asked to stop before all were checked, CheckerError on all ranks if the checker
    failed, OutputError likewise if a store cannot be written.
    """
    if section is None:
        return {}
    check, arguments = component_of(section), section.model_extra or {}
    verdict_of = partial(_verdict_of, section.component, partial(check, **arguments), tokenizer)
    made_by = {
        "component": section.component,
        "arguments": redacted(arguments),
        "source": code_of(check),  # of its file alone
    }
    for folder in folders:
        responses = PairStore.open(folder / "responses")
        made_from = json_fingerprint([responses.manifest["fingerprint"], responses.manifest["shards"]])
        fingerprint = {"opponent": responses.opponent, "responses": made_from, "checker": made_by}
        store = open_store(folder / "checked", fingerprint, responses.num_shards, world)
        sizes, missing = [shard["rows"] for shard in responses.manifest["shards"]], missing_shards(store, world)
        left = sum(sizes[shard] for shard in missing)
        with stage("check", "response", sum(sizes), sum(sizes) - left) as bar:
            _check_shards(responses, store, missing, verdict_of, world, bar, should_stop)
        seal(store, world, should_stop())
    found: dict[str, float] = {}
    with raise_on_all_ranks(world, StoreError):
        if world.is_main:
            counts = store.count_verdicts()
            found = {f"{verdict}_fraction": counts[verdict] / counts.total() for verdict in get_args(Verdict)}
            shown = ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in get_args(Verdict))
            log.info(f"{section.component} on {counts.total():,} responses of {folders[-1]}: {shown}")
    return broadcast_object(found, world)


def _check_shards(
    responses: PairStore,
    store: PairStore,
    missing: Sequence[int],
    verdict_of: Callable[[Pair, Response], Verdict],
    world: World,
    bar: Stage,
    should_stop: Callable[[], bool],
) -> None:
    """Each rank its part of the shards, a response after another; a shard's journal has the verdicts so far."""
    set_stage("checking responses")
    count, should_stop = CountOfRanks(), any_rank_soon(should_stop)
    with raise_on_all_ranks(world, OutputError):
        for shard in missing[world.rank :: world.world_size]:
            pairs, journal = responses.read_shard(shard), store.journal(shard)
            asked = [(pair, response) for pair in pairs for response in pair.generated]
            found = journal.read(len(asked))
            for index, (pair, response) in enumerate(asked):
                if should_stop():
                    break
                if index not in found:
                    ids = list(map(int, response.token_ids))
                    found[index] = replace(response, token_ids=ids, verdict=verdict_of(pair, response))
                    journal.append(index, found[index])
                bar.update(count.add(1))
            else:
                checked = iter([found[index] for index in range(len(asked))])
                done = [replace(pair, generated=list(islice(checked, len(pair.generated)))) for pair in pairs]
                store.write_shard(shard, done)
        bar.update(count.add(0, look=True))
    bar.update(count.add(0, look=True))  # all have added theirs


def _verdict_of(
    name: str, check: Callable[..., Any], tokenizer: PromptTokenizer, pair: Pair, response: Response
) -> Verdict:
    """What a checker says of a response; it gets the prompt as the template wrote it, and responses without special
    tokens. CheckerError if it raises, even what is no ``Exception`` (time limits of some libraries), or says something
    else. Ctrl-C names the response at which it hung."""
    by = f"pairs.checker: sample {pair.sample_id}: {name}"
    kept = "The responses and the verdicts so far are kept: correct it, and rerun the same command to resume."
    here = os.getcwd()  # to which the run's paths may be relative
    try:
        said = check(
            prompt=tokenizer.decode(list(map(int, pair.prompt_ids))),
            real=tokenizer.decode(list(map(int, pair.real_ids)), skip_special_tokens=True),
            generated=tokenizer.decode(list(map(int, response.token_ids)), skip_special_tokens=True),
            truncated=response.truncated,
        )
    except KeyboardInterrupt:
        log.warning(f"{by} had not returned; let it end what may hang. {kept}")
        raise
    except BaseException as error:  # noqa: BLE001 - code of the user's own may raise anything
        raised = raised_in(name, error)
        raise CheckerError(f"{by} raised {raised}. {kept} SPIN_TRACEBACK=1 shows where it happened.") from error
    finally:
        os.chdir(here)
    if said is None:
        return "unknown"
    if isinstance(said, bool | np.bool_):
        return "right" if said else "wrong"
    raise CheckerError(
        f"{by} returned {reprlib.repr(said)} of type {type(said).__name__}, expected True (right), False (wrong) or "
        f"None (unknown). {kept}"
    )
