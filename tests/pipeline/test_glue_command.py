"""`distill-llm glue`: models found by their tasks, a base model fine-tuned on each, and nothing done twice."""

import json
from pathlib import Path

import pytest
import torch
from builders.recipes import write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.pipeline import glue as glue_module
from distill_llm.pipeline.glue import models_by_task
from distill_llm.pipeline.stages import teacher


def put(folder: Path, **files: dict) -> Path:
    """A folder with files of JSON by name, `/` written as `__`."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def test_models_are_found_by_their_runs_metrics_and_names_of_folders(tmp_path):
    run = put(tmp_path / "runs" / "first", metrics={"task": "cola"}, student__config={}, teacher__config={})
    model = put(tmp_path / "runs" / "STS-B", config={})
    tuned = put(tmp_path / "runs" / "third", teacher__config={})
    (tuned / "recipe.yaml").write_text("data: {task: mrpc}\n")
    other = put(tmp_path / "runs" / "other", metrics={"task": "embedded"}, student__config={})
    expected = {"cola": str(run / "student"), "stsb": str(model), "mrpc": str(tuned / "teacher")}
    assert models_by_task([str(tmp_path / "runs")]) == expected
    assert models_by_task([str(run), str(model), str(tuned)]) == expected
    assert models_by_task([str(put(tmp_path / "base", config={}))]) is None and models_by_task(["me/base"]) is None
    for names, words in (([run, run], "one model for cola"), ([run, other], "a run on a GLUE task")):
        with pytest.raises(InputError, match=words):
            models_by_task([str(name) for name in names])


def write_data(folder: Path) -> Path:
    """MRPC, and MNLI with both development sets, of words that the tiny models know."""
    pairs = [("good film", "bad plot"), ("very good", "not bad"), ("the film", "the plot"), ("bad", "good")]
    for name, header, labels, files in (
        ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ("0", "1"), ("train", "dev")),
        (
            "MNLI",
            "sentence1\tsentence2\tgold_label",
            ("entailment", "neutral"),
            ("train", "dev_matched", "dev_mismatched"),
        ),
    ):
        (folder / name).mkdir(parents=True)
        for shift, file in enumerate(files):
            rows = [header]
            for i in range(12):
                (a, b), label = pairs[(i + shift) % 4], labels[(i * (shift + 1)) % 2]
                rows.append(f"{label}\t0\t0\t{a}\t{b}" if name == "MRPC" else f"{a}\t{b}\t{label}")
            (folder / name / f"{file}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_a_base_model_is_fine_tuned_on_every_task_once_and_scored_as_by_hand(tmp_path, monkeypatch):
    trained, scored = [], []
    for module, name, done in ((teacher, "train_model", trained), (glue_module, "evaluate_model", scored)):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _real=real, _done=done, **k: (_done.append(1), _real(*a, **k))[1])
    base, data = write_model(tmp_path / "base", max_position_embeddings=64), write_data(tmp_path / "glue")
    words = ["glue", str(base), "--data", str(data), "--output-dir", str(tmp_path / "out"), "--max-length", "16"]
    words += ["--set", "teacher.train.num_train_epochs=1", "--set", "teacher.train.learning_rate=1e-2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Average of 2 of the 9 tasks" in result.output and (len(trained), len(scored)) == (2, 3)
    record = json.loads((tmp_path / "out" / "glue.json").read_text())
    for name, file in (("metrics", "dev_matched"), ("mismatched", "dev_mismatched")):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "mnli" / "teacher").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "mnli" / "teacher")
        right = []
        for line in (data / "MNLI" / f"{file}.tsv").read_text().splitlines()[1:]:
            first, second, label = line.split("\t")
            with torch.no_grad():
                found = int(model(**tokenizer(first, second, return_tensors="pt")).logits.argmax())
            right.append(("entailment", "neutral", "contradiction")[found] == label)
        assert record["tasks"]["mnli"][name]["accuracy"] == pytest.approx(sum(right) / len(right))

    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and (len(trained), len(scored)) == (2, 3)
    from_runs = CliRunner().invoke(
        app,
        [
            "glue",
            str(tmp_path / "out"),
            "--data",
            str(data),
            "--output-dir",
            str(tmp_path / "second"),
            "--max-length",
            "16",
        ],
    )
    assert from_runs.exit_code == 0, from_runs.output
    assert json.loads((tmp_path / "second" / "glue.json").read_text())["average"] == record["average"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "colla"], "error: --tasks: got 'colla'; accepted: 'cola' (the nearest)"),
        (["--tasks", "rte"], "error: --tasks: got 'rte'; leave rte out, or give its data"),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, line):
    data = write_data(tmp_path / "glue")
    found = CliRunner().invoke(
        app, ["glue", "me/base", "--data", str(data), "--output-dir", str(tmp_path / "out"), *words]
    )
    assert found.exit_code == 2 and found.stderr.startswith(line) and len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
