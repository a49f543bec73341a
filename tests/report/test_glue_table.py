"""GLUE's table: each task by the metrics that GLUE reports, and an average that says what it is of."""

import pytest

from distill_llm.data.glue import GLUE
from distill_llm.report.glue import average_line, glue_record, glue_table

METRICS = {
    "cola": {"matthews_correlation": 0.5, "accuracy": 0.8},
    "sst2": {"accuracy": 0.9, "standard_error": 0.01},
    "mrpc": {"f1": 0.88, "accuracy": 0.84},
    "stsb": {"pearsonr": 0.86, "spearmanr": 0.85},
    "qqp": {"f1": 0.87, "accuracy": 0.91},
    "mnli": {"accuracy": 0.82},
    "qnli": {"accuracy": 0.89},
    "rte": {"accuracy": 0.6},
    "wnli": {"accuracy": 0.56},
}
RESULTS = {name: {"metrics": {**each, "rows": 100}} for name, each in METRICS.items()}
RESULTS["mnli"]["mismatched"] = {"accuracy": 0.84, "rows": 90}
BY_HAND = {
    "cola": 0.5,
    "sst2": 0.9,
    "mrpc": 0.86,
    "stsb": 0.855,
    "qqp": 0.89,
    "mnli": 0.83,
    "qnli": 0.89,
    "rte": 0.6,
    "wnli": 0.56,
}


def test_a_task_counts_by_the_mean_of_its_metrics_and_the_average_is_over_tasks():
    record = glue_record(["m"], RESULTS)
    assert {name: each["score"] for name, each in record["tasks"].items()} == pytest.approx(BY_HAND)
    assert record["average"] == pytest.approx(sum(BY_HAND.values()) / 9) and record["missing"] == []
    assert record["average_without_wnli"] == pytest.approx((sum(BY_HAND.values()) - 0.56) / 8)
    lines = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]]
        for line in glue_table(record).splitlines()
    }
    assert lines["MNLI"] == ["m/mm", "82.0/84.0", "–", "100/90"] and lines["CoLA"][:2] == ["Matthews", "50.0"]
    assert lines["MRPC"][:2] == ["F1/acc", "88.0/84.0"] and lines["STS-B"][:2] == ["Pearson/Spearman", "86.0/85.0"]
    assert lines["SST-2"] == ["acc", "90.0", "1.0", "100"]
    assert average_line(record).startswith("GLUE average: 76.5; without WNLI: 79.1.")


def test_the_average_is_the_leaderboards():
    """BERT-large on GLUE's leaderboard: its average of 80.5 takes MNLI's two parts for one task, and holds WNLI."""
    listed = {
        "cola": (60.5,), "sst2": (94.9,), "mrpc": (89.3, 85.4), "stsb": (87.6, 86.5), "qqp": (72.1, 89.3),
        "mnli": (86.7,), "qnli": (92.7,), "rte": (70.1,), "wnli": (65.1,),
    }  # fmt: skip
    results = {
        name: {
            "metrics": dict(
                zip([metric for metric in METRICS[name] if metric != "standard_error"], scores, strict=False), rows=9
            )
        }
        for name, scores in listed.items()
    }
    results["mnli"]["mismatched"] = {"accuracy": 85.9, "rows": 9}
    assert round(glue_record(["bert"], results)["average"], 1) == 80.5


def test_missing_tasks_are_said():
    half = {**RESULTS, "mnli": {"metrics": METRICS["mnli"]}}
    line = average_line(glue_record(["m"], half))
    assert "not GLUE's average: MNLI's mismatched part is missing" in line
    record = glue_record(["m"], {name: RESULTS[name] for name in ("cola", "sst2")})
    line = average_line(record)
    assert (
        line.startswith("Average of 2 of the 9 tasks: 70.0. This is not GLUE's average: MRPC, STS-B")
        and "are missing" in line
    )
    assert record["missing"] == [name for name in GLUE if name not in ("cola", "sst2")]
    assert "| MNLI  |" in glue_table(record)
