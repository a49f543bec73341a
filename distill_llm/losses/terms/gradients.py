"""How the outputs change with a layer's states: the gradients of both models."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.layers import Layers, layer_faults
from distill_llm.losses.terms.term import Signal, Term, Use, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch, Signals


@term("gradients")
class GradientsLoss(Term):
    """Squared difference of the gradients of student and teacher in the states of paired layers.

    `loss`: half the squared distance of the gradients of each model's loss against the labels (gradient-based attention transfer,
    Zagoruyko and Komodakis, 2017). `jacobian`: the squared distance of the gradients of the teacher's likeliest
    output, each at unit length for an example (Jacobian matching, Srinivas and Fleuret, 2018).

    The loss is differentiated through the gradient: the student is run backward twice as deep, the teacher once, and the
    student's attention runs without its fast kernels, which cannot be differentiated twice.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("logits", "hidden", "graph")
    packed_rows: ClassVar[bool] = False

    of: Literal["loss", "jacobian"] = Field(
        default="loss",
        description="What is differentiated: the loss against the labels, or the teacher's likeliest output.",
    )
    layers: Literal["embeddings"] | Layers = Field(
        default="embeddings",
        description="In which states: those that the first layers read, or those of paired layers.",
    )

    @property
    def asks_for_labels(self) -> str | None:
        """What is differentiated, where that is the loss."""
        return "of" if self.of == "loss" else None

    def unit(self, kind: Kind) -> Unit:
        """Examples, whatever the model."""
        return "examples"

    def faults(self, use: Use) -> Iterator[InputError]:
        """The states must be of one width, the student whole in every process, and an example of one label."""
        yield from super().faults(use)
        if self.layers != "embeddings":
            yield from layer_faults(self.layers, use.layers, use.cut)
        if use.widths is not None:
            accepted = "a student as wide as its teacher, or cut from it: gradients in other states cannot be compared"
            yield InputError("", "states of {} and {} channels".format(*use.widths), accepted)
        if use.sharding is not None:
            yield InputError("", f"a student sharded by {use.sharding}", "DDP, or one process")
        if use.mixed and self.of == "loss":
            yield InputError("of", self.of, f"jacobian, where examples have two labels ({use.mixed})")

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`; widths and attention kernels are checked."""
        from distill_llm.losses.mapping import LayerPair
        from distill_llm.losses.signals import EMBEDDINGS

        match.check_differentiable(f"losses.{self.name}")
        if self.layers == "embeddings":
            return [LayerPair(EMBEDDINGS, EMBEDDINGS)]
        return match.hidden_pairs(self.layers, f"losses.{self.name}.layers")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over examples of the mean over layer pairs."""
        from distill_llm.losses.unit_length import at_unit_length

        live = batch.target.live
        assert live is not None
        classes = batch.target.logits[..., : match.classes].argmax(-1, keepdim=True)
        of_student = self._gradients(batch, match, batch.own, [pair.student for pair in pairs], classes, twice=True)
        of_teacher = self._gradients(batch, match, live, [pair.teacher for pair in pairs], classes)
        total, valid = batch.zero(), batch.valid.float().unsqueeze(-1)
        for own, source in zip(of_student, of_teacher, strict=True):
            both = [(each.float() * valid).flatten(1) for each in (own, match.same_channels(source))]
            if self.of == "jacobian":
                both = [at_unit_length(each) for each in both]
            distance = (both[0] - both[1]).square().sum()
            total = total + (distance if self.of == "jacobian" else distance / 2)
        return total / len(pairs)

    def _gradients(
        self,
        batch: "Batch",
        match: "Match",
        signals: "Signals",
        layers: list[int],
        classes: "Tensor",
        twice: bool = False,
    ) -> "tuple[Tensor, ...]":
        """In the states of some layers, (B, T, H) each; `twice`: they can be differentiated again."""
        from torch.autograd import grad

        from distill_llm.losses.labels import label_loss

        logits = signals.logits[..., : match.classes].float()
        if self.of == "jacobian":
            value = logits.gather(-1, classes).sum()
        else:
            value = label_loss(logits, batch.needed_labels(f"losses.{self.name}")).sum()
        return grad(value, [signals.hidden[layer] for layer in layers], create_graph=twice, retain_graph=True)
