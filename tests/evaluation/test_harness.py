"""Scores of lm-evaluation-harness: those that a hand computation gives; unknown tasks and a missing package are told."""

import random

import pytest
import torch
from builders.benchmarks import QUESTIONS, write_benchmark
from builders.causal import causal_model, word_tokenizer

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


@pytest.mark.slow
def test_scores_of_an_uneven_student_are_those_of_a_hand_computation(benchmarks):
    check_benchmarks(benchmarks)
    whole, tokenizer = causal_model().eval(), word_tokenizer()
    plan = PruningPlan("llama", (LayerPlan(0, (0,), tuple(range(40))), LayerPlan(1, (0, 1), tuple(range(8)))))
    model = prune(whole, plan).eval()
    right = []
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            prompt, ids = (
                tokenizer(text, return_tensors="pt").input_ids
                for text in (row["question"], f"{row['question']} {choice}")
            )
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            taken = logs.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(taken[prompt.shape[1] - 1 :].sum()))
        right.append(float(sums.index(max(sums)) == row["answer"]))
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
