"""experiments/checkable.py: problems that a program checks, arms from start to page."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import yaml

from spin.config import SPINConfig, complete, load_config

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "experiments"))  # as when it runs, and for its workers

import checkable  # noqa: E402
import checkable_report  # noqa: E402
import jobs as job_plan  # noqa: E402
from checkable_problems import FAMILIES, check, make_rows, verdict  # noqa: E402

PLAN = yaml.safe_load(checkable.PLAN.read_text(encoding="utf-8"))


# --- Problems ---


def test_real_responses_are_right_and_no_question_is_in_both_parts():
    train, test = (make_rows(list(FAMILIES), 300, is_test) for is_test in (False, True))
    questions, others = ({row["messages"][0]["content"] for row in rows} for rows in (train, test))
    assert len(questions) == len(others) == 300 and not questions & others
    assert train == make_rows(list(FAMILIES), 300, False)
    for row in (*train, *test):
        real = row["messages"][1]["content"]
        assert verdict(real, real) == "r" and check(prompt="", real=real, generated=real, truncated=False)


@pytest.mark.parametrize(
    ("generated", "letter"),
    [
        ("28+12=40,40-31=9#9.2", "r"),
        ("28+12=41,41-31=10#10.2", "s"),
        ("28+12=40,40-31=9#9.3", "w"),
        ("28+12=40,40-31=9", "f"),
        ("28+12=40#40#9.2", "f"),
    ],
)
def test_verdicts_by_hand(generated, letter):
    """28 January and 12 days are 9 February."""
    real = "28+12=40,40-31=9#9.2"
    assert verdict(real, generated) == letter
    assert verdict(real, generated, truncated=True) == "t"
    assert not check(prompt="28.1+12", real=real, generated=generated, truncated=True)


# --- Figures ---


def measured(*samples):
    return {"verdicts": ["", *samples]}


def test_a_difference_and_its_interval_by_hand():
    """Problems solved in 1/2 of the samples less 0, 1 - 1 and 1 - 0: mean 1/2 and variance 1/4 over 3 problems. With a
    second seed of differences 0, 0, 0: means by problem 1/4, 0, 1/2, variance 1/16; of the seeds' 1/2 and 0, 1/8."""
    arm, other = measured("rrr", "srr"), measured("srs", "srs")
    mean, half = checkable_report.difference({0: arm}, {0: other, 1: arm})
    assert (mean, half) == pytest.approx((1 / 2, 1.96 * (1 / 4 / 3) ** 0.5))
    mean, half = checkable_report.difference({0: arm, 1: arm}, {0: other, 1: arm})
    assert (mean, half) == pytest.approx((1 / 4, 1.96 * (1 / 16 / 3 + 1 / 8 / 2) ** 0.5))
    assert checkable_report.difference({0: arm}, {1: arm}) is None


def test_added_figures_stand_beside_those_of_other_starts_and_replace_those_of_the_same():
    def result(arm, began, finished=True):
        return {"arm": arm, "seed": 0, "finished": finished, "iterations": [{"began": began}] if began else []}

    earlier = [result("start", "a"), result("spin", "a"), result("k4", None, finished=False), result("sft", None)]
    earlier += [result("hot", None)]
    new = [result("start", "b"), result("spin", "a"), result("k4", "b"), result("hot", "a")]
    assert job_plan.added(earlier, new) == [earlier[0], earlier[3], *new]
    ended = [result("start", "a", finished=False), result("k4", "b", finished=False)]
    assert job_plan.added(earlier, ended) == [*earlier[:2], *earlier[3:], ended[1]]  # nothing that was whole is lost


