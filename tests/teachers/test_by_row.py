"""Rows that name their teacher: each is taught by that one alone, from Python and from a recipe, and others are refused."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from builders.models import tiny_model
from builders.recipes import causal_recipe, faults_at_the_door, recipe_with, write_decoder, write_model
from builders.runs import weights
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import ByRow

OWNERS = [1, 0, 2, 1, 1, 0, 2, 1]


def named(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}


def with_owners(data, owners=OWNERS):
    return [{**row, "teacher_of": torch.tensor(owner)} for row, owner in zip(data, owners, strict=True)]


def log_p(model, batch) -> np.ndarray:
    with torch.no_grad():
        return model(**batch).logits.double().log_softmax(-1).numpy()


def batch_of(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0] if name not in ("labels", "teacher_of")}


def logged(trainer, name="loss/logits") -> float:
    trainer.train()
    return trainer.state.log_history[0][name]


@pytest.mark.slow
@pytest.mark.parametrize("also", [{}, {"hidden": {"layers": "uniform"}}], ids=["outputs", "layers"])
def test_each_example_learns_from_its_own_teacher(tmp_path, also):
    names = ("no", "maybe", "yes")
    kinds = [tiny_model(num_labels=3, layers=2, seed=seed, **NO_DROPOUT, **named(names)) for seed in (1, 2)]
    kinds.append(tiny_model(num_labels=3, layers=2, seed=3, **NO_DROPOUT, **named(("yes", "no", "maybe"))))
    student = tiny_model(num_labels=3, layers=2, seed=4, **NO_DROPOUT, **named(names))
    data = with_owners(rows(student))
    batch = batch_of(data)
    outputs = [log_p(kind, batch) for kind in kinds]
    outputs[2] = outputs[2][:, [1, 2, 0]]
    own = log_p(student, batch)
    expected = np.mean([(np.exp(outputs[o][i]) * (outputs[o][i] - own[i])).sum() for i, o in enumerate(OWNERS)])
    trainer = trainer_of(tmp_path, copy.deepcopy(student), ByRow(kinds), data, {"logits": {}, **also})
    assert logged(trainer) == pytest.approx(expected, rel=1e-4)
    if also:  # layers are compared with the first, in all rows
        alone = trainer_of(tmp_path, copy.deepcopy(student), kinds[0], data, {"logits": {}, **also})
        assert trainer.state.log_history[0]["loss/hidden"] == pytest.approx(logged(alone, "loss/hidden"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("owners", [OWNERS, [1] * 8], ids=["mixed", "one"])
def test_each_token_of_a_language_model_learns_from_the_teacher_of_its_row(tmp_path, owners):
    kinds, student = [causal_model(layers=2, seed=seed) for seed in (1, 2, 3)], causal_model(layers=2, seed=4)
    data = with_owners(rows(student), owners)
    batch, labels = batch_of(data), torch.stack([row["labels"] for row in data])
    outputs, own = [log_p(kind, batch) for kind in kinds], log_p(student, batch)
    found = [
        (np.exp(outputs[owners[i]][i, t]) * (outputs[owners[i]][i, t] - own[i, t])).sum()
        for i, t in (labels[:, 1:] != -100).nonzero().tolist()
    ]
    assert logged(trainer_of(tmp_path, student, ByRow(kinds), data, {"logits": {}})) == pytest.approx(
        np.mean(found), rel=1e-4
    )


def test_a_teacher_reads_its_own_rows_alone(monkeypatch):
    kinds, student = [causal_model(layers=1, seed=seed) for seed in (1, 2, 3)], causal_model(layers=1)
    teacher, read = ByRow(kinds), []
    teacher.meet(student)
    for kind in kinds:
        kind.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
        )
    batch = {"input_ids": torch.arange(40).view(4, 10), "teacher_of": torch.tensor([2, 0, 2, 2])}
    got = teacher.signals(batch, positions=torch.tensor([3, 12, 39])).logits
    assert read == [1, 3]
    plain = [kind(input_ids=batch["input_ids"]).logits.flatten(0, 1) for kind in kinds]
    torch.testing.assert_close(got, torch.stack([plain[2][3], plain[0][12], plain[2][39]]))
    with pytest.raises(InputError, match="^teacher_of: got 'a batch without it'"):
        teacher.signals({"input_ids": batch["input_ids"]}, positions=torch.tensor([3]))
    for wrong in (3, -1):
        unknown = {**batch, "teacher_of": torch.tensor([2, 0, wrong, 2])}
        with pytest.raises(InputError, match=rf"^teacher_of: got \[.*{wrong}.*\]; accepted: numbers from 0 to 2"):
            teacher.signals(unknown, positions=torch.tensor([3]))


TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True}
WORDS = ("good", "bad", "film", "plot")


def write_sources(file, sources) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["review", "mood", "kind"])
        writer.writerows(
            [f"{WORDS[i % 4]} {WORDS[i // 4 % 4]}", ("neg", "pos")[i % 2], sources[i % len(sources)]] for i in range(48)
        )


@pytest.fixture
def folder(tmp_path):
    """Two teachers, and rows of the kinds 7 and 8."""
    for seed, name in enumerate(("teacher", "second")):
        write_model(tmp_path / name, seed=seed, max_position_embeddings=64, **named(("neg", "pos")))
    write_sources(tmp_path / "rows.csv", ("7", "8"))
    return tmp_path


def by_row(folder, first=("7",), second=("8",), **changes):
    others = [{"model": str(folder / "second"), "teaches": list(second)}]
    given = {
        "teacher__ensemble": {"teaches": list(first), "others": others},
        "data__columns": {"text": "review", "label": "mood", "teacher_of": "kind"},
        "distillation": {"losses": {"logits": {}}, **TRAINING},
    }
    return recipe_with(folder, **{**given, **changes})


@pytest.mark.slow
def test_a_recipe_teaches_each_row_by_the_teacher_that_it_names(folder):
    """With one teacher twice, names change nothing; with another, they do, and which rows it has matters."""
    students = {}
    for name, recipe in {
        "alone": recipe_with(folder, distillation={"losses": {"logits": {}}, **TRAINING}),
        "both": by_row(folder),
        "turned": by_row(folder, ("8",), ("7",)),
    }.items():
        distill_llm.run(recipe, folder / f"run-{name}")
        students[name] = weights(folder / f"run-{name}" / "student")
    (folder / "second").rename(folder / "gone")
    write_model(folder / "second", seed=0, max_position_embeddings=64, **named(("neg", "pos")))
    distill_llm.run(by_row(folder, data__holdout_examples=0), folder / "run-same")
    same = weights(folder / "run-same" / "student")

    def apart(one, other):  # but for a bias whose gradient is 0 but for rounding, which Adam makes steps of
        pairs = ((students[one][name], tensor) for name, tensor in other.items() if "key.bias" not in name)
        return max((mine - theirs).abs().max().item() for mine, theirs in pairs)

    assert apart("alone", same) < 1e-4
    assert all(apart(one, students[two]) > 1e-3 for one, two in (("alone", "both"), ("both", "turned")))
    report = (folder / "run-both" / "report.md").read_text()
    assert f"`{folder}/teacher` for 7" in report and f"`{folder}/second` for 8" in report


@pytest.mark.slow
def test_prompts_and_chats_keep_the_name_of_their_teacher(tmp_path):
    for seed, name in enumerate(("teacher", "second")):
        write_decoder(tmp_path / name, seed=seed, max_position_embeddings=64)
    asked = [{"prompt": f"w{i}", "response": f"w{i + 1}", "from": ("math", "chat")[i % 2]} for i in range(40)]
    file = tmp_path / "named.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    ensemble = {"teaches": ["math"], "others": [{"model": str(tmp_path / "second"), "teaches": ["chat"]}]}
    data = {"task": "prompts", "path": str(file), "max_length": 16, "columns": {"teacher_of": "from"}}
    training = {"losses": {"logits": {}}, **TRAINING}
    recipe = causal_recipe(
        tmp_path, "prompts", teacher__ensemble=ensemble, data=data, distillation=training, data__holdout_examples=4
    )
    assert distill_llm.run(recipe, tmp_path / "run").metrics["retention"] > 0
    (line,) = faults_at_the_door(_with_text(recipe, tmp_path))
    assert line.startswith("data.columns: got 'teacher_of'; ")


def _changed(recipe, section, **fields):
    plain = recipe.model_dump(mode="json")
    return {**plain, section: {**plain[section], **fields}}


def _with_text(recipe, folder):
    file = folder / "documents.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1}", "from": "math"}) for i in range(40)))
    return parse_recipe(_changed(recipe, "data", task="text", path=str(file), holdout_examples=0))


@pytest.mark.slow
def test_the_door_counts_rows_that_no_teacher_teaches(folder):
    write_sources(folder / "rows.csv", ("7", "8", "9"))
    (line,) = faults_at_the_door(by_row(folder))
    assert line.startswith("data.columns.teacher_of: got \"'9' in 1") and "of the training rows" in line
    assert "accepted: a name that a teacher `teaches`" in line and len(line) <= 300
    write_sources(folder / "rows.csv", ("7",))
    (line,) = faults_at_the_door(by_row(folder))
    assert line.startswith("teacher.ensemble.others.0.teaches: got ['8']; name rows that there are")
    (line,) = faults_at_the_door(by_row(folder, data__columns__teacher_of="sort"))
    assert line.startswith("data.columns.teacher_of: got 'sort'; accepted: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__ensemble__teaches": None}, "teacher.ensemble.teaches: not given; name the rows"),
        ({"teacher__ensemble__teaches": ["7", "8"]}, "teacher.ensemble.others.0.teaches: got '8'; leave it out here"),
        ({"teacher__ensemble__weight": 2}, "teacher.ensemble.weight: got 2.0; leave it out: a row is taught by one"),
        ({"teacher__ensemble__confidence": True}, "teacher.ensemble.confidence: got True; leave it out"),
        ({"teacher__ensemble__average": "logits"}, "teacher.ensemble.average: got 'logits'; leave it out"),
        ({"data__columns__teacher_of": None}, "data.columns.teacher_of: not given; name the column"),
        ({"teacher__ensemble": None}, "data.columns.teacher_of: got 'kind'; remove it"),
        ({"data__packing": True}, "data.packing: got True; remove it"),
        ({"data__augment": {"cutout": {}}}, "data.augment: got "),
    ],
)
def test_the_recipe_refuses_names_that_fit_nothing(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        by_row(tmp_path, **changes)
    assert str(caught.value).startswith(message)
