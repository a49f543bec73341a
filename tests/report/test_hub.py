"""Pushing, with the real huggingface_hub, to a Hub on this machine (`builders.hub`)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.hub import BREAK, LOSE, OTHER_TOKEN, READ_TOKEN, TOKEN, Fault, LocalHub, connect, serving
from huggingface_hub import CommitOperationAdd, HfApi

from distill_llm.common.errors import InputError
from distill_llm.report.hub import check_push, push

UPLOAD = r"PUT /storage/"
COMMIT = r"POST /api/\w+/.*/commit/"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that huggingface_hub takes for the real one, with somebody's token."""
    with serving() as server:
        connect(monkeypatch, server, tmp_path / "cache")
        yield server


CARD = '# Card\n\n```python\nmodel_id = "path/to/student"\n```\n'


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student's folder with what training may have left in it."""
    files = {
        "config.json": "{}",
        "model.safetensors": "weights",
        "tokenizer.json": "{}",
        "modeling_pruned.py": "code",
        "metrics.json": "{}",
        "README.md": CARD,
        ".eval_results/sst2.yaml": "[]",
        "training_args.bin": "settings of this machine",
        "checkpoint-10/optimizer.pt": "state",
        "checkpoint-10/model.safetensors": "old weights",
        ".cache/notes.txt": "of this machine",
    }
    return written(tmp_path / "student", files)


def written(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def refused(folder: Path, name: str = "somebody/student", **options) -> str:
    """The line with which a push is refused."""
    with pytest.raises(InputError) as error:
        push(folder, name, **options)
    line = str(error.value)
    assert "\n" not in line and len(line) <= 300
    assert not any(token in line for token in (TOKEN, READ_TOKEN, OTHER_TOKEN))
    return line


def test_push_uploads_student_tokenizer_card_and_results_in_one_commit_and_nothing_of_the_training(
    hub: LocalHub, student: Path
) -> None:
    before = {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}
    assert push(student, "somebody/student", private=True) == f"{hub.url}/somebody/student"
    sent = {"config.json", "model.safetensors", "tokenizer.json", "modeling_pruned.py", "metrics.json", "README.md"}
    assert set(hub.files("somebody/student")) - {".gitattributes"} == {*sent, ".eval_results/sst2.yaml"}
    assert hub.files("somebody/student")["model.safetensors"] == b"weights"
    repo = hub.repos["models/somebody/student"]
    assert repo.private and len(repo.commits) == 2, "an empty one, and one with all files"
    assert hub.tokens == {TOKEN, None}, "none to the storage, whose addresses are signed"
    assert before == {path: path.read_bytes() for path in student.rglob("*") if path.is_file()}, (
        "nothing is changed here"
    )


def test_card_loads_from_the_repository_that_it_is_in(hub: LocalHub, student: Path) -> None:
    push(student, "somebody/student")
    push(student, "just-a-name")
    for name in ("somebody/student", "somebody/just-a-name"):
        assert f'model_id = "{name}"'.encode() in hub.files(name)["README.md"]


@pytest.mark.parametrize("name", ["a/b/c", "owner/", "bad name", "-x", "owner/a--b", ""])
def test_a_name_the_hub_does_not_take_is_refused_before_any_call(hub: LocalHub, student: Path, name: str) -> None:
    assert refused(student, name).startswith("repo_id: got")
    assert not hub.requests


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(hub: LocalHub, student: Path, missing: str) -> None:
    (student / missing).unlink()
    assert refused(student).startswith("folder: got")
    assert not hub.requests


@pytest.mark.parametrize("token", [None, READ_TOKEN, "hf_" + "Unkn0wn" * 5, "not-of-the-usual-form"])
def test_a_token_that_is_missing_or_may_not_write_is_one_line_and_leaves_nothing(
    hub: LocalHub, student: Path, token: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, hub, tmp_path / "cache", token)
    line = refused(student)
    assert token is None or token not in line
    if token == READ_TOKEN:
        assert line.startswith("repo_id: got 'somebody/student'; push to") and "belongs to somebody" in line
    else:
        assert "hf auth login" in line and "HF_TOKEN" in line
    assert not hub.repos and (token or not hub.requests)


def test_a_repository_of_someone_else_is_refused_and_stays_as_it_is(hub: LocalHub, student: Path) -> None:
    push(student, "somebody-else/student", token=OTHER_TOKEN)
    push(student, "somebody-else/hidden", token=OTHER_TOKEN, private=True)
    (student / "model.safetensors").write_text("other weights")
    for name in ("student", "hidden", "new"):
        line = refused(student, f"somebody-else/{name}")
        assert "push to a repository of your own" in line and "belongs to somebody" in line
    assert hub.files("somebody-else/student")["model.safetensors"] == b"weights"


def test_an_existing_repository_gets_a_commit_without_old_weights_or_none_if_nothing_changed(
    hub: LocalHub, student: Path
) -> None:
    push(student, "somebody/student")
    push(student, "somebody/student")
    repo = hub.repos["models/somebody/student"]
    assert len(repo.commits) == 2 and hub.asked(UPLOAD) == 1, "nothing was sent again"
    (student / "model.safetensors").rename(student / "model-00001-of-00001.safetensors")
    (student / "model.safetensors.index.json").write_text("{}")
    repo.commits[-1]["mine.safetensors"] = repo.commits[-1]["model.safetensors"]
    push(student, "somebody/student")
    weights = {name for name in repo.files if "safetensors" in name}
    assert weights == {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "mine.safetensors"}


def test_a_card_that_was_edited_in_the_repository_stays_and_so_do_files_of_other_names(
    hub: LocalHub, student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(student, "somebody/student")
    (student / "README.md").write_text("a newer card")
    push(student, "somebody/student")
    assert hub.files("somebody/student")["README.md"] == b"a newer card" and not caplog.messages
    mine = dict.fromkeys(("README.md", "model-int8.safetensors", "pytorch_model.bin", "notes.txt"), b"mine")
    written_there = [CommitOperationAdd(name, content) for name, content in mine.items()]
    HfApi(token=TOKEN).create_commit("somebody/student", written_there, commit_message="Update README.md")
    (student / "model.safetensors").write_text("newer weights")
    push(student, "somebody/student")
    there = hub.files("somebody/student")
    assert {name: there[name] for name in mine} == mine and there["model.safetensors"] == b"newer weights"
    (line,) = caplog.messages
    assert "so it stays" in line


def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub: LocalHub, student: Path) -> None:
    push(student, "somebody/student")
    (student / "model.safetensors").write_text("secret weights")
    assert refused(student, private=True).startswith(
        "private: got True; make somebody/student private on the Hub first"
    )
    assert hub.files("somebody/student")["model.safetensors"] == b"weights"


@pytest.mark.parametrize("request_", ["POST /api/repos/create", UPLOAD, "POST .*/preupload/", COMMIT])
def test_a_connection_that_breaks_leaves_nothing_half_done_and_the_same_call_goes_on(
    hub: LocalHub, student: Path, request_: str
) -> None:
    hub.faults.append(Fault(request_, BREAK, times=99))
    line = refused(student)
    assert line.startswith("repo_id: got 'somebody/student'; push again when the Hub can be reached")
    assert all(len(repo.commits) == 1 for repo in hub.repos.values()), "the empty first commit"
    hub.faults.clear()
    push(student, "somebody/student")
    assert hub.files("somebody/student")["model.safetensors"] == b"weights"
    if request_ == COMMIT:
        assert hub.asked(UPLOAD) == 1, "the weights had arrived"


def test_an_upload_that_breaks_once_is_tried_again_by_itself(hub: LocalHub, student: Path) -> None:
    hub.faults += [Fault(UPLOAD, BREAK), Fault(UPLOAD, 503)]
    push(student, "somebody/student")
    assert hub.asked(UPLOAD) == 3


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: LocalHub, student: Path) -> None:
    hub.faults.append(Fault(COMMIT, LOSE))
    assert "push again" in refused(student)
    push(student, "somebody/student")
    assert len(hub.repos["models/somebody/student"].commits) == 2


