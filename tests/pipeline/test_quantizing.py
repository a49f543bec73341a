"""Runs whose student ends in fewer bits: rounded after training, or learnt under rounding; stopped and gone on with."""

import json
from types import SimpleNamespace

import pytest
import torch
from builders.recipes import faults_at_the_door, recipe_for, write_model
from builders.runs import same, weights, write_learnable_rows
from transformers import AutoTokenizer

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.stages import stages_of
from distill_llm.quantizing.rounding import quantize
from distill_llm.quantizing.scheme import Scheme
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.training.trainer import DistillationTrainer

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-3, "use_cpu": True}


class Killed(BaseException):
    """Stands for the end of the process."""


def plain(model) -> dict[str, torch.Tensor]:
    """What a model's weights stand for, by name."""
    found = {name: each.detach() for name, each in model.named_parameters()}
    return {name: each if type(each) is torch.Tensor else each.dequantize() for name, each in found.items()}


@pytest.fixture
def given(tmp_path):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_learnable_rows(tmp_path / "rows.csv")
    return recipe_for(
        tmp_path,
        pruning={"keep": 0.5, "calibration_examples": 8, "round_to": 8},
        distillation={"losses": {"logits": {}, "hidden": {}}, **TRAINING},
    )


@pytest.mark.slow
def test_a_run_ends_with_a_rounded_student_and_says_what_that_costs_and_brings(given, tmp_path):
    folder, recipe = tmp_path / "run", {**given, "quantize": {"bits": 8, "activations": True, "smooth": 0.5}}
    result = distill_llm.run(recipe, folder)
    student, told = load_pretrained(folder / "student"), result.metrics["quantization"]
    kinds = {type(each).__name__ for each in student.parameters()}
    assert "Int8Tensor" in kinds and student.classifier.weight.dtype == torch.float32
    metrics = distill_llm.run(given, tmp_path / "float").metrics  # the same run, not rounded
    assert same(weights(tmp_path / "float/round-1/student"), weights(folder / "round-1/student"))
    assert told["before"]["score"] == metrics["student"]["score"]
    assert told["before"]["params"] == told["after"]["params"] == metrics["student"]["params"]
    float_bytes = sum(each.numel() * 4 for each in weights(tmp_path / "float/student").values())
    assert told["before"]["file_mb"] == pytest.approx(float_bytes / 1e6)
    assert told["after"]["file_mb"] == pytest.approx((folder / "student/model.safetensors").stat().st_size / 1e6)
    assert told["after"]["weights_mb"] < told["before"]["weights_mb"] and told["speedup"] > 0
    assert result.metrics["student"]["score"] == told["after"]["score"]
    for text in ((folder / "report.md").read_text(), (folder / "student/README.md").read_text()):
        assert "Fewer bits" in text and "weights on disk" in text and "smoothed with alpha 0.5" in text
        assert "recovered |" in text.split("## Fewer bits")[0] or "| quantized" in text
    page = (folder / "report.html").read_text()
    assert "Before and after quantization" in page and "and torchao" in page
    assert "needs torchao" in (folder / "student/README.md").read_text()
    assert distill_llm.run(recipe, folder).metrics == result.metrics  # nothing is done again

    other = {**given, "quantize": {"bits": 4, "group_size": 8}}
    before = weights(folder / "round-1/student")
    again = distill_llm.run(other, folder).metrics  # another scheme trains nothing anew
    assert "4 bits" in again["quantization"]["scheme"] and same(before, weights(folder / "round-1/student"))
    assert json.loads((folder / "state.json").read_text())["stages"]["quantize"]["quantization"]["scheme"] in (
        folder / "report.md"
    ).read_text().replace("Weights in 4", "weights in 4")
    plain = distill_llm.run(given, folder)  # and without the section the student is whole again
    assert "quantization" not in plain.metrics and same(
        weights(folder / "student"), weights(tmp_path / "float/student")
    )


