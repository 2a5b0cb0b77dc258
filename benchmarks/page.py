"""Tables and a plot from the results of benchmarks/peers.py and scaling.py, for docs/benchmarks.md and the README.

    python benchmarks/page.py             # writes between the pages' markers, from peers_*.json and scaling_*.json
    python benchmarks/page.py --check     # fails if a page says something else than these files of benchmarks/results

A page marks where a section goes, ``<!-- peers: NAME -->`` to ``<!-- peers: end -->``; one without results is empty.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
PLOT = Path("docs") / "benchmarks.svg"
PAGES = (Path("docs") / "benchmarks.md", Path("README.md"))
MARKED = re.compile(r"(<!-- peers: (?P<name>\w+) -->\n).*?(<!-- peers: end -->)", re.DOTALL)
MIXES = ("short", "long", "third")
TUNED = ("trl_tuned", "trl_torch_compile", "trl_liger")
# what the project set out to reach: how many times as fast as an arm, in which mixes
GOALS = (
    ("TRL, default", ("trl",), 4.0, MIXES),
    ("TRL, tuned", TUNED, 2.5, MIXES),
    ("the authors' style", ("authors",), 6.0, MIXES),
    ("packed, prompts not shared", ("hf_packed",), 1.45, ("short",)),
    ("packed, prompts not shared", ("hf_packed",), 1.55, ("long",)),
    ("packed, prompts not shared", ("hf_packed",), 1.25, ("third",)),
)
# of whole iterations: title, arm, how many times as fast
ITERATION_GOALS = (
    ("whole iteration, TRL, default", "trl", 5.0),
    ("whole iteration, vLLM and TRL, tuned", "trl_vllm", 3.0),
    ("whole iteration, vLLM and TRL, tuned, bf16 weights", "trl_bf16_vllm", 3.0),
)
FLOAT8_GOALS = (("llama3_1_8b_8_layers", "8 layers of 8B", 1.35), ("llama3_2_1b", "1B", 1.2))
FLOAT8_TFLOPS_GOAL = 744.0  # of the least work, of FLOAT8_GOALS' first: Megatron-Bridge's Llama 3 8B, FP8, on an H100
VLLM_GOAL = 1.3  # the embedded generator's tokens a second by vLLM's
ADAPTER_GOAL = 0.95  # tokens a second through VLLMGenerator by those of its engine called bare
QUIET = 0.25  # of a host's CPUs may be busy before engines are compared
HASH = "hash of the weights"  # a stage of whole iterations that TRL alone has, as in benchmarks/peer_passes.py
START_GOAL, REFERENCE_GOAL = 1.5, 0.35  # at most: iteration 0 by iteration 1, a reference pass by an epoch
PRODUCT_GOAL = 0.75  # of a sustained matrix product of the same run, by the least work that the pairs need
SCALING_GOAL = 0.92  # of linear, the 8B's step on eight GPUs
SCALING_MODEL, SCALING_GPUS = "llama3_1_8b", (1, 2, 4, 8)

Results = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------ figures
def sections(results: Results, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The results that have a section, each with that section."""
    return [(result, result[name]) for result in results if name in result]