def test_arms_of_all_seeds_that_begin_with_the_same_weights_are_compared_with_their_one_measurement():
    start, of_seed_1 = measured("sss"), measured("ssr")
    base = {(0, "a"): start, (1, "b"): of_seed_1}
    arm = {(0, "a"): {}, (1, "a"): {}, (1, "b"): {}, (2, "c"): {}, (3, None): {}}
    arms = {"base": {"recipe": "none", "start": "plateau"}, "arm": {"start": "plateau"}}
    found = checkable_report.began_with({"base": base, "arm": arm}, arms, "arm")
    assert found == {(0, "a"): start, (1, "a"): start, (1, "b"): of_seed_1}


def test_jobs_that_failed_are_told_from_those_that_the_deadline_ended(tmp_path):
    jobs = [
        {"arm": arm, "seed": 1, "device": device, "finished": False, "error": error, "iterations": []}
        for arm, device, error in (("spin", "CPU", None), ("sft", None, "ImportError: torch"))
    ]
    (tmp_path / "checkable_small.json").write_text(json.dumps(jobs), encoding="utf-8")
    assert checkable_report.jobs_line(tmp_path, "small") == (
        "0 jobs, starts among them, on: CPU. Ended by the deadline, and left out: `spin` (seed 1). "
        "Failed, and left out: `sft` (seed 1)."
    )
    assert checkable_report.read_results(tmp_path) == {}


def test_the_pages_have_the_figures_of_the_results():
    results = checkable_report.read_results(checkable_report.DOCS / "experiments")
    for page in checkable_report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert checkable_report.fill_sections(text, checkable_report.sections(results, PLAN)) == text


# --- From start to page ---


def arguments(out, *given):
    parser = argparse.ArgumentParser()
    job_plan.add_arguments(parser, out=str(out))
    return parser.parse_args(given)


def test_what_begins_with_a_start_or_problems_that_have_changed_is_made_again(tmp_path):
    def names(plan):
        jobs = job_plan.make_jobs(plan, "small", arguments(tmp_path, "--arms", "spin,early_spin", "--seeds", "0"))
        return jobs, [job["name"] for job in job_plan.unfinished(jobs)]

    plan = json.loads(json.dumps(PLAN))
    jobs, _ = names(plan)
    for job in jobs:
        file = Path(job["result"])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"finished": True, **job}), encoding="utf-8")
    assert names(plan)[1] == []
    plan["forms"]["small"]["starts"]["plateau"]["settings"]["sft.epochs"] = 2
    assert names(plan)[1] == ["plateau-seed0", "spin-seed0"]
    plan["forms"]["small"]["problems"]["train"] = 100
    assert names(plan)[1] == [job["name"] for job in jobs]


