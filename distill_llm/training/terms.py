"""An objective bound to a student and a teacher: which layers to record, and the sum of every term over a batch."""

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.mapping import LayerPair
from distill_llm.losses.matching import Match, MatchSettings
from distill_llm.losses.objective import Objective
from distill_llm.losses.signals import Batch, Wanted
from distill_llm.losses.terms.term import Use
from distill_llm.losses.units import Kind, Unit
from distill_llm.models.exits import exits_in


class Terms:
    """Computes the terms of an objective for one student and one teacher.

    Args:
        objective: which terms.
        student, teacher: the models; `teacher` may be None where the objective does not compare layers with it.
        settings: what the terms share.

    Attributes:
        match: what the terms ask about the two models.
        pairs: by term, the layer pairs that are compared.

    Raises:
        InputError: layers that do not exist, a lineage that is missing, relation heads that do not divide the widths, a term of
            layers with nothing to compare.
    """

    def __init__(
        self,
        objective: Objective,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        settings: MatchSettings | None = None,
    ):
        self.objective, self.terms = objective, objective.terms()
        self.match = Match(student, teacher, settings or MatchSettings())
        self.pairs: dict[str, list[LayerPair]] = {name: [] for name in self.terms}
        if teacher is not None:
            self.pairs = {name: term.layer_pairs(self.match) for name, term in self.terms.items()}
        self._check_pairs(teacher is not None)
        self._check_exits(student)
        named = [(self.terms[name], pairs) for name, pairs in self.pairs.items()]
        learning = [(term.shares_projection, pairs) for term, pairs in named if pairs and term.learns_projections]
        if learning:
            apart = [pair for shares, pairs in learning if not shares for pair in pairs]
            self.match.project(apart, shared=any(shares for shares, _ in learning))
        for term, pairs in named:
            if pairs and (memory := term.memory(self.match, pairs)) is not None:
                self.match.memories[term.name] = memory

    def _check_pairs(self, has_model: bool) -> None:
        """A term of layers without layers would train on nothing."""
        for name, term in self.terms.items():
            if not term.needs_teacher or not {"hidden", "attention", "vectors", "neurons"} & set(term.signals):
                continue
            if not has_model:
                fix = "set the teacher's `model` to the model whose layers are compared, or leave the term out"
                raise InputError(f"losses.{name}", "a teacher whose model is None", fix=fix)
            if not self.pairs[name]:
                fix = "compare layers that both models have, or leave the term out: it would train on nothing"
                raise InputError(f"losses.{name}", "no pair of layers", fix=fix)

    def only(self, names: Collection[str]) -> "Terms":
        """These of the terms alone, for the same models, with the same projections and memories."""
        found = copy.copy(self)
        found.objective = self.objective.only(names)
        found.terms = {name: term for name, term in self.terms.items() if name in names}
        found.pairs = {name: pairs for name, pairs in self.pairs.items() if name in names}
        return found

    def _check_exits(self, student: PreTrainedModel) -> None:
        """Exits that nothing teaches would no longer fit the layers below them, and a loss of exits needs some."""
        taught = [name for name, term in self.terms.items() if "exits" in term.signals]
        if taught and not exits_in(student):
            fix = "give the student exits first: distill_llm.with_exits(student, [3, 6])"
            raise InputError(f"losses.{taught[0]}", f"{type(student).__name__} without exits", fix=fix)
        if exits_in(student) and not taught:
            fix = "add the term exits: otherwise the exits stay as they are while the layers below them learn"
            raise InputError("losses", f"{type(student).__name__} without a loss of its exits", fix=fix)

    @property
    def kind(self) -> Kind:
        """What an output of the models is about."""
        return self.match.kind

    @property
    def projections(self) -> nn.ModuleDict:
        """Learned maps from the student's width to the teacher's, by layer pair (see `Match`)."""
        return self.match.projections

    @property
    def memories(self) -> nn.ModuleDict:
        """What terms keep from step to step, by term (see `Match`)."""
        return self.match.memories

    def wanted(self, side: str) -> Wanted:
        """The layers to record of the `student` or the `teacher`."""
        pairs = self.pairs.items()
        return wanted_by(self.objective, {name: [getattr(pair, side) for pair in found] for name, found in pairs})

    @property
    def needs_outputs(self) -> bool:
        """Whether a term is about the outputs of the student's head."""
        return any("logits" in term.signals for term in self.terms.values())

    @property
    def needs_teacher_outputs(self) -> bool:
        """Whether a term is about the outputs of the teacher's head."""
        return any("logits" in term.signals and term.needs_teacher for term in self.terms.values())

    @property
    def needs_logits(self) -> bool:
        """Whether a term needs a language model's logits whole."""
        return any(term.needs_logits() for term in self.terms.values())

    @property
    def needs_exits(self) -> bool:
        """Whether a term is about the outputs of the student's exits."""
        return any("exits" in term.signals for term in self.terms.values())

    @property
    def needs_unlabelled(self) -> bool:
        """Whether a term compares the outputs of tokens without a label too."""
        outputs = (name for name, term in self.terms.items() if "logits" in term.signals)
        return self.kind == "token" and any(self.unit(name) == "tokens" for name in outputs)

    def unit(self, name: str) -> Unit:
        """What an item of a term is."""
        return self.terms[name].unit(self.kind)

    def __call__(self, batch: Batch, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The sums of the terms of one batch, by name, but for those of the names in `without`."""
        if batch.sequences is not None and not all(term.packed_rows for term in self.terms.values()):
            raise_all(self.objective.faults(Use(packed="position_ids")))
        left = {name: term for name, term in self.terms.items() if name not in without}
        return {name: term.sum(batch, self.match, self.pairs[name]) for name, term in left.items()}


def wanted_by(objective: Objective, layers: Mapping[str, Sequence[int]]) -> Wanted:
    """The layers to record where each term compares those of its name; an error names the first term that asks."""
    found: dict[str, dict[int, None]] = {"hidden": {}, "attention": {}, "vectors": {}, "neurons": {}}
    fields: dict[str, str] = {}
    for name, term in objective.terms().items():
        for signal in found.keys() & set(term.signals) if layers[name] else ():
            found[signal] |= dict.fromkeys(layers[name])
            fields.setdefault(signal, f"losses.{name}")
    graph = any(layers[name] for name in objective.differentiates)
    return Wanted(
        tuple(found["hidden"]),
        tuple(found["attention"]),
        tuple(found["vectors"]),
        tuple(found["neurons"]),
        graph,
        fields,
    )
