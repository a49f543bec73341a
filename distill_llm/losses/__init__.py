"""Losses of distillation: pure functions of signals, and the objective that combines them."""

from distill_llm.losses.attention import AttentionInputs, attention_distance
from distill_llm.losses.hidden import hidden_distance
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.objective import (
    AttentionLoss,
    HiddenLoss,
    LabelsLoss,
    LogitsLoss,
    Objective,
    parse_objective,
)

__all__ = [
    "AttentionInputs",
    "AttentionLoss",
    "HiddenLoss",
    "LabelsLoss",
    "LogitsLoss",
    "Objective",
    "attention_distance",
    "hidden_distance",
    "label_loss",
    "logits_divergence",
    "parse_objective",
]
