"""The report: what is read, what is drawn, what is advised, and that nothing in a run can take the page over."""

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spin.cli import main
from spin.report import advice, read_run, render
from spin.report.charts import MOST_POINTS, Chart, Series, nice_ticks, number
from tests.report_runs import SCRIPT, step_metrics, write_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "my run", iterations=2, steps=10)


@pytest.fixture(scope="module")
def page(run_folder):
    return render(read_run(run_folder))


class Elements(HTMLParser):
    """Tags and attributes of a page, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


# --- The page ---


def test_the_page_stands_alone(page):
    """No script, no style sheet, image or font from elsewhere, no handler: one file, readable without a network."""
    found = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(found.tags)
    assert not [each for each in found.attributes if each[1] in ("src", "href", "srcset", "action", "style")]
    assert not [each for each in found.attributes if each[1].startswith("on")]
    assert "@import" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_what_comes_from_the_run_is_escaped(tmp_path):
    """A prompt, a sample id, a config value and the folder's name that are markup come out as text."""
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>", config={"seed": SCRIPT})
    row = {"step": 20, "prompt": None, "real": 5, "margin": "x", "iteration": 1}
    row["sample_id"] = f'"><a href="//evil">{SCRIPT}'
    with (folder / "samples.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    page = render(read_run(folder))
    found = Elements(page)
    assert not {"script", "img", "a"} & set(found.tags)
    assert "onerror" not in {name for _, name, _ in found.attributes}
    assert SCRIPT not in page and html.escape(SCRIPT, quote=False).split("'")[0] in page
    assert "generated <b>response" not in page and "generated &lt;b&gt;response" in page


def test_numbers_of_the_run_are_there(page):
    """Validation losses 3.0, 2.9, 2.8; last margin 2, its loss log(1 + e^-2); half of two responses truncated."""
    assert "Finished after 20 steps." in page
    assert f"0.6931 → {math.log1p(math.exp(-2)):.4g}" in page
    assert "<dt>validation loss</dt><dd>2.8</dd>" in page
    assert "15 / -5" in page and "<td>50%</td>" in page and "<td>3 / 2 / 3</td>" in page
    for title in ("Loss", "Rewards", "Log-prob against the opponent&#39;s, nats", "Validation loss, nats per token"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "ln 2: equal models" in page
    assert page.count('<section class="sample">') == 4
    assert "real response of 0" in page and "real response of 1" in page


def test_time_by_stage(run_folder, page):
    """Fitting: 10 steps of 2 seconds. Validation: 1.5. Playing: between the times in the store's manifest."""
    manifest = run_folder / "iteration_000" / "responses" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"begun_at": 1000.0, "sealed_at": 1065.0}))
    seconds = read_run(run_folder).iterations[0].seconds
    assert seconds == {"fit": 20.0, "validate": 1.5, "play": 65.0}
    assert "1 min 05 s" in render(read_run(run_folder))


# --- Runs that are not whole ---


def test_a_run_that_is_still_writing(tmp_path):
    """Half a line of metrics, a line of binary, a store without a manifest, a shard that is cut: told, not fatal."""
    folder = write_run(tmp_path, iterations=2, steps=5, finished=False)
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff\xfe\n[1, 2]\n{"step": "x"}\n{"step": 11, "loss": NaN, "iteration": 1}\n{"step": 12, "lo')
    broken = folder / "iteration_001" / "responses"
    (broken / "manifest.json").unlink()
    shard = broken / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    run = read_run(folder)
    page = render(run)
    assert "Not finished: at step 11, in iteration 1." in page and "UTC" in page
    assert [iteration.responses for iteration in run.iterations] == [2, 1]
    assert "shard-00000.parquet: cannot be read" in page
    assert len(run.series("loss")) == 10


@pytest.mark.parametrize("gone", ["samples.jsonl", "config.yaml", "iteration_000", "metrics.jsonl", "all"])
def test_a_run_without_one_of_its_parts(tmp_path, gone):
    folder = write_run(tmp_path, iterations=1, steps=3)
    for path in list(folder.iterdir()) if gone == "all" else [folder / gone]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if gone == "all":  # a run that has only begun
        (folder / "iteration_000" / "responses").mkdir(parents=True)
    page = render(read_run(folder))
    assert "</html>" in page
    assert gone != "all" or ("Not finished" in page and "<figure>" not in page)


@pytest.mark.parametrize("loss", [None, "text", {"_component_": "mine.Loss"}], ids=str)
def test_a_loss_section_of_another_form_and_a_config_that_is_being_written(tmp_path, loss):
    folder = write_run(tmp_path, iterations=1, steps=5, config={"loss": loss})
    assert ("ln 2: equal models" in render(read_run(folder))) == (not isinstance(loss, dict))
    (folder / "config.yaml").write_text("loss: {beta: 0.1")
    assert re.search(r"config.yaml:\d+:\d+: not valid YAML", render(read_run(folder)))


def add_line(folder, step, iteration, share, **changes):
    """Another line of a run's metrics."""
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(step_metrics(step, iteration, share, **changes)) + "\n")


