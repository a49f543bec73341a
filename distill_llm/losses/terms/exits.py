"""The loss of a student's exits, which learn from its deepest head."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from distill_llm.common.errors import InputError
from distill_llm.losses.schedules import Temperature, value_at
from distill_llm.losses.terms.term import Signal, Term, Use, term
from distill_llm.losses.units import OUTPUT_UNITS, Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("exits")
class ExitsLoss(Term):
    """Exits learn from the labels and from the deepest head of the same model (Zhang et al., 2019, ICCV).

    For a student with exits alone (the section `exits` of a recipe, `distill_llm.with_exits` in Python). It does not teach the
    deepest head: another term must.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("exits",)
    needs_teacher: ClassVar[bool] = False

    labels: float = Field(
        default=0.5,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the cross-entropy of each exit with the true labels.",
    )
    logits: float = Field(
        default=0.5,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the KL divergence of each exit from the deepest head.",
    )
    hints: float = Field(
        default=0.05,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the squared difference of what an exit makes of its state from the state after the last layer.",
    )
    temperature: Temperature = Field(
        default=1.0,
        description="Divides the logits of exits and deepest head; the divergence is multiplied by its square.",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> "ExitsLoss":
        if not (self.labels or self.logits or self.hints):
            raise InputError("", {"labels": 0, "logits": 0, "hints": 0}, "at least one of them above 0")
        return self

    @property
    def asks_for_labels(self) -> str | None:
        """The weight of the cross-entropy with them."""
        return "labels" if self.labels else None

    def unit(self, kind: Kind) -> Unit:
        """What an output of the model is about."""
        return OUTPUT_UNITS[kind]

    def faults(self, use: Use) -> Iterator[InputError]:
        """Exits are of classifiers and causal language models, and their states are read within layers."""
        yield from super().faults(use)
        if use.kind == "token" or use.single_output:
            accepted = "a task with one class for each example, or a causal language model's"
            yield InputError("", "a student that does not classify examples", accepted)
        if use.kind == "next_token" and use.sharding is not None:
            yield InputError("", f"a language model's exits under {use.sharding}", "DDP, which leaves its head whole")
        if use.reentrant is not None:
            yield InputError("", f"{use.reentrant}: true", fix=f"set {use.reentrant} to false")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over examples (see `exit_losses`), or over next tokens (see `token_exit_losses`)."""
        import torch

        from distill_llm.losses.exits import ExitTargets, ExitWeights, exit_losses, token_exit_losses
        from distill_llm.losses.labels import IGNORED
        from distill_llm.losses.signals import TokenExits

        exits = batch.own.exits
        assert exits is not None
        labels = batch.needed_labels("losses.exits.labels") if self.labels else None
        if labels is not None and batch.data_items is not None:  # what the student answered itself is no truth
            labels = labels.masked_fill(torch.arange(len(labels), device=labels.device) >= batch.data_items, IGNORED)
        temperature = value_at(self.temperature, batch.step, batch.steps)
        weights = ExitWeights(self.labels, self.logits, self.hints, temperature)
        if isinstance(exits, TokenExits):
            return token_exit_losses(exits, labels, weights, match.smoothing)
        targets = ExitTargets(batch.own.logits, labels, batch.mixed, match.smoothing)
        return exit_losses(exits, targets, weights).sum()
