"""A headless Chromium, spoken to over its debugging pipe; as a command, pictures of a report.

python -m tests.report.browser docs runs/quickstart     # docs/report_1280.png, docs/report_390.png
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab; ``requests`` and ``errors`` are what it asked for and complained of since it was opened."""

    def __init__(self, profile):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the numbers that Chromium expects
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *options, "--remote-debugging-pipe"],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._count, self._session = b"", 0, None
        self.requests, self.errors = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.call("Browser.close")
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def _receive(self):
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise EOFError("Chromium has ended")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(message)
        name, values = message.get("method"), message.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"])
        elif name == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])
        return message

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, width, height=900, scheme="light"):
        """Opens a page and waits until it has loaded; the one before has ended, with its last requests."""
        self._load("about:blank")
        self.requests, self.errors = [], []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._load(url)

    def _load(self, url):
        self.call("Page.navigate", url=url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The JSON value of an expression, or of what it promises."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition):
        """Waits up to a minute for a condition of the page."""
        self.run(f"""new Promise((done, fail) => {{
            const until = Date.now() + 60000;
            (function look() {{
                if ({condition}) done(); else if (Date.now() > until) fail("never came"); else setTimeout(look, 50);
            }})();
        }})""")

    def hover(self, selector, along=0.5):
        """Moves the mouse to a place within an element, by the fraction of its width."""
        self.run(f'document.querySelector("{selector}").scrollIntoViewIfNeeded()')
        box = self.run(f'document.querySelector("{selector}").getBoundingClientRect().toJSON()')
        x, y = box["left"] + along * box["width"], box["top"] + box["height"] / 2
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def picture(self, file):
        """Writes a PNG of what is to be seen."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def main(docs, *runs):
    from spin.report import read_run, render

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(render(*(read_run(Path(run)) for run in runs)), encoding="utf-8")
        browser = Browser(Path(folder, "profile"))
        for width, height in ((1280, 1250), (390, 1250)):
            browser.open(f"file://{page}", width, height)
            if width > 500:
                browser.hover("figure .u-over", 0.7)
            browser.picture(Path(docs, f"report_{width}.png"))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
