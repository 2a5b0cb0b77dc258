"""Tables and plot of the comparison with peers, from made-up results, and the pages of this repository."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))  # as when one of them runs

import page  # noqa: E402

SETUP = {
    "setup": {"device": "Some GPU", "versions": {"torch": "2.0", "liger_kernel": "0.8"}, "model": "m", "rounds": 3,
              "compute_dtype": "bfloat16", "row_tokens": 8},
    "ceilings": {"matmul_tflops": 700.0, "copy_gb_per_second": 2500.0},
}  # fmt: skip
DEVIATIONS = {"loss": 0.7, "loss_deviation": 0.01, "grad_norm_deviation": 0.002, "gradient_deviation": 0.05}


def figure(*values):
    return {"values": list(values), "median": sorted(values)[len(values) // 2], "min": min(values), "max": max(values)}


def arm(title, *seconds, peak=None, pairs=64, micro_batch=None):
    """An arm that takes these seconds for a step."""
    step = {**figure(*seconds), "pairs_per_second": pairs / sorted(seconds)[len(seconds) // 2]}
    run = {"title": title, "micro_batch": micro_batch, "step": step, "forward_backward": step}
    return run | ({"peak_gib": figure(peak)} if peak else {})


def step_file(mix, arms):
    mean = {"prompt": 199.4, "real": 278, "generated": 278}
    section = {"pairs": 64, "mean_tokens": mean, "floor_tflop": 1.0, "arms": arms}
    check = dict.fromkeys(arms, DEVIATIONS)
    return {**SETUP, "skipped": {"trl_liger": "liger_kernel not installed"}, "check": check, "step": {mix: section}}


@pytest.fixture
def results():
    """Ours takes 1 s in the short mix, TRL 5 s, tuned TRL 2 s and 3 s, packed 1.2 s; in the long mix packed fails."""
    short = {
        "ours": arm("this project", 0.5, 1.0, 2.0, peak=30.0),
        "trl": arm("TRL & more", 5.0, 5.0, 5.0, peak=60.0, micro_batch=8),
        "trl_tuned": arm("tuned", 3.0),
        "trl_torch_compile": arm("whole", 2.0),
        "hf_packed": arm("packed", 1.2),
    }
    long = {
        "ours": arm("this project", 2.0),
        "trl_liger": arm("Liger", 3.0, peak=9.0),
        "hf_packed": {"title": "packed", "error": "OutOfMemoryError: large"},
    }
    stages = {"generate": figure(4.0), "train": figure(6.0)}
    slow = {"generate": figure(30.0), "train": figure(15.0)}
    iteration = {
        "ours": {"title": "this project", "stages": stages, "seconds": figure(10.0)},
        "trl": {"title": "TRL", "stages": slow, "seconds": figure(45.0)},
        "trl_tuned": {"title": "tuned", "error": "ValueError: no"},
    }
    passes = {
        "ours": {"title": "this project", "seconds": figure(1.0), "pairs_per_second": 256.0, "batch": None,
                 "logps_deviation": 1e-5},
        "trl": {"title": "TRL", "seconds": figure(4.0), "pairs_per_second": 64.0, "batch": 8, "logps_deviation": 2e-5},
    }  # fmt: skip
    return [
        step_file("long", long),
        step_file("short", short),
        {**SETUP, "iteration": {"prompts": 512, "generated_tokens": 255.4, "arms": iteration}},
        {**SETUP, "reference": {"pairs": 256, "arms": passes}},
    ]


def rows(markdown):
    """Cells of all table lines."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_steps_by_mix(results):
    text = page.step_section(results)
    assert text.index("**short**") < text.index("**long**"), "mixes have an order of their own"
    cells = rows(text[: text.index("**long**")])
    assert cells["this project"] == ["64 (32 to 128)", "1.00", "64", "30", "1.0e-02", "5.0e-02"]
    assert cells["TRL & more, 8 pairs a time"][:4] == ["12.8 (12.8 to 12.8)", "5.00", "12.8", "60"]
    assert "bfloat16 compute, 1 to 3 rounds. In the same run" in text[: text.index("**long**")]
    assert "bfloat16 compute, 1 round. In the same run" in text[text.index("**long**") :]
    assert rows(text)["packed"] == ["OutOfMemoryError: large", *["-"] * 5]
    assert "liger-kernel 0.8" in text and "700 TFLOP/s" in text and "mean tokens 199 prompt" in text
    assert "Not run: trl_liger: liger_kernel not installed." in text


