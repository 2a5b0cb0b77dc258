"""`spin export --push`: huggingface_hub itself uploads, over a socket, to a false huggingface.co."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.report_runs import write_run

TOKEN = "hf_" + "s3cr3t" * 6
NAME = "org/my-model"


class FalseHub:
    """What of huggingface.co an upload needs: repositories of name -> private, files, and large files by hash."""

    def __init__(self):
        self.private, self.files, self.large = {}, {}, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, content, status=200, **headers):
                body = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                path, _, _ = self.path.partition("?")
                if self.command == "PUT":  # a signed address, which needs no token
                    hub.large[path.rpartition("/")[2]] = body
                    return self.answer({})
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "Invalid username or password."}, 401)
                if path == "/api/validate-yaml":  # of the card
                    return self.answer({"errors": [], "warnings": []})
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    hub.private.setdefault(name, asked["visibility"] == "private")
                    return self.answer({"url": f"{hub.url}/{name}", "id": name})
                if path == f"/api/models/{NAME}" and NAME not in hub.private:
                    return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                if path == f"/api/models/{NAME}":
                    siblings = [{"rfilename": name} for name in hub.files]
                    return self.answer({"id": NAME, "private": hub.private[NAME], "siblings": siblings})
                if path == f"/api/models/{NAME}/preupload/main":
                    kinds = [
                        {"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                        for each in json.loads(body)["files"]
                        for mode in ["lfs" if each["path"].endswith(".safetensors") else "regular"]
                    ]
                    return self.answer({"files": kinds})
                if path == f"/{NAME}.git/info/lfs/objects/batch":
                    objects = [
                        {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}", "header": {}}}}
                        for each in json.loads(body)["objects"]
                    ]
                    return self.answer({"transfer": "basic", "objects": objects})
                if path == f"/api/models/{NAME}/commit/main":
                    hub.commit([json.loads(line) for line in body.splitlines()])
                    return self.answer({"commitUrl": f"{hub.url}/{NAME}/commit/1", "commitOid": "1" * 40})
                return self.answer({"error": f"unknown: {self.command} {self.path}"}, 404)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - http.server's names

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.message = value["summary"]
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del self.files[value["path"]]


@pytest.fixture
def hub():
    found = FalseHub()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def export(tmp_path, subprocess_env):
    """Exit code, stdout and stderr of `spin export` of a finished run, with an answer on the standard input."""
    run = write_run(tmp_path / "run", iterations=1, config={"checkpointer": {"checkpoint_dir": "/models/Some-1B"}})

    def export(endpoint, *words, token=TOKEN, answer="", **variables):
        env = subprocess_env | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        # by Git LFS's protocol: that of Xet is the other one that the client speaks
        env |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", **variables}
        command = [sys.executable, "-m", "spin", "export", str(run), *words]
        done = subprocess.run(command, env=env, input=answer, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    export.model = run / "iteration_000" / "hf_model"
    return export


@pytest.mark.slow
def test_a_model_is_uploaded(hub, export):
    """Nothing without --yes; then all that was shown, private; again, and the weights of an older export go."""
    code, out, err = export(hub.url, "--push", NAME)
    assert code == 1 and "nothing was uploaded" in err and hub.private == {}
    assert f"Upload to {NAME}, a new private repository on {hub.url}:" in out
    code, out, err = export(hub.url, "--push", NAME, "--yes")
    assert (code, hub.private) == (0, {NAME: True}), err
    assert out.endswith(f"{hub.url}/{NAME}\n") and "model.safetensors" in out and hub.message == "SPIN, iteration 0"
    assert hub.files == {file.name: file.read_bytes() for file in export.model.iterdir()}
    assert f'pipeline("text-generation", "{NAME}")'.encode() in hub.files["README.md"]
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    hub.files |= {**stale, "notes.md": b"mine"}
    code, out, err = export(hub.url, "--push", NAME, "--yes")
    assert code == 0 and all(f"delete  {name}\n" in out for name in stale), err
    assert hub.files == {file.name: file.read_bytes() for file in export.model.iterdir()} | {"notes.md": b"mine"}


@pytest.mark.slow
def test_a_public_repository_is_made_if_it_is_said(hub, export):
    code, _, err = export(hub.url, "--push", NAME, "--yes", "--public")
    assert code == 0, err
    assert hub.private == {NAME: False} and hub.files


def test_a_repository_that_is_public_is_not_written_to_unasked(hub, export):
    hub.private[NAME] = False
    code, _, err = export(hub.url, "--push", NAME, "--yes")
    assert code == 1 and f"{NAME} is public on huggingface.co" in err and not hub.files


@pytest.mark.parametrize(
    ("words", "variables", "code", "message"),
    [
        ([], {"token": ""}, 1, "HF_TOKEN is not set"),
        ([], {"token": "hf_wrong"}, 1, "cannot look it up"),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "Check the network"),
        ([], {"HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE is not set"),
        (["--push", "my-model"], {}, 1, "expected ORG/NAME"),
    ],
)
def test_what_cannot_be_pushed(hub, export, words, variables, code, message):
    found, _, err = export(hub.url, "--push", NAME, "--yes", *words, **variables)
    assert found == code and message in err and len(err.splitlines()) == 1 and not hub.private


def test_public_without_push_is_refused(export):
    assert export("http://127.0.0.1:9", "--public")[0] == 2


@pytest.mark.parametrize("word", ["org/Some-1B", None])
def test_an_adapter_names_its_base_as_others_find_it(hub, export, word):
    """Not by a folder of the machine that it was made on; nor does any other file."""
    for name, content in {
        "adapter_config.json": {"base_model_name_or_path": "/home/ada/Some-1B", "r": 4},
        "tokenizer_config.json": {"name_or_path": "/home/ada/Some-1B"},
    }.items():
        (export.model / name).write_text(json.dumps(content))
    (export.model / "config.json").unlink()
    export.model.rename(export.model.with_name("adapter"))
    code, _, err = export(hub.url, "--push", NAME, "--yes", *(["--base-model", word] if word else []))
    if word is None:
        assert code == 1 and "--base-model ORG/NAME says which model" in err and not hub.files
        return
    assert code == 0, err
    assert json.loads(hub.files["adapter_config.json"]) == {"base_model_name_or_path": word, "r": 4}
    assert not [name for name, content in hub.files.items() if b"/home/ada" in content]
