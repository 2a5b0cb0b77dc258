"""The tables and the picture of docs/when_it_helps.md, from the results of experiments/checkable.py.

python experiments/checkable_report.py    # again, from docs/experiments/checkable_*.json
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pages import drawing, fill_sections, save

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = (DOCS / "when_it_helps.md", DOCS / "experiments" / "checkable.md")
PLAN = Path(__file__).with_name("checkable.yaml")
FORMS = {
    "small": "140k parameters",
    "full": "135M parameters",
    "four_epochs": "135M parameters, after four epochs",
    "half_billion": "0.5B parameters",
}
OUTSIDE = "chain_sum"  # an unseen family
WRONG = {"s": "wrong step", "w": "wrong answer", "f": "no answer", "t": "truncated"}
ERRORS = f"{' / '.join(WRONG.values())}, %"
SHORT = ("arm", "what", "seeds", "temperature 1", "against its start, points")  # columns that fit a terminal
COLUMNS = (
    "arm", "what", "seeds", "greedy", "temperature 1", "against its start, points", "pass@4", ERRORS, "val_loss",
    "unseen families", "NLL of other text", "k tokens",
)  # fmt: skip
NOT_ENGLISH = tuple(column for column in COLUMNS if column != "NLL of other text")
RATES = ("spin_slow", "spin", "spin_fast", "spin_faster", "gentle_spin", "gentle_spin_fast")  # arms that differ in it
DRAWN = (
    *RATES, "spin_fast_beta1", "spin_fast_beta5", "spin_fast_nll.2", "spin_fast_nll1", "spin_greedy", "spin_cool",
    "spin_top_p", "spin_hot", "spin_drop_equal", "spin_history", "spin_k4", "spin_space", "spin_checker", "sft_slow",
    "sft", "sft_fast", "gentle_sft",
)  # fmt: skip

Run = tuple[int, str | None]  # seed, and fingerprint of the weights that it began with, if known
Results = Mapping[str, Mapping[Run, Any]]  # of a form: the last iteration by arm and run


def read_results(folder: Path) -> dict[str, Results]:
    """What the jobs of each form measured at their end.

    Args:
        folder (Path): of ``checkable_FORM.json``.

    Returns:
        dict[str, Results]: by form; those whose file has any.
    """
    found = {form: measured_at_the_end(read_jobs(folder, form)) for form in FORMS}
    return {form: of_form for form, of_form in found.items() if of_form}


def read_jobs(folder: Path, form: str) -> list[Any]:
    """The jobs of a form, as ``jobs.compact`` has them; none if their file is not there."""
    file = folder / f"checkable_{form}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def measured_at_the_end(jobs: Sequence[Any]) -> Results:
    """What jobs measured last; without those that did not get there."""
    found: dict[str, Any] = {}
    for job in jobs:
        if job["iterations"] and "verdicts" in job["iterations"][-1]:
            measured = job["iterations"][-1]
            found.setdefault(job["arm"], {})[job["seed"], measured.get("began")] = measured
    return found


def jobs_line(folder: Path, form: str) -> str:
    """Where the jobs of a form ran, and which did not get to their end."""
    jobs = read_jobs(folder, form)
    ended = [job for job in jobs if not job["finished"] and "verdicts" not in (job["iterations"] or [{}])[-1]]
    devices = ", ".join(sorted({job["device"] for job in jobs if job["device"]}))
    line = f"{len(jobs) - len(ended)} jobs, starts among them, on: {devices}."
    for why, are_these in (("Ended by the deadline", False), ("Failed", True)):
        names = [f"`{job['arm']}` (seed {job['seed']})" for job in ended if bool(job["error"]) == are_these]
        line += f" {why}, and left out: {', '.join(names)}." if names else ""
    return line


def difference(arm: Mapping[Run, Any], other: Mapping[Run, Any]) -> tuple[float, float] | None:
    """How many more problems an arm solves than another, by responses at temperature 1 to the same problems.

    Args:
        arm (Mapping[Run, Any]): measurements by seed and start.
        other (Mapping[Run, Any]): likewise.

    Returns:
        tuple[float, float] | None: the mean, and half of a 95 % interval that takes in problems and, where there are
        several, runs; None if no seed and start has both.
    """
    runs = [run for run in arm if run in other]
    if not runs:
        return None

    def solved(measured: Any) -> list[float]:  # of each problem, the fraction of right responses
        return [letters.count("r") / len(letters) for letters in zip(*measured["verdicts"][1:], strict=True)]

    by_run = [[a - b for a, b in zip(solved(arm[run]), solved(other[run]), strict=True)] for run in runs]
    by_problem = [statistics.mean(each) for each in zip(*by_run, strict=True)]
    variance = statistics.variance(by_problem) / len(by_problem)
    if len(runs) > 1:
        variance += statistics.variance(map(statistics.mean, by_run)) / len(runs)
    return statistics.mean(by_problem), 1.96 * math.sqrt(variance)


def change(arm: Mapping[Run, Any], other: Mapping[Run, Any]) -> str:
    """:func:`difference` in percentage points, bold if its interval leaves zero out."""
    found = difference(arm, other)
    if found is None:
        return "-"
    text = f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f}"
    return f"**{text}**" if abs(found[0]) > found[1] else text


def mean(arm: Mapping[Run, Any], name: str, form: str = ".3f") -> str:
    """A measurement: its mean over runs, with several also the standard deviation between them."""
    values = [measured[name] for measured in arm.values()]
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), form)}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def arms_table(results: Results, arms: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> str:
    """A line for each arm that has a result, next to its own start."""
    rows = []
    for name in (name for name in arms if name in results):
        measured, is_start = results[name], arms[name].get("recipe") == "none"
        errors = (100 * statistics.mean(each[f"errors_{kind}"] for each in measured.values()) for kind in WRONG)
        row = {
            "arm": f"`{name}`", "what": arms[name]["what"], "seeds": str(len(measured)),
            "greedy": mean(measured, "greedy"), "temperature 1": mean(measured, "sampled"),
            "against its start, points": "" if is_start else change(measured, began_with(results, arms, name)),
            "pass@4": mean(measured, "pass_4"),
            ERRORS: " / ".join(f"{each:.1f}" for each in errors),
            "val_loss": mean(measured, "val_loss", ".4f"), "unseen families": mean(measured, "unseen"),
            "NLL of other text": mean(measured, "nll_text", ".2f"),
            "k tokens": f"{statistics.mean(each['trained_tokens'] for each in measured.values()) / 1000:.0f}",
        }  # fmt: skip
        rows.append([row[column] for column in columns])
    return table(columns, rows)


def start_of(arms: Mapping[str, Any], name: str) -> str:
    """The arm that measures where another one begins; an empty text if there is none."""
    start = arms[name].get("start")
    return next((each for each, arm in arms.items() if arm.get("recipe") == "none" and arm.get("start") == start), "")


def began_with(results: Results, arms: Mapping[str, Any], name: str) -> Mapping[Run, Any]:
    """Measurements of the start of each run of an arm; all seeds of an arm may begin with the same weights, which one
    seed has measured."""
    start = results.get(start_of(arms, name), {})
    by_weights = {weights: measured for (_, weights), measured in start.items() if weights}
    found = {run: start.get(run, by_weights.get(run[1])) for run in results[name]}
    return {run: measured for run, measured in found.items() if measured}


def situations_table(results: Mapping[str, Results], plan: Mapping[str, Any]) -> str:
    """SFT and SPIN from each kind of start."""
    rows = []
    for form, of_form in results.items():
        arms = plan["forms"][form]["arms"]
        for what, sft, spin in plan["forms"][form]["situations"]:
            if sft in of_form and spin in of_form and (start := of_form.get(start_of(arms, spin))):
                columns = [mean(each, "sampled") for each in (start, of_form[sft], of_form[spin])]
                rows.append([what, FORMS[form], *columns, change(of_form[spin], of_form[sft])])
    return table(["start", "model", "at the start", "SFT", "SPIN", "SPIN less SFT, points"], rows)


def rates_table(results: Mapping[str, Results], plan: Mapping[str, Any]) -> str:
    """Changes by SPIN's learning rate as a fraction of the one by which SFT made the start, a line for each start."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for form, of_form in results.items():
        shape = plan["forms"][form]
        for name in (name for name in RATES if name in of_form):
            arm = shape["arms"][name]
            rate = {**shape["settings"], **arm.get("settings", {})}["optimizer.lr"]
            of_sft = shape["starts"][arm["start"]]["settings"]["sft.lr"]
            text = change(of_form[name], began_with(of_form, shape["arms"], name))
            rows.setdefault((FORMS[form], f"{of_sft:.0e}"), {})[int(float(f"{of_sft / rate:.0e}"))] = text
    fractions = sorted({fraction for changes in rows.values() for fraction in changes}, reverse=True)
    cells = [[*row, *(changes.get(fraction, "") for fraction in fractions)] for row, changes in rows.items()]
    return table(["model", "SFT's rate", *(f"1/{fraction}" for fraction in fractions)], cells)


