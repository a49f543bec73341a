"""A Hub on this machine, for the real huggingface_hub: repositories with commits, LFS storage, tokens, and faults on demand.

It speaks the calls that a push and `from_pretrained` make without Xet: whoami, create, validate-yaml, preupload, LFS batch with
upload and verify, commit, info, tree, paths-info, resolve. What it accepts is checked as the Hub does it: rights, hashes, and
that every LFS file of a commit has been uploaded.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
from huggingface_hub import constants

TOKEN = "hf_" + "Wr1te" * 7
READ_TOKEN = "hf_" + "R3ad1" * 7
OTHER_TOKEN = "hf_" + "0Ther" * 7
LFS = (".safetensors", ".gguf", ".onnx", ".bin")
BREAK, LOSE = "break", "lose"
"""Faults: the connection breaks in the middle of the request; the work is done, but the answer is lost."""


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The hash by which git, or LFS, knows it."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: its files after every commit, oldest first."""

    private: bool = False
    commits: list[dict[str, Blob]] = field(default_factory=lambda: [{}])
    titles: dict[str, str] = field(default_factory=dict)
    """By path the title of the last commit that changed it."""

    @property
    def files(self) -> dict[str, bytes]:
        """The contents of the last commit by path."""
        return {path: blob.content for path, blob in self.commits[-1].items()}

    @property
    def sha(self) -> str:
        """The id of the last commit."""
        return hashlib.sha1(repr(sorted((p, b.oid) for p, b in self.commits[-1].items())).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with requests that match: a status code, BREAK or LOSE; so many times."""

    request: str
    what: int | str
    times: int = 1


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class LocalHub(ThreadingHTTPServer):
    """The server and all that it holds.

    Attributes:
        users: name and role by token.
        repos: by `models/OWNER/NAME` or `datasets/OWNER/NAME`.
        objects: what LFS stores, by SHA-256.
        faults: what is to go wrong.
        requests: `METHOD PATH` of all requests, in order.
        tokens: the tokens that requests came with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.users = {
            TOKEN: ("somebody", "write"),
            READ_TOKEN: ("somebody", "read"),
            OTHER_TOKEN: ("somebody-else", "write"),
        }
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}"  # another host, as the Hub's is

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """The contents of a repository."""
        return self.repos[f"{repo_type}s/{repo_id}"].files

    def asked(self, request: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(request, each)) for each in self.requests)


