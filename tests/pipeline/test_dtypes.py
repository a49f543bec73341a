"""In which precision a run scores, measures and writes its models."""

import copy
import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from builders.causal import causal_model, word_tokenizer, words
from builders.grids import slow
from builders.recipes import recipe_for, write_model, write_rows
from builders.runs import same, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import distill_llm
from distill_llm.checks.recipe import open_recipe
from distill_llm.common.finite import NotFinite
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.run import prune_recipe
from distill_llm.recipe.recipe import parse_recipe

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
DISTILLATION = {"losses": {"logits": {}}, **TRAINING}
PRUNING = {"keep": 0.6, "calibration_examples": 8}


def write_teacher(folder: Path, dtype: torch.dtype, **config) -> str:
    """A tiny decoder with its tokenizer, saved in this dtype."""
    causal_model(**config).to(dtype).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, dtype: torch.dtype, **sections) -> dict:
    """A recipe on random text for a teacher in this dtype."""
    random = Random(0)
    (folder / "text").mkdir(exist_ok=True)
    for split, count in (("train", 24), ("test", 8)):
        lines = [words(*random.choices(range(90), k=16)) for _ in range(count)]
        (folder / "text" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return {
        "teacher": {"model": write_teacher(folder / "teacher", dtype)},
        "data": {"task": "text", "path": str(folder / "text"), "max_length": 16},
        "pruning": PRUNING,
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
        "output_dir": str(folder / "run"),
        **sections,
    }


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in weights(folder).values()}


def score(given: dict, model: Path, **options) -> float:
    """What a model scores as anyone loads it."""
    opened = open_recipe(parse_recipe({**given, "output_dir": str(model.parent / "nothing")}))
    return Context(opened).evaluate(distill_llm.load_pretrained(model, **options))["score"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)], ids=str)
def test_a_student_is_written_scored_and_measured_in_the_dtype_of_its_teachers_checkpoint(tmp_path, dtype):
    given = recipe(tmp_path, dtype, distillation=DISTILLATION)
    result, run = distill_llm.run(given), tmp_path / "run"
    for name in ("round-1/pruned", "round-1/student"):
        assert dtypes(run / name) == {torch.float32}, "what another round would work on"
    student, last = weights(run / "student"), weights(run / "round-1" / "student")
    assert same(student, {name: tensor.to(dtype) for name, tensor in last.items()})
    loaded = distill_llm.load_pretrained(run / "student")
    remote = AutoModelForCausalLM.from_pretrained(run / "student", trust_remote_code=True)
    assert same(loaded.state_dict(), student) and same(remote.state_dict(), student)
    name = str(dtype).removeprefix("torch.")
    for side, folder in (("teacher", tmp_path / "teacher"), ("student", run / "student")):
        found = result.metrics[side]
        assert found["dtype"] == name and found["score"] == score(given, folder)
        buffers = sum(buffer.nbytes for buffer in distill_llm.load_pretrained(folder).buffers())
        assert found["weights_mb"] == pytest.approx((sum(t.nbytes for t in weights(folder).values()) + buffers) / 1e6)
    exact = score(given, run / "round-1" / "student", dtype=torch.float32)
    assert (result.metrics["student"]["score"] == exact) == (dtype == torch.float32), "else a cast shows"
    for file in (result.report, run / "student" / "README.md"):
        assert f"Models were scored and measured with weights in {name}." in file.read_text()


@pytest.mark.parametrize("compensate", [True, *slow(False)])
def test_the_score_of_a_student_that_a_run_only_prunes_is_of_what_is_written(tmp_path, compensate):
    given = recipe(tmp_path, torch.bfloat16, pruning={**PRUNING, "compensate": compensate})
    result = distill_llm.run(given)
    assert dtypes(result.student_dir) == {torch.bfloat16}
    assert result.metrics["student"]["score"] == score(given, result.student_dir)


def test_pruning_alone_writes_and_scores_in_the_dtype_of_the_checkpoint(tmp_path, capsys):
    given = recipe(tmp_path, torch.bfloat16)
    out = prune_recipe(parse_recipe(given))
    assert dtypes(out) == {torch.bfloat16} and (out / "plan.json").is_file()
    scores = [f"{score(given, folder):.4f}" for folder in (tmp_path / "teacher", out)]
    assert re.search(rf"perplexity {scores[0]} ± \S+ -> {scores[1]} ± \S+ on 8 rows", capsys.readouterr().out)


def test_a_given_student_keeps_the_dtype_of_its_own_checkpoint_and_the_report_names_both(tmp_path):
    student = write_teacher(tmp_path / "small", torch.float16, num_hidden_layers=1)
    alone = {"pruning": None, "student": {"model": student}, "distillation": DISTILLATION}
    given = recipe(tmp_path, torch.float32, **alone)
    result = distill_llm.run(given)
    before = weights(result.student_dir)
    assert dtypes(result.student_dir) == {torch.float16}
    assert [result.metrics[side]["dtype"] for side in ("teacher", "student")] == ["float32", "float16"]
    assert result.metrics["teacher"]["score"] == score(given, tmp_path / "teacher")
    line = "Models were scored and measured with weights in float32 (teacher) and float16 (student)."
    assert line in result.report.read_text()
    again = distill_llm.run({**given, "evaluation": {"latency": {"batch_size": 1, "sequence_length": 4}}})
    assert again.metrics["latency"]["batch_size"] == 1, "a report made anew"
    assert same(weights(again.student_dir), before)


def test_a_teacher_that_is_fine_tuned_here_is_kept_in_float32_and_measured_in_the_dtype_it_came_in(tmp_path):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    given = recipe_for(
        tmp_path, teacher={"model": str(tmp_path / "teacher"), "train": TRAINING}, distillation=DISTILLATION
    )
    result = distill_llm.run(given)
    assert dtypes(tmp_path / "run" / "teacher") == {torch.float32} != dtypes(result.student_dir) == {torch.bfloat16}
    assert {result.metrics[side]["dtype"] for side in ("teacher", "student")} == {"bfloat16"}


def test_a_checkpoint_whose_config_names_no_dtype_gives_a_student_in_float32(tmp_path):
    given = recipe(tmp_path, torch.bfloat16)
    assert Context(open_recipe(parse_recipe(given))).student_dtype == torch.bfloat16
    file = tmp_path / "teacher" / "config.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "dtype"})
    )
    assert Context(open_recipe(parse_recipe(given))).student_dtype == torch.float32


def test_a_student_with_a_weight_beyond_its_dtype_is_not_written(tmp_path):
    """The largest finite number of float16 is 65504."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    run = Context(open_recipe(parse_recipe(recipe_for(tmp_path))))
    model = distill_llm.load_pretrained(tmp_path / "teacher")
    for value in (65504.0, 70000.0):
        model.classifier.weight.data[0, 0] = value
        half, folder = copy.deepcopy(model).half(), tmp_path / str(value)
        if value < 65505:
            run.save(half, folder)
            assert weights(folder)["classifier.weight"][0, 0] == value
            continue
        with pytest.raises(
            NotFinite, match=r"^a weight is inf in classifier\.weight; nothing was saved: work in float32"
        ):
            run.save(half, folder)
        assert not folder.exists()