def test_a_step_that_was_made_again_counts_once(tmp_path):
    folder = write_run(tmp_path, iterations=1, steps=3)
    add_line(folder, 3, 0, 1.0, loss=0.25)
    assert read_run(folder).series("loss")[-1] == (3, 0.25)
    assert len(read_run(folder).series("loss")) == 3


# --- Advice ---


def falling(step):
    return {"real_logp_drift": -3.0 * step, "generated_logp_drift": -9.0 * step}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (falling, ["both log-probs fall", "nll_weight"]),
        (lambda step: {"acc": 0.0}, ["acc stays at 0", "optimizer.lr"]),
        (lambda step: {"acc": 0.0, "updated_fraction": 0.01}, ["acc stays at 0", "dtype=fp32"]),
        (lambda step: {"acc": 1.0}, ["acc is 1.000", "epochs"]),
        (lambda step: {"loss": math.log(2) + 0.1 * (step - 1)}, ["far above ln 2", "optimizer.lr"]),
        (lambda step: {"loss": 0.75 if step == 1 else 0.5}, ["first loss is 0.7500", "self_test"]),
        (lambda step: {"nonfinite_steps": 2}, ["2 batches were left out"]),
    ],
)
def test_known_failures_get_advice(tmp_path, changes, words):
    run = read_run(write_run(tmp_path, iterations=1, steps=10, changes=changes))
    found = [text for text in advice(run) if "length limit" not in text]
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_a_truncated_fraction_and_a_rising_validation_loss_get_advice_and_a_good_run_none(tmp_path):
    """One of two responses is truncated in write_run; the validation loss goes from 3.0 to 3.5."""
    folder = write_run(tmp_path, iterations=1, steps=10)
    responses = folder / "iteration_000" / "responses"
    add_line(folder, 11, 0, 1.0, val_loss=3.5)
    found = advice(read_run(folder))
    assert any("50% of the opponent's responses were truncated" in text for text in found)
    assert any("rose from 3.000 to 3.500" in text for text in found)
    write_run(tmp_path, iterations=1, steps=10)
    shutil.rmtree(responses)
    assert advice(read_run(folder)) == []


def test_validation_by_source(tmp_path):
    folder = write_run(tmp_path, iterations=1, steps=5)
    by_source = {f"val_loss/{name}": 2.0 + i for i, name in enumerate(("chat", "math", "code", "law"))}
    add_line(folder, 6, 0, 1.0, val_loss=3.5, **by_source)
    page = render(read_run(folder))
    assert page.count("<figcaption>Validation loss by source, nats per token</figcaption>") == 2
    for name in ("chat", "math", "code", "law"):
        assert f"{name} " in page


def test_another_loss_is_not_measured_by_ln_2(tmp_path):
    changes = {"loss": {"beta": 0.1, "loss_type": "hinge"}}
    folder = write_run(tmp_path, iterations=1, steps=10, changes=lambda step: {"loss": 1.5}, config=changes)
    assert not any("ln 2" in text for text in advice(read_run(folder)))
    assert "ln 2: equal models" not in render(read_run(folder))


# --- Charts ---


def test_ticks_are_round_and_enclose_the_range():
    for low, high, ticks in (
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (-3.0, 5.0, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0]),
        (0.61, 0.7, [0.6, 0.625, 0.65, 0.675, 0.7]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ):
        assert nice_ticks(low, high) == pytest.approx(ticks)


