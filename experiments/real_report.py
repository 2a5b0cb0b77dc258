"""From the results of experiments/real_model.py's jobs to one JSON file, a page and pictures.

python experiments/real_report.py    # page and pictures again, from docs/experiments/real_model.json
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jobs import compact
from pages import drawing, fill_sections, save

from spin.core.files import write_json

PLAN = Path(__file__).with_name("real_model.yaml")

# column head, measurement, format; arrows say which way is better
COLUMNS = (
    ("held-out loss ↓", "val_loss", ".3f"),
    ("distinguished ↓", "classifier_text", ".3f"),
    ("by opening ↓", "classifier_opening", ".3f"),
    ("tokens", "response_tokens", ".0f"),
    ("truncated", "truncated_fraction", ".2f"),
    ("choices ↑", "choices_accuracy", ".3f"),
    ("sums ↑", "sums_accuracy", ".3f"),
    ("k tokens trained", "trained_tokens", ".0f"),
    ("s", "seconds", ".0f"),
)
LOSS = ("val_loss", "held-out loss, nats per token")
LENGTH = ("response_tokens", "tokens of a response (real ones have 25)")
# a picture: its file's ending, its two measurements, its arms with what a reader calls them
PICTURES = (
    (
        "fine_tuning",
        (LOSS, ("classifier_text", "real and generated told apart (0.5: not at all)")),
        {"spin": "SPIN", "sft": "SFT", "sft_slow": "SFT at SPIN's rate", "sft_spin": "SFT, then SPIN"},
    ),
    (
        "rate_and_beta",
        (LOSS, LENGTH),
        {"spin": "SPIN", "spin_fast": "rate 1e-5", "spin_beta1": "beta 1", "spin_schedule": "the paper's schedule"},
    ),
    (
        "options",
        (LOSS, LENGTH),
        {"spin": "SPIN", "spin_epochs2": "two epochs", "spin_history_all": "all earlier opponents",
         "spin_drop_truncated": "truncated ones dropped"},
    ),
)  # fmt: skip
START = "start"
EMPTY_PAGE = "# Self-play with a real model\n\n<!-- figures: real_model -->\n<!-- figures: end -->\n"

Results = list[dict[str, Any]]


def curves(results: Results) -> dict[str, list[dict[str, list[float]]]]:
    """What was measured, by arm and iteration: each measurement's values over the seeds that got there.

    The start is iteration 0 of every arm, where its own arm was run with the same seed.

    Args:
        results (Results): of the jobs.

    Returns:
        dict[str, list[dict[str, list[float]]]]: by arm; a list by iteration; values by measurement.
    """
    starts = {result["seed"]: result["iterations"][:1] for result in results if result["arm"] == START}
    arms: dict[str, list[dict[str, list[float]]]] = {}
    for result in results:
        iterations = result["iterations"]
        if result["arm"] != START:
            iterations = [*starts.get(result["seed"], [{}]), *iterations]
        curve = arms.setdefault(result["arm"], [])
        for number, measured in enumerate(iterations):
            if number == len(curve):
                curve.append({})
            for name, value in measured.items():
                if isinstance(value, (int, float)):
                    curve[number].setdefault(name, []).append(value)
    return arms


def cell(values: Sequence[float], form: str) -> str:
    """Mean, and with several seeds the standard deviation between them."""
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def table(results: Results, order: Sequence[str]) -> str:
    """A line for each arm, as it was after its last iteration.

    Args:
        results (Results): of the jobs.
        order (Sequence[str]): arms; those without a result are left out.

    Returns:
        str: Markdown.
    """
    arms = curves(results)
    lines = ["| arm | seeds | iterations | " + " | ".join(head for head, _, _ in COLUMNS) + " |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 3))
    for arm in order:
        # a job that was cut short has no last iteration
        done = [result for result in results if result["arm"] == arm and result["finished"]]
        if not done:
            continue
        starts = [result for result in results if result["arm"] == START and arm != START]
        last = curves(starts + done)[arm][-1]
        cells = []
        for _, name, form in COLUMNS:
            values = [value / 1000 for value in last.get(name, [])] if name == "trained_tokens" else last.get(name, [])
            cells.append(cell(values, form))
        iterations = len(arms[arm]) - 1
        lines.append(f"| `{arm}` | {len(done)} | {iterations} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unfinished(results: Results) -> str:
    """The jobs that failed or were cut short, a line each; a sentence if there is none."""
    lines = [
        f"- `{result['arm']}-seed{result['seed']}`: {result['error'] or 'cut short by the deadline'} "
        f"(after {len(result['iterations'])} iterations)"
        for result in results
        if not result["finished"]
    ]
    return "\n".join(lines) or "Every job ran to its end."


def draw(results: Results, out: Path) -> None:
    """The pictures: two panels each, lines named at their ends, a band of one standard deviation.

    Args:
        results (Results): of the jobs.
        out (Path): folder of ``real_model_NAME.svg``.
    """
    pyplot = drawing()
    arms = curves(results)
    for picture, measurements, titles in PICTURES:
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
        for panel, (name, label) in zip(panels, measurements, strict=True):
            ends = []
            for number, arm in enumerate(arm for arm in titles if arm in arms):
                by_iteration = [measured[name] for measured in arms[arm] if name in measured]
                at = range(len(arms[arm]) - len(by_iteration), len(arms[arm]))
                means = [statistics.mean(each) for each in by_iteration]
                spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in by_iteration]
                low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                panel.plot(at, means, color=f"C{number}")
                panel.fill_between(at, low, high, alpha=0.15, color=f"C{number}", linewidth=0)
                ends.append((means[-1], at[-1], titles[arm], f"C{number}"))
            room = 0.075 * (panel.get_ylim()[1] - panel.get_ylim()[0])  # between two names
            free = -float("inf")
            for value, last, title, colour in sorted(ends):
                free = max(value, free + room)
                panel.annotate(title, (last, free), (6, 0), textcoords="offset points", color=colour, va="center")
            panel.set_title(label, fontsize="medium")
            panel.set_xlabel("iteration")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.spines[["top", "right"]].set_visible(False)
        save(figure, out / f"real_model_{picture}.svg")


def figures(results: Results, order: Sequence[str]) -> str:
    """What stands between the page's marks.

    Args:
        results (Results): of the jobs.
        order (Sequence[str]): arms.

    Returns:
        str: Markdown.
    """
    devices = ", ".join(sorted({result["device"] or "an unknown device" for result in results}))
    return "\n\n".join(
        [
            f"{len(results)} jobs, on {devices}. Mean and standard deviation over seeds.",
            "After the last iteration:",
            table(results, order),
            unfinished(results),
        ]
    )


def write_report(results: Results, out: Path, order: Sequence[str]) -> None:
    """Writes real_model.json, the pictures and the figures in real_model.md; nothing if there is no result.

    Args:
        results (Results): of the jobs.
        out (Path): where to.
        order (Sequence[str]): arms, as the page lists them.
    """
    if not any(result["iterations"] for result in results):
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "real_model.json", {"jobs": compact(results)})
    draw(results, out)
    page = out / "real_model.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else EMPTY_PAGE
    page.write_text(fill_sections(text, {"real_model": figures(results, order)}), encoding="utf-8")
    print(f"{page}\n{table(results, order)}")


def published() -> tuple[Results, Path, list[str]]:
    """What :func:`write_report` takes to write the documentation's page again."""
    docs = Path(__file__).resolve().parents[1] / "docs" / "experiments"
    jobs = json.loads((docs / "real_model.json").read_text(encoding="utf-8"))["jobs"]
    return jobs, docs, list(yaml.safe_load(PLAN.read_text(encoding="utf-8"))["forms"]["full"]["arms"])


if __name__ == "__main__":
    write_report(*published())