def gradients_table(results: Mapping[str, Results], plan: Mapping[str, Any]) -> str:
    """How SPIN's gradient compares with that of SFT, of the arms that have ``watch.gradient_checks``."""
    beta, rows = plan["settings"]["loss.beta"], []
    for form, of_form in results.items():
        arms = plan["forms"][form]["arms"]
        for name in (name for name in arms if any("gradients" in each for each in of_form.get(name, {}).values())):
            checks = [check for each in of_form[name].values() for check in each.get("gradients", ())]
            firsts = {
                min(c["samples"] for c in checks if c["iteration"] == i) for i in {c["iteration"] for c in checks}
            }
            for when, is_first in (("at an iteration's start", True), ("within an iteration", False)):
                found = [check for check in checks if (check["samples"] in firsts) == is_first]
                cells = [_spread(found, "cosine"), _spread(found, "ratio", 2 / beta)]
                cells += [_spread(found, "signal"), _spread(found, "sft_signal")]
                start = arms.get(start_of(arms, name), {"what": "-"})["what"]
                rows.append([start, FORMS[form], when, *cells])
    heads = ["start", "model", "when", "cosine", "norm / (beta / 2 of SFT's)", "signal of SPIN", "signal of SFT"]
    return table(heads, rows)


def _spread(checks: Sequence[Mapping[str, float]], name: str, factor: float = 1.0) -> str:
    """Mean and standard deviation of the checks that have a figure, and how many these are."""
    values = [factor * check[name] for check in checks if name in check]
    if not values:
        return f"none of {len(checks)}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f} ({len(values)} of {len(checks)})"


