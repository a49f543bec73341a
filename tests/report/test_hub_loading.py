"""What was pushed is used by its repository's name: models, adapters, exports, caches and responses."""

import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders.caches import causal_model as cached_model
from builders.caches import contents, sequences, write
from builders.checkpoints import student_of
from builders.hub import BREAK, TOKEN, Fault, LocalHub, connect, environment_of, serving
from builders.models import random_batch
from builders.processes import command, environment
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from builders.responses import answer, rows_of, save_teacher, write_prompts
from huggingface_hub import DatasetCard, ModelCard, snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.data.sources import read_splits
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.report.hub import push
from distill_llm.report.other_cards import shown_adapters
from distill_llm.report.uploads import find_upload
from distill_llm.teachers.cache import CachedTeacher


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that the libraries take for the real one, with somebody's token."""
    with serving() as server:
        connect(monkeypatch, server, tmp_path / "cache")
        yield server


def test_an_uneven_student_loads_from_a_private_repository_with_equal_outputs(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of()
    write_model(tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    push(tmp_path / "student", "somebody/student", private=True)
    batch = random_batch(student)
    with torch.no_grad():
        wanted = student(**batch).logits
        plain = AutoModelForSequenceClassification.from_pretrained("somebody/student", trust_remote_code=True)
        own = load_pretrained("somebody/student")
        assert torch.equal(plain.eval()(**batch).logits, wanted) and torch.equal(own.eval()(**batch).logits, wanted)
    assert AutoTokenizer.from_pretrained("somebody/student", trust_remote_code=True)("film")["input_ids"]
    connect(monkeypatch, hub, tmp_path / "another", token=None)
    with pytest.raises(OSError, match="somebody/student"):
        AutoModelForSequenceClassification.from_pretrained("somebody/student", trust_remote_code=True)


def test_a_model_without_a_card_gets_one_that_says_how_it_loads(hub: LocalHub, tmp_path: Path) -> None:
    write_model(tmp_path / "student")
    push(tmp_path / "student", "somebody/student")
    card = ModelCard(hub.files("somebody/student")["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert 'model_id = "somebody/student"' in card.text
    assert not (tmp_path / "student" / "README.md").exists()


@pytest.mark.slow
def test_a_teacher_cache_is_a_dataset_that_is_downloaded_whole(hub: LocalHub, tmp_path: Path) -> None:
    write(tmp_path / "cache-of-teacher", cached_model(), sequences())
    (tmp_path / "cache-of-teacher" / ".lock").touch()
    push(tmp_path / "cache-of-teacher", "somebody/cache")
    files = hub.files("somebody/cache", "dataset")
    assert files.keys() == {".gitattributes", "README.md", *contents(tmp_path / "cache-of-teacher")} - {".lock"}
    card = DatasetCard(files["README.md"].decode())
    assert "teacher-cache" in card.data.tags and "20 examples over 97 classes" in card.text
    there = snapshot_download("somebody/cache", repo_type="dataset")
    for name, content in contents(tmp_path / "cache-of-teacher").items():
        assert name == ".lock" or Path(there, name).read_bytes() == content
    CachedTeacher(there)


@pytest.mark.slow
def test_responses_are_a_dataset_that_a_recipe_reads_by_name(hub: LocalHub, tmp_path: Path) -> None:
    teacher, prompts = (
        save_teacher(tmp_path / "secret" / "teacher"),
        write_prompts(tmp_path / "secret" / "prompts.jsonl"),
    )
    answer(str(teacher), str(prompts), tmp_path / "answers", max_new_tokens=8, progress=False)
    push(tmp_path / "answers", "somebody/answers")
    files = hub.files("somebody/answers", "dataset")
    assert files.keys() == {".gitattributes", "README.md", "responses.json", "train.jsonl"}
    about = json.loads(files["responses.json"])
    assert (about["teacher"], about["data"]) == ("teacher", "prompts.jsonl")
    assert not [name for name, content in files.items() if b"secret" in content]
    assert list(read_splits("somebody/answers")["train"]) == rows_of(tmp_path / "answers")


@pytest.mark.parametrize("name", ["model-f16.gguf", "model.onnx"])
def test_an_export_is_a_model_with_the_command_that_uses_it(hub: LocalHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / name).write_bytes(b"weights")
    (tmp_path / "student").mkdir()
    said = "---\nlicense: apache-2.0\nbase_model: somebody/base\ndatasets: [nyu-mll/glue]\n---\n# Student\n"
    (tmp_path / "student" / "README.md").write_text(said)
    given = tmp_path / "export" / name if name.endswith(".gguf") else tmp_path / "export"
    push(given, "somebody/exported")
    files = hub.files("somebody/exported")
    card = ModelCard(files["README.md"].decode())
    assert files[name] == b"weights" and card.data.library_name == name.rpartition(".")[2]
    assert "somebody/exported" in card.text and f"`{name}`" in card.text
    assert (card.data.license, card.data.base_model, card.data.datasets) == (
        "apache-2.0",
        "somebody/base",
        ["nyu-mll/glue"],
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": "{}"}, "adapter_model.safetensors is missing"),
        ({"responses.json": "{}"}, "train.jsonl is missing"),
        ({"index.json": "{}"}, "damaged"),
        ({"notes.txt": "mine"}, "a GGUF file, or a folder with a model"),
    ],
)
def test_what_is_not_complete_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        find_upload(tmp_path)


ELSEWHERE = """
import sys
sys.modules["distill_llm"] = None  # any import of it fails
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
student = AutoModelForSequenceClassification.from_pretrained("somebody/student", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("somebody/student", trust_remote_code=True)
batch = tokenizer("the film not bad", return_tensors="pt")
results = {"ids": batch["input_ids"]}
with torch.no_grad():
    results["student"] = student(**batch).logits
    if len(sys.argv) > 1:
        from peft import PeftModel
        base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
        results["adapters"] = PeftModel.from_pretrained(base, "somebody/adapters").eval()(**batch).logits
torch.save(results, "results.pt")
"""


@pytest.mark.slow
def test_a_run_pushes_its_student_goes_on_after_a_broken_connection_and_shows_no_token(
    hub: LocalHub, tmp_path: Path
) -> None:
    """The student is loaded in a process of its own, where this package is not installed."""

    def ran(*line: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(map(str, line)))
        assert done.exit_code == code and TOKEN not in done.output, done.output[-3000:]
        return done.output

    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    recipe = write_recipe(tmp_path, recipe_for(tmp_path, hub={"repo_id": "somebody/student", "private": True}))
    hub.faults.append(Fault("POST /api/models/.*/commit/", BREAK))
    said = ran("run", recipe, code=2)
    assert "repo_id: got 'somebody/student'; push again when the Hub can be reached" in said
    assert len(hub.repos["models/somebody/student"].commits) == 1
    ran("run", recipe)
    files = hub.files("somebody/student")
    assert {"recipe.yaml", "plan.json", "metrics.json", "README.md", "model.safetensors"} <= files.keys()
    assert hub.asked("PUT /storage/") == 1, "the weights had arrived"
    kept = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in kept if TOKEN.encode() in file.read_bytes()]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    listed = ran("push", tmp_path / "run" / "student", "somebody/listed", "--dry-run")
    assert "plan.json" in listed and "model.safetensors" in listed and "models/somebody/listed" not in hub.repos
    wanted = {"student": load_pretrained(tmp_path / "run" / "student")}
    if peft := importlib.util.find_spec("peft"):
        wanted["adapters"] = _pushed_adapters(tmp_path, ran)
    line = command("-c", ELSEWHERE, *([tmp_path / "teacher"] if peft else []))
    variables = environment(**environment_of(hub, tmp_path / "home"))
    done = subprocess.run(line, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "results.pt")
    for name, model in wanted.items():
        with torch.no_grad():
            assert torch.equal(found[name], model(found["ids"]).logits), name


def _pushed_adapters(folder: Path, ran: Callable[..., str]) -> torch.nn.Module:
    """Adapters of the teacher in `somebody/adapters`, with a card of this package's."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    settings = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    adapted.save_pretrained(folder / "adapters")
    (folder / "adapters" / "README.md").unlink()  # peft's is a form to fill in
    ran("push", folder / "adapters", "somebody/adapters")
    pushed = json.loads(shown_adapters(folder / "adapters"))
    own = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    assert (
        own.pop("base_model_name_or_path") == str(folder / "teacher")
        and pushed.pop("base_model_name_or_path") == "teacher"
    )
    assert pushed == own
    return adapted
