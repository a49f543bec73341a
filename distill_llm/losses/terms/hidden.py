"""The distance of hidden states."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from distill_llm.common.errors import InputError
from distill_llm.losses.distances import StateDistance
from distill_llm.losses.layers import MATCHINGS, MatchedLayers, Matching
from distill_llm.losses.terms.adapted import AdaptedTerm
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, Use, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.adapters import Adapter
    from distill_llm.losses.layer_choice import Matched
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("hidden")
class HiddenLoss(AdaptedTerm, PairedTerm):
    """Distance between hidden states of mapped layers, or of layers that are matched by their states in training.

    `nearest`: each layer of the student, or of the teacher (CoFi, Xia et al., 2022), with the layer of the other model that
    was nearest in the step before. `attention`: each student layer with all teacher layers, in shares that an example's pooled
    states make: the distance from the mixture of their states (ALP-KD, Passban et al., 2021), or the mixture of the
    distances (Chen et al., 2021).
    """

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)

    layers: MatchedLayers = "lineage"
    distance: StateDistance = "mse"
    matching: Matching | None = None

    def faults(self, use: Use) -> Iterator[InputError]:
        """`matching` must have something to say, of layers that exist."""
        yield from super().faults(replace(use, packed=None))  # of which this term says itself what goes
        if self.matching is not None:
            yield from self.matching.faults(self.layers, use.layers)
        if use.packed and self.layers == "attention":
            yield InputError(
                "layers", f"attention, with rows of several sequences ({use.packed})", "nearest, or fixed layers"
            )

    @property
    def packed_rows(self) -> bool:  # type: ignore[override]
        """Where examples need not be told apart."""
        return self.layers != "attention"

    @property
    def shares_projection(self) -> bool:
        """Where any two layers may be compared."""
        return self.layers in MATCHINGS

    @property
    def _how(self) -> Matching:
        return self.matching or Matching()

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`; all pairs that may be compared, where layers are matched in training."""
        field = f"losses.{self.name}"
        if self.layers not in MATCHINGS:
            return match.hidden_pairs(self.layers, f"{field}.layers")
        for fault in self._how.faults(self.layers, match.layer_counts):
            raise fault.renamed(f"{field}.{fault.field}")
        students, teachers = match.layer_counts
        sources = self._how.teacher or range(teachers)
        return match.hidden_pairs([(own, source) for own in range(students) for source in sources], f"{field}.layers")

    def memory(self, match: "Match", pairs: "list[LayerPair]") -> "Matched | None":
        """The matching, where each layer has one partner."""
        from distill_llm.losses.layer_choice import Matched

        if self.layers != "nearest":
            return None
        students, teachers = map(len, _sides(pairs))
        rows, columns = (students, teachers) if self._how.each == "student" else (teachers, students)
        return Matched(rows, columns, self._how.ordered)

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over valid tokens of the mean over layer pairs (see `hidden_distance`)."""
        if self.layers not in MATCHINGS:
            return match.state_distance(batch, pairs, self.distance, self.adapter)
        adapter: Adapter = "interpolation" if self.adapter == "interpolation" else "shared"
        students, teachers = _sides(pairs)
        own = [match.adapted(batch.own.hidden[layer], adapter) for layer in students]
        source = [match.same_channels(batch.target.hidden[layer]) for layer in teachers]
        valid = batch.valid.float()
        if self.layers == "nearest":
            return self._nearest(match, own, source, valid)
        return self._attended(own, source, valid)

    def _nearest(self, match: "Match", own: "list[Tensor]", source: "list[Tensor]", valid: "Tensor") -> "Tensor":
        """The mean over the rows of the matching; and the costs of all pairs, for the next step's."""
        import torch

        from distill_llm.losses.hidden import hidden_distance

        memory = cast("Matched", match.memories[self.name])
        turned = self._how.each == "teacher"
        with torch.no_grad():
            costs = torch.stack(
                [torch.stack([(hidden_distance(a, b, self.distance) * valid).sum(1) for b in source], 1) for a in own],
                1,
            )
        memory.keep(costs.transpose(1, 2) if turned else costs, valid.sum(1))
        chosen = memory.chosen()
        matched = [
            (own[column], source[row]) if turned else (own[row], source[column]) for row, column in enumerate(chosen)
        ]
        total = torch.stack([(hidden_distance(*each, self.distance) * valid).sum() for each in matched])
        return total.sum() / len(matched)

    def _attended(self, own: "list[Tensor]", source: "list[Tensor]", valid: "Tensor") -> "Tensor":
        """The mean over student layers."""
        import torch

        from distill_llm.losses.examples import pooled
        from distill_llm.losses.hidden import hidden_distance
        from distill_llm.losses.layer_choice import attended

        pools, sources = (
            torch.stack([pooled(each, valid, self._how.pool) for each in states], 1) for states in (own, source)
        )
        shares = attended(pools, sources, self._how.temperature)
        total = valid.new_zeros(())
        for layer, state in enumerate(own):
            share = shares[:, layer]  # (B, C)
            if self._how.form == "states":
                mixture = sum(each.float() * share[:, place, None, None] for place, each in enumerate(source))
                values = hidden_distance(state, cast("Tensor", mixture), self.distance)
            else:
                apart = torch.stack([hidden_distance(state, each, self.distance) for each in source], 1)
                values = (apart * share.unsqueeze(-1)).sum(1)
            total = total + (values * valid).sum()
        return total / len(own)


def _sides(pairs: "list[LayerPair]") -> tuple[list[int], list[int]]:
    """The layers of student and teacher of which all pairs are there."""
    return list(dict.fromkeys(pair.student for pair in pairs)), list(dict.fromkeys(pair.teacher for pair in pairs))