def by_mix(results: Results, name: str = "step") -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Results and step by mix of lengths; of two files with one mix the later one comes first."""
    newest = sections(results, name)[::-1]
    found = {mix: [(result, steps[mix]) for result, steps in newest if mix in steps] for mix in MIXES}
    return {mix: steps for mix, steps in found.items() if steps}


def against(
    steps: Iterable[tuple[dict[str, Any], dict[str, Any]]], names: Iterable[str]
) -> tuple[float, dict[str, Any]] | None:
    """How many times as fast this project is as the fastest of some arms in one run, the newest that has both; and
    the run."""
    for result, step in steps:
        ours, theirs = speed(step["arms"].get("ours")), fastest(step["arms"], names)
        if ours is not None and theirs is not None:
            return ours / theirs, result
    return None


def speed(run: dict[str, Any] | None, figure: str = "step") -> float | None:
    """Pairs per second of an arm, None where it has none."""
    return None if run is None or figure not in run else float(run[figure]["pairs_per_second"])


def fastest(arms: dict[str, Any], names: Iterable[str]) -> float | None:
    """Pairs per second of the fastest of some arms."""
    speeds = [value for name in names if (value := speed(arms.get(name))) is not None]
    return max(speeds, default=None)


def times(ours: float | None, theirs: float | None) -> str:
    """How many times as fast, as text."""
    return "-" if ours is None or theirs is None else f"{ours / theirs:.2f}"


def number(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def spread(figure: dict[str, Any], amount: float | None = None) -> str:
    """A median with the range of all rounds; with an amount, of the amount per second."""
    middle, low, high = figure["median"], figure["min"], figure["max"]
    if amount is not None:
        middle, low, high = amount / middle, amount / high, amount / low
    return f"{number(middle)} ({number(low)} to {number(high)})" if len(figure["values"]) > 1 else number(middle)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *rows])


def machine(result: dict[str, Any], arms: dict[str, Any] | None = None, name: str = "seconds") -> str:
    """One line: the GPU, versions, the ceilings of the same run, and how many rounds of this figure the arms have."""
    setup, ceilings = result["setup"], result["ceilings"]
    packages = ", ".join(f"{name.replace('_', '-')} {version}" for name, version in setup["versions"].items())
    sustained = ceilings.get("sustained_matmul_tflops")
    for_seconds = f" ({number(sustained)} for seconds)" if sustained else ""
    return (
        f"{setup['device']}; {packages}. {setup['model']}, {setup['compute_dtype']} compute{_rounds(arms, name)}. "
        f"In the same run a matrix product reached {number(ceilings['matmul_tflops'])} TFLOP/s{for_seconds}, a copy "
        f"{number(ceilings['copy_gb_per_second'])} GB/s."
    )


def _rounds(arms: dict[str, Any] | None, name: str) -> str:
    counts = {len(run[name]["values"]) for run in (arms or {}).values() if name in run}
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    return f", {least} round{'s' if least > 1 else ''}" if least == most else f", {least} to {most} rounds"


# ----------------------------------------------------------------------------------------------------------- sections
def step_section(results: Results, name: str = "step") -> str:
    """A table for every mix: speed of the whole step, of forward and backward, memory, agreement with fp32."""
    parts = []
    for mix, (result, step) in ((mix, each) for mix, steps in by_mix(results, name).items() for each in steps):
        mean, arms = step["mean_tokens"], step["arms"]
        ours, rows = speed(arms.get("ours")), []
        for arm, run in arms.items():
            if "error" in run:
                rows.append([run["title"], run["error"], *["-"] * 5])
                continue
            checked, peak = result["check"][arm], run.get("peak_gib")
            gradient = checked.get("gradient_deviation", checked["grad_norm_deviation"])
            rows.append(
                [
                    _sized(arm, run, result["setup"]),
                    spread(run["step"], step["pairs"]),
                    times(ours, speed(run)),
                    number(speed(run, "forward_backward")),
                    number(peak["median"]) if peak else "-",
                    f"{checked['loss_deviation']:.1e}",
                    f"{gradient:.1e}",
                ]
            )
        columns = ["", "pairs/s", "ours: times as fast", "forward, backward", "peak GiB", "loss off", "gradient off"]
        parts.append(
            f"**{mix}**: {step['pairs']} pairs, mean tokens {mean['prompt']:.0f} prompt, {mean['real']:.0f} real, "
            f"{mean['generated']:.0f} generated. {machine(result, arms, 'step')}\n\n{table(columns, rows)}"
            f"{_skipped(result)}"
        )
    return "\n\n".join(parts)


def _sized(arm: str, run: dict[str, Any], setup: dict[str, Any]) -> str:
    """An arm's title with the size of what it computes at a time."""
    rows = setup["row_tokens"] if arm.startswith("ours") else run.get("row_tokens")
    size = (
        f", {run['micro_batch']} pairs a time" if run["micro_batch"] else f", rows of {rows:,} tokens" if rows else ""
    )
    return str(run["title"]) + size