def test_goals_are_measured_against_the_fastest_tuned_arm(results):
    """5 / 1, 2 / 1 (torch_compile is the faster of the tuned arms), 1.2 / 1 and 45 / 10."""
    assert rows(page.goals_section(results)) == {
        "ours against": ["goal, times as fast", "measured", "reached"],
        "---": ["---", "---", "---"],
        "TRL, default, short": ["4", "5.00", "yes"],
        "TRL, tuned, short": ["2.5", "2.00", "no"],
        "TRL, tuned, long": ["2.5", "1.50", "no"],
        "packed, prompts not shared, short": ["1.25", "1.20", "no"],
        "whole iteration, TRL, default": ["5", "4.50", "no"],
    }


def test_iterations_and_passes(results):
    cells = rows(page.iteration_section(results))
    assert cells["TRL"] == ["30", "15", "45", "4.50"]
    assert cells["tuned"] == ["ValueError: no", "-", "-", "-"]
    assert rows(page.reference_section(results))["TRL, 8 pairs a time"] == ["64", "4.00", "2.0e-05"]


def test_generation_from_the_committed_results():
    section = json.loads((REPO / "benchmarks/results/h100_generation.json").read_text(encoding="utf-8"))
    text = page.generation_section([{**SETUP, "generation": section}])
    assert "vLLM 0.23.0; 512 prompts of 204 tokens, answers of 124." in text
    for run in section["arms"].values():
        assert run["title"] in text
    assert rows(text)[section["arms"]["transformers"]["title"]][1] == "1.00"


def test_readme_has_one_row_for_each_arm(results):
    cells = rows(page.readme_section(results))
    assert cells["this project (pairs/s)"] == ["64", "32", "30"]
    assert cells["TRL & more"] == ["5.00", "-", "60"]
    assert cells["packed"] == ["1.20", "-", "-"]
    assert cells["Liger"] == ["-", "1.50", "-"], "its memory was measured in another mix than the column's"


def test_the_plot_is_a_picture_with_a_bar_for_each_arm(results):
    svg = page.plot(results)
    assert page.plot(results) == svg
    tree = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    bars = {
        rect.get("fill"): float(rect.get("width")) for rect in tree.iter(f"{name}rect") if rect.get("fill") != "white"
    }
    assert len(list(tree.iter(f"{name}rect"))) == 1 + 5 + 3  # background, arms of short and of long
    texts = [text.text for text in tree.iter(f"{name}text")]
    assert "TRL & more" in texts and "failed" in texts and "64" in texts
    assert set(bars) == {page.COLORS["ours"], page.OTHERS}


@pytest.fixture
def root(tmp_path):
    """A repository with both pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(
        "# Title\n<!-- peers: goals -->\nold\n<!-- peers: end -->\ntext\n<!-- peers: plot -->\n<!-- peers: end -->\n"
    )
    (tmp_path / "README.md").write_text("words\n\n<!-- peers: readme -->\n<!-- peers: end -->\nmore\n")
    return tmp_path


def test_pages_are_written_between_their_markers_and_checked(root, results):
    files = []
    for index, result in enumerate(results):
        files.append(str(root / f"peers_{index}.json"))
        Path(files[-1]).write_text(json.dumps(result))
    command = [*files, "--root", str(root)]
    with pytest.raises(SystemExit, match="Run: python benchmarks/page.py"):
        page.main([*command, "--check"])
    page.main(command)
    page.main([*command, "--check"])
    text = (root / "docs" / "benchmarks.md").read_text()
    assert text.startswith("# Title\n<!-- peers: goals -->\n\n| ours against") and "old" not in text
    assert "](benchmarks.svg)\n\n<!-- peers: end -->\n" in text
    assert (root / "docs" / "benchmarks.svg").read_text() == page.plot(results)
    assert (root / "README.md").read_text().endswith("<!-- peers: end -->\nmore\n")


def test_an_unknown_section_is_an_error():
    with pytest.raises(SystemExit, match="marks the section speed; expected one of goals"):
        page.filled("<!-- peers: speed -->\n<!-- peers: end -->\n", [])


def test_pages_of_this_repository_are_made_from_its_results():
    """Every section is on a page, and says what benchmarks/results does."""
    text = "".join((REPO / name).read_text(encoding="utf-8") for name in page.PAGES)
    assert {match["name"] for match in page.MARKED.finditer(text)} == page.SECTIONS.keys()
    page.main(["--check"])
