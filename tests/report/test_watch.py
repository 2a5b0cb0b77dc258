"""``spin report --watch``: what is read again, what is served and to whom, and how it ends."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest

from spin.cli import main
from spin.core.files import AppendedLines
from spin.report.watch import LiveRuns, make_server
from tests.report_runs import step_metrics, write_run


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The address of a run's live page."""
    server, address = make_server([write_run(tmp_path_factory.mktemp("run"))], [], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield urlsplit(address)
    server.shutdown()
    server.server_close()


def news(live, version, have):
    """What is new, once the server looks again."""
    ends_at = time.monotonic() + 60
    while (found := live.since(version, have)) is None and time.monotonic() < ends_at:
        time.sleep(0.01)
    return found


def get(live, path, **headers):
    connection = http.client.HTTPConnection(live.netloc, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, body


def test_only_what_was_appended_is_read(tmp_path):
    """What was read is overwritten in place, and not seen again; half a line waits for its end; another file under the
    name, or one that has become shorter, is read from its beginning."""
    file = tmp_path / "metrics.jsonl"
    lines = AppendedLines(file)
    assert lines.read() == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert lines.read() == [{"step": 1}, {"step": 2}]
    with file.open("r+") as stream:
        stream.write("x" * 12)
    with file.open("a") as stream:
        stream.write('ep": 3}\n')
    assert lines.read() == [{"step": 1}, {"step": 2}, {"step": 3}] and lines.times_replaced == 1
    (tmp_path / "new").write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 40}\n')
    (tmp_path / "new").rename(file)
    assert lines.read() == [{"step": step} for step in (10, 20, 30, 40)]
    file.write_text('{"step": 5}\n')
    assert lines.read() == [{"step": 5}]


def test_a_page_gets_what_it_lacks(tmp_path):
    """Nothing if nothing is new; of a curve the points from its last one on; of the sections those that changed."""
    folder = write_run(tmp_path, iterations=1, steps=10)
    live = LiveRuns([folder], [])
    first = live.since(0, ["0:0"])
    assert live.since(first["version"], ["x:0"]) is None
    (run,) = first["runs"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_metrics(11, 0, 0.5, loss=0.25)) + "\n")
    found = news(live, first["version"], [f"{run['key']}:{len(run['x'])}"])
    (run,) = found["runs"]
    assert run["from"] == 11 and run["x"] == [10, 11] and run["y"]["loss"][-1] == 0.25
    assert found["version"] > first["version"] and found["sections"].keys() == {"summary", "iterations"}


def test_a_long_run_is_not_read_again_for_each_line(tmp_path):
    """All lines come, with a twentieth of a core, whoever asks without a pause."""
    folder = write_run(tmp_path, iterations=1, steps=500)
    live = LiveRuns([folder], [])
    version, brought = live.since(0, ["0:0"])["version"], []
    began, used = time.monotonic(), time.thread_time()
    while len(brought) < 3:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_metrics(501 + len(brought), 0, 0.5)) + "\n")
        found = news(live, version, ["0:0"])
        version = found["version"]
        brought.append(found["runs"][0]["x"][-1])
    assert brought == [501, 502, 503]
    assert time.thread_time() - used < (time.monotonic() - began) / 5


def test_a_run_that_vanishes_stays_as_it_was_shown(tmp_path):
    """The other run goes on; the one that is made again is read from its beginning."""
    gone, other = (write_run(tmp_path / name, iterations=1, steps=10) for name in ("gone", "other"))
    live = LiveRuns([gone, other], [])
    version = live.since(0, ["0:0", "0:0"])["version"]
    shutil.rmtree(gone)
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_metrics(11, 0, 0.5)) + "\n")
    found = news(live, version, ["0:0", "0:0"])
    assert [run["x"][-1] for run in found["runs"]] == [10, 11] and "Iterations</h2>" in live.page()
    write_run(gone, iterations=1, steps=3)
    again = news(live, found["version"], ["0:0", "0:0"])
    assert [run["x"][-1] for run in again["runs"]] == [3, 11]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "evil@127.0.0.1", "[", ""],
)
def test_other_names_than_this_machines_are_refused(live, host):
    """A foreign page whose name was pointed to 127.0.0.1 would have this page's origin."""
    status, _, body = get(live, live.path, Host=host)
    assert status == 403 and "</h2>" not in body


def test_the_page_and_nothing_else_is_served(live):
    for host in (live.netloc, "localhost:9000", "127.0.0.1"):  # `ssh -L 9000:...`
        status, headers, body = get(live, live.path, Host=host)
        assert status == 200 and "Iterations</h2>" in body and "connect-src &#39;self&#39;" in body
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'" and headers["Cache-Control"] == "no-store"
    for path in (
        "/",
        "/config.yaml",
        f"{live.path}config.yaml",
        f"{live.path}../config.yaml",
        f"{live.path}%2e%2e/",
    ):
        assert get(live, path)[0] == 404
    for query in ("", "?version=x&have=0:0", "?version=1", "?version=1&have=0:0,0:0"):
        assert get(live, f"{live.path}since{query}")[0] == 400


def test_the_command_serves_until_ctrl_c(tmp_path, repo):
    """It waits for a run that has not begun, and writes nothing."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "spin", "report", str(folder), "--watch"]
    with subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith(f"Waiting for a run to begin in {folder}")
        write_run(tmp_path / "made", iterations=1, steps=3).rename(folder)
        before = sorted(folder.rglob("*"))
        address = urlsplit(process.stdout.readline().strip())
        assert f"ssh -L {address.port}:127.0.0.1:{address.port} " in process.stdout.readline()
        assert get(address, address.path)[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and process.stderr.read() == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("words", [["--port", "80"], ["--watch", "--port", "70000"], ["--watch", "--out", "x.html"]])
def test_wrong_usage(tmp_path, words):
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path), *words])
    assert end.value.code == 2


def test_a_port_that_is_in_use(live, tmp_path, capsys):
    folder = write_run(tmp_path, iterations=1, steps=3)
    assert main(["report", str(folder), "--watch", "--port", str(live.port)]) == 1
    assert f"--port {live.port}: in use" in capsys.readouterr().err
