"""Arms of an experiment: recipes with some settings changed, each with several seeds, as jobs that keep their figures.

A plan is a YAML file: ``base``, a packaged config; ``settings`` of every arm; ``measure``, the function that measures;
``others``, prompts that it takes besides the validation set, as arguments of ``prompt_dataset``; and ``forms``, sizes
that it comes in. A form has ``seeds``, ``settings``, those of every ``sft`` arm, arguments of all ``others`` if any,
``starts`` and ``arms``. A start is a model that ``spin_sft`` makes for arms to begin with, by its settings. An arm has
a ``recipe`` (spin if none is named; sft; none, which measures), a ``start``, ``settings``, and ``seeds`` if not all.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pool import run_jobs

from spin.core.files import write_json

Job = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What the commands of all experiments take."""
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="results by job, logs, models (default: %(default)s)"
    )
    parser.add_argument("--docs", type=Path, help="folder for the JSON file, and what else is published (default: OUT)")
    parser.add_argument("--arms", default="", help="names with commas between them (default: the form's)")
    parser.add_argument("--seeds", default="", help="numbers with commas between them (default: the form's)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every arm")
    parser.add_argument("--gpus", default="", help="numbers of GPUs with commas between them (default: no GPU)")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs at a time on each GPU, or on the CPU")
    parser.add_argument("--deadline", type=float, help="seconds after which jobs are ended; what is finished stays")


def make_jobs(plan: Mapping[str, Any], form: str, args: argparse.Namespace) -> list[Job]:
    """All starts, then one job for each arm and seed, in the order of the arms: what a deadline cuts off comes last.

    Seeds after the first of an arm with ``later`` come after all others.

    Args:
        plan (Mapping[str, Any]): of a YAML file.
        form (str): one of its ``forms``.
        args (argparse.Namespace): of :func:`add_arguments`.

    Returns:
        list[Job]: what :func:`run_job` takes.

    Raises:
        SystemExit: If an arm or its start is unknown, a seed is no number, or figures of other settings would be
            published.
    """
    if args.docs and args.set:
        raise SystemExit("error: --set with --docs: figures of other settings would stand for the plan's. Add an arm.")
    shape = plan["forms"][form]
    arms: dict[str, Any] = shape["arms"]
    names = [name for name in args.arms.split(",") if name] or list(arms)
    if unknown := [name for name in names if name not in arms]:
        raise SystemExit(f"error: no arm {', '.join(unknown)}; there are {', '.join(arms)}.")
    changes = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.set)}
    if lost := [name for name in names if (start := arms[name].get("start")) and start not in shape["starts"]]:
        raise SystemExit(f"error: no start for {', '.join(lost)}; there are {', '.join(shape['starts'])}.")
    if wrong := [seed for seed in args.seeds.split(",") if seed and not seed.isdecimal()]:
        raise SystemExit(
            f"error: --seeds {', '.join(wrong)}: expected numbers with commas between them, such as 0,1,2."
        )
    seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    others = {name: {**prompts, **shape.get("others", {})} for name, prompts in plan["others"].items()}
    jobs: dict[str, Job] = {}

    def add(kind: str, name: str, seed: int, arm: Mapping[str, Any]) -> str:
        key, recipe, start = f"{name}-seed{seed}", arm.get("recipe", "spin"), arm.get("start")
        if start:
            start = add("starts", start, seed, {"recipe": "sft", **shape["starts"][start]})
        settings = {**plan["settings"], **shape["settings"], **(shape["sft"] if recipe == "sft" else {})}
        settings |= {
            "model.path": "${start}" if start else "${model}",
            **arm.get("settings", {}),
            "seed": seed,
        } | changes
        jobs.setdefault(
            key,
            {
                "name": key, "arm": name, "seed": seed, "form": form, "recipe": recipe, "needs": start,
                "problems": shape.get("problems"), "settings": settings, "keeps": kind == "starts",
                "base": plan["base"], "measure": plan["measure"], "others": others,
                "folder": str(args.out / kind / key),
                "start_folder": start and str(args.out / "starts" / start / "sft" / "iteration_000" / "hf_model"),
                "result": str(args.out / "jobs" / f"{key}.json"), "log": str(args.out / "logs" / f"{key}.log"),
            },
        )  # fmt: skip
        return key

    for name in names:
        for seed in seeds or arms[name].get("seeds", shape["seeds"]):
            add("arms", name, seed, arms[name])

    def order(job: Job) -> tuple[bool, int]:
        later = not job["keeps"] and arms[job["arm"]].get("later", False)
        return not job["keeps"], job["seed"] if later else 0

    return sorted(jobs.values(), key=order)


