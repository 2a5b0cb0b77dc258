"""The documentation's pages of figures are those of benchmarks/results."""

import subprocess
import sys
from xml.etree import ElementTree

import page
import pytest


def test_pages_of_this_repository_are_made_from_its_results():
    """Every section is on a page, and says what benchmarks/results does."""
    text = "".join((page.REPO / name).read_text(encoding="utf-8") for name in page.PAGES)
    assert {match["name"] for match in page.MARKED.finditer(text)} == page.SECTIONS.keys()
    page.main(["--check"])


def test_pages_are_written_between_their_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("words\n\n<!-- peers: sentence -->\nold\n<!-- peers: end -->\nmore\n")
    (tmp_path / "docs" / "benchmarks.md").write_text("# Title\n<!-- peers: plot -->\n<!-- peers: end -->\n")
    with pytest.raises(SystemExit, match="Run: python benchmarks/page.py"):
        page.main(["--root", str(tmp_path), "--check"])
    page.main(["--root", str(tmp_path)])
    page.main(["--root", str(tmp_path), "--check"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("words\n") and text.endswith("<!-- peers: end -->\nmore\n") and "old" not in text
    ElementTree.parse(tmp_path / "docs" / "benchmarks.svg")
    with pytest.raises(SystemExit, match="marks the section speed; expected one of goals"):
        page.filled("<!-- peers: speed -->\n<!-- peers: end -->\n", [])


def _step(seconds, **more):
    figure = {"median": seconds, "min": seconds, "max": seconds, "values": [seconds], "pairs_per_second": 64 / seconds}
    return {"title": "an arm", "micro_batch": None, "step": figure, "forward_backward": figure, **more}


def test_goals_and_ratios_are_of_one_run():
    """Each ratio comes from the newest run that has both arms; engines are compared on a quiet host alone."""
    ceilings = {"matmul_tflops": 800.0, "sustained_matmul_tflops": 500.0, "copy_gb_per_second": 4000.0}
    old = {"file": "old.json", "ceilings": {}, "step": {"short": {"pairs": 64, "floor_tflop": 300.0, "arms": {
        "ours": _step(1.0), "hf_packed": _step(1.4), "authors": _step(6.5)}}}}  # fmt: skip
    new = {"file": "new.json", "ceilings": ceilings, "step": {"short": {"pairs": 64, "floor_tflop": 300.0, "arms": {
        "ours": _step(0.8), "hf_packed": _step(1.2, row_tokens=24576)}}}}  # fmt: skip
    stages = {"generate": 5.0, page.HASH: 10.0, "train": 20.0}
    whole = {"title": "", "seconds": {"median": 35.0}, "stages": {k: {"median": v} for k, v in stages.items()}}
    iteration = {"file": "it.json", "iteration": {"arms": {"ours": {"seconds": {"median": 10.0}}, "trl_vllm": whole}}}
    speeds = {"embedded_auto": 80.0, "vllm_512": 38.0, "vllm_bare_512": 40.0, "vllm_process_1024": 50.0}
    arms = {name: {"tokens_per_second": speed} for name, speed in speeds.items()}
    hosts = {
        "quiet.json": {"cpus": 16, "busy_cpus": 2.0},
        "busy.json": {"cpus": 16, "busy_cpus": 9.0},
        "unknown.json": {},
    }
    engines = [
        {"file": file, "generation": {"setup": {"requests": 4096, **host}, "arms": arms}}
        for file, host in hosts.items()
    ]
    results = [old, new, iteration, *engines]
    rows = [line.strip("| ").split(" | ") for line in page.goals_section(results).splitlines()[2:]]
    found = {(row[0], row[-1]): row[1:-1] for row in rows if row[-1] in {each["file"] for each in results}}
    whole = "whole iteration, vLLM and TRL, tuned"
    assert found == {
        ("step, the authors' style, short", "old.json"): ["6", "6.50", "yes"],
        ("step, packed, prompts not shared, short", "new.json"): ["1.45", "1.50", "yes"],
        ("step, short, part of a sustained matrix product", "new.json"): ["0.75", "0.75", "yes"],
        (whole, "it.json"): ["3", "3.50", "yes"],
        (f"{whole}, without TRL's {page.HASH}", "it.json"): ["3", "2.50", "no"],
        ("embedded generator against vLLM, 4,096 prompts", "quiet.json"): ["1.3", "1.60", "yes"],
        ("vLLM through the product against the same engine called bare, 4,096 prompts", "quiet.json"): [
            "0.95", "0.95", "yes"],
    }  # fmt: skip


@pytest.mark.slow
def test_plans_of_many_hosts_are_what_their_command_writes(subprocess_env):
    command = [sys.executable, "benchmarks/plans.py", "--check"]
    done = subprocess.run(command, cwd=page.REPO, env=subprocess_env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