def _skipped(result: dict[str, Any]) -> str:
    reasons = [f"{name}: {reason}" for name, reason in result.get("skipped", {}).items()]
    return f"\n\nNot run: {'; '.join(reasons)}." if reasons else ""


def goals_section(results: Results) -> str:
    """What was set out to reach and what was measured, each with its file."""
    rows = []
    steps = by_mix(results)
    for title, names, goal, mixes in GOALS:
        for mix in (mix for mix in mixes if mix in steps):
            if found := against(steps[mix], names):
                rows.append(_goal(f"step, {title}, {mix}", goal, found[0], found[1]["file"]))
    for result, _ in sections(results, "iteration"):
        for title, arm, goal in ITERATION_GOALS:
            if found := _whole_iteration([result], arm):
                rows.append(_goal(title, goal, found[0], result["file"]))
                if found[1] != found[0]:
                    rows.append(_goal(f"{title}, without TRL's {HASH}", goal, found[1], result["file"]))
    for mix, runs_of_mix in steps.items():
        for result, step in runs_of_mix:
            sustained, run = result["ceilings"].get("sustained_matmul_tflops"), step["arms"].get("ours", {})
            if sustained and "step" in run:
                share = step["floor_tflop"] / run["step"]["median"] / sustained
                title = f"step, {mix}, part of a sustained matrix product"
                rows.append(_goal(title, PRODUCT_GOAL, share, result["file"]))
    rows += [*_float8_goals(), *_generator_goals(results), *_start_goals()] if results else []
    goals = [table(["what", "goal", "measured", "reached", "file of benchmarks/results"], rows)] if rows else []
    return "\n\n".join([*goals, _scaling_goal(results)])


def _goal(title: str, goal: float, measured: float, file: str, at_most: bool = False) -> list[str]:
    """A row: times as fast, or a fraction."""
    reached = measured <= goal if at_most else measured >= goal
    figure = f"{measured:.2f}" if measured < 100 else f"{measured:.0f}"
    return [title, f"{'at most ' * at_most}{goal:g}", figure, "yes" if reached else "no", file]


