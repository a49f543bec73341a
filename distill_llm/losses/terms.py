"""An objective bound to a student and a teacher: which layers to record, and the sum of every term over a batch."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.capture import Signals
from distill_llm.errors import InputError
from distill_llm.losses.attention import attention_distance
from distill_llm.losses.hidden import hidden_distance
from distill_llm.losses.items import Unit
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.mapping import LayerPair, attention_pairs, hidden_pairs, relative_lineage
from distill_llm.losses.objective import LogitsLoss, Objective
from distill_llm.pruning.modeling_pruned import layers_of, lineage_of


@dataclass(frozen=True)
class Term:
    """The sum of a loss over the items of a batch, and what an item is: the sum is divided by their number."""

    total: torch.Tensor
    unit: Unit


def per_token(model: PreTrainedModel) -> bool:
    """Whether the model's head gives an output per token (masked LM, token classification), not per example."""
    return type(model).__name__.endswith(("ForMaskedLM", "ForTokenClassification"))


class Terms:
    """Computes the terms of an objective for one student and one teacher.

    Args:
        objective: which terms.
        student, teacher: the models; `teacher` may be None where the objective does not need one.
        smoothing: label smoothing.
        classes: compare logits over the first `classes` entries only (vocabularies of padded sizes); None: all.
        seed: of the projections' first weights.
        precision: what the projections multiply in, as mixed precision has it for the student; None: their own.

    Attributes:
        hidden, attention: the layer pairs that are compared.
        projections: learned bias-free maps from the student's width to the teacher's, by layer pair; empty where the
            widths agree. They belong to the loss, not to the student.

    Raises:
        InputError: layers that do not exist, a lineage that is missing.
    """

    def __init__(
        self,
        objective: Objective,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        smoothing: float = 0.0,
        classes: int | None = None,
        seed: int = 0,
        precision: torch.dtype | None = None,
    ):
        self.precision = precision
        self.objective, self.smoothing, self.classes = objective, smoothing, classes
        self.per_token = per_token(student)
        self.hidden: list[LayerPair] = []
        self.attention: list[LayerPair] = []
        self.projections = nn.ModuleDict()
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        if teacher is None or not (objective.hidden or objective.attention):
            return
        lineage, original = lineage_of(student), lineage_of(teacher)
        if lineage is not None and original is not None:
            lineage = relative_lineage(lineage, original)
        counts = len(layers_of(student)), len(layers_of(teacher))
        if objective.hidden:
            self.hidden = hidden_pairs(objective.hidden.layers, *counts, lineage)
            self._project(student.config.hidden_size, teacher.config.hidden_size, seed)
        if objective.attention:
            pairs = attention_pairs(objective.attention.layers, *counts, lineage)
            self.attention = [pair for pair in pairs if original is None or original[pair.teacher].heads]

    def _project(self, student_width: int, teacher_width: int, seed: int) -> None:
        if student_width == teacher_width:
            return
        generator = torch.Generator().manual_seed(seed)
        for pair in self.hidden:
            linear = torch.nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
            nn.init.normal_(linear.weight, std=student_width**-0.5, generator=generator)
            self.projections[_name(pair)] = linear

    def __call__(
        self, student: Signals, teacher: Signals | None, labels: torch.Tensor | None, valid: torch.Tensor
    ) -> dict[str, Term]:
        """The terms of one batch.

        Args:
            student: of the training forward; logits (B, C) for one output per example, (items, V) for one per token.
            teacher: of the same batch; None where the objective does not need it.
            labels: (B,) or (items,) as the logits have them; None where the data has none.
            valid: (B, T), 1 at valid tokens and 0 at padding.
        """
        terms: dict[str, Term] = {}
        objective, valid = self.objective, valid.float()
        if objective.labels is not None:
            if labels is None:
                raise InputError(
                    "losses.labels",
                    "a batch without labels",
                    "data with a labels column, or an objective without labels",
                )
            terms["labels"] = Term(label_loss(student.logits, labels.flatten(), self.smoothing).sum(), "labels")
        if objective.logits is not None and teacher is not None:
            unit: Unit = "tokens" if self.per_token else "examples"
            terms["logits"] = Term(self._logits(objective.logits, student.logits, teacher.logits), unit)
        if objective.hidden is not None and teacher is not None:
            terms["hidden"] = Term(self._hidden(objective.hidden.distance, student, teacher, valid), "tokens")
        if objective.attention is not None and teacher is not None:
            terms["attention"] = Term(self._attention(objective.attention.distance, student, teacher, valid), "tokens")
        return terms

    def _logits(self, settings: LogitsLoss, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student, teacher = student[..., : self.classes], teacher[..., : self.classes]
        return logits_divergence(student, teacher, settings.divergence, settings.temperature).sum()

    def _hidden(self, distance: str, student: Signals, teacher: Signals, valid: torch.Tensor) -> torch.Tensor:
        total = student.logits.new_zeros((), dtype=torch.float32)
        for pair in self.hidden:
            state = student.hidden[pair.student]
            target = teacher.hidden[pair.teacher]
            if (name := _name(pair)) in self.projections:
                with torch.autocast(state.device.type, self.precision, enabled=self.precision is not None):
                    state = self.projections[name](state)
            total = total + (hidden_distance(state, target, distance) * valid).sum()
        return total / len(self.hidden)

    def _attention(self, distance: str, student: Signals, teacher: Signals, valid: torch.Tensor) -> torch.Tensor:
        total = student.logits.new_zeros((), dtype=torch.float32)
        for pair in self.attention:
            source = teacher.attention[pair.teacher]
            if pair.heads is not None and pair.heads != tuple(range(source.query.shape[1])):
                source = source.select(self._head_indices(pair.heads, source.query.device))
            total = total + attention_distance(student.attention[pair.student], source, valid, distance)
        return total / max(1, len(self.attention))

    def _head_indices(self, heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if heads not in self._indices:
            self._indices[heads] = torch.tensor(heads, device=device)
        return self._indices[heads]


def _name(pair: LayerPair) -> str:
    return f"{pair.student}-{pair.teacher}"