@pytest.mark.slow
def test_a_student_learns_under_rounding_and_a_stopped_training_goes_on_to_equal_bits(given, tmp_path, monkeypatch):
    scheme = Scheme(4, group_size=8)
    recipe = {**given, "quantize": {"bits": 4, "group_size": 8, "train": {"max_steps": 8}}}
    distill_llm.run(recipe, tmp_path / "whole")
    folder, step, left = tmp_path / "stopped", DistillationTrainer.training_step, [6 + 5]

    def killed(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillationTrainer, "training_step", killed)
        distill_llm.run(recipe, folder)
    assert "quantize/train" not in json.loads((folder / "state.json").read_text())["stages"]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", lambda *a, **k: (seen.append(1), step(*a, **k))[1])
        result = distill_llm.run(recipe, folder)
    assert len(seen) == 4  # from the checkpoint of the fourth step
    assert not list((folder / "quantize").glob("*-training"))
    for name in ("quantize/student", "student"):
        assert same(weights(tmp_path / "whole" / name), weights(folder / name)), name

    learnt, before = load_pretrained(folder / "quantize/student"), load_pretrained(folder / "round-1/student")
    assert not torch.equal(learnt.classifier.weight, before.classifier.weight)
    final = plain(
        load_pretrained(folder / "student")
    )  # weights, not logits: products of memory-mapped ones differ in last bits
    assert same(final, plain(quantize(learnt, scheme))) and not same(final, plain(quantize(before, scheme)))
    assert result.metrics["quantization"]["trained"] and "quantize/train" in result.metrics["history"]
    assert "as if rounded already" in (folder / "report.md").read_text()
    assert result.metrics["quantization"]["before"]["score"] == pytest.approx(
        result.metrics["rounds"][-1]["score_recovered"]
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quantize": {"bits": 4, "symmetric": False, "train": {}}}, "quantize.train: got 'symmetric: false'"),
        ({"quantize": {"bits": 8, "smooth": 0.5}}, "quantize.smooth: got 0.5; remove it"),
        ({"quantize": {"bits": 8, "train": {}}, "distillation": None}, "quantize.train: got {}; add a distillation"),
        (
            {"quantize": {"bits": 8, "train": {}}, "student": {"peft": {"r": 2}}},
            "quantize.train: got {}; remove it, or s",
        ),
        (
            {"quantize": {"bits": 8, "train": {}}, "teacher": {"model": "it", "checkpoints": {0: "a", 3: "b"}}},
            "quantize.train: got {}; remove it, or teacher.checkpoints: ",
        ),
        (
            {"quantize": {"bits": 8, "train": {}}, "teacher": {"model": "it", "moving_average": {}}},
            "quantize.train: got {}; remove it, or teacher.moving_average: ",
        ),
        ({"quantize": {"bits": 8}, "export": [{"format": "onnx"}]}, "export: got 'onnx'; remove it, or the quantize"),
        ({"quantize": {"bits": 5}}, "quantize.bits: got 5; accepted: 8 or 4"),
        ({"quantize": {"bits": 8, "train": {"learning_rte": 1}}}, "quantize.train.learning_rte: "),
    ],
)
def test_what_does_not_go_together_is_a_line_of_the_recipe(tmp_path, changes, line):
    with pytest.raises(InputError) as error:
        parse_recipe(recipe_for(tmp_path, **changes))
    assert str(error.value).startswith(line) and len(str(error.value)) <= 300, str(error.value)


def test_learning_under_rounding_reads_the_weights_that_several_teachers_have_learnt(tmp_path):
    teacher = {"model": "it", "ensemble": {"others": [{"model": "other"}], "learn_weights": True}}
    quantize = {"bits": 8, "train": {}}
    recipe = parse_recipe(recipe_for(tmp_path, teacher=teacher, quantize=quantize))
    stages = {
        stage.name: stage for stage in stages_of(SimpleNamespace(recipe=recipe, folder=tmp_path, teacher_path="it"))
    }
    assert [each.name for each in stages["quantize/train"].inputs] == ["teacher", "round-1/recover", "ensemble"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"quantize": {"bits": 4, "group_size": 8}, "pruning": {"keep": 0.5}},
            "quantize.group_size: got 8; set pruning.r",
        ),
        (
            {"quantize": {"bits": 4, "group_size": 16}, "pruning": {"keep": 0.5, "round_to": 16}},
            "quantize.group_size: got 16; take a size that divides 8",
        ),
        ({"quantize": {"bits": 4, "group_size": 5}, "pruning": {"layers": [0, 1]}}, "quantize.group_size: got 5; take"),
        ({"quantize": {"bits": 8, "train": {"optim": "none"}}}, "quantize.train.optim: got 'none'"),
    ],
)
def test_what_the_student_will_not_take_is_a_line_at_the_door(given, changes, line):
    faults = faults_at_the_door(parse_recipe({**given, **changes}))
    assert len(faults) == 1 and faults[0].startswith(line), faults


@pytest.mark.slow
def test_a_rounded_model_is_no_student_that_learns(given, tmp_path):
    quantize(load_pretrained(tmp_path / "teacher"), Scheme(8)).save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "rounded")
    changes = {"pruning": None, "student": {"model": str(tmp_path / "rounded")}}
    changes["distillation"] = {"losses": {"logits": {}}, **TRAINING}
    [fault] = faults_at_the_door(parse_recipe({**given, **changes}))
    assert fault.startswith("student.model: got '") and "rounded weights cannot learn" in fault