@pytest.mark.parametrize(
    ("experiment", "form"),
    [("checkable", form) for form in PLAN["forms"]] + [("real_model", "small"), ("real_model", "full")],
)
def test_every_arm_of_the_plans_is_a_config_that_works(experiment, form, tmp_path, tiny_lm):
    """As far as can be known without the model: keys, kinds, lists by iteration."""
    plan = yaml.safe_load((REPO / "experiments" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    seeds = {job["seed"] for job in job_plan.make_jobs(plan, form, arguments(tmp_path))}
    assert seeds == set(plan["forms"][form]["seeds"])
    jobs = job_plan.make_jobs(plan, form, arguments(tmp_path, "--seeds", "0"))
    names = [job["name"] for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        assert job["needs"] is None or names.index(job["needs"]) < names.index(job["name"])
        paths = {"${model}": str(tiny_lm), "${start}": str(tiny_lm), "${data}": str(tmp_path)}
        settings = {**job_plan.fill(job["settings"], paths), "output_dir": str(tmp_path), "device": "cpu"}
        complete(load_config(job["base"], job_plan.overrides(settings)), SPINConfig)
    for _, *both in plan["forms"][form].get("situations", []):
        assert {f"{name}-seed0" for name in both} <= set(names)


@pytest.mark.slow
def test_the_smallest_form_from_start_to_page(tmp_path, capfd):
    form = PLAN["forms"]["small"]
    few = {"limit_train_batches": 1, "global_batch_size": 4, "max_iterations": 2, "sampling.max_new_tokens": 8}
    sft = {"global_batch_size": 8, "sft.epochs": 2, "sft.limit_train_batches": 1, "val_check_interval": 1}
    small = {
        **form,
        "problems": {**form["problems"], "train": 40, "test": 8},
        "settings": form["settings"] | few,
        "sft": form["sft"] | sft,
        "starts": {"plateau": {"settings": {"sft.epochs": 1}}},
        "arms": {name: form["arms"][name] for name in ("start", "sft", "spin", "spin_checker")},
    }
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN | {"forms": {"small": small}}), encoding="utf-8")
    command = ["--plan", str(plan), "--out", str(tmp_path / "out"), "--docs", str(tmp_path), "--seeds", "0"]
    assert checkable.main(command) == 0

    file = tmp_path / "checkable_small.json"
    found = {job["arm"]: job for job in json.loads(file.read_text(encoding="utf-8"))}
    assert [len(found[arm]["iterations"]) for arm in ("plateau", "start", "sft", "spin")] == [1, 1, 2, 2]
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    plateau, start, spin = (found[arm]["iterations"][-1] for arm in ("plateau", "start", "spin"))
    assert plateau["val_loss"] == pytest.approx(start["val_loss"], abs=1e-4)  # weights were handed on
    assert start["val_loss"] != spin["val_loss"] and spin["trained_tokens"] > 0
    assert [len(letters) for letters in spin["verdicts"]] == 5 * [8]
    assert not list((tmp_path / "out" / "small" / "arms").iterdir())  # no weights are left

    results = checkable_report.read_results(tmp_path)
    assert "| `spin` | SPIN, rate 3e-5 | 1 | " in checkable_report.sections(results, PLAN)["small"]
    checkable_report.draw(results, PLAN, tmp_path / "picture.svg")
    assert ">greedy responses<" not in (picture := (tmp_path / "picture.svg").read_text()) and ">SFT, rate" in picture

    assert "| arm | what | seeds | temperature 1 |" in capfd.readouterr().out
    assert checkable.main(command) == 0
    assert "5 jobs, 5 of them finished before" in capfd.readouterr().out

    assert checkable.main([*command[:-1], "1", "--arms", "start"]) == 0  # another seed of some arms is added
    results = checkable_report.read_results(tmp_path)["small"]
    assert {arm: [seed for seed, _ in runs] for arm, runs in results.items()} == {
        "start": [0, 1], "sft": [0], "spin": [0], "spin_checker": [0]
    }  # fmt: skip
    (began,) = {began for runs in results.values() for seed, began in runs if seed == 0}
    assert began not in {began for seed, began in results["start"] if seed == 1}


def test_an_unknown_arm_form_or_seed_and_settings_that_would_be_published(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no arm spun; there are start, sft"):
        job_plan.make_jobs(PLAN, "small", arguments(tmp_path, "--arms", "spun"))
    arms = {"spin": {"what": "SPIN", "start": "platau"}}
    plan = PLAN | {"forms": {"small": PLAN["forms"]["small"] | {"arms": arms}}}
    with pytest.raises(SystemExit, match="no start for spin; there are plateau, early"):
        job_plan.make_jobs(plan, "small", arguments(tmp_path))
    with pytest.raises(SystemExit, match="--seeds 0-2: expected numbers with commas"):
        job_plan.make_jobs(PLAN, "small", arguments(tmp_path, "--seeds", "0-2"))
    with pytest.raises(SystemExit):
        checkable.main(["--form", "large"])
    assert "--form large: expected small, full" in capsys.readouterr().err
    for given, said in (((), "full takes --model"), (("--model", str(tmp_path)), "it has no config.json")):
        with pytest.raises(SystemExit):
            checkable.main(["--form", "full", "--out", str(tmp_path), *given])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="figures of other settings would stand for the plan's"):
        job_plan.make_jobs(PLAN, "small", arguments(tmp_path, "--docs", str(tmp_path), "--set", "loss.beta=1.0"))
