"""An objective bound to a student and a teacher: which layers to record, and the sum of every term over a batch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import (
    FAMILIES,
    dims_of,
    hidden_lineage,
    layers_of,
    lineage_of,
    width_of,
)
from distill_llm.common.errors import InputError
from distill_llm.losses.attention import attention_distance
from distill_llm.losses.hidden import hidden_distance
from distill_llm.losses.items import Kind, Unit, kind_of
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.mapping import (
    LayerPair,
    attention_pairs,
    cut_from,
    hidden_pairs,
    query_heads,
    relative_lineage,
)
from distill_llm.losses.objective import Objective
from distill_llm.losses.relations import relation_distance, relation_heads
from distill_llm.losses.schedules import value_at
from distill_llm.losses.sparse import sparse_forward_kl
from distill_llm.models.recording import EMBEDDINGS, Signals, SparseSignals, Vectors, Wanted

LOGITS_UNITS: dict[Kind, Unit] = {"example": "examples", "token": "tokens", "next_token": "labels"}


@dataclass(frozen=True)
class Batch:
    """What terms are computed from.

    Attributes:
        teacher: signals of a batch: logits (B, C) for one output per example, (items, V) for one per token; or, of a
            language model, what its logits are made from. None where the objective does not need them.
        labels: (B,) or (items,) as the logits have them; None where the data has none.
        valid: (B, T), 1 at valid tokens and 0 at padding.
        step, steps: optimizer steps done, and those of the whole training.
        student: of the training forward; None before it.
        sequences: (B, T) of packed rows, the number of the sequence that each token belongs to; None: a sequence per row.
    """

    teacher: Signals | None
    labels: torch.Tensor | None
    valid: torch.Tensor
    step: int = 0
    steps: int = 1
    student: Signals | None = None
    sequences: torch.Tensor | None = None

    @property
    def own(self) -> Signals:
        """The student's signals."""
        assert self.student is not None
        return self.student

    @property
    def target(self) -> Signals:
        """The teacher's signals, of a term that needs them."""
        assert self.teacher is not None
        return self.teacher

    def needed_labels(self, field: str) -> torch.Tensor:
        """The labels, of a term that needs them.

        Raises:
            InputError: there are none.
        """
        if self.labels is None:
            raise InputError(
                field, "a batch without labels", f"data with a labels column, or an objective without {field}"
            )
        return self.labels.flatten()