def _read_all(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    return [(file.name, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(RESULTS.glob(pattern))]


def _float8_ratios() -> Iterable[tuple[str, dict[str, Any], tuple[str, str, float], float]]:
    """File, section, model with its goal, and how many times as fast as bf16's a whole step in float8 is."""
    for name, result in _read_all("h200_float8*.json"):
        for goal in FLOAT8_GOALS:
            if section := result["speed"].get(goal[0]):
                steps = section["optimizer step"]
                yield name, section, goal, steps["compiled"]["median_seconds"] / steps["float8"]["median_seconds"]


def _float8_goals() -> Iterable[list[str]]:
    for name, section, (model, title, goal), ratio in _float8_ratios():
        steps, title = section["optimizer step"], f"{title}, rows of {max(section['rows']):,} tokens"
        yield _goal(f"step in float8 against bf16, {title}", goal, ratio, name)
        if model == FLOAT8_GOALS[0][0] and "floor_tflop" in section:
            rate = section["floor_tflop"] / steps["float8"]["median_seconds"]
            yield _goal(f"step in float8, {title}, TFLOP/s of needed work", FLOAT8_TFLOPS_GOAL, rate, name)
            if sustained := section.get("sustained_matmul_tflops"):
                share = section["floor_tflop"] / steps["compiled"]["median_seconds"] / sustained
                yield _goal(f"step, {title}, part of a sustained matrix product", PRODUCT_GOAL, share, name)


def _generator_goals(results: Results) -> Iterable[list[str]]:
    """The fastest of each kind in one run, and vLLM's engine through the product and by itself; on quiet hosts."""
    for result, section in sections(results, "generation"):
        setup = section["setup"]
        busy = setup.get("busy_cpus")
        if busy is None or busy > QUIET * setup["cpus"]:
            continue
        speeds = {name: run["tokens_per_second"] for name, run in section["arms"].items() if "tokens_per_second" in run}
        ours, theirs = ([speeds[n] for n in speeds if n.startswith(kind)] for kind in ("embedded", "vllm"))
        prompts = f"{setup['requests']:,} prompts"
        if ours and theirs:
            title = f"embedded generator against vLLM, {prompts}"
            yield _goal(title, VLLM_GOAL, max(ours) / max(theirs), result["file"])
        for name in speeds:
            bare = name.replace("vllm", "vllm_bare", 1)
            if bare != name and bare in speeds:
                title = f"vLLM through the product against the same engine called bare, {prompts}"
                yield _goal(title, ADAPTER_GOAL, speeds[name] / speeds[bare], result["file"])


def _start_goals() -> Iterable[list[str]]:
    """Starts that were measured from empty caches; and of all iterations, the last one's reference pass."""
    for name, result in _read_all("*_cold_start.json"):
        (first, second), before = result["starts"]["iterations"], result["starts"]["before iteration 0"]
        prompts = result["setup"]["prompts"]
        more = (4096 / prompts - 1) * second  # what is beyond an iteration 1 does not grow with the prompts
        title = f"iteration 0 from the process's start by iteration 1, {prompts:,} prompts"
        title += " made 4,096" if more else ""
        ratio = (before + first + more) / (second + more)
        yield _goal(title, START_GOAL, ratio, name, at_most=True)
    for name, result in _read_all("*_iteration*.json") + _read_all("*_start.json"):
        seconds = {row["stage"]: row["seconds"] for row in result.get("stages", ())}  # of the last iteration
        if seconds:
            ratio = seconds["reference log-probs"] / seconds["train"]
            yield _goal("reference pass by an epoch", REFERENCE_GOAL, ratio, name, at_most=True)


def reference_section(results: Results) -> str:
    """Pairs per second of the reference pass."""
    parts = []
    for result, section in sections(results, "reference"):
        arms, rows = section["arms"], []
        ours = arms.get("ours", {}).get("pairs_per_second")
        for run in arms.values():
            if "error" in run:
                rows.append([run["title"], run["error"], "-", "-"])
                continue
            title = run["title"] + (f", {run['batch']} pairs a time" if run["batch"] else "")
            middle = run["pairs_per_second"]
            speeds = spread(run["seconds"], section["pairs"])
            rows.append([title, speeds, times(ours, middle), f"{run['logps_deviation']:.1e}"])
        columns = ["", "pairs/s", "ours: times as fast", "log-probs off"]
        parts.append(f"{section['pairs']} pairs of the short mix. {machine(result, arms)}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def generation_section(results: Results) -> str:
    """Useful tokens per second of each engine."""
    parts = []
    for _, section in sections(results, "generation"):
        setup, arms = section["setup"], section["arms"]
        base, rows = arms.get("transformers", {}).get("tokens_per_second"), []
        for run in arms.values():
            if "tokens_per_second" not in run:
                rows.append([run["title"], run.get("error") or run["skipped"], "-", "-"])
                continue
            low, high = (number(run[f"{which}_tokens_per_second"]) for which in ("min", "max"))
            middle = run["tokens_per_second"]
            speeds = f"{number(middle)} ({low} to {high})"
            rows.append([run["title"], speeds, number(run["peak_gib"]), times(middle, base)])
        columns = ["", "useful tokens/s", "GiB beyond the weights", "x transformers.generate"]
        vllm = f", vLLM {setup['vllm']}" if setup["vllm"] else ""
        parts.append(
            f"{setup['device']}, torch {setup['torch']}, transformers {setup['transformers']}{vllm}; "
            f"{setup['requests']:,} prompts of {setup['mean_prompt_tokens']:.0f} tokens, responses of "
            f"{setup['mean_new_tokens']:.0f}{_busy(setup)}.\n\n"
            + table(columns[: 4 if base else 3], [row[: 4 if base else 3] for row in rows])
        )
    return "\n\n".join(parts)


def _busy(setup: dict[str, Any]) -> str:
    busy = setup.get("busy_cpus")
    return "" if busy is None else f"; {busy:.1f} of the host's {setup['cpus']} CPUs had other work"


def iteration_section(results: Results) -> str:
    """Seconds of a whole iteration, by stage."""
    parts = []
    for result, section in sections(results, "iteration"):
        arms, rows = section["arms"], []
        ours = arms.get("ours", {}).get("seconds", {}).get("median")
        every = [list(run["stages"]) for run in arms.values() if "stages" in run]
        stages, has_hash = max(every, key=len, default=[]), any(_hash_seconds(run) for run in arms.values())
        for run in arms.values():
            if "error" in run:
                rows.append([run["title"], run["error"], *["-"] * (1 + len(stages) + has_hash)])
                continue
            whole, hashed = run["seconds"]["median"], _hash_seconds(run)
            ratios = ["-" if ours is None else f"{seconds / ours:.2f}" for seconds in (whole, whole - hashed)]
            each = [number(run["stages"].get(stage, {}).get("median")) for stage in stages]
            rows.append([run["title"], *each, spread(run["seconds"]), *ratios[: 1 + has_hash]])
        columns = ["", *(f"{stage}, s" for stage in stages), "iteration, s", "ours: times as fast"]
        columns += [f"without the {HASH}"] if has_hash else []
        parts.append(
            f"{section['prompts']} prompts, responses of {section['generated_tokens']:.0f} tokens, one epoch, warm. "
            f"{machine(result, arms)}\n\n{table(columns, rows)}"
        )
    return "\n\n".join(parts)


def _whole_iteration(results: Results, arm: str) -> tuple[float, float] | None:
    """How many times as fast as an arm this project's iteration is, in the newest run of both; and without the hash."""
    for _, section in sections(results, "iteration")[::-1]:
        runs = {name: run for name, run in section["arms"].items() if "seconds" in run}
        if {"ours", arm} <= runs.keys():
            theirs, ours = runs[arm]["seconds"]["median"], runs["ours"]["seconds"]["median"]
            return theirs / ours, (theirs - _hash_seconds(runs[arm])) / ours
    return None


def _hash_seconds(run: dict[str, Any]) -> float:
    return float(run.get("stages", {}).get(HASH, {}).get("median", 0.0))


def scaling_section(results: Results) -> str:
    """The step by number of GPUs against linear, checkpoints, iterations; what was not measured is named."""
    parts = []
    for result, runs in sections(results, "runs"):
        setup, all_runs = result["setup"], list(runs.values())
        packages = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
        lines = [f"A host of {max(1, setup['host_gpus'])} x {setup['device']}; {packages}."]
        for make in (_scaling_steps, _scaling_checkpoints, _scaling_iterations):
            lines += make(all_runs)
        skipped = [f"{name} ({reason})" for name, reason in result.get("skipped", {}).items()]
        parts += [*lines, *([f"Not run: {', '.join(skipped)}."] if skipped else [])]
    every = [run for _, runs in sections(results, "runs") for run in runs.values()]
    return "\n\n".join([*parts, *_not_measured(every)])


def _scaling_goal(results: Results) -> str:
    """The goal and the best layout's figure, by the files that have one."""
    shares = [
        (_pairs_per_gpu(run) / _pairs_per_gpu(base), base["gpus"])
        for _, runs in sections(results, "runs")
        for run, base in _with_base(list(runs.values()))
        if (run["model"], run["load"], run["gpus"]) == (SCALING_MODEL, "weak", 8) and base not in (None, run)
    ]
    goal = f"Goal: at least {SCALING_GOAL:g} of linear for the 8B's step on eight GPUs, the pairs on each GPU the same"
    if not shares:
        return f"{goal}; not measured."
    share, gpus = max(shares)
    against = "one GPU" if gpus == 1 else f"{gpus} GPUs: fewer do not hold it, or were not measured"
    return f"{goal}; measured {share:.3f}, against {against}: {'reached' if share >= SCALING_GOAL else 'not reached'}."


def _with_base(runs: Results) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Step runs, each with the fastest of FSDP2 on the fewest GPUs that did the same work; None for what failed."""
    steps = [run for run in runs if run["part"] == "step"]
    pairs = []
    for run in steps:
        same = [
            other
            for other in steps
            if "result" in other
            and (other["model"], other["load"], other["replicas"]) == (run["model"], run["load"], 1)
            and _work(other) == _work(run)
        ]
        first = min(same, key=lambda other: (other["gpus"], -_pairs_per_gpu(other)), default=None)
        base = first if "result" in run else None
        pairs.append((run, base))
    return pairs


def _work(run: dict[str, Any]) -> float:
    """What has to be equal: pairs on each GPU, or in all."""
    return run["pairs"] / run["gpus"] if run["load"] == "weak" else run["pairs"]


def _step_run(run: dict[str, Any]) -> dict[str, Any]:
    return dict(run["result"]["optimizer_step"]["runs"]["optimizer step"])


def _pairs_per_gpu(run: dict[str, Any]) -> float:
    """Pairs per second and GPU."""
    return float(_step_run(run)["pairs_per_second"]) / run["gpus"]


def _least_and_most(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _scaling_steps(runs: Results) -> list[str]:
    rows = []
    for run, base in _with_base(runs):
        layout = "FSDP2" if run["replicas"] == 1 else f"HSDP, {run['replicas']} replicas"
        layout += "".join(f", {option.removeprefix('--').replace('-', ' ')}" for option in run["options"])
        head = [
            run["model"],
            f"{run['gpus']}",
            layout,
            f"{run['pairs']}" + ("" if run["load"] == "weak" else " in all"),
        ]
        if "error" in run:
            rows.append([*head, run["error"], *["-"] * 4])
            continue
        step, share = _step_run(run), "-"
        if base is not None:
            share = f"{_pairs_per_gpu(run) / _pairs_per_gpu(base):.3f}"
            share += "" if base["gpus"] == 1 else f" of {base['gpus']} GPUs"
        low, high = number(step["min_pairs_per_second"]), number(step["max_pairs_per_second"])
        speeds = f"{number(step['pairs_per_second'])} ({low} to {high})"
        memory = _least_and_most(step["peak_gib_by_rank"])
        matmul = number(run["result"]["ceilings"]["matmul_tflops"])
        rows.append([*head, speeds, share, number(step["tflops"]), matmul, memory])
    columns = ["model", "GPUs", "layout", "pairs", "pairs/s", "of linear", "needed TFLOP/s a GPU", "matmul TFLOP/s",
               "peak GiB of a rank"]  # fmt: skip
    return ["**Optimizer steps**, medians (range of all rounds).", table(columns, rows)] if rows else []


def _scaling_checkpoints(runs: Results) -> list[str]:
    rows = []
    for run in (run for run in runs if run["part"] == "checkpoint"):
        head = [run["model"], f"{run['gpus']}"]
        if "error" in run:
            rows.append([*head, run["error"], *["-"] * 4])
            continue
        result = run["result"]
        seconds = [result["async"]["blocked_seconds"], result["sync"]["blocked_seconds"]]
        seconds += [result["restore_seconds"], result["export_seconds"]]
        rows.append([*head, number(result["setup"]["state_gb"]), *(number(value) for value in seconds)])
    columns = ["model", "GPUs", "state, GB", "training waits, background save, s", "whole save, s", "restore, s",
               "export, s"]  # fmt: skip
    return ["**Checkpoints**.", table(columns, rows)] if rows else []


def _scaling_iterations(runs: Results) -> list[str]:
    rows, names = [], ("generate", "reference log-probs", "train", "save and export")
    for run in (run for run in runs if run["part"] == "iteration"):
        engines = run["generator"] + (
            f", {run['tensor_parallel']} ranks share one" if run["tensor_parallel"] > 1 else ""
        )
        head = [run["model"], f"{run['gpus']}", engines, f"{run['prompts']}"]
        if "error" in run:
            rows.append([*head, run["error"], *["-"] * (2 + len(names))])
            continue
        stages = run["result"]["stages"]
        last = max(row["iteration"] for row in stages)
        warm = {row["stage"]: row for row in stages if row["iteration"] == last}
        tokens = run["prompts"] * run["result"]["setup"]["generated_tokens"] / warm["generate"]["seconds"]
        by_rank = [max(peaks) for peaks in zip(*(row["peak_gib_by_rank"] for row in warm.values()), strict=True)]
        seconds = [number(warm[name]["seconds"]) for name in names]
        whole = number(sum(row["seconds"] for row in warm.values()))
        rows.append([*head, number(tokens), *seconds, whole, _least_and_most(by_rank)])
    columns = ["model", "GPUs", "generator", "prompts", "tokens/s", *(f"{name}, s" for name in names), "iteration, s",
               "GiB in use on a GPU"]  # fmt: skip
    return (
        ["**Whole iterations**, the second one, which is warm; tokens/s are the generator's.", table(columns, rows)]
        if rows
        else []
    )


def _not_measured(runs: Results) -> list[str]:
    """What the goal names and no run has, by part: on which numbers of GPUs."""
    wanted = {
        "the 8B's step": ("step", SCALING_MODEL),
        "the 1B's step": ("step", "llama3_2_1b"),
        "the 8B's checkpoints": ("checkpoint", SCALING_MODEL),
        "the 8B's iteration": ("iteration", SCALING_MODEL),
    }
    missing = []
    for title, key in wanted.items():
        done = {run["gpus"] for run in runs if (run["part"], run["model"]) == key and "result" in run}
        left = [f"{gpus}" for gpus in SCALING_GPUS if gpus not in done]
        if left:
            missing.append(f"{title} on {', '.join(left)}")
    return [f"Not measured, by number of GPUs: {'; '.join(missing)}."] if missing else []


def lora_section(results: Results) -> str:
    """The step with adapters."""
    return step_section(results, "lora")


def summary_section(results: Results) -> str:
    """One row for each arm: how many times as fast this project is in each mix, and the peak of memory."""
    steps = by_mix(results)
    if not steps:
        return ""
    newest = next(iter(steps.values()))
    # an arm may be in some mixes only, or in an older run
    titles = {name: run["title"] for runs in steps.values() for _, step in runs for name, run in step["arms"].items()}
    rows = []
    for name, title in titles.items():
        if name == "ours":
            cells = [number(speed(runs[0][1]["arms"].get("ours"))) for runs in steps.values()]
        else:
            ratios = [against(runs, (name,)) for runs in steps.values()]
            cells = [f"{found[0]:.2f}" if found else "-" for found in ratios]
        peak = next((run["peak_gib"] for _, step in newest if "peak_gib" in (run := step["arms"].get(name, {}))), None)
        memory = number(peak["median"]) if peak else "-"
        rows.append([title + (" (pairs/s)" if name == "ours" else ""), *cells, memory])
    rows.sort(key=lambda row: (not row[0].endswith("(pairs/s)"), float(row[1]) if row[1] != "-" else math.inf))
    columns = ["this project is times as fast as", *steps, f"peak GiB, {next(iter(steps))}"]
    return f"{machine(newest[0][0])}\n\n{table(columns, rows)}"


def sentence_section(results: Results) -> str:
    """What the README says: the hardest opponent first, ranges over the mixes."""
    steps = by_mix(results)
    opponents = {
        "Hugging Face without padding (layers compiled)": ("hf_packed",),
        "a tuned TRL `DPOTrainer`": TUNED,
        "that trainer with its defaults": ("trl",),
    }
    parts = []
    for title, names in opponents.items():
        ratios = [found[0] for runs in steps.values() if (found := against(runs, names))]
        if ratios:
            parts.append(f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as {title}")
    if not parts:
        return ""
    device = next(iter(steps.values()))[0][0]["setup"]["device"]
    said = f"A training step of a 1B model on one {device} is {', '.join(parts[:-1])} and {parts[-1]}."
    if whole := _whole_iteration(results, "trl_bf16_vllm"):
        said += f" A whole iteration is {whole[1]:.1f} times as fast as by vLLM and a tuned `DPOTrainer` in bf16"
        said += f", {whole[0]:.1f} times with the trainer's {HASH}."
    if float8 := [ratio for *_, goal, ratio in _float8_ratios() if goal == FLOAT8_GOALS[0]]:
        gain = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(float8), max(float8))))
        said += f" In float8, for fine-tuning, a step of 8B shapes is {gain} times as fast as in bf16."
    return said


SECTIONS: dict[str, Callable[[Results], str]] = {
    "goals": goals_section,
    "step": step_section,
    "reference": reference_section,
    "generation": generation_section,
    "iteration": iteration_section,
    "lora": lora_section,
    "scaling": scaling_section,
    "summary": summary_section,
    "sentence": sentence_section,
    "plot": lambda results: f"![pairs per second of a training step]({PLOT.name})" if by_mix(results) else "",
}


# --------------------------------------------------------------------------------------------------------------- plot
BAR, GAP, LEFT, WIDE = 16, 6, 380, 380  # pixels
COLORS = {"ours": "#1b7837", "ours_unshared": "#7fbf7b"}
OTHERS = "#8c8c8c"


def plot(results: Results) -> str:
    """Pairs per second of the training step as an SVG: the fastest first, whiskers over all rounds.

    Args:
        results (Results): of all files.

    Returns:
        str: the picture; the same for the same results.
    """
    steps = next(iter(by_mix(results).values()))
    arms = {name: (run, step) for _, step in steps[::-1] for name, run in step["arms"].items() if "step" in run}
    result = steps[0][0]
    runs = sorted(
        ((name, run["title"], *_range(run, step)) for name, (run, step) in arms.items()), key=lambda each: -each[2]
    )
    longest = max(high for *_, high in runs)
    setup = result["setup"]
    head = f"pairs per second of a training step, {setup['model']}, one {setup['device']}"
    marks, y = [f'<text x="8" y="20" font-weight="bold">{escape(head)}</text>'], 32
    for name, title, middle, low, high in runs:
        width, center = WIDE * middle / longest, y + BAR / 2
        marks.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(title)}</text>')
        marks.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLORS.get(name, OTHERS)}"/>')
        ends = f'x1="{LEFT + WIDE * low / longest:.1f}" x2="{LEFT + WIDE * high / longest:.1f}"'
        marks.append(f'<line {ends} y1="{center}" y2="{center}" stroke="black"/>')
        marks.append(f'<text x="{LEFT + WIDE * high / longest + 6:.1f}" y="{y + 12}">{number(middle)}</text>')
        y += BAR + GAP
    size = f'width="{LEFT + WIDE + 60}" height="{y}"'
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', f'<rect {size} fill="white"/>', *marks, "</svg>\n"]
    )


def _range(run: dict[str, Any], step: dict[str, Any]) -> tuple[float, float, float]:
    """Median, least and greatest pairs per second."""
    seconds = run["step"]
    return step["pairs"] / seconds["median"], step["pairs"] / seconds["max"], step["pairs"] / seconds["min"]


# --------------------------------------------------------------------------------------------------------------- main
def filled(page: str, results: Results) -> str:
    """A page with the sections that it marks.

    Args:
        page (str): Markdown.
        results (Results): of all files.

    Returns:
        str: the page; what stood between its markers is gone.

    Raises:
        SystemExit: If it marks a section that there is not.
    """

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in SECTIONS:
            raise SystemExit(f"The page marks the section {name}; expected one of {', '.join(SECTIONS)}.")
        text = SECTIONS[name](results)
        return match[1] + (f"\n{text}\n\n" if text else "") + match[3]

    return MARKED.sub(section, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="results; default: peers_*.json and scaling_*.json")
    parser.add_argument("--root", type=Path, default=REPO, help="folder of README.md and docs")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    args = parser.parse_args(arguments)
    files = args.files or [file for kind in ("peers", "scaling") for file in sorted(RESULTS.glob(f"{kind}_*.json"))]
    results = [json.loads(file.read_text(encoding="utf-8")) | {"file": file.name} for file in files]
    wanted = {args.root / page: filled((args.root / page).read_text(encoding="utf-8"), results) for page in PAGES}
    if by_mix(results):
        wanted[args.root / PLOT] = plot(results)
    for file, text in wanted.items():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            raise SystemExit(f"{file} says something else than the results. Run: python benchmarks/page.py")
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
