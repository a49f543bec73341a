"""Losses of distillation: pure functions of signals, and the objective that combines them.

The public names load on first use: an objective is read and checked without torch.

May import: common, architectures.
"""

from typing import TYPE_CHECKING

from distill_llm.common.lazy import lazy_names

if TYPE_CHECKING:
    from distill_llm.losses.attention import AttentionInputs as AttentionInputs
    from distill_llm.losses.attention import attention_distance as attention_distance
    from distill_llm.losses.hidden import hidden_distance as hidden_distance
    from distill_llm.losses.labels import label_loss as label_loss
    from distill_llm.losses.logits import logits_divergence as logits_divergence
    from distill_llm.losses.objective import Objective as Objective
    from distill_llm.losses.objective import parse_objective as parse_objective
    from distill_llm.losses.relations import relation_distance as relation_distance
    from distill_llm.losses.schedules import Schedule as Schedule
    from distill_llm.losses.terms.attention import AttentionLoss as AttentionLoss
    from distill_llm.losses.terms.embeddings import EmbeddingsLoss as EmbeddingsLoss
    from distill_llm.losses.terms.hidden import HiddenLoss as HiddenLoss
    from distill_llm.losses.terms.labels import LabelsLoss as LabelsLoss
    from distill_llm.losses.terms.logits import LogitsLoss as LogitsLoss
    from distill_llm.losses.terms.relations import RelationsLoss as RelationsLoss

__getattr__, __dir__, __all__ = lazy_names(  # the names above, which are for type checkers and editors
    __name__,
    {
        "attention": "AttentionInputs attention_distance",
        "hidden": "hidden_distance",
        "labels": "label_loss",
        "logits": "logits_divergence",
        "objective": "Objective parse_objective",
        "relations": "relation_distance",
        "schedules": "Schedule",
        "terms.attention": "AttentionLoss",
        "terms.embeddings": "EmbeddingsLoss",
        "terms.hidden": "HiddenLoss",
        "terms.labels": "LabelsLoss",
        "terms.logits": "LogitsLoss",
        "terms.relations": "RelationsLoss",
    },
)