class Terms:
    """Computes the terms of an objective for one student and one teacher.

    Every term is the method of its name: from a Batch to the sum over its items.

    Args:
        objective: which terms.
        student, teacher: the models; `teacher` may be None where the objective does not need one.
        smoothing: label smoothing.
        classes: compare logits over the first `classes` entries only (vocabularies of padded sizes); None: all.
        seed: of the projections' first weights.
        precision: what the projections multiply in, as mixed precision has it for the student; None: their own.

    Attributes:
        kind: what an output of the models is about.
        pairs: by term, the layer pairs that are compared.
        projections: learned bias-free maps from the student's width to the teacher's, by layer pair; empty where the
            widths agree, and where the student was cut from the teacher and keeps known channels of it. They belong to
            the loss, not to the student.

    Raises:
        InputError: layers that do not exist, a lineage that is missing, relation heads that do not divide the widths.
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
        self.kind = kind_of(student)
        self.pairs: dict[str, list[LayerPair]] = {"embeddings": [], "hidden": [], "attention": [], "relations": []}
        self.projections = nn.ModuleDict()
        self._channels: tuple[int, ...] | None = None
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        if teacher is not None and not self.pairs.keys().isdisjoint(objective.terms()):
            self._pair_layers(student, teacher)
            self._match_widths(student, teacher, seed)

    def _pair_layers(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        objective, own, original = self.objective, lineage_of(student), lineage_of(teacher)
        lineage, group_size = None, 1
        if own is not None and cut_from(student.config, teacher.config):
            dims = dims_of(student.config)
            group_size = dims.queries // dims.groups
            lineage = own if original is None else relative_lineage(own, original, group_size)
        counts = len(layers_of(student)), len(layers_of(teacher))
        if objective.embeddings:
            self.pairs["embeddings"] = [LayerPair(EMBEDDINGS, EMBEDDINGS)]
        if objective.hidden:
            self.pairs["hidden"] = hidden_pairs(objective.hidden.layers, *counts, lineage)
        for name in ("attention", "relations"):
            if section := getattr(objective, name):
                pairs = attention_pairs(section.layers, *counts, lineage, f"losses.{name}.layers", group_size)
                pairs = [pair for pair in pairs if own is None or own[pair.student].heads]
                self.pairs[name] = [pair for pair in pairs if original is None or original[pair.teacher].heads]
        for pair in self.pairs["relations"]:
            widths = {*_widths(student, pair.student), *_widths(teacher, pair.teacher)}
            if widths and objective.relations:
                relation_heads(objective.relations.heads, widths)

    def _match_widths(self, student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> None:
        """Compare the channels that a student kept of this teacher with where they are in it; project any other width."""
        related = cut_from(student.config, teacher.config)
        kept, there = hidden_lineage(student.config) if related else None, hidden_lineage(teacher.config)
        if kept is not None and there is not None:
            if not set(kept) <= set(there):
                accepted = "a teacher that has all channels of the student"
                raise InputError("teacher", f"a model without {len(set(kept) - set(there))} of them", accepted)
            kept = tuple(map(there.index, kept))
        self._channels = kept
        widths = width_of(student), width_of(teacher)
        if kept is not None or widths[0] == widths[1]:
            return
        generator = torch.Generator().manual_seed(seed)
        for pair in self.pairs["hidden"] + self.pairs["embeddings"]:
            linear = torch.nn.utils.skip_init(nn.Linear, *widths, bias=False)
            nn.init.normal_(linear.weight, std=widths[0] ** -0.5, generator=generator)
            self.projections[_name(pair)] = linear

    def wanted(self, side: str) -> Wanted:
        """The layers to record of the `student` or the `teacher`."""
        layers = {name: tuple(dict.fromkeys(getattr(p, side) for p in pairs)) for name, pairs in self.pairs.items()}
        return Wanted(layers["embeddings"] + layers["hidden"], layers["attention"], layers["relations"])

    @property
    def needs_unlabelled(self) -> bool:
        """Whether a term compares the outputs of tokens without a label too."""
        return self.kind == "token" and self.objective.logits is not None and not self.objective.logits.needs_labels

    @property
    def needs_outputs(self) -> bool:
        """Whether a term is about the outputs of the student's head."""
        return self.objective.labels is not None or self.objective.logits is not None

    def unit(self, name: str) -> Unit:
        """What an item of a term is."""
        if name == "labels" or (name == "logits" and self.objective.logits and self.objective.logits.needs_labels):
            return "labels"
        return LOGITS_UNITS[self.kind] if name == "logits" else "tokens"

    def __call__(self, batch: Batch, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The sums of the terms of one batch, by name, but for those of the names in `without`."""
        return {name: getattr(self, name)(batch) for name in self.objective.terms() if name not in without}

    def labels(self, batch: Batch) -> torch.Tensor:
        """The loss against the labels (see `label_loss`)."""
        labels = batch.needed_labels("losses.labels")
        return label_loss(batch.own.logits, labels, self.smoothing).sum()

    def logits(self, batch: Batch) -> torch.Tensor:
        """The divergence of the outputs (see `logits_divergence`)."""
        section = self.objective.logits
        assert section is not None
        student, teacher = batch.own.logits[..., : self.classes], batch.target.logits[..., : self.classes]
        if isinstance(batch.target, SparseSignals):
            return sparse_forward_kl(student, batch.target.targets).sum()
        temperature, settings = value_at(section.temperature, batch.step, batch.steps), section.settings()
        if section.needs_labels:
            settings["labels"] = batch.needed_labels(f"losses.logits.divergence {section.divergence}")
        return logits_divergence(student, teacher, section.divergence, temperature, **settings).sum()

    def embeddings(self, batch: Batch) -> torch.Tensor:
        """The distance of the embedding layers' outputs (see `hidden_distance`)."""
        assert self.objective.embeddings is not None
        return self._states(batch, self.pairs["embeddings"], self.objective.embeddings.distance)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The mean over layer pairs of the distance of hidden states (see `hidden_distance`)."""
        assert self.objective.hidden is not None
        return self._states(batch, self.pairs["hidden"], self.objective.hidden.distance)

    def _states(self, batch: Batch, pairs: Sequence[LayerPair], distance: str) -> torch.Tensor:
        total = batch.own.logits.new_zeros((), dtype=torch.float32)
        for pair in pairs:
            state = batch.own.hidden[pair.student]
            target = batch.target.hidden[pair.teacher]
            if self._channels is not None:
                target = target.index_select(-1, self._on(target.device, self._channels))
            if (name := _name(pair)) in self.projections:
                with torch.autocast(state.device.type, self.precision, enabled=self.precision is not None):
                    state = self.projections[name](state)
            total = total + (hidden_distance(state, target, distance) * batch.valid.float()).sum()
        return total / len(pairs)

    def attention(self, batch: Batch) -> torch.Tensor:
        """The mean over layer pairs of the distance of attention probabilities (see `attention_distance`)."""
        assert self.objective.attention is not None
        total = batch.own.logits.new_zeros((), dtype=torch.float32)
        for pair in self.pairs["attention"]:
            own, source = batch.own.attention[pair.student], batch.target.attention[pair.teacher]
            if pair.heads is not None and pair.heads != tuple(range(source.query.shape[1])):
                source = source.select(self._on(source.query.device, pair.heads))
            total = total + attention_distance(own, source, batch.valid, self.objective.attention.distance)
        return total / max(1, len(self.pairs["attention"]))

    def relations(self, batch: Batch) -> torch.Tensor:
        """The mean over layer pairs of the sum over kinds of relations of their divergence (see `relation_distance`)."""
        section = self.objective.relations
        assert section is not None
        total = batch.own.logits.new_zeros((), dtype=torch.float32)
        for pair in self.pairs["relations"]:
            own, source = batch.own.vectors[pair.student], batch.target.vectors[pair.teacher]
            for kind in section.pairs:
                place = Vectors._fields.index({"q": "query", "k": "key", "v": "value"}[kind[0]])
                total = total + relation_distance(
                    own[place], source[place], batch.valid, section.heads, sequences=batch.sequences
                )
        return total / max(1, len(self.pairs["relations"]))

    def _on(self, device: torch.device, indices: tuple[int, ...]) -> torch.Tensor:
        if indices not in self._indices:
            self._indices[indices] = torch.tensor(indices, device=device)
        return self._indices[indices]


def _widths(model: PreTrainedModel, layer: int) -> set[int]:
    """Channels of all heads' queries and of all heads' keys in a layer, where the family's sizes are known."""
    if model.config.model_type not in FAMILIES:
        return set()
    dims, lineage = dims_of(model.config), lineage_of(model)
    if lineage is None:
        return {dims.queries * dims.head_size, dims.groups * dims.head_size}
    queries = query_heads(lineage[layer], dims.queries // dims.groups)
    return {len(queries) * dims.head_size, len(lineage[layer].heads) * dims.head_size}


def _name(pair: LayerPair) -> str:
    return "embeddings" if pair.student == EMBEDDINGS else f"{pair.student}-{pair.teacher}"
