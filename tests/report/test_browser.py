"""The report in a real browser: what is to be seen, on a screen and on a phone, from a file and live."""

import json
import threading

import pytest

from spin.report import read_run, render
from spin.report.watch import make_server
from tests.report.browser import CHROMIUM, Browser
from tests.report_runs import SCRIPT, step_metrics, write_fixed_prompts, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `apt-get install chromium` fetches it")
VALUES = """[...document.querySelectorAll("figure")].map(figure => [...figure.querySelectorAll(
    ".u-series:not(.behind) .u-value")].map(cell => cell.textContent))"""
# text whose contrast with the colour behind it is below 4.5, or 3 for large letters
FAINT = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const rgb = numbers(getComputedStyle(element).backgroundColor);
      if (rgb.length === 3 || rgb[3] === 1) return rgb;
    }
  };
  return [...document.querySelectorAll("main *, footer")].filter(each => each.offsetParent
    && [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim())).filter(each => {
      const [a, b] = [numbers(getComputedStyle(each).color), behind(each)].map(light).sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05) < (parseFloat(getComputedStyle(each).fontSize) >= 24 ? 3 : 4.5);
    }).map(each => each.outerHTML.slice(0, 100));
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs whose texts, names and sources are hostile."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "<img src=x onerror=alert(1)>", prompt=SCRIPT, config={"seed": SCRIPT})
    second = write_run(
        folder / "second", iterations=1, steps=12, changes=lambda step: {f"val_loss/</script>{SCRIPT}": step}
    )
    write_fixed_prompts(first, [f"A cat. {SCRIPT}", f"A dog. {SCRIPT}", "word " * 300], prompt=SCRIPT)
    file = folder / "page.html"
    file.write_text(render(read_run(first), read_run(second)))
    return f"file://{file}"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_fits_is_legible_and_inert(browser, page, width, scheme):
    """Nothing scrolls sideways but tables in their own boxes; every text has its contrast; curves are drawn; scripts in
    prompts are text, and nothing is asked of a network."""
    browser.open(page, width, scheme=scheme)
    assert browser.requests == [page] and browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") == browser.run("innerWidth") == width
    assert browser.run("document.title").endswith("second · SPIN")
    assert browser.run(FAINT) == []
    assert browser.run("document.querySelectorAll('canvas[role=img]').length") == 11
    assert browser.run("document.querySelector('canvas').ariaLabel").startswith("Loss: <img src=x onerror=alert(1)>")
    for colour in {"light": ([31, 111, 235], [209, 87, 11]), "dark": ([110, 168, 255], [255, 157, 92])}[scheme]:
        drawn = f"""[...document.querySelectorAll("canvas")].filter(canvas => {{
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < pixels.length; i += 4)
                if ({colour}.every((value, c) => Math.abs(value - pixels[i + c]) < 4)) return true;
        }}).length"""
        assert browser.run(drawn) >= 10  # a colour for each run; one chart is of one run
    wide = "[...document.querySelectorAll('.scroll')].map(each => each.scrollWidth > each.clientWidth)"
    assert width > 500 or all(browser.run(wide)[:-1])


def test_values_under_the_mouse_and_smoothing(browser, page):
    """The middle of 20 steps: both runs' losses there, in all charts at once. Smoothed by 0.5: the mean of what was and
    what is, from an iteration's first step on."""
    browser.open(page, 1280)
    browser.hover("figure .u-over")
    loss, acc = browser.run(VALUES)[:2]
    step = int(loss[0])
    first = step_metrics(step, 0, (step - 1) % 10 / 9)
    second = step_metrics(step, 0, (step - 1) / 11)
    assert step in (10, 11) and loss == [str(step), f"{first['loss']:.4g}", f"{second['loss']:.4g}"]
    assert acc == [str(step), f"{first['acc']:.4g}", f"{second['acc']:.4g}"]
    browser.run("document.querySelector('.u-over').dispatchEvent(new MouseEvent('mouseleave'))")
    browser.run("""(slider => { slider.value = 0.5; slider.dispatchEvent(new Event("input")); })
        (document.getElementById("smoothing"))""")
    expected = step_metrics(11, 1, 0.0)["loss"]
    for step in range(1, 10):
        expected = 0.5 * expected + 0.5 * step_metrics(11, 1, step / 9)["loss"]
    assert f"{expected:.4g}" in browser.run("document.querySelector('canvas').ariaLabel")
    assert browser.run("document.querySelector('output').textContent") == "0.5"


@pytest.mark.parametrize("width", [1280, 390])
def test_what_a_run_appends_arrives_in_the_live_page(browser, tmp_path, width):
    """A further step, then a chart that was not there, then a restart that takes steps back; what a reader has opened
    stays open."""
    folder = write_run(tmp_path, iterations=2, steps=5, finished=False)
    server, address = make_server([folder], [], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    last = "document.querySelector('.u-legend .u-value').textContent"
    try:
        browser.open(address, width)
        assert browser.run(last) == "10"
        browser.run("document.querySelector('details').open = true")
        before = (folder / "metrics.jsonl").read_text()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_metrics(11, 1, 0.5)) + "\n")
        browser.wait(f"{last} === '11' && document.body.innerText.includes('at step 11, in iteration 1')")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_metrics(12, 1, 0.5, **{f"val_loss/{SCRIPT}": 2.0})) + "\n")
        browser.wait("document.body.innerText.includes('Validation loss by source')")
        (folder / "new.jsonl").write_text(before)
        (folder / "new.jsonl").rename(folder / "metrics.jsonl")
        browser.wait(f"{last} === '10' && document.body.innerText.includes('at step 10')")
        assert browser.run("document.querySelector('details').open") and browser.errors == []
        assert browser.run("document.documentElement.scrollWidth") == width
        assert {url.partition("?")[0] for url in browser.requests} == {address, f"{address}since"}
    finally:
        server.shutdown()
        server.server_close()
    browser.wait("document.body.innerText.includes('Is spin report --watch still running?')")
