"""Runs taught by checkpoints of the teacher, or by the student of the round before."""

import re

import pytest
import torch
import yaml
from builders.recipes import faults_at_the_door, recipe_for, write_model
from builders.runs import same, weights
from builders.stops import LOSSES, TRAINING, stopped_and_resumed, teacher_and_rows

import distill_llm
from distill_llm.common.errors import InputError, faults_in
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import Ensemble
from distill_llm.training.trainer import DistillationTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return teacher_and_rows(tmp_path_factory.mktemp("stages"))


def given(folder, losses=LOSSES, pruning=None, **teacher):
    teacher = {"model": str(folder / "teacher"), **teacher}
    pruning = {"keep": 0.5, "calibration_examples": 8, **(pruning or {})}
    return recipe_for(folder, teacher=teacher, pruning=pruning, distillation={"losses": losses, **TRAINING})


def test_the_runs_own_teacher_is_kept_at_stages_of_its_training_and_teaches_by_them(folder, monkeypatch):
    recipe = given(folder, train=TRAINING, checkpoints=4)
    out = folder / "own"
    seen, taken = [], DistillationTrainer.training_step

    def watched(trainer, *args, **kwargs):
        loss = taken(trainer, *args, **kwargs)
        if trainer.teacher is None:
            seen.append({name: each.detach().clone() for name, each in trainer.model.state_dict().items()})
        else:
            taught.append({name: each.detach().clone() for name, each in trainer.teacher.model.state_dict().items()})
        return loss

    taught: list = []
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", watched)
        found = distill_llm.run(recipe, out)
    stages = [*(out / "teacher-stages" / str(number) for number in (1, 2, 3)), out / "teacher"]
    for number in (1, 2, 3):  # after its n-th step, which is what the next step begins with
        assert all(
            torch.equal(each, seen[number][name])
            for name, each in load_pretrained(stages[number - 1]).state_dict().items()
        )
    for stage, held in zip(stages, taught, strict=True):
        assert all(torch.equal(each, held[name]) for name, each in load_pretrained(stage).state_dict().items()), stage
    words = "The student learnt from 4 checkpoints of the teacher, one after the other."
    assert words in found.report.read_text()

    for step in (3, 7):  # in the teacher's training, and in the student's
        other = folder / f"own-stopped-{step}"
        stopped_and_resumed(recipe, other, monkeypatch, step)
        for path in (*stages, out / "student"):
            assert same(weights(path), weights(other / path.relative_to(out))), path


def test_named_checkpoints_teach_by_step_and_a_run_goes_on_with_the_same_ones_only(folder, monkeypatch):
    for seed in (5, 6):
        write_model(folder / f"early-{seed}", max_position_embeddings=64, seed=seed)
    starts = {0: str(folder / "early-5"), 0.5: str(folder / "early-6"), 3: str(folder / "teacher")}
    recipe = given(folder, {**LOSSES, "hidden": {}}, checkpoints=starts)
    distill_llm.run(recipe, folder / "named")
    stopped_and_resumed(recipe, folder / "named-stopped", monkeypatch, 3)
    students = [weights(folder / name / "student") for name in ("named", "named-stopped")]
    assert same(*students)
    distill_llm.run(given(folder, {**LOSSES, "hidden": {}}), folder / "plain")
    assert not same(students[0], weights(folder / "plain" / "student"))
    write_model(folder / "early-6", max_position_embeddings=64, seed=9)
    with pytest.raises(InputError, match=r"^teacher.checkpoints.0.5: got '.*early-6'; .*since this run began"):
        distill_llm.run(recipe, folder / "named")


def test_checkpoints_that_do_not_fit_are_refused_at_the_door(folder):
    write_model(folder / "deeper", max_position_embeddings=64, layers=5)
    faults = faults_at_the_door(parse_recipe(given(folder, checkpoints={0: str(folder / "deeper")})))
    assert len(faults) == 1 and faults[0].startswith("teacher.checkpoints.0: got "), faults
    assert "weights of the teacher's own shapes" in faults[0]
    names = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    write_model(folder / "turned", max_position_embeddings=64, **names)
    faults = faults_at_the_door(parse_recipe(given(folder, checkpoints={2: str(folder / "turned")})))
    assert len(faults) == 1 and "labels ['neg', 'pos'], in this order" in faults[0], faults


@pytest.mark.parametrize(
    "teacher, words",
    [
        ({"checkpoints": {-1: "a"}}, "teacher.checkpoints: got -1; accepted: whole numbers of steps, or shares"),
        ({"checkpoints": {1.0: "a"}}, "teacher.checkpoints: got 1.0; "),
        ({"checkpoints": {"early": "a"}}, "teacher.checkpoints: got 'early'; "),
        ({"checkpoints": {}}, "teacher.checkpoints: got {}; "),
        ({"checkpoints": 1}, "teacher.checkpoints: got 1; "),
        ({"checkpoints": 4}, "teacher.checkpoints: got 4; give a mapping of steps to folders, or teacher.train"),
        (
            {"checkpoints": {0: "a"}, "quantization": "8bit"},
            "teacher.quantization: got '8bit'; remove it, or remove teacher.checkpoints",
        ),
        (
            {"assistant": True},
            "teacher.assistant: got {'share': 0.5, 'average': 'probabilities'}; remove it, or set pruning.rounds",
        ),
        ({"assistant": {"share": 0}}, "teacher.assistant.share: got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(folder, teacher, words):
    with pytest.raises(InputError) as error:
        parse_recipe(given(folder, **teacher))
    faults = [str(fault) for fault in faults_in(error.value)]
    assert any(fault.startswith(words) for fault in faults), faults
    assert all("\n" not in fault and len(fault) <= 300 for fault in faults)


def test_the_examples_and_keys_survive_the_resolved_recipe(folder):
    recipe = parse_recipe(given(folder, checkpoints={0: "a", 0.5: "b", 1000: "c"}))
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe and list(again.teacher.checkpoints) == [0, 0.5, 1000]


@pytest.mark.parametrize("share", [0.25, 1])
def test_the_student_of_the_round_before_teaches_with_its_share(folder, monkeypatch, share):
    recipe = given(folder, {**LOSSES, "hidden": {}}, {"rounds": 2}, assistant={"share": share})
    out = folder / f"assisted-{share}"
    found = distill_llm.run(recipe, out)
    stopped_and_resumed(recipe, folder / f"assisted-stopped-{share}", monkeypatch, 7)
    assert same(weights(out / "student"), weights(folder / f"assisted-stopped-{share}" / "student"))

    def source(stage, weights=None):
        teacher, path = load_pretrained(folder / "teacher"), out / "round-1" / "student"
        if stage.round == 1:
            return teacher
        return load_pretrained(path) if share == 1 else Ensemble([teacher, load_pretrained(path)], [0.75, 0.25])

    plain = {**recipe, "teacher": {"model": str(folder / "teacher")}}
    with monkeypatch.context() as patch:
        patch.setattr(Recover, "source", source)
        distill_llm.run(plain, folder / f"by-hand-{share}")
    assert same(weights(out / "student"), weights(folder / f"by-hand-{share}" / "student"))
    distill_llm.run(plain, folder / f"alone-{share}")
    assert not same(weights(out / "student"), weights(folder / f"alone-{share}" / "student"))
    words = "alone" if share == 1 else "with a share of 0.25"
    text = re.sub(r"\s+", " ", found.report.read_text())
    assert f"learnt from the second round on from the student of the round before, {words}." in text