def coordinates(svg, tag="polyline"):
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(rf'<{tag} class="s\d" points="([^"]*)"', svg)
    ]


def test_a_curve_ends_where_an_iteration_does():
    """Steps 1, 2 | 3, 4 of two iterations: two lines, each from its first to its last step; up is less."""
    points = [(1, 0.0), (2, 1.0), (3, 0.0), (4, 1.0)]
    svg = Chart("Loss", [Series("training", points)], marks=[(1, "0"), (3, "1")]).svg()
    first, second = coordinates(svg)
    assert [x for x, _ in first + second] == sorted(x for x, _ in first + second)
    assert first[0][1] == second[0][1] > first[1][1] == second[1][1]
    joined = Chart("v", [Series("validation", [(1, 0.0), (4, 1.0)], is_dots=True)], marks=[(3, "1")]).svg()
    assert len(coordinates(joined)) == 1 and joined.count("<circle") == 2


def test_many_points_are_averaged_over_their_range():
    """1000 points that alternate between 0 and 1: about 250 of 0.5, and behind them a band from 0 to 1."""
    svg = Chart("t", [Series("s", [(i, float(i % 2)) for i in range(1000)])]).svg()
    (line,), (band,) = coordinates(svg), coordinates(svg, "polygon")
    assert len(line) == 250 <= MOST_POINTS and len({y for _, y in line}) == 1
    assert min(y for _, y in band) < line[0][1] < max(y for _, y in band)


def test_numbers_are_short():
    values = (0.69314718, 12345.6, 0.0, 2e-7, -0.5, 1.5e6)
    assert [number(value) for value in values] == ["0.6931", "12346", "0", "2e-07", "-0.5", "1.5e+06"]


# --- The command ---


def test_the_command_writes_one_file(tmp_path, capsys):
    folder = write_run(tmp_path / "run", iterations=1, steps=3)
    before = {path.name for path in folder.iterdir()}
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}
    assert main(["report", str(folder), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == (folder / "report.html").read_text()


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["report", str(folder)]) == 1
        text = capsys.readouterr().err
        assert "expected the output_dir of a run" in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a_vs_b").mkdir()
    (tmp_path / "a_vs_b" / "summary.json").write_text("{}")
    for command in ("report", "export"):
        assert main([command, str(tmp_path)]) == 1
        assert "an evaluation's folder" in (text := capsys.readouterr().err) and "a_vs_b/summary.json" in text


# --- In a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def chromium(page, tmp_path, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path / 'profile'}", *options, f"file://{page}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `apt-get install chromium` fetches it")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(run_folder, tmp_path, width):
    """A script that measures the page, which is the only one that runs: nothing is wider than the screen, curves and
    letters have a size, and the script in the prompts is text."""
    measure = """<script>addEventListener("load", () => {
      const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll table")
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
      const svg = document.querySelector("svg").getBoundingClientRect();
      document.body.append(Object.assign(document.createElement("output"), {textContent: JSON.stringify({
        wide, title: document.title, width: innerWidth, svg: [svg.width, svg.height],
        letters: document.querySelector("svg text").getBoundingClientRect().height,
        curve: document.querySelector("polyline").getBoundingClientRect().width,
        samples: document.querySelectorAll(".sample").length})}));
    })</script>"""
    page = tmp_path / "page.html"
    frame = tmp_path / "frame.html"
    page.write_text(render(read_run(run_folder)).replace("</body>", measure + "</body>"))
    # a window is never narrower than 500 pixels; a frame is
    frame.write_text(
        f'<iframe id="f" src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe><pre></pre>'
        '<script>addEventListener("load", () => setTimeout(() => document.querySelector("pre").textContent = '
        'document.getElementById("f").contentDocument.querySelector("output").textContent, 100))</script>'
    )
    dom = chromium(frame, tmp_path, "--allow-file-access-from-files", "--window-size=1300,1000", "--dump-dom")
    found = json.loads(html.unescape(re.search(r"<pre>(\{.*?\})</pre>", dom, re.DOTALL)[1]))
    assert found["width"] == width and found["wide"] == []
    assert found["title"] == f"{Path(run_folder).name} · SPIN"
    assert found["svg"][0] > 280 and found["svg"][1] > 140
    assert found["letters"] > 9 and found["curve"] > 100
    assert found["samples"] == 4
