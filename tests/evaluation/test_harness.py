"""Scores of lm-evaluation-harness: those that a hand computation gives; unknown tasks and a missing package are told."""

import json
import random

import pytest
import torch
from builders.benchmarks import QUESTIONS, write_benchmark
from builders.causal import causal_model, word_tokenizer
from builders.recipes import write_decoder
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.evaluation import harness
from distill_llm.evaluation.harness import Benchmarks, BenchmarkScore, check_benchmarks, run_benchmarks, side_by_side
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan


@pytest.fixture
def benchmarks(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    return Benchmarks(("choose",), include_path=write_benchmark(tmp_path / "tasks"))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"evaluation.harness: got 'arc_easy'; .*pip install 'distill_llm\[harness\]'"):
        check_benchmarks(Benchmarks(("arc_easy",)), "evaluation.harness")


def answered_rightly(model, tokenizer):
    """1.0 for each question whose answer has the larger sum of log probabilities, else 0.0."""
    right = []
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            texts = row["question"], f"{row['question']} {choice}"
            prompt, ids = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            taken = logs.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(taken[prompt.shape[1] - 1 :].sum()))
        right.append(float(sums.index(max(sums)) == row["answer"]))
    return right


@pytest.mark.slow
def test_scores_of_an_uneven_student_are_those_of_a_hand_computation(benchmarks):
    check_benchmarks(benchmarks)
    whole, tokenizer = causal_model().eval(), word_tokenizer()
    plan = PruningPlan("llama", (LayerPlan(0, (0,), tuple(range(40))), LayerPlan(1, (0, 1), tuple(range(8)))))
    model = prune(whole, plan).eval()
    right = answered_rightly(model, tokenizer)
    rows, mean = len(right), sum(right) / len(right)
    error = (mean * (1 - mean) / (rows - 1)) ** 0.5  # sample standard deviation of 0s and 1s over the root of rows
    assert 0 < mean < 1
    torch.manual_seed(5), random.seed(5)
    before = torch.rand(1), random.random()
    torch.manual_seed(5), random.seed(5)
    (found,) = run_benchmarks(model, tokenizer, benchmarks, batch_size=4)
    assert (torch.rand(1), random.random()) == before
    assert found == BenchmarkScore("choose", "acc", pytest.approx(mean), pytest.approx(error), True, rows, 0)
    assert tokenizer.pad_token is None
    (few,) = run_benchmarks(model, tokenizer, Benchmarks(("choose",), 5, include_path=benchmarks.include_path), 4)
    assert few.rows == 5 and few.score == pytest.approx(sum(right[:5]) / 5)
    (row,) = side_by_side([few], [found])
    assert row["teacher"] == {"score": few.score, "standard_error": few.standard_error} and row["rows"] == rows


@pytest.mark.slow
def test_what_cannot_run_is_told_at_the_door(benchmarks, tmp_path):
    (benchmarks.include_path / "choose.jsonl").unlink()
    for given, words in (
        (Benchmarks(("arc_esy",)), "got 'arc_esy'; accepted: 'arc_easy' \\(the nearest\\)"),
        (Benchmarks(("x",), include_path=tmp_path / "none"), "include_path: got .*a folder with tasks"),
        (benchmarks, "got 'choose'; make its data reachable, or remove it"),
    ):
        with pytest.raises(InputError, match=words) as error:
            check_benchmarks(given, "evaluation.harness")
        assert str(error.value).startswith("evaluation.harness") and len(str(error.value)) <= 300


@pytest.mark.slow
def test_a_group_that_holds_another_named_task_is_told_at_the_door(benchmarks):
    (benchmarks.include_path / "group.yaml").write_text("group: both\ntask: [choose]\n")
    given = Benchmarks(("both", "choose"), include_path=benchmarks.include_path)
    with pytest.raises(InputError, match="got 'choose'; remove it, or both: both have the task choose"):
        check_benchmarks(given)


@pytest.mark.slow
def test_the_command_scores_a_model_by_benchmarks(benchmarks, tmp_path):
    write_decoder(tmp_path / "model", max_position_embeddings=64)
    words = ["evaluate", str(tmp_path / "model"), "--harness", "choose", "--output", str(tmp_path / "scores.json")]
    found = CliRunner().invoke(app, [*words, "--include-path", str(benchmarks.include_path), "--test-examples", "6"])
    assert found.exit_code == 0, found.output
    (row,) = json.loads((tmp_path / "scores.json").read_text())["harness"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), word_tokenizer()
    assert row["rows"] == 6 and row["score"] == pytest.approx(sum(answered_rightly(model, tokenizer)[:6]) / 6)


def test_either_a_task_or_benchmarks(tmp_path):
    for words in ([], ["--task", "sst2", "--harness", "arc_easy"]):
        found = CliRunner().invoke(app, ["evaluate", "model", *words, "--output", str(tmp_path / "scores.json")])
        assert found.exit_code == 2 and "give either a task, or --harness" in found.stderr
