"""The numbers of a finished run, for metrics.json."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from platform import python_version
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.data.tasks import Task
from distill_llm.measuring.compressing import compressed_share
from distill_llm.measuring.counting import count_params, weights_memory
from distill_llm.measuring.grid import latency_grid
from distill_llm.measuring.profiling import MEGABYTE, Profile, compare
from distill_llm.models.masks import Masks
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.plans import kept_of
from distill_llm.report.tables import retention

VERSIONS = ("distill_llm", "torch", "transformers", "accelerate", "datasets")


def collect_metrics(
    recipe: Recipe,
    task: Task,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    teacher_result: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    quantized: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores, costs of teacher and student measured side by side on this device, and how much of every layer was kept.

    Args:
        quantized: the result of the stage `quantize`, where the student is the one that it made.
    """
    latency = recipe.evaluation.latency
    measured = compare(student, teacher, latency.batch_size, latency.sequence_length)
    points = latency_grid(student, teacher, measured) if recipe.report.latency_grid else []
    kept, channels = kept_of(_shapes(student) if quantized else student, teacher)
    sizes = zip(count_params(student), count_params(teacher), strict=True)
    kept_params, kept_in_layers = (ours / theirs for ours, theirs in sizes)
    last = rounds[-1]
    final = quantized["metrics"] if quantized else last.get("recovered") or last.get("compensated") or last["pruned"]
    return {
        "task": recipe.data.test.task if recipe.data.test is not None else recipe.data.task,
        "metric": task.main_metric,
        "higher_is_better": task.higher_is_better,
        "device": measured.model.device,
        "teacher_model": recipe.teacher.model,
        "learned_from": _source(recipe),
        "teacher": side_of(teacher, measured.other, teacher_result["metrics"]),
        "student": side_of(student, measured.model, final),
        "baselines": dict(teacher_result["baselines"]),
        "warnings": [teacher_result["warning"]] if teacher_result["warning"] else [],
        "retention": retention(final["score"], teacher_result["score"], task.higher_is_better),
        "params_kept": kept_params,
        "layer_params_kept": kept_in_layers,
        "speedup": measured.speedup,
        "speedup_min": measured.speedup_min,
        "speedup_max": measured.speedup_max,
        "latency": latency.model_dump(),
        "latency_grid": [asdict(point) for point in points],
        **{name: last[name] for name in ("augmented", "generations", "peers", "aligned") if name in last},
        **({"quantization": quantized["quantization"]} if quantized else {}),
        "rounds": [
            {name: value for name, value in row.items() if name not in ("generations", "peers")} for row in rounds
        ]
        if recipe.pruning is not None
        else [],
        "plan_layers": kept,
        "plan_hidden": channels,
        "seed": recipe.seed,
        "versions": {"python": python_version(), **{name: version(name) for name in VERSIONS}},
    }


def _shapes(model: PreTrainedModel) -> PreTrainedModel:
    """The model in full precision, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def stage_records(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The time of a run and of each of its stages, and the losses of those that trained (see `loss_history`)."""
    return {
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "stages": {name: result["seconds"] for name, result in results.items()},
        "history": {name: result["history"] for name, result in results.items() if result.get("history")},
    }


def sparsity_record(masks: Masks, teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, Any]:
    """What of a sparse student is zero, and what the weights of both take after compression, in MB."""
    sizes = {
        side: compressed_share(model) * weights_memory(model) / MEGABYTE
        for side, model in (("teacher", teacher), ("student", student))
    }
    return {
        "share": masks.sparsity,
        "weights": masks.weights,
        "zeros": masks.zeros,
        "pattern": masks.pattern,
        "criterion": masks.criterion,
        "compressed_mb": sizes,
    }


def taught_by(recipe: Recipe, learnt: Sequence[float] | None = None) -> dict[str, Any]:
    """What teaches in the place of the recipe's model, under its field; of an ensemble with weights that sum to 1, or with the
    rows of each.

    Args:
        learnt: the weights of an ensemble, where they are not the recipe's.
    """
    if (server := recipe.teacher.server) is not None:
        return {"served": {"model": server.model or recipe.teacher.model, "k": server.k}}
    if (average := recipe.teacher.moving_average) is not None:
        return {"moving_average": average.model_dump()}
    if (peers := recipe.teacher.peers) is not None:
        return {"learnt_with": {"peers": len(peers.others), "average": peers.average}}
    if (stages := recipe.teacher.checkpoints) is not None:
        return {"teacher_stages": stages if isinstance(stages, int) else len(stages)}
    if (assistant := recipe.teacher.assistant) is not None:
        return {"assistant": assistant.model_dump(), **_ensemble(recipe, learnt)}
    return _ensemble(recipe, learnt)


def _ensemble(recipe: Recipe, learnt: Sequence[float] | None) -> dict[str, Any]:
    """Under `ensemble`, the teachers of a recipe that has several."""
    section = recipe.teacher.ensemble
    if section is None:
        return {}
    names = [recipe.teacher.model, *(member.model for member in section.others)]
    if section.by_row:
        rows = [section.teaches, *(member.teaches for member in section.others)]
        both = zip(names, rows, strict=True)
        return {"ensemble": {"models": [{"model": name, "teaches": each} for name, each in both]}}
    given = section.weights if learnt is None else learnt
    weights = [weight / sum(given) for weight in given]
    models = [{"model": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
    return {"ensemble": {"average": section.average, "confidence": section.confidence, "models": models}}


def _source(recipe: Recipe) -> str | None:
    """What the student learned from: `teacher` (perhaps with labels), `labels` alone, or None."""
    if recipe.distillation is None:
        return None
    return "teacher" if recipe.distillation.losses.needs_teacher else "labels"


def side_of(model: PreTrainedModel, profile: Profile, scores: Mapping[str, float]) -> dict[str, Any]:
    """Scores and costs of a model."""
    return {
        "layers": model.config.num_hidden_layers,
        "dtype": profile.dtype,
        "score": scores["score"],
        "standard_error": scores.get("standard_error"),
        "rows": scores["rows"],
        "metrics": dict(scores),
        "params": profile.params,
        "layer_params": profile.layer_params,
        "flops": profile.flops,
        "latency_ms": profile.latency_ms,
        "weights_mb": profile.weights_mb,
        "peak_memory_mb": profile.peak_memory_mb,
    }
