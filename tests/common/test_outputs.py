"""What may be written: nothing of the user's is replaced, and what cannot be written is said before any work."""

import json
from pathlib import Path

import pytest
import torch
from builders.causal import causal_model, word_tokenizer
from builders.recipes import faults_at_the_door as faults
from builders.recipes import recipe_with, write_model, write_rows
from safetensors.torch import save_file

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.outputs import usable_file, usable_output, usable_statistics
from distill_llm.data import DataSpec
from distill_llm.pipeline.caching import cache_teacher
from distill_llm.responses.respond import respond
from distill_llm.responses.settings import ResponseSettings

METADATA = {"examples": "1", "tokens": "1", "has_gradients": "0"}
RECORD = {"model": "memory:1", "rows": "2", "gradients": False, "moments": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A working directory with a thesis in a folder, a table with its JSON, and an empty folder."""
    for name in ("mythesis/thesis.txt", "precious.csv", "precious.json", "weights.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[1, 2]")
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["mythesis", "precious.csv/below", "/proc/x/y", "/dev/null"])
@pytest.mark.parametrize("begun", [None, "recipe.yaml"])
def test_a_folder_with_files_or_that_cannot_be_made_is_refused(home, path, begun):
    with pytest.raises(InputError, match="^--output-dir: got"):
        usable_output(Path(path), "--output-dir", begun)


def test_new_and_empty_folders_and_those_that_were_begun_are_taken_and_left_as_they_are(home):
    before = sorted(home.rglob("*"))
    for name in ("empty", "new", "new/below"):
        usable_output(Path(name))
        usable_output(Path(name), begun="recipe.yaml")
    usable_output(Path("mythesis"), begun="thesis.txt")
    assert sorted(home.rglob("*")) == before
    (home / "empty" / "recipe.yaml.partial").write_text("")
    usable_output(Path("empty"), begun="recipe.yaml")


def test_the_working_directory_is_not_replaced_even_if_it_is_empty(home, monkeypatch):
    monkeypatch.chdir(home / "empty")
    with pytest.raises(InputError, match="working directory"):
        usable_output(Path("."))
    usable_output(Path("."), begun="recipe.yaml")


@pytest.mark.parametrize("path", ["mythesis", "precious.csv/x.json", "/proc/x/y.json", "/proc/y.json"])
def test_a_file_that_cannot_be_written_is_refused(home, path):
    with pytest.raises(InputError, match="^--output: got"):
        usable_file(Path(path), "--output")


def test_new_files_and_those_that_are_there_are_taken_and_left_as_they_are(home):
    before = contents(home)
    for name in ("precious.csv", "new.json", "new/below.json", "/dev/null"):
        usable_file(Path(name), "--output")
    assert contents(home) == before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("mythesis", "ends in .safetensors"),
        ("precious.csv", "ends in .safetensors"),
        ("precious.safetensors", "precious.json holds something else"),
        ("weights.safetensors", "weights.json holds something else"),
        ("model.safetensors", "model.safetensors holds something else"),
        ("teacher/model.safetensors", "model.safetensors holds something else"),
        ("folder.safetensors", "folder.safetensors holds something else"),
        ("rows.csv/s.safetensors", "can be written"),
        ("/proc/x/s.safetensors", "can be written"),
        ("run/state.safetensors", "outside the output folder"),
    ],
)
def test_statistics_never_take_the_place_of_something_else(home, path, words):
    (home / "folder.safetensors").mkdir()
    write_model(home / "teacher")
    write_rows(home / "rows.csv")
    before = contents(home)
    (line,) = faults(recipe_with(home, pruning__statistics=path))
    assert line.startswith("pruning.statistics: got ") and words in line
    assert contents(home) == before


def test_statistics_may_be_new_or_ours(home):
    usable_statistics(home / "new" / "s.safetensors", "statistics")
    save_file({"similarity": torch.ones(2)}, home / "s.safetensors", METADATA)
    usable_statistics(home / "s.safetensors", "statistics")  # as a stop between the two files leaves it
    (home / "s.json").write_text(json.dumps(RECORD))
    usable_statistics(home / "s.safetensors", "statistics")
    kept = contents(home)
    usable_statistics(home / "s.safetensors", "statistics")
    assert contents(home) == kept and not (home / "new").exists()
    (home / "s.safetensors").unlink()
    usable_statistics(home / "s.safetensors", "statistics")


def test_a_folder_is_replaced_only_where_it_is_meant(home):
    with pytest.raises(OSError), written_whole(home / "mythesis") as path:
        path.write_text("a file")
    assert (home / "mythesis" / "thesis.txt").is_file()
    with written_whole(home / "mythesis", folder=True) as path:
        path.mkdir()
        (path / "model").write_text("new")
    assert contents(home / "mythesis") == {"model": b"new"}
    with pytest.raises(ZeroDivisionError), written_whole(home / "mythesis", folder=True) as path:
        raise ZeroDivisionError
    assert contents(home / "mythesis") == {"model": b"new"}


@pytest.fixture
def llm(home) -> Path:
    """A causal LM with its tokenizer in `home`/llm, a text, and another tool's index.json in a folder."""
    for part in (causal_model(max_position_embeddings=64), word_tokenizer()):
        part.save_pretrained(home / "llm")
    (home / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1}" for i in range(40)))
    (home / "site").mkdir()
    (home / "site" / "index.json").write_text('{"name": "a site"}')
    return home


@pytest.mark.parametrize("output", ["mythesis", ".", "precious.csv", "/proc/x", "site"])
def test_a_cache_and_answers_go_to_a_folder_of_their_own_or_no_teacher_is_loaded(llm, output, monkeypatch):
    for module in ("pipeline.caching", "responses.respond"):
        monkeypatch.setattr(f"distill_llm.{module}.load_pretrained", None)
    before = contents(llm)
    with pytest.raises(InputError, match="^(output_dir|cache): got"):
        cache_teacher("llm", DataSpec("text", "text.txt", max_length=16), output)
    with pytest.raises(InputError, match="^output_dir: got"):
        respond("llm", ["w1 w2"], output, ResponseSettings(max_new_tokens=4), progress=False)
    assert contents(llm) == before


NO_NAMES = ["x" * 250, "new/" + "é" * 130, "a\0b", "\ud800"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_no_file_can_have_are_refused_before_any_work(home, name):
    for check, path in ((usable_output, name), (usable_file, name), (usable_statistics, f"{name}.safetensors")):
        with pytest.raises(InputError) as error:
            check(home / path, "field")
        assert str(error.value).startswith("field: got ") and len(str(error.value).splitlines()) == 1


def test_the_longest_name_can_be_written_whole(home):
    path = home / ("x" * 200)
    usable_file(path, "field")
    with written_whole(path) as file:
        file.write_text("text")
    assert path.read_text() == "text"
