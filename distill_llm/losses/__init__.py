"""Losses of distillation: pure functions of signals, and the objective that combines them.

The public names load on first use: an objective is read and checked without torch.

May import: common, architectures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.losses.attention import AttentionInputs, attention_distance
    from distill_llm.losses.hidden import hidden_distance
    from distill_llm.losses.labels import label_loss
    from distill_llm.losses.logits import logits_divergence
    from distill_llm.losses.objective import Objective, parse_objective
    from distill_llm.losses.relations import relation_distance
    from distill_llm.losses.schedules import Schedule
    from distill_llm.losses.terms.attention import AttentionLoss
    from distill_llm.losses.terms.embeddings import EmbeddingsLoss
    from distill_llm.losses.terms.hidden import HiddenLoss
    from distill_llm.losses.terms.labels import LabelsLoss
    from distill_llm.losses.terms.logits import LogitsLoss
    from distill_llm.losses.terms.relations import RelationsLoss

_HOMES = {
    "AttentionInputs": "attention",
    "attention_distance": "attention",
    "hidden_distance": "hidden",
    "label_loss": "labels",
    "logits_divergence": "logits",
    "AttentionLoss": "terms.attention",
    "EmbeddingsLoss": "terms.embeddings",
    "HiddenLoss": "terms.hidden",
    "LabelsLoss": "terms.labels",
    "LogitsLoss": "terms.logits",
    "Objective": "objective",
    "RelationsLoss": "terms.relations",
    "parse_objective": "objective",
    "relation_distance": "relations",
    "Schedule": "schedules",
}

__all__ = [
    "AttentionInputs",
    "AttentionLoss",
    "EmbeddingsLoss",
    "HiddenLoss",
    "LabelsLoss",
    "LogitsLoss",
    "Objective",
    "RelationsLoss",
    "Schedule",
    "attention_distance",
    "hidden_distance",
    "label_loss",
    "logits_divergence",
    "parse_objective",
    "relation_distance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
