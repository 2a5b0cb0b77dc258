"""From the records of runs to a page: HTML sections, the numbers of the charts, and one file with both."""

from __future__ import annotations

import hashlib
import itertools
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import fmean as mean
from typing import Any, get_args

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import spin
from spin.config.interpolation import configs_root
from spin.core.hub import hub_name
from spin.core.terminal import clock, counted, printable
from spin.core.texts import marked, plain_text, turns
from spin.report.advice import LN_2, advice, verdict
from spin.report.record import IterationRecord, RunRecord, is_number
from spin.types import Verdict

SECTIONS = ("summary", "prompts", "evaluation", "iterations", "responses", "configs")  # macros of sections.html
STAGES = ("play", "score", "fit", "validate")
MOST_POINTS = 1000  # of a line; of more, so many means are drawn over their range
MOST_PROMPTS = 50  # of fixed_prompts.jsonl
BY_SOURCE = "val_loss/"
# title: lines of metric, label, and whether they are dots: measured at some steps only
CHARTS = {
    "Loss": (("loss", "training", 0), ("total_loss", "total", 0), ("val_spin_loss", "validation", 1)),
    "acc: fraction of pairs won": (("acc", "training", 0), ("val_acc", "validation", 1)),
    "Margin: reward of real less generated": (("margin", "training", 0), ("val_margin", "validation", 1)),
    "Rewards": (("rewards_actual_mean", "real", 0), ("rewards_generated_mean", "generated", 0)),
    "Log-prob against the opponent's, nats": (("real_logp_drift", "real", 0), ("generated_logp_drift", "generated", 0)),
    "Validation loss, nats per token": (("val_loss", "real responses", 1),),
    "Length of responses, tokens": (("avg_generated_lengths", "generated", 0), ("real_tokens", "real", 0)),
    "Truncated fraction of generated responses": (("truncated_fraction", "training", 0),),
    "Responses by the checker's verdict": (
        *((f"{name}_fraction", name, 0) for name in get_args(Verdict)),
        ("val_right_fraction", "right, held-out prompts", 0),
    ),
    "Gradient norm": (("grad_norm", "before clipping", 0),),
    "Generator off the policy, nats per token": (("generator/logprob_gap", "mean gap", 1),),
    "Speed, pairs per second": (("pairs_per_second", "training step", 0),),
}
# metric, label, and the direction that is good
TILES = (("loss", "loss", -1), ("acc", "acc", 1), ("margin", "margin", 1), ("val_loss", "validation loss", -1))
_HERE = Path(__file__).parent


def render(*runs: RunRecord, evaluations: Sequence[Mapping[str, Any]] = (), version: int | None = None) -> str:
    """The page of runs as far as they have come.

    Args:
        *runs (RunRecord): the runs, compared in the same charts.
        evaluations (Sequence[Mapping[str, Any]]): summaries of spin_evaluate besides those in the runs' folders.
        version (int | None): if given, the page asks the server that it came from for what is new since.

    Returns:
        str: HTML that needs nothing else; whatever is the runs' is escaped.
    """
    style = Markup(_file("uPlot.min.css") + _file("page.css"))  # nosec B704
    notice = f"/*!\n{_file('uPlot.LICENSE')}\n*/\n"
    script = Markup(notice + _file("uPlot.iife.min.js") + _file("page.js"))  # nosec B704
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        f"connect-src '{'none' if version is None else 'self'}'; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(chart_data(runs) | {"version": version}, allow_nan=False).replace("<", r"\u003c")
    return _templates().get_template("page.html").render(
        title=", ".join(names_of(runs)), sections=sections(runs, evaluations), style=style, script=script,
        policy=policy, data=Markup(data), is_live=version is not None, version=spin.__version__,  # nosec B704
    )  # fmt: skip


@cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _templates() -> Environment:
    # autoescape: prompts and responses are whatever people and models write
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_shown
    )
    environment.filters |= {
        "seconds": clock,
        "turns": turns,
        "plain": plain_text,
        "percent": percent,
        "number": number,
    }
    return environment


def _shown(value: Any) -> Any:
    """Control characters and marks of direction in foreign text are to be seen."""
    return value if isinstance(value, Markup) else printable(value)


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    names = [run.path.resolve().name for run in runs]
    return [printable(n if names.count(n) == 1 else run.path) for n, run in zip(names, runs, strict=True)]


