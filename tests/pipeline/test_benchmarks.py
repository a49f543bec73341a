"""Benchmarks of a recipe: refused at the door where they cannot be run, scored at the end, added to a run that is done."""

import json

import pytest
from builders.benchmarks import QUESTIONS, write_benchmark
from builders.recipes import causal_recipe, faults_at_the_door, recipe_with, write_decoder, write_model, write_rows
from builders.runs import same, weights

import distill_llm
from distill_llm.evaluation.harness import run_benchmarks
from distill_llm.pipeline.stages import benchmarks, report


def test_benchmarks_are_for_decoders(tmp_path):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_rows(tmp_path / "rows.csv")
    (line,) = faults_at_the_door(recipe_with(tmp_path, evaluation__harness=["arc_easy"]))
    assert line.startswith("evaluation.harness: got 'arc_easy'; remove it: ")


@pytest.mark.slow
def test_teacher_and_student_are_scored_at_the_end_or_in_a_run_that_is_done(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    write_decoder(tmp_path / "teacher", max_position_embeddings=64)
    changes = {"student": None, "pruning": {"keep": 0.5, "calibration_examples": 8}, "distillation": None}
    evaluation = {"latency": {"batch_size": 1, "sequence_length": 8}}
    before = distill_llm.run(causal_recipe(tmp_path, **changes, evaluation=evaluation))
    assert "harness" not in before.metrics
    student = weights(before.student_dir)
    harness = {"tasks": ["choose"], "limit": 6, "include_path": str(write_benchmark(tmp_path / "tasks"))}
    recipe = causal_recipe(tmp_path, **changes, evaluation={**evaluation, "harness": harness})
    after = distill_llm.run(recipe)
    assert same(student, weights(after.student_dir))
    (row,) = after.metrics["harness"]
    assert (row["task"], row["metric"], row["rows"], row["shots"]) == ("choose", "acc", 6, 0) and len(QUESTIONS) > 6
    assert row == json.loads((tmp_path / "run" / "metrics.json").read_text())["harness"][0]
    for side in ("teacher", "student"):
        shown = f"{row[side]['score']:.4f} ± {row[side]['standard_error']:.4f}"
        for file in (after.report, after.student_dir / "README.md"):
            assert shown in file.read_text() and "lm-evaluation-harness" in file.read_text()


@pytest.mark.slow
def test_in_a_sweep_the_teacher_is_scored_once(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    scored = []
    for module in (benchmarks, report):
        real = run_benchmarks
        monkeypatch.setattr(
            module, "run_benchmarks", lambda model, *a, _real=real: (scored.append(1), _real(model, *a))[1]
        )
    write_decoder(tmp_path / "teacher", max_position_embeddings=64)
    harness = {"tasks": ["choose"], "include_path": str(write_benchmark(tmp_path / "tasks"))}
    evaluation = {"latency": {"batch_size": 1, "sequence_length": 8}, "harness": harness}
    changes = {"student": None, "pruning": {"keep": 0.5, "calibration_examples": 8}, "distillation": None}
    found = distill_llm.sweep(causal_recipe(tmp_path, **changes, evaluation=evaluation), keep=[0.7, 0.5])
    rows = [cell.metrics["harness"][0] for cell in found.cells]
    assert len(scored) == 3 and rows[0]["teacher"] == rows[1]["teacher"]
