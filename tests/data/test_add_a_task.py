"""The example of docs/development/add-a-task.md: a task kind in one file, trained, scored and run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.causal import word_tokenizer
from builders.models import tiny_model
from datasets import Dataset

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, collator, encode, task_names
from distill_llm.data.kinds import KINDS
from distill_llm.data.loading import read_task
from distill_llm.evaluation import evaluate_model
from distill_llm.losses.items import kind_of
from distill_llm.models.checkpoint import load_for_task
from distill_llm.report.usage import snippet
from distill_llm.training.config import DistillationConfig
from distill_llm.training.trainer import DistillationTrainer

PAGE = Path(__file__).parents[2] / "docs" / "development" / "add-a-task.md"
TAGS = ("O", "PER", "LOC")


@pytest.fixture
def kind():
    """The page's kind of task, registered for one test."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, "token_classification.py", "exec"), {})
    yield KINDS["token_classification"]
    del KINDS["token_classification"]


def tagged(count: int = 200) -> Dataset:
    """Words w0 to w29 are no names, w30 to w59 persons, w60 to w89 places."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 90, size) for size in draw.integers(2, 9, count)]
    words, tags = [[f"w{n}" for n in row] for row in rows], [[TAGS[n // 30] for n in row] for row in rows]
    return Dataset.from_dict({"words": words, "tags": tags})


def tokenizer():
    return word_tokenizer(pad=True)


def model(seed: int = 0):
    return tiny_model(head="token-classification", layers=2, num_labels=3, vocab=97, seed=seed)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    tagged().to_json(tmp_path / "rows.jsonl")
    columns = {"text": "words", "label": "tags"}
    return DataSpec("token_classification", str(tmp_path / "rows.jsonl"), columns, max_length=16)


def test_rows_have_labels_at_first_tokens_and_the_score_is_counted_by_hand(kind, spec: DataSpec) -> None:
    assert task_names()[-1] == "token_classification"
    data = read_task(spec)
    assert data.task.label_names == ("LOC", "O", "PER") and data.task.kind == kind and len(data.test) == 20
    rows = encode(data, tokenizer(), 16)
    for raw, row in zip(data.test, rows.test, strict=True):
        numbers = [int(word[1:]) for word in raw["text"]]
        assert row["input_ids"] == [4 + n for n in numbers]
        assert row["labels"] == [(1, 2, 0)[n // 30] for n in numbers]
    student = model()
    hits = []
    with torch.no_grad():
        for row in rows.test:
            logits = student(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            hits += (logits.argmax(-1) == torch.tensor(row["labels"])).tolist()
    got = evaluate_model(student, rows.test, data.task, collator(data.task, tokenizer()), batch_size=4, progress=False)
    assert got["accuracy"] == got["score"] == pytest.approx(sum(hits) / len(hits))
    assert got.keys() == {"accuracy", "f1", "score", "standard_error", "rows"}


def test_words_of_several_tokens_are_one_item(kind, spec: DataSpec) -> None:
    from transformers import BertTokenizerFast

    split = BertTokenizerFast(
        vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", "##1", "##2"])}
    )
    task = read_task(spec).task
    made = kind.encoder(task, split, 8)({"text": [["w1", "w"], ["w2"]], "labels": [[2, 0], [1]]})
    assert made["input_ids"] == [[2, 4, 5, 4, 3], [2, 4, 6, 3]]
    assert made["labels"] == [[-100, 2, -100, 0, -100], [-100, 1, -100, -100]]
    batch = kind.collator(split, 0)([dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)])
    assert batch["labels"].tolist() == [[-100, 2, -100, 0, -100], [-100, 1, -100, -100, -100]]


def test_a_student_learns_it_through_the_trainer(kind, spec: DataSpec, tmp_path) -> None:
    data = encode(read_task(spec), tokenizer(), 16)
    pad = collator(data.task, tokenizer())
    assert kind_of(model()) == kind.item
    model(1).save_pretrained(tmp_path / "student")
    student = load_for_task(tmp_path / "student", data.task)
    assert tuple(student.config.id2label.values()) == data.task.label_names
    before = evaluate_model(student, data.test, data.task, pad, progress=False)["score"]
    args = DistillationConfig(
        str(tmp_path / "out"),
        losses={"labels": {"weight": 0.9}, "logits": {"weight": 0.1}},
        max_steps=100,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    names = [name for name in data.train.column_names if name != "length"]
    trainer = DistillationTrainer(
        model=student,
        teacher=model(2),
        args=args,
        train_dataset=data.train.select_columns(names),
        eval_dataset=data.test.select_columns(names),
        data_collator=pad,
        compute_metrics=lambda given: {
            "accuracy": float(np.mean(np.equal(*kind.predictions(given.predictions, given.label_ids))))
        },
    )
    trainer.train()
    after = evaluate_model(student, data.test, data.task, pad, progress=False)["score"]
    assert after > before and after > 0.6
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(after)


@pytest.mark.slow
def test_a_recipe_prunes_and_distils_it(kind, spec: DataSpec, tmp_path) -> None:
    teacher = model()
    teacher.config.id2label = dict(enumerate(("LOC", "O", "PER")))
    teacher.config.label2id = {name: number for number, name in teacher.config.id2label.items()}
    for part in (teacher, tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    recipe = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "data": {"task": spec.task, "path": spec.path, "columns": dict(spec.columns), "max_length": 16},
        "pruning": {"keep": 0.5, "calibration_examples": 16},
        "distillation": {"max_steps": 2, "use_cpu": True, "report_to": []},
        "evaluation": {"metric": "f1", "latency": {"batch_size": 2, "sequence_length": 8}},
    }
    result = distill_llm.run(recipe, tmp_path / "run")
    assert (result.metrics["metric"], result.metrics["task"]) == ("f1", "token_classification")
    assert 0 <= result.metrics["student"]["score"] <= 1 and result.metrics["layer_params_kept"] < 0.52
    card = (result.student_dir / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "AutoModelForTokenClassification.from_pretrained" in snippet(result.student_dir, "x")
    json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_bad_rows_are_one_line(kind, tmp_path: Path) -> None:
    for split, tag in (("train", "A"), ("test", "B")):
        Dataset.from_dict({"text": [["w1"], ["w2"]], "label": [[tag], ["A"]]}).to_json(tmp_path / f"{split}.jsonl")
    with pytest.raises(InputError, match=r"^data.columns.label: got 'B'; accepted: the classes A of the training rows"):
        read_task(DataSpec("token_classification", str(tmp_path)))
