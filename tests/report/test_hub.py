"""Pushing, against a local HTTP server that speaks the few calls of the Hub that a push makes."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distill_llm.common.errors import InputError
from distill_llm.report.hub import push

TOKEN = "hf_" + "x" * 34


class FakeHub(ThreadingHTTPServer):
    """Takes repositories and commits and remembers them."""

    def __init__(self, status: int = 200):
        super().__init__(("127.0.0.1", 0), Calls)
        self.status, self.created, self.files, self.tokens = status, [], {}, set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Calls(BaseHTTPRequestHandler):
    """The calls: create a repository, ask how to upload files, commit."""

    server: FakeHub

    def do_POST(self) -> None:
        """Answer as the Hub would."""
        raw = self.read()
        self.server.tokens.add(self.headers.get("authorization"))
        if self.server.status != 200:
            self.reply({"error": "no"}, self.server.status)
        elif self.path == "/api/repos/create":
            body = json.loads(raw)
            self.server.created.append(body)
            owner = body.get("organization") or "somebody"
            self.reply({"url": f"{self.server.url}/{owner}/{body['name']}", "id": f"{owner}/{body['name']}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]
            ]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repo = self.path.split("/api/models/")[1].split("/commit/")[0]
            self.reply({"commitUrl": f"{self.server.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.reply({})

    def do_GET(self) -> None:
        """Nothing is there yet."""
        self.reply({"siblings": [], "id": "x/y"})

    def read(self) -> bytes:
        """The body, sent whole or in chunks."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, body: Any, status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake Hub that huggingface_hub takes for the real one; its parameter is the status it answers with."""
    server = FakeHub(getattr(request, "param", 200))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student's folder with what training may have left in it."""
    files = {
        "config.json": "{}",
        "model.safetensors": "weights",
        "tokenizer.json": "{}",
        "modeling_pruned.py": "code",
        "metrics.json": "{}",
        "README.md": '# Card\n\n```python\nmodel_id = "path/to/student"\n```\n',
        "training_args.bin": "settings of this machine",
        "checkpoint-10/optimizer.pt": "state",
        "checkpoint-10/model.safetensors": "old weights",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_push_uploads_student_tokenizer_card_and_results_and_nothing_of_the_training(
    hub: FakeHub, student: Path
) -> None:
    assert push(student, "owner/student", private=True, token=TOKEN) == f"{hub.url}/owner/student"
    sent = {"config.json", "model.safetensors", "tokenizer.json", "modeling_pruned.py", "metrics.json", "README.md"}
    assert set(hub.files) - {".gitattributes"} == sent
    assert hub.files["model.safetensors"] == b"weights"
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("owner", "student", "private")
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_card_loads_from_the_repository_it_was_pushed_to_and_again_from_the_next(hub: FakeHub, student: Path) -> None:
    push(student, "owner/student", token=TOKEN)
    assert b'model_id = "owner/student"' in hub.files["README.md"]
    push(student, "just-a-name", token=TOKEN)
    assert b'model_id = "somebody/just-a-name"' in hub.files["README.md"]


@pytest.mark.parametrize("name", ["a/b/c", "owner/", "bad name", "-x", "owner/a--b", ""])
def test_a_name_the_hub_does_not_take_is_refused_before_any_call(hub: FakeHub, student: Path, name: str) -> None:
    with pytest.raises(InputError, match="^repo_id: got"):
        push(student, name, token=TOKEN)
    assert not hub.tokens


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(hub: FakeHub, student: Path, missing: str) -> None:
    (student / missing).unlink()
    with pytest.raises(InputError, match="^student_dir: got"):
        push(student, "owner/student", token=TOKEN)
    assert not hub.tokens


@pytest.mark.parametrize("hub", [401, 403], indirect=True)
def test_missing_rights_are_one_line_without_the_token(hub: FakeHub, student: Path) -> None:
    with pytest.raises(InputError, match="^repo_id: got 'owner/student'; accepted: a repository") as error:
        push(student, "owner/student", token=TOKEN)
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)


def test_a_switched_off_hub_is_said(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="^HF_HUB_OFFLINE: got"):
        push(student, "owner/student", token=TOKEN)


def test_a_hub_out_of_reach_is_one_line(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound, and nobody listens: the connection is refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(
            InputError, match="^repo_id: got 'owner/student'; push again when the Hub can be reached"
        ) as error:
            push(student, "owner/student", token=TOKEN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hub", [400, 500], indirect=True)
def test_a_refusal_of_the_hub_is_one_line(hub: FakeHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match="^repo_id: got 'owner/student'; accepted: .* the Hub accepts") as error:
        push(student, "owner/student", token=TOKEN)
    assert "\n" not in str(error.value)
