"""Names for the Hub: what looks like a path is never asked for, and a Hub that cannot be reached is tried once, briefly."""

import http.server
import threading

import huggingface_hub
import pytest
from builders.recipes import write_model
from huggingface_hub import constants

from distill_llm.checks.profile import open_profile
from distill_llm.common import hub
from distill_llm.common.errors import InputError
from distill_llm.data.sources import read_splits

PATHS = [
    "./x",
    "../x",
    "/x/y",
    "~/x",
    "a/b/c",
    "runs/x/",
    "x.csv",
    "me/x.jsonl",
    "x.gguf",
    "a..b",
    "-x",
    "a b",
    "",
    "x" * 97,
]
NAMES = ["bert-base-uncased", "nyu-mll/glue", "HuggingFaceTB/SmolLM2-1.7B", "Qwen/Qwen2.5-0.5B"]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every question with the server's `status`, and counts."""

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def site(monkeypatch):
    """A Hub on this machine, and no HF_HUB_OFFLINE."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.status = 0, 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    hub._reach.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    hub._reach.cache_clear()


def check(name: str) -> None:
    hub.check_hub_name(name, "teacher.model", name, "an existing folder")


@pytest.mark.parametrize("name", PATHS)
def test_what_looks_like_a_path_is_not_asked_for(site, name):
    with pytest.raises(InputError, match=r"teacher\.model: got .*; accepted: an existing folder"):
        check(name)
    with pytest.raises(InputError, match=r"--data: got .*; accepted: an existing file or folder"):
        read_splits(name or "/nothing", field="--data")
    assert site.asked == 0


def test_a_hub_that_answers_is_asked_once_in_a_process(site):
    for name in NAMES:
        check(name)
    assert site.asked == 1


def test_a_hub_that_cannot_be_reached_gives_one_line_that_names_the_way_without_it(site, monkeypatch, tmp_path):
    site.status = 503  # a proxy without a network behind it
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE=1.*answers 503"):
        check(NAMES[0])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    for ask in (lambda: check(NAMES[1]), lambda: open_profile({"model": NAMES[1]}, 8), lambda: read_splits(NAMES[1])):
        with pytest.raises(InputError, match=f"got '{NAMES[1]}'; check .*HF_HUB_OFFLINE=1") as error:
            ask()
        assert len(str(error.value).splitlines()) == 1
    write_model(tmp_path / "folder")
    open_profile({"model": str(tmp_path / "folder")}, 8)  # what is here needs no Hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.is_offline_mode()
    check(NAMES[1])
