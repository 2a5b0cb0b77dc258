"""Self-play with a real model: SmolLM2-135M-Instruct on prompts with human-written responses; measured on others.

    python experiments/real_model.py --form small --model FOLDER --data FOLDER              # a CPU, minutes
    python experiments/real_model.py --model FOLDER --data FOLDER --gpus 0,1 --per-gpu 4    # GPUs, all arms and seeds

The model is what `spin demo --only-model` makes, the data what experiments/real_data.py makes. The arms are in
real_model.yaml: each is the product's own recipe with some settings changed. Every job (an arm and a seed) writes its
figures to `OUT/jobs` after each iteration; the same command continues with what is missing. At the end the figures of
all jobs are put into one JSON file, a page and pictures (--docs).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from real_pool import run_jobs
from real_report import PLAN, read_results, write_report

from spin.core.files import write_json


def make_jobs(
    plan: Mapping[str, Any],
    form: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    changes: Mapping[str, Any] | None = None,
) -> list[dict]:
    """One job for each arm and seed, all arms of the first seed first.

    Args:
        plan (Mapping[str, Any]): from :func:`read_plan`.
        form (str): one of its ``forms``.
        arms (Sequence[str]): names; none stands for the form's own, or all.
        seeds (Sequence[int]): none stands for the form's own.
        out (Path): folder of results, logs and scratch space.
        changes (Mapping[str, Any] | None): settings that go before all others.

    Returns:
        list[dict]: what :func:`run_job` takes.

    Raises:
        SystemExit: If an arm is unknown.
    """
    shape = plan["forms"][form]
    names = list(arms or shape.get("arms", plan["arms"]))
    unknown = [name for name in names if name not in plan["arms"]]
    if unknown:
        sys.exit(f"error: no arm {', '.join(unknown)}; there are {', '.join(plan['arms'])}.")
    questions = {name: {**arguments, **shape.get("questions", {})} for name, arguments in plan["questions"].items()}
    jobs = []
    for seed in seeds or shape["seeds"]:
        for name in names:
            stages = []
            for stage in plan["arms"][name]:
                recipe = stage.get("recipe", "spin")
                own = stage.get("settings", {})
                matched = shape["sft"] if recipe == "sft" else {}
                settings = {**plan["settings"], **shape["settings"], **matched, **own, "seed": seed} | dict(
                    changes or {}
                )
                stages.append({"recipe": recipe, "settings": settings})
            key = f"{name}-seed{seed}"
            jobs.append(
                {
                    "name": key,
                    "arm": name,
                    "seed": seed,
                    "base": plan["base"],
                    "stages": stages,
                    "questions": questions,
                    "paths": plan["paths"],
                    "result": str(out / "jobs" / f"{key}.json"),
                    "log": str(out / "logs" / f"{key}.log"),
                    "scratch": str(out / "scratch" / key),
                }
            )
    return jobs


def is_finished(job: Mapping[str, Any]) -> bool:
    """Whether a job's result is there, complete and made with the same settings, wherever model and data lay."""
    file = Path(job["result"])
    if not file.is_file():
        return False
    result = json.loads(file.read_text(encoding="utf-8"))
    return result["finished"] and result["stages"] == json.loads(json.dumps(job["stages"]))


def run_job(job: Mapping[str, Any]) -> bool:
    """Runs a job in this process and keeps its figures, what went wrong among them.

    Args:
        job (Mapping[str, Any]): from :func:`make_jobs`.

    Returns:
        bool: it ran to its end.
    """
    result: dict[str, Any] = {
        **{name: job[name] for name in ("name", "arm", "seed", "stages")},
        "device": None,
        "finished": False,
        "error": None,
        "iterations": [],
    }
    file = Path(job["result"])
    file.parent.mkdir(parents=True, exist_ok=True)

    def report(measured: dict[str, Any]) -> None:
        result["iterations"].append(measured)
        write_json(file, result)

    try:
        import torch  # not before: the worker first says which GPU it has
        from real_runs import run_stages

        result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        stages, questions = (fill(job[name], job["paths"]) for name in ("stages", "questions"))
        run_stages(job["base"], stages, questions, Path(job["scratch"]), report)
        result["finished"] = True
    except Exception as error:  # noqa: BLE001 - an arm that fails is a result; the others continue
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    write_json(file, result)
    return result["finished"]


def read_plan(file: Path, model: Path, data: Path) -> dict[str, Any]:
    """The arms, and the paths that the names in them stand for.

    Args:
        file (Path): real_model.yaml or another one like it.
        model (Path): Hugging Face folder.
        data (Path): folder made by real_data.py.

    Returns:
        dict[str, Any]: the plan.

    Raises:
        SystemExit: If something is not there.
    """
    files = [model / "config.json", *(data / f"{name}.jsonl" for name in ("train", "val", "choices", "sums"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        sys.exit(f"error: {', '.join(map(str, missing))}: no such file. See the head of {Path(__file__).name}.")
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    return plan | {"paths": {"${model}": str(model.resolve()), "${data}": str(data.resolve())}}


def fill(value: Any, paths: Mapping[str, str]) -> Any:
    """JSON values with the paths in place of their names.

    Args:
        value (Any): such as a job's stages.
        paths (Mapping[str, str]): by name, ``${model}`` and ``${data}``.

    Returns:
        Any: a copy.
    """
    if isinstance(value, Mapping):
        return {key: fill(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, paths) for item in value]
    if isinstance(value, str):
        for name, path in paths.items():
            value = value.replace(name, path)
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing and writes the report; 1 if a job did not succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN, help="the arms (default: %(default)s)")
    parser.add_argument("--form", default="full", help="of real_model.yaml: full, for GPUs, or small, for a CPU")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder made by real_data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"), help="results by job, logs, scratch space")
    parser.add_argument("--docs", type=Path, help="folder for real_model.json, .md and pictures (default: OUT)")
    parser.add_argument("--arms", default="", help="names with commas between them (default: the form's)")
    parser.add_argument("--seeds", default="", help="numbers with commas between them (default: the form's)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every arm")
    parser.add_argument("--gpus", default="", help="numbers of GPUs with commas between them (default: no GPU)")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs at a time on each GPU, or on the CPU")
    parser.add_argument("--deadline", type=float, help="seconds after which jobs are ended; what is finished stays")
    args = parser.parse_args(arguments)
    plan = read_plan(args.plan, args.model, args.data)
    if args.form not in plan["forms"]:
        parser.error(f"--form {args.form}: expected {', '.join(plan['forms'])}")
    seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    changes = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.set)}
    jobs = make_jobs(plan, args.form, [name for name in args.arms.split(",") if name], seeds, args.out, changes)
    missing = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them finished before", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = run_jobs(missing, run_job, args.gpus.split(","), args.per_gpu, args.deadline, _tell)
    write_report(read_results(args.out / "jobs"), args.docs or args.out, list(plan["arms"]))
    return int(failed > 0)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