def sections(runs: Sequence[RunRecord], evaluations: Sequence[Mapping[str, Any]] = ()) -> dict[str, Markup]:
    """The HTML of each section of a page besides its charts, by id."""
    template = _templates().get_template("sections.html")
    views = [
        {
            "name": name, "run": run, "state": state_of(run), "verdict": verdict(run), "facts": _facts(run),
            "tiles": _tiles(run), "advice": [*advice(run), *run.remarks],
            "table": [_table_row(iteration) for iteration in run.iterations], "prompts": _prompt_table(run),
            "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        }
        for name, run in zip(names_of(runs), runs, strict=True)
    ]  # fmt: skip
    found = [_evaluation_row(each) for each in [*itertools.chain(*(run.evaluations for run in runs)), *evaluations]]
    macros = template.make_module({"views": views, "evaluations": found})
    return {name: getattr(macros, name)() for name in SECTIONS}


def state_of(run: RunRecord) -> str:
    """Where the run stands, in a sentence."""
    written = None if run.written_at is None else datetime.fromtimestamp(run.written_at, timezone.utc)
    when = "" if written is None else f" Last written {written:%Y-%m-%d %H:%M:%S} UTC."
    if run.is_finished:
        return f"Finished after {counted(run.last_step, 'step')}.{when}"
    at = f"at step {run.last_step}, in iteration {run.iterations[-1].number}" if run.iterations else "not started"
    return f"Not finished: {at}. It runs, or was stopped; the same command resumes from its newest checkpoint.{when}"


# --- Charts ---


def chart_data(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What ``page.js`` draws: the charts that have numbers, and the numbers of each run, as JSON values."""
    curves = [curves_of(run) | {"name": name} for name, run in zip(names_of(runs), runs, strict=True)]
    there = set().union(*(run["y"] for run in curves))
    levels = {"Log-prob against the opponent's, nats": (0.0, "opponent")}
    if all(run.is_logistic for run in runs):
        levels["Loss"] = (LN_2, "ln 2: equal models")
    sources = [
        (name, printable(name.removeprefix(BY_SOURCE)), 1) for name in sorted(there) if name.startswith(BY_SOURCE)
    ]
    wanted = CHARTS | ({"Validation loss by source, nats per token": tuple(sources)} if sources else {})
    drawn = {title: [line for line in lines if line[0] in there] for title, lines in wanted.items()}
    charts = [{"title": title, "lines": lines, "level": levels.get(title)} for title, lines in drawn.items() if lines]
    return {"charts": charts, "runs": curves}


def curves_of(run: RunRecord) -> dict[str, Any]:
    """A run's metrics by step, as columns with None where nothing is known, which is where an iteration ends too.

    ``key`` changes when points that were given before are no longer right; else they only get more. ``low`` and
    ``high`` are there if a point is the mean of several steps.
    """
    size = 1 << max(0, (len(run.rows) - 1) // MOST_POINTS).bit_length()
    names = [name for lines in CHARTS.values() for name, _, _ in lines]
    names += sorted({name for row in run.rows for name in row if name.startswith(BY_SOURCE)})
    real_tokens = {iteration.number: iteration.mean_tokens.get("real") for iteration in run.iterations}
    x: list[float] = []
    columns: dict[str, dict[str, list[float | None]]]
    columns = {kind: {name: [] for name in names} for kind in ("y", "low", "high")}
    before = None
    for (_, iteration), numbered in itertools.groupby(
        enumerate(run.rows),
        key=lambda pair: (pair[0] // size, own if isinstance(own := pair[1].get("iteration"), int) else -1),
    ):
        part = [row for _, row in numbered]
        if x and iteration != before:
            x.append(part[0]["step"] - 0.5)
            for column in itertools.chain(*(found.values() for found in columns.values())):
                column.append(None)
        before = iteration
        x.append(part[-1]["step"])
        for name in names:
            values = [value for row in part if is_number(value := row.get(name)) and abs(value) < 1e100]
            if name == "real_tokens" and (tokens := real_tokens.get(iteration)) is not None:
                values = [tokens]
            for kind, of in (("y", mean), ("low", min), ("high", max)):
                columns[kind][name].append(float(f"{of(values):.6g}") if values else None)
    there = [name for name in names if any(value is not None for value in columns["y"][name])]
    word = "iteration " if len(run.iterations) < 4 else ""  # more would not fit
    return {
        "key": f"{run.times_replaced}-{size}-{len(there)}",
        "marks": [[i.steps[0]["step"], f"{word}{i.number}"] for i in run.iterations if i.steps],
        "x": x,
        **{kind: {n: columns[kind][n] for n in there} for kind in (("y",) if size == 1 else ("y", "low", "high"))},
    }


# --- Sections ---


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    folder = run.config.get("checkpointer", {})
    folder = folder.get("checkpoint_dir") if isinstance(folder, dict) else None
    first, last = (run.starts[0], run.starts[-1]) if run.starts else ({}, {})
    resumed = f", resumed {len(run.starts) - 1} times, last at step {last.get('step')}" if len(run.starts) > 1 else ""
    facts = {
        "model": (hub_name(folder) or folder) if isinstance(folder, str) else None,
        "data": run.data.replace(f"{configs_root()}/", "packaged:"),
        "hardware": last.get("hardware"),
        "started": f"{first.get('time')}{resumed}".replace("T", " ").replace("+00:00", " UTC") if first else None,
        "command": last.get("command"),
    }
    return [(label, str(value)) for label, value in facts.items() if value]


def _tiles(run: RunRecord) -> list[dict[str, str]]:
    values = [(label, [value for _, value in run.series(name)], good, number) for name, label, good in TILES]
    played = [iteration for iteration in run.iterations if iteration.responses]
    values += [
        ("responses, tokens", [iteration.mean_tokens["generated"] for iteration in played], 0, number),
        ("truncated", [iteration.truncated / iteration.responses for iteration in played], -1, percent),
    ]
    tiles = []
    for label, series, good, text in values:
        if not series:
            continue
        change = series[-1] - series[0]
        shown = text(abs(change)).replace("%", " points")
        is_equal = text(abs(change)) == text(0.0)
        tiles.append(
            {
                "label": label,
                "value": text(series[-1]),
                "change": "as at the start" if is_equal else f"{'▲' if change > 0 else '▼'} {shown}",
                "good": {-1: "lower is better", 0: "", 1: "higher is better"}[good],
                "kind": "" if is_equal or not good else "better" if change * good > 0 else "worse",
            }
        )
    total = sum(sum(iteration.seconds.values()) for iteration in run.iterations)
    done = {"label": "time", "value": clock(total), "change": counted(run.last_step, "step"), "good": "", "kind": ""}
    return tiles + ([done] if total else [])


def _table_row(iteration: IterationRecord) -> dict[str, Any]:
    steps = iteration.steps

    def last(name: str) -> str:
        values = [row[name] for row in steps if is_number(row.get(name))]
        return number(values[-1]) if values else ""

    return {
        "number": iteration.number,
        "steps": len(steps),
        "beta": last("beta"),
        "loss": f"{number(steps[0]['loss'])} → {number(steps[-1]['loss'])}" if steps else "",
        "acc": last("acc"),
        "margin": last("margin"),
        "drift": f"{last('real_logp_drift')} / {last('generated_logp_drift')}" if steps else "",
        "val_loss": last("val_loss"),
        "responses": f"{iteration.responses or ''}",
        "truncated": f"{iteration.truncated / iteration.responses:.0%}" if iteration.responses else "",
        "tokens": " / ".join(f"{value:.0f}" for value in iteration.mean_tokens.values()),
        "seconds": [*map(iteration.seconds.get, STAGES), iteration.compiling or None],
    }


def _prompt_table(run: RunRecord) -> dict[str, Any]:
    """The responses to fixed prompts, each compared with the one before it."""
    rows = [row for row in run.fixed_prompts if isinstance(row.get("iteration"), int)]
    by_place = {(str(row.get("sample_id")), row["iteration"]): row for row in rows}
    iterations = sorted({row["iteration"] for row in rows})
    table = []
    for sample in list(dict.fromkeys(sample for sample, _ in by_place))[:MOST_PROMPTS]:
        own = [by_place.get((sample, iteration)) for iteration in iterations]
        first = next(row for row in own if row)
        cells, before = [], None
        for row in own:
            response = str(row.get("response")) if row else None
            text = plain_text(response) if before is None or response is None else marked(before, response)
            cells.append((text, row is not None and row.get("finish_reason") == "length"))
            before = response if response is not None else before
        table.append({"prompt": first.get("prompt"), "real": first.get("real"), "cells": cells})
    heads = ["before self-play" if n == 0 else f"after iteration {n - 1}" for n in iterations]
    return {"heads": heads, "rows": table}


def _evaluation_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of a summary of spin_evaluate, which is as foreign as any file."""
    models = [found if isinstance(found := summary.get(role), dict) else {} for role in ("candidate", "baseline")]
    interval = summary.get("win_rate_interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return {
        "names": [str(model.get("name", "")) for model in models],
        "verdict": str(summary.get("verdict", "")),
        "counts": [summary.get(name, "") for name in ("samples", "wins", "ties", "losses")],
        "rate": percent(summary.get("win_rate")) + (f" ({percent(low)} to {percent(high)})" if low is not None else ""),
        "p": number(summary.get("sign_test_p")),
        **{
            name: " / ".join(text(model.get(key)) for model in models)
            for name, key, text in (
                ("tokens", "mean_tokens", number), ("truncated", "truncated_fraction", percent),
                ("accuracy", "accuracy", percent),
            )
        },
    }  # fmt: skip


def percent(value: Any) -> str:
    """A fraction in percent; nothing for what is none."""
    return f"{value:.0%}" if is_number(value) else ""


def number(value: Any) -> str:
    """A number as a person writes it, with about four digits; nothing for what is none."""
    if not is_number(value):
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2g}"
