"""Metrics of a run with known numbers, and a student's folder, for the tests of what is written about them."""

import copy
import json
from pathlib import Path
from typing import Any

METRICS: dict[str, Any] = {
    "task": "sst2",
    "metric": "accuracy",
    "higher_is_better": True,
    "device": "Test CPU, 2 threads",
    "teacher_model": "owner/teacher-model",
    "learned_from": "teacher",
    "teacher": {
        "dtype": "bfloat16",
        "score": 0.8,
        "params": 20_000_000,
        "layer_params": 10_000_000,
        "flops": 4_000_000_000,
        "latency_ms": 60.0,
        "peak_memory_mb": 120.0,
        "weights_mb": 80.0,
    },
    "student": {
        "dtype": "bfloat16",
        "score": 0.796,
        "params": 15_000_000,
        "layer_params": 5_000_000,
        "flops": 2_100_000_000,
        "latency_ms": 32.0,
        "peak_memory_mb": 90.0,
        "weights_mb": 60.0,
    },
    "retention": 0.995,
    "params_kept": 0.75,
    "layer_params_kept": 0.5,
    "speedup": 1.9,
    "speedup_min": 1.75,
    "speedup_max": 2.05,
    "rounds": [
        {
            "keep": 0.7,
            "score_pruned": 0.78,
            "score_compensated": 0.79,
            "score_recovered": 0.8,
            "layer_params_kept": 0.699,
            "seconds": {"statistics": 9.25, "recover": 185.0},
        },
        {
            "keep": 0.5,
            "score_pruned": 0.7,
            "score_compensated": 0.76,
            "score_recovered": 0.796,
            "layer_params_kept": 0.5,
            "seconds": {"statistics": 42.0, "recover": 7800.0},
        },
    ],
    "plan_layers": [
        {"source": 0, "heads": 3, "neurons": 40, "heads_of": 4, "neurons_of": 64},
        {"source": 2, "heads": 0, "neurons": 64, "heads_of": 4, "neurons_of": 64},
    ],
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "latency": {"batch_size": 32, "sequence_length": 64},
    "seconds": 420.0,
}


def metrics(**changes: Any) -> dict[str, Any]:
    """A fresh copy of METRICS with some keys replaced."""
    return {**copy.deepcopy(METRICS), **changes}


def student_folder(folder: Path, architecture: str = "BertForSequenceClassification", **config: Any) -> Path:
    """A folder that looks like a saved student, with weights of a few bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "bert", **config}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _side(score: float, params: float, latency: float) -> dict[str, Any]:
    return {"score": score, "standard_error": 0.01, "rows": 100, "params": params, "latency_ms": latency, "flops": 1e9}


def cell_metrics(score: float, params: float, latency: float) -> dict[str, Any]:
    """What a run in a sweep may have in metrics.json: a teacher of 4 million parameters, scored 0.8, with 100 ms a batch."""
    return {
        "task": "embedded",
        "metric": "accuracy",
        "higher_is_better": True,
        "device": "a CPU",
        "teacher_model": "me/teacher",
        "latency": {"batch_size": 2, "sequence_length": 8},
        "baselines": {},
        "versions": {},
        "teacher": _side(0.8, 4e6, 100),
        "student": _side(score, params, latency),
        "retention": score / 0.8,
        "params_kept": params / 4e6,
        "layer_params_kept": params / 4e6,
        "speedup": 100 / latency,
        "speedup_min": None,
        "speedup_max": None,
        "seconds": 1,
    }