def outside_table(results: Mapping[str, Results], plan: Mapping[str, Any]) -> str:
    """Right greedy responses to a kind of problem that no training has, of arms that begin alike, by seed."""
    of_form, arms = results.get("full", {}), plan["forms"]["full"]["arms"]
    shown = {name: of_form.get(name, {}) for name in ("paper_start", "paper_spin_fast", "paper_sft")}
    runs = [run for run in shown["paper_start"] if all(run in measured for measured in shown.values())]
    heads = ["", *(f"seed {seed}" for seed, _ in runs), "mean"]
    rows = []
    for name, measured in shown.items():
        right = [measured[run]["unseen_families"][OUTSIDE] for run in runs]
        rows.append([arms[name]["what"], *(f"{each:.2f}" for each in right), f"{statistics.mean(right or [0.0]):.2f}"])
    return table(heads, rows)


def draw(results: Mapping[str, Results], plan: Mapping[str, Any], file: Path) -> None:
    """Arms that begin with a fine-tuned model: points and intervals, a panel for each form."""
    pyplot = drawing()
    rows = math.ceil(len(results) / 2)
    figure, panels = pyplot.subplots(rows, 2, figsize=(11, 4.6 * rows), squeeze=False, constrained_layout=True)
    for panel in panels.flat[len(results) :]:
        panel.set_axis_off()
    for panel, (form, of_form) in zip(panels.flat, results.items(), strict=False):
        arms = plan["forms"][form]["arms"]
        shown = [name for name in DRAWN if name in of_form]
        for place, name in enumerate(reversed(shown)):
            middle, half = (
                100 * each for each in difference(of_form[name], began_with(of_form, arms, name)) or (0.0, 0.0)
            )
            colour = "C1" if arms[name].get("recipe") == "sft" else "C0"
            panel.errorbar(middle, place, xerr=half, fmt="o", color=colour, capsize=2)
        panel.set_yticks(range(len(shown)), [arms[name]["what"] for name in reversed(shown)], fontsize="small")
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(f"{FORMS[form]}: points against the start", fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def sections(results: Mapping[str, Results], plan: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of docs/when_it_helps.md and docs/experiments/checkable.md."""
    tables = {
        form: jobs_line(DOCS / "experiments", form)
        + "\n\n"
        + arms_table(of_form, plan["forms"][form]["arms"], NOT_ENGLISH if form == "small" else COLUMNS)
        for form, of_form in results.items()
    }
    return tables | {
        "rates": rates_table(results, plan),
        "situations": situations_table(results, plan),
        "outside": outside_table(results, plan),
        "gradients": gradients_table(results, plan),
    }


def write_pages() -> None:
    """Tables into the pages, and the picture."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    results = read_results(DOCS / "experiments")
    for page in PAGES:
        page.write_text(fill_sections(page.read_text(encoding="utf-8"), sections(results, plan)), encoding="utf-8")
    if results:
        draw(results, plan, DOCS / "when_it_helps.svg")


if __name__ == "__main__":
    write_pages()
