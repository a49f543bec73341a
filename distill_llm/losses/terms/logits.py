"""The divergence of the two models' outputs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from distill_llm.common.errors import InputError
from distill_llm.losses.divergences import DIVERGENCES, OF_VALUES
from distill_llm.losses.registry import NameIn
from distill_llm.losses.schedules import Temperature, value_at
from distill_llm.losses.terms.outputs import head_part
from distill_llm.losses.terms.term import Signal, Term, Use, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.head_parts import Part
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("logits")
class LogitsLoss(Term):
    """Divergence of the teacher's and the student's outputs at a temperature (Hinton et al., 2015)."""

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)
    sparse_targets: ClassVar[bool] = True

    divergence: Annotated[str, BeforeValidator(NameIn(DIVERGENCES))] = "forward_kl"
    temperature: Temperature = Field(
        default=1.0, description="Divides the logits of both models; the loss is multiplied by its square."
    )
    beta: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Setting β of jsd (below 1) and of dkd."
    )
    skew: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share α in the mixture: of the teacher in skew_kl, of the student in skew_reverse_kl.",
    )
    alpha: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Setting α of dkd: weight of the true class's part."
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Setting of huber: the difference at which the square ends.",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Compare the teacher's k likeliest classes, and all others as one class."
    )

    @model_validator(mode="after")
    def _settings_belong(self) -> "LogitsLoss":
        for name in type(self).model_fields:
            given = getattr(self, name)
            general = name in ("weight", "divergence", "temperature")
            if given is not None and not general and name not in DIVERGENCES[self.divergence].settings:
                owners = [divergence for divergence, row in DIVERGENCES.items() if name in row.settings]
                fix = f"remove it: {self.divergence} does not use it, only {', '.join(owners)}"
                raise InputError(name, given, fix=fix)
        if self.divergence == "jsd" and self.beta is not None and self.beta >= 1:
            raise InputError("beta", self.beta, "a number above 0 and below 1 with jsd")
        return self

    def settings(self) -> dict[str, Any]:
        """The settings of the divergence that were given; the others are at its own defaults."""
        own = {name: getattr(self, name, None) for name in DIVERGENCES[self.divergence].settings}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def needs_labels(self) -> bool:
        """Whether the divergence treats the true class apart."""
        return DIVERGENCES[self.divergence].needs_labels

    @property
    def asks_for_labels(self) -> str | None:
        """The divergence, where it treats the true class apart."""
        return "divergence" if self.needs_labels else None

    def unit(self, kind: Kind) -> Unit:
        """Outputs; labelled ones where the divergence needs labels."""
        return "labels" if self.needs_labels else super().unit(kind)

    def faults(self, use: Use) -> Iterator[InputError]:
        """A single output has no probabilities; a few tokens of each item allow one divergence only."""
        yield from super().faults(use)
        if use.mixed and self.needs_labels:
            fix = f"choose another one: {self.divergence} needs one label, and {use.mixed} mixes examples of two"
            yield InputError("divergence", self.divergence, fix=fix)
        if use.single_output and self.divergence not in OF_VALUES:
            accepted = f"{' or '.join(OF_VALUES)}, where outputs are no probabilities (a regression)"
            yield InputError("divergence", self.divergence, accepted)
        if use.teacher is None or use.teacher.few is None:
            return
        k, classes = use.teacher.few
        given = {"divergence": self.divergence, "temperature": self.temperature, **self.settings()}
        held = {"divergence": "forward_kl", "temperature": 1.0}
        for name, value in given.items():
            kept = f"with {use.teacher.name} that knows {k} of {classes} classes"
            if name not in held:
                yield InputError(name, value, fix=f"remove it: it does not work {kept}")
            elif value != held[name]:
                yield InputError(name, value, f"{held[name]} {kept}")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over the outputs that count (see `logits_divergence`)."""
        from distill_llm.losses.logits import logits_divergence
        from distill_llm.losses.signals import SparseSignals
        from distill_llm.losses.sparse import sparse_forward_kl

        student, teacher = batch.own.logits[..., : match.classes], batch.target.logits[..., : match.classes]
        if isinstance(batch.target, SparseSignals):
            return sparse_forward_kl(student, batch.target.targets).sum()
        temperature, settings = value_at(self.temperature, batch.step, batch.steps), self.settings()
        if self.needs_labels:
            settings["labels"] = self._labels(batch)
        return batch.weighted(logits_divergence(student, teacher, self.divergence, temperature, **settings)).sum()

    def in_head(self, batch: "Batch", match: "Match", factor: "Tensor") -> "Part":
        """The same, a block of items at a time."""
        from distill_llm.losses.head_parts import Comparison

        temperature = value_at(self.temperature, batch.step, batch.steps)
        how = Comparison(self.divergence, self.settings(), temperature, match.classes)
        return head_part(how, batch, factor, self._labels(batch) if self.needs_labels else None)

    def _labels(self, batch: "Batch") -> "Tensor":
        return batch.needed_labels(f"losses.logits.divergence {self.divergence}")
