"""What a recipe is checked for before any weight is read: each case is a real folder or file with one thing wrong."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from recipe_inputs import WORDS, recipe_for, write_model, write_rows

from distill_llm.checks import check_recipe
from distill_llm.errors import InputError
from distill_llm.faults import faults_in
from distill_llm.recipe import Recipe, parse_recipe


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher and rows that fit the recipe of `recipe_for`."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    return tmp_path


def recipe_with(folder, **changes) -> Recipe:
    """The recipe of `recipe_for` with fields changed: `pruning__keep=1`."""
    mapping = recipe_for(folder)
    for path, value in changes.items():
        inner, names = mapping, path.split("__")
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
    return parse_recipe(mapping)


def faults(recipe: Recipe) -> list[str]:
    """The lines of the recipe's faults; none where it passes."""
    try:
        check_recipe(recipe)
    except InputError as error:
        return [str(fault) for fault in faults_in(error)]
    return []


def test_a_recipe_that_fits_passes_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    assert faults(recipe_with(folder)) == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"teacher__model": "missing/folder/here"}, "teacher.model", "existing folder"),
        ({"teacher__model": "nobody/nothing"}, "teacher.model", "the Hub is off"),
        ({"teacher__model": "package://no_such_package/model"}, "teacher.model", "not installed"),
        ({"data__task": "sst3"}, "data.task", "'sst2' (the nearest)"),
        ({"data__path": "missing/folder/rows.csv"}, "data.path", "existing file or folder"),
        ({"data__columns__text": "revew"}, "data.columns", "review"),
        ({"data__train_examples": 500}, "data.train_examples", "training rows"),
        ({"data__max_length": 65}, "data.max_length", "at most 64"),
        ({"evaluation__latency__sequence_length": 65}, "evaluation.latency.sequence_length", "at most 64"),
        ({"pruning__calibration_examples": 41}, "pruning.calibration_examples", "the training rows"),
        ({"pruning__round_to": 65}, "pruning.round_to", "at most 64"),
        ({"pruning": {"layers": [0, 3]}}, "pruning.layers", "indices from 0 to 2"),
        ({"distillation__losses__hidden": {"layers": [[3, 0]]}}, "distillation.losses.hidden.layers", "[3, 3]"),
        ({"distillation__fp16": True}, "distillation.fp16", "bf16"),
        ({"distillation__optim": "adamw"}, "distillation.optim", "adamw_torch"),
        ({"final": {"train_sampling_strategy": "by_length"}}, "final.train_sampling_strategy", "group_by_length"),
        ({"distillation__dataloader_prefetch_factor": 2}, "distillation", "dataloader_num_workers"),
    ],
)
def test_one_thing_wrong_gives_one_line_with_field_given_and_accepted(folder, changes, field, words):
    if "fp16" in str(changes) and torch.accelerator.is_available():
        pytest.skip("fp16 fits this device")
    found = [
        line for line in faults(recipe_with(folder, **changes)) if not line.startswith("final.") or "final" in field
    ]
    assert len(found) == 1 and found[0].startswith(field), found
    assert "got " in found[0] and words in found[0].split("; accepted: ")[1]


def test_all_faults_are_reported_together(folder):
    recipe = recipe_with(folder, teacher__model="a/b/c", data__task="sst3", distillation__optim="adamw")
    assert [line.split(":")[0] for line in faults(recipe)] == ["teacher.model", "data.task", "distillation.optim"]


def test_labels_must_match_the_teachers_unless_it_is_trained(folder):
    write_rows(folder / "rows.csv", labels=("bad", "fair", "good"))
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "with 2 labels" in line and "3 labels" in line
    assert faults(recipe_with(folder, teacher__train={"num_train_epochs": 1})) == []


def test_label_names_in_another_order_are_refused(folder):
    config = json.loads((folder / "teacher" / "config.json").read_text())
    config |= {"id2label": {"0": "POS", "1": "NEG"}, "label2id": {"POS": 0, "NEG": 1}}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    (line,) = faults(recipe_with(folder))
    assert "order" in line and "['pos', 'neg']" in line


def test_a_teacher_without_the_tasks_head_must_be_trained(folder):
    write_model(folder / "teacher", head="base")
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "ForSequenceClassification" in line and "teacher.train" in line
    assert faults(recipe_with(folder, teacher__train={"num_train_epochs": 1})) == []


def test_a_family_that_cannot_be_pruned_says_how_to_add_it(folder):
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(config | {"model_type": "ernie"}))
    (line,) = faults(recipe_with(folder))
    assert "family ernie" in line and "bert" in line and "FAMILIES" in line


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_config_or_tokenizer_is_refused(folder, missing):
    for file in (folder / "teacher").glob("vocab*"):
        file.unlink()
    (folder / "teacher" / missing).unlink()
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and missing in line


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    write_model(folder / "teacher", vocab=len(WORDS) - 2)
    (line,) = faults(recipe_with(folder))
    assert f"at most {len(WORDS) - 2} tokens" in line and f"has {len(WORDS)}" in line


def test_a_student_needs_the_teachers_tokenizer_and_explicit_layers(folder):
    losses = {"logits": {}, "hidden": {"layers": "lineage"}}
    student = {"student__model": str(folder / "student"), "pruning": None}
    write_model(folder / "student", layers=2)
    (line,) = faults(recipe_with(folder, **student, distillation__losses=losses))
    assert line.startswith("distillation.losses.hidden.layers: got 'lineage'")
    losses["hidden"]["layers"] = "uniform"
    assert faults(recipe_with(folder, **student, distillation__losses=losses)) == []
    write_model(folder / "student", words=[*WORDS[:-1], "other"], layers=2)
    (line,) = faults(recipe_with(folder, **student, distillation__losses=losses))
    assert line.startswith("student.model: got ") and "tokenizer" in line


def test_a_regression_takes_only_mse_of_the_logits(folder):
    write_model(folder / "teacher", num_labels=1)
    write_rows(folder / "rows.csv", labels=("0.5", "1.5"))
    (line,) = faults(recipe_with(folder, data__task="regression"))
    assert line.startswith("distillation.losses.logits.divergence: got 'forward_kl'")
    losses = {"logits": {"divergence": "mse"}}
    assert faults(recipe_with(folder, data__task="regression", distillation__losses=losses)) == []


def test_a_full_disk_and_an_output_that_is_a_file_are_refused(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        (line,) = faults(recipe_with(folder))
    assert line.startswith("output_dir: got ") and "GB free" in line
    (folder / "run").write_text("")
    (line,) = faults(recipe_with(folder))
    assert line.startswith("output_dir: got ") and "can be written" in line


def test_a_masked_lm_recipe_for_text_passes(folder):
    write_model(folder / "teacher", head="masked-lm")
    (folder / "text.txt").write_text("\n\n".join(["the film", "not good", "the plot", "very bad"] * 10))
    losses = {"labels": {"weight": 2}, "logits": {"weight": 5}, "hidden": {"layers": "last", "distance": "cosine"}}
    changes = {"data": {"task": "text", "path": str(folder / "text.txt"), "max_length": 16}}
    assert faults(recipe_with(folder, **changes, pruning={"layers": [0, 2]}, distillation__losses=losses)) == []
