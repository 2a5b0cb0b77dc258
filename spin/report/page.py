"""From a run's record to the page."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

import spin
from spin.core.terminal import printable
from spin.report.advice import LN_2, advice
from spin.report.charts import Chart, Series, number
from spin.report.record import IterationRecord, RunRecord, is_number

STAGES = ("play", "score", "fit", "validate")


def render(run: RunRecord) -> str:
    """The page of a run as far as it has come: HTML that needs nothing else, with whatever is the run's escaped."""
    return _template().render(
        run=run,
        name=run.path.resolve().name,
        state=state_of(run),
        version=spin.__version__,
        facts=_facts(run),
        advice=advice(run),
        table=[_table_row(iteration) for iteration in run.iterations],
        has_times=any(iteration.seconds for iteration in run.iterations),
        charts=charts_of(run),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    # autoescape: prompts and responses are whatever people and models write
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_shown
    )
    environment.filters["seconds"] = duration
    return environment.get_template("page.html")


def _shown(value: Any) -> Any:
    """Control characters and marks of direction in foreign text are to be seen; a drawing has none."""
    return value if isinstance(value, Markup) else printable(value)


def state_of(run: RunRecord) -> str:
    """Where the run stands, in a sentence."""
    if run.is_finished:
        return f"Finished after {run.last_step} steps."
    written = None if run.written_at is None else datetime.fromtimestamp(run.written_at, timezone.utc)
    when = "" if written is None else f" Last written {written:%Y-%m-%d %H:%M:%S} UTC."
    at = f"at step {run.last_step}, in iteration {run.iterations[-1].number}" if run.iterations else "not started"
    return f"Not finished: {at}. It runs, or was stopped; the same command resumes from its newest checkpoint.{when}"


def charts_of(run: RunRecord) -> list[Chart]:
    """The figures for which a run has numbers."""
    word = "iteration " if len(run.iterations) < 4 else ""  # more would not fit
    marks = [(i.steps[0]["step"], f"{word}{i.number}") for i in run.iterations if i.steps]

    def lines(*names: tuple[str, str]) -> list[Series]:
        return [Series(label, run.series(name)) for name, label in names]

    def dots(name: str, label: str = "validation") -> Series:
        return Series(label, run.series(name), is_dots=True)

    real_tokens = [
        (step, iteration.mean_tokens["real"])
        for iteration in run.iterations
        if iteration.mean_tokens and iteration.steps
        for step in (iteration.steps[0]["step"], iteration.steps[-1]["step"])
    ]
    equal = (LN_2, "ln 2: equal models") if run.is_logistic else None
    drift = lines(("real_logp_drift", "real"), ("generated_logp_drift", "generated"))
    loss = lines(("loss", "training"), ("total_loss", "with NLL term"))
    lengths = [*lines(("avg_generated_lengths", "generated")), Series("real", real_tokens)]
    found = [
        Chart("Loss", [*loss, dots("val_spin_loss")], level=equal),
        Chart("acc: fraction of pairs won", [*lines(("acc", "training")), dots("val_acc")]),
        Chart("Margin: reward of real less generated", [*lines(("margin", "training")), dots("val_margin")]),
        Chart("Rewards", lines(("rewards_actual_mean", "real"), ("rewards_generated_mean", "generated"))),
        Chart("Log-prob against the opponent's, nats", drift, level=(0.0, "opponent")),
        Chart("Validation loss, nats per token", [dots("val_loss", "real responses")]),
        *_by_source(run),
        Chart("Length of responses, tokens", lengths),
        Chart("Truncated fraction of generated responses", lines(("truncated_fraction", "training"))),
        Chart("Gradient norm", lines(("grad_norm", "before clipping"))),
        Chart("Generator off the policy, nats per token", [dots("generator/logprob_gap", "mean gap")]),
        Chart("Speed, pairs per second", lines(("pairs_per_second", "training step"))),
    ]
    span = (float(min((row["step"] for row in run.rows), default=0)), float(run.last_step))
    return [replace(chart, marks=marks, span=span) for chart in found if chart.drawn]


def _by_source(run: RunRecord) -> list[Chart]:
    """The validation loss of each source of a mixture, as many to a chart as it has colours for."""
    prefix = "val_loss/"
    names = list(dict.fromkeys(name for row in run.rows for name in row if name.startswith(prefix)))
    series = [Series(printable(name.removeprefix(prefix)), run.series(name), is_dots=True) for name in names]
    return [Chart("Validation loss by source, nats per token", series[i : i + 3]) for i in range(0, len(series), 3)]


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    shown = {"loss": "loss", "acc": "acc", "margin": "margin", "val_loss": "validation loss"}
    facts = [(label, number(points[-1][1])) for name, label in shown.items() if (points := run.series(name))]
    total = sum(sum(iteration.seconds.values()) for iteration in run.iterations)
    return facts + ([("time", duration(total))] if total else [])


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
        "seconds": [iteration.seconds.get(stage) for stage in STAGES],
    }


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: ``12 s``, ``3 min 20 s``, ``2 h 05 min``; nothing for what is not known."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