class Calls(BaseHTTPRequestHandler):
    """One request."""

    server: LocalHub

    def handle_any(self) -> None:
        """Answer, or go wrong as asked."""
        self.path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        self.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.server.tokens.add(self.token)
        fault = next((each for each in self.server.faults if each.times and re.search(each.request, request)), None)
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.what == BREAK:
            self.rfile.read(min(1000, int(self.headers.get("content-length", 0)) // 2))
            return self.reset()
        body = self.read()
        try:
            if fault is not None and isinstance(fault.what, int):
                raise Refusal(fault.what, f"wrong on purpose, for the token {self.token}")
            status, headers, content = self.answer(body)
        except Refusal as refusal:
            status, headers = refusal.status, {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            content = json.dumps({"error": refusal.message}).encode()
        if fault is not None and fault.what == LOSE:
            return self.reset()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def reset(self) -> None:
        """End the connection as a cable does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = self.rfile  # nothing is left to flush

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

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the content."""
        if self.token is not None and self.token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for pattern, call in CALLS:
            if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                answer = call(self, *found.groups(), **({"body": body} if self.command in ("POST", "PUT") else {}))
                if isinstance(answer, tuple):
                    return answer
                return 200, {"content-type": "application/json"}, json.dumps(answer).encode()
        raise Refusal(404, f"the local Hub has no {self.command} {self.path}")

    # Rights

    def owner(self) -> tuple[str | None, str | None]:
        """Who asks, and the role of the token."""
        return self.server.users[self.token] if self.token is not None else (None, None)

    def may_write(self, name: str) -> None:
        """Refuse those who may not write to `OWNER/NAME`."""
        who, role = self.owner()
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        if role != "write" or who != name.split("/")[0]:
            raise Refusal(403, f"{who} has no rights to write to {name}")

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repository that the one who asks may see."""
        found = self.server.repos.get(f"{kind}/{name}")
        if found is None or (found.private and self.owner()[0] != name.split("/")[0]):
            raise Refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(name)
        return found

    # Calls: writing

    def whoami(self) -> Any:
        """Who the token belongs to."""
        who, role = self.owner()
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": "an-organisation", "type": "org"}]
        return {"name": who, "type": "user", "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}

    def create(self, body: bytes) -> Any:
        """A new repository."""
        asked = json.loads(body)
        who, _ = self.owner()
        name = f"{asked.get('organization') or who}/{asked['name']}"
        self.may_write(name)
        key, prefix = f"{asked.get('type', 'model')}s/{name}", "datasets/" if asked.get("type") == "dataset" else ""
        known = {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name}
        if key in self.server.repos:
            content = json.dumps({"error": "You already created this repo", **known}).encode()
            return 409, {"content-type": "application/json"}, content
        private = asked.get("visibility") == "private"
        self.server.repos[key] = Repo(private, [{".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}])
        return known

    def validate(self, body: bytes) -> Any:
        """Is the card's front matter right?"""
        text = json.loads(body)["content"]
        wrong = [] if text.startswith("---\n") or "---" not in text else [{"message": "no front matter"}]
        return {"errors": wrong, "warnings": []}

    def preupload(self, kind: str, name: str, revision: str, body: bytes) -> Any:
        """How each file is to be sent, and what is there of the same name."""
        there = self.repo(kind, name, write=True).commits[-1]
        rows = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS) or file["size"] > 10_000_000 else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": there[path].oid} if path in there else {}))
        return {"files": rows}

    def batch(self, kind: str | None, name: str, body: bytes) -> Any:
        """Where to send which objects; nowhere for those that are there."""
        self.repo(kind or "models", name, write=True)
        rows = []
        for each in json.loads(body)["objects"]:
            url = self.server.url
            actions = {
                "upload": {"href": f"{url}/storage/{each['oid']}", "header": {}},
                "verify": {"href": f"{url}/verify"},
            }
            rows.append(each if each["oid"] in self.server.objects else each | {"actions": actions})
        return {"transfer": "basic", "objects": rows}

    def store(self, oid: str, body: bytes) -> Any:
        """Keep an object."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        self.server.objects[oid] = body
        return {}

    def verify(self, body: bytes) -> Any:
        """Did the object arrive?"""
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(400, "the object is not there")
        return {}

    def commit(self, kind: str, name: str, revision: str, body: bytes) -> Any:
        """All files of a commit, or none."""
        repo = self.repo(kind, name, write=True)
        files = dict(repo.commits[-1])
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "header":
                title = value["summary"]
            if row["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"the LFS file {value['path']} was not uploaded")
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        repo.titles |= {path: title for path, blob in files.items() if blob != repo.commits[-1].get(path)}
        repo.commits.append(files)
        return {"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}

    # Calls: reading

    def info(self, kind: str, name: str, revision: str | None = None) -> Any:
        """What the repository is."""
        repo = self.repo(kind, name)
        rows = [{"rfilename": path} for path in repo.files]
        return {
            "id": name,
            "modelId": name,
            "sha": repo.sha,
            "private": repo.private,
            "siblings": rows,
            "tags": [],
            "downloads": 0,
        }

    def tree(self, kind: str, name: str, revision: str, below: str | None = None) -> Any:
        """The files."""
        blobs = self.repo(kind, name).commits[-1].items()
        return [_entry(path, blob) for path, blob in blobs if path.startswith(f"{below}/" if below else "")]

    def paths_info(self, kind: str, name: str, revision: str, body: bytes) -> Any:
        """Some files."""
        repo = self.repo(kind, name)
        known = [path for path in parse_qs(body.decode())["paths"] if path in repo.files]
        last = {"id": repo.sha, "date": "2026-01-01T00:00:00.000Z"}
        return [
            _entry(path, repo.commits[-1][path]) | {"lastCommit": last | {"title": repo.titles[path]}} for path in known
        ]

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> Any:
        """A file's content, or what is known of it. LFS files are stored elsewhere."""
        repo = self.repo(f"{kind or 'models'}", name)
        blob = repo.commits[-1].get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return 200, headers, blob.content
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        return 302, headers | {"Location": f"{self.server.storage}/storage/{blob.oid}"}, b""

    def stored(self, oid: str) -> Any:
        """An LFS object."""
        return 200, {"ETag": f'"{oid}"'}, self.server.objects[oid]

    def home(self) -> Any:
        """The front page."""
        return {}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid, **lfs}


_REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
CALLS: list[tuple[str, Callable[..., Any]]] = [
    (r"(?:GET|HEAD) /", Calls.home),
    (r"GET /api/whoami-v2", Calls.whoami),
    (r"POST /api/repos/create", Calls.create),
    (r"POST /api/validate-yaml", Calls.validate),
    (rf"POST {_REPO}/preupload/(.+)", Calls.preupload),
    (r"POST /(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Calls.batch),
    (r"PUT /storage/(\w+)", Calls.store),
    (r"POST /verify", Calls.verify),
    (rf"POST {_REPO}/commit/(.+)", Calls.commit),
    (rf"GET {_REPO}", Calls.info),
    (rf"GET {_REPO}/revision/([^/]+)", Calls.info),
    (rf"GET {_REPO}/tree/([^/]+)(?:/(.+))?", Calls.tree),
    (rf"POST {_REPO}/paths-info/([^/]+)", Calls.paths_info),
    (r"(?:GET|HEAD) /(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Calls.resolve),
    (r"(?:GET|HEAD) /storage/(\w+)", Calls.stored),
]


@contextmanager
def serving() -> Iterator[LocalHub]:
    """A running server."""
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment_of(hub: LocalHub, home: Any, token: str = TOKEN) -> dict[str, str]:
    """Variables with which libraries in a process of its own take the server for the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def connect(monkeypatch: Any, hub: LocalHub, cache: Any, token: str | None = TOKEN) -> None:
    """Let the libraries in this process take the server for the Hub, with an empty cache, this token, and no waiting."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
