"""From the results of experiments/real_model.py's jobs to one JSON file, a page and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.core.files import write_json

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# column head, measurement, format; arrows say which way is better
COLUMNS = (
    ("held-out loss ↓", "val_loss", ".3f"),
    ("distinguished ↓", "classifier_text", ".3f"),
    ("by opening ↓", "classifier_opening", ".3f"),
    ("by length ↓", "classifier_length", ".3f"),
    ("tokens", "response_tokens", ".0f"),
    ("truncated", "truncated_fraction", ".2f"),
    ("repeated ↓", "repeated_4grams", ".3f"),
    ("distinct", "distinct_2grams", ".2f"),
    ("choices ↑", "choices_accuracy", ".3f"),
    ("sums ↑", "sums_accuracy", ".3f"),
    ("k tokens trained", "trained_tokens", ".0f"),
    ("s", "seconds", ".0f"),
)
PLOTS = (
    ("val_loss", "held-out loss, nats per token"),
    ("classifier_text", "classifier: accuracy, whole responses"),
    ("classifier_opening", "classifier: accuracy, openings"),
    ("response_tokens", "tokens of a response"),
    ("repeated_4grams", "repeated groups of 4 tokens"),
    ("choices_accuracy", "right choices"),
)
START = "start"

Results = list[dict[str, Any]]


def read_results(folder: Path) -> Results:
    """The results of all jobs, by name.

    Args:
        folder (Path): where they are.

    Returns:
        Results: may be empty.
    """
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


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


def by_iteration(results: Results, order: Sequence[str], name: str, form: str) -> str:
    """One measurement after each iteration, a line for each arm.

    Args:
        results (Results): of the jobs.
        order (Sequence[str]): arms.
        name (str): the measurement.
        form (str): of a number.

    Returns:
        str: Markdown.
    """
    arms = curves(results)
    most = max(len(curve) for curve in arms.values())
    lines = ["| arm | " + " | ".join("start" if i == 0 else f"iteration {i}" for i in range(most)) + " |"]
    lines.append("|---" * (most + 1) + "|")
    for arm in order:
        if arm in arms and arm != START:
            values = [cell(measured.get(name, []), form) for measured in arms[arm]]
            lines.append(f"| `{arm}` | " + " | ".join([*values, *["-"] * (most - len(values))]) + " |")
    return "\n".join(lines)


def unfinished(results: Results) -> str:
    """The jobs that failed or were cut short, a line each; a sentence if there is none."""
    lines = [
        f"- `{result['name']}`: {result['error'] or 'cut short by the deadline'} (after {len(result['iterations'])} "
        "iterations)"
        for result in results
        if not result["finished"]
    ]
    return "\n".join(lines) or "Every job ran to its end."


def plot(results: Results, order: Sequence[str], file: Path) -> None:
    """The measurements by iteration: a panel each, a line for each arm, a band of one standard deviation.

    Args:
        results (Results): of the jobs.
        order (Sequence[str]): arms.
        file (Path): an SVG file.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spin"  # the same file for the same results
    from matplotlib import pyplot

    arms = curves(results)
    shown = [arm for arm in order if arm in arms and arm != START]
    colours = pyplot.get_cmap("tab20")
    figure, panels = pyplot.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    for panel, (name, label) in zip(panels.flat, PLOTS, strict=True):
        for number, arm in enumerate(shown):
            points = [(i, measured[name]) for i, measured in enumerate(arms[arm]) if measured.get(name)]
            if not points:
                continue
            at, values = zip(*points, strict=True)
            means = [statistics.mean(each) for each in values]
            colour = colours(number % 20)
            panel.plot(at, means, marker="o", markersize=3, label=arm, color=colour)
            if any(len(each) > 1 for each in values):
                spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                panel.fill_between(at, low, high, alpha=0.1, color=colour, linewidth=0)
        panel.set(xlabel="iteration", title=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


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
            "Held-out loss by iteration:",
            by_iteration(results, order, "val_loss", ".3f"),
            "How well a classifier distinguishes real responses from generated ones, by iteration:",
            by_iteration(results, order, "classifier_text", ".3f"),
            "The same from the openings alone:",
            by_iteration(results, order, "classifier_opening", ".3f"),
            "![Measurements by iteration](real_model.svg)",
            unfinished(results),
        ]
    )


def replace_figures(page: str, content: str) -> str:
    """A page with the text between its marks replaced; a page without marks gets them at its end.

    Args:
        page (str): Markdown.
        content (str): Markdown.

    Returns:
        str: the new page.
    """
    if BEGIN not in page or END not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def write_report(jobs: Path, out: Path, order: Sequence[str]) -> None:
    """Writes real_model.json, real_model.svg and the figures in real_model.md; nothing if there is no result.

    Args:
        jobs (Path): folder of the jobs' results.
        out (Path): where to.
        order (Sequence[str]): arms, as the page lists them.
    """
    results = read_results(jobs)
    if not any(result["iterations"] for result in results):
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "real_model.json", compact(results))
    plot(results, order, out / "real_model.svg")
    page = out / "real_model.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Self-play with a real model\n"
    page.write_text(replace_figures(text, figures(results, order)), encoding="utf-8")
    print(f"{page}\n{table(results, order)}")


def compact(results: Results) -> Mapping[str, Any]:
    """What is worth keeping of the jobs: figures to four places, and no path of this machine.

    Args:
        results (Results): of the jobs.

    Returns:
        Mapping[str, Any]: JSON values.
    """
    return {
        "jobs": [
            {name: result[name] for name in ("arm", "seed", "device", "finished", "error")}
            | {
                "iterations": [
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
                    for measured in result["iterations"]
                ]
            }
            for result in results
        ]
    }