def run_plan(
    plan: Mapping[str, Any], form: str, paths: Mapping[str, str], args: argparse.Namespace
) -> tuple[list[Job], int]:
    """Runs the jobs that are not finished yet.

    Args:
        plan (Mapping[str, Any]): of a YAML file.
        form (str): one of its ``forms``.
        paths (Mapping[str, str]): what ``${model}`` and other names in the plan stand for.
        args (argparse.Namespace): of :func:`add_arguments`.

    Returns:
        tuple[list[Job], int]: results of the jobs that have begun, in the plan's order; how many did not succeed.
    """
    jobs = make_jobs(plan, form, args)
    missing = [{**job, "paths": dict(paths)} for job in unfinished(jobs)]
    for file in (Path(job["result"]) for job in missing):
        if file.is_file():  # of other settings, or half of them: not a result of this command if time is up before
            file.replace(file.with_suffix(".stale"))
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them finished before", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = run_jobs(
        missing, run_job, args.gpus.split(","), args.per_gpu, args.deadline, lambda line: print(line, flush=True)
    )
    files = [Path(job["result"]) for job in jobs]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()], failed


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Jobs of :func:`make_jobs` that are to be run: what began with a start that is made again is made again too."""
    found: list[Job] = []
    for job in jobs:
        if not is_finished(job) or job["needs"] in {each["name"] for each in found}:
            found.append(job)
    return found


def is_finished(job: Job) -> bool:
    """Whether a job's result is there, complete and of the same settings and problems, wherever model and data lay."""
    file = Path(job["result"])
    if not file.is_file():
        return False
    result = json.loads(file.read_text(encoding="utf-8"))
    made_of = {name: result.get(name) for name in ("settings", "problems")}
    return result["finished"] and made_of == json.loads(json.dumps({name: job[name] for name in made_of}))


def run_job(job: Job) -> bool:
    """Runs a job in this process and keeps its figures, what went wrong among them.

    Args:
        job (Job): from :func:`make_jobs`, with ``paths``.

    Returns:
        bool: it ran to its end.
    """
    result: dict[str, Any] = {
        **{name: job[name] for name in ("arm", "seed", "form", "recipe", "needs", "settings", "problems")},
        "device": None, "finished": False, "error": None, "iterations": [],
    }  # fmt: skip
    file = Path(job["result"])
    file.parent.mkdir(parents=True, exist_ok=True)

    def report(measured: dict[str, Any]) -> None:
        result["iterations"].append(measured)
        write_json(file, result)

    try:
        import torch  # not before: the worker first says which GPU it has
        from measured import run_recipe

        result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        paths = job["paths"] | {"${start}": job["start_folder"] or ""}
        run_recipe({**job, **{name: fill(job[name], paths) for name in ("settings", "others")}}, report)
        result["finished"] = True
    except Exception as error:  # noqa: BLE001 - an arm that fails is a result; the others continue
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    write_json(file, result)
    return result["finished"]


def fill(value: Any, paths: Mapping[str, str]) -> Any:
    """JSON values with the paths in place of their names.

    Args:
        value (Any): such as a job's settings.
        paths (Mapping[str, str]): by name, ``${model}``, say.

    Returns:
        Any: a copy.
    """
    if isinstance(value, Mapping):
        return {key: fill(item, paths) for key, item in value.items()}
    if isinstance(value, str):
        for name, path in paths.items():
            value = value.replace(name, path)
    return value


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them; ``~KEY`` removes a key of the base."""
    return [key if key.startswith("~") else f"{key}={json.dumps(value)}" for key, value in settings.items()]


def compact(results: Sequence[Job]) -> list[Job]:
    """What is worth keeping of results: figures to four places, and no path of this machine."""
    return [
        {name: result[name] for name in ("arm", "seed", "form", "needs", "device", "finished", "error")}
        | {
            "iterations": [
                {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
                for measured in result["iterations"]
            ]
        }
        for result in results
    ]


def added(earlier: Sequence[Job], results: Sequence[Job]) -> list[Job]:
    """Results of some arms or seeds beside those of earlier runs.

    Args:
        earlier (Sequence[Job]): of :func:`compact`. Those of the same arm, seed and start are replaced; of the same
            arm and seed also those that did not finish, or whose start is not known.
        results (Sequence[Job]): likewise, new. One that did not finish replaces none that did.

    Returns:
        list[Job]: all.
    """

    def key(result: Job) -> tuple[str, int]:
        return result["arm"], result["seed"]

    done = {key(result) for result in earlier if result["finished"]}
    found = [result for result in results if result["finished"] or key(result) not in done]
    new = {key(result): _began(result) for result in found}

    def stays(result: Job) -> bool:
        if key(result) not in new:
            return True
        return result["finished"] and _began(result) not in (None, new[key(result)])

    return [*filter(stays, earlier), *found]


def _began(result: Job) -> str | None:
    """Of the weights that a job began with, a fingerprint."""
    return next((measured["began"] for measured in result["iterations"] if "began" in measured), None)