@pytest.mark.parametrize(
    ("status", "words"), [(400, "the Hub refuses the push"), (500, "push again later"), (429, "later")]
)
def test_an_answer_that_repeats_the_token_is_one_line_without_it(
    hub: LocalHub, student: Path, status: int, words: str
) -> None:
    hub.faults.append(Fault(COMMIT, status, times=99))
    assert words in refused(student)


def test_a_switched_off_hub_is_said(hub: LocalHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(student).startswith("HF_HUB_OFFLINE: got")


def test_a_hub_out_of_reach_is_one_line(hub: LocalHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound, and nobody listens: the connection is refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "push again when the Hub can be reached" in refused(student)


@pytest.mark.parametrize("file", ["README.md", "recipe.yaml", "tokenizer.json", ".eval_results/sst2.yaml"])
def test_a_token_in_a_file_is_not_uploaded(hub: LocalHub, student: Path, file: str) -> None:
    (student / file).write_text(f"line\ntoken: {OTHER_TOKEN}\n")
    line = refused(student)
    assert line.startswith("folder: got") and f"take the access token out of {file}" in line
    assert not hub.requests


def test_the_door_of_a_run_asks_whether_the_token_may_write_there(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: str, token: str | None = TOKEN) -> str:
        connect(monkeypatch, hub, tmp_path / "cache", token)
        try:
            check_push(name, "hub.repo_id")
        except InputError as error:
            return str(error)
        return ""

    assert said("somebody/student") == said("an-organisation/student") == ""
    assert "somebody or an-organisation" in said("another/student")
    assert "can only read" in said("somebody/student", READ_TOKEN)
    assert "does not accept the token" in said("somebody/student", "hf_" + "Unkn0wn" * 5)
    assert "log in first" in said("somebody/student", None)
    assert all(line.startswith("hub.repo_id: got") for line in [said("another/student"), said("a/b", READ_TOKEN)])
