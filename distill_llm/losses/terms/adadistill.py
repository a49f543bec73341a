"""The student's embedding classified by the teacher's class centres, which move as the student learns."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.terms.contrast import not_a_class
from distill_llm.losses.terms.embedded import EmbeddedTerm
from distill_llm.losses.terms.term import Use, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.memory import Centres
    from distill_llm.losses.signals import Batch


@term("adadistill")
class AdaDistillLoss(EmbeddedTerm):
    """Softmax with a margin over the cosines of the student's embedding and class centres of the teacher (Boutros et al., 2024).

    The centre of an example's own class is alpha times the class's centre plus (1 - alpha) times the teacher's embedding of the
    example, where alpha is the cosine of the student's and the teacher's embedding: at first the student learns the example,
    later the class. With `hard`, alpha is multiplied by the cosine of the teacher's embedding and the centre: an example far from
    its class is learnt itself. Centres then move by all examples of the step. Classes that no step has had yet do not count.
    """

    of_data: ClassVar[bool] = True

    scale: float = Field(
        default=64.0, gt=0, allow_inf_nan=False, description="Multiplies the cosines before the softmax."
    )
    margin: float = Field(default=0.5, ge=0, lt=1.5, description="What the example's own class must be nearer by.")
    form: Literal["angle", "cosine"] = Field(
        default="angle",
        description="What the margin is added to: the angle (ArcFace), or subtracted from: the cosine (CosFace).",
    )
    hard: bool = Field(
        default=False, description="Whether examples far from their class's centre are learnt themselves."
    )

    def unit(self, kind: Kind) -> Unit:
        """Labels."""
        return "labels"

    def faults(self, use: Use) -> Iterator[InputError]:
        """There must be classes of examples."""
        yield from super().faults(use)
        if given := not_a_class(use):
            yield InputError("", given, "classes of examples: centres are of classes")

    def memory(self, match: "Match", pairs: "list[LayerPair]") -> "Centres":
        """A centre of each layer pair and class."""
        from distill_llm.losses.memory import Centres

        return Centres(len(pairs), match.classes_of_task, match.width)

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over labelled examples of the mean over layer pairs."""
        import torch

        from distill_llm.losses.unit_length import at_unit_length

        memory = cast("Centres", match.memories[self.name])
        labels = batch.needed_labels(f"losses.{self.name}")
        known, places = labels >= 0, labels.clamp(min=0)
        own, source = self.embeddings(batch, match, pairs)
        held = memory.centres[:, places].transpose(0, 1)  # (B, L, H)
        rates = (own * source).sum(-1).detach().clamp(0, 1)
        if self.hard:
            rates = rates * (at_unit_length(held) * source).sum(-1).clamp(0, 1)
        memory.keep(source, rates, labels)
        kept = rates.masked_fill(~memory.seen[places][:, None], 0.0).unsqueeze(-1)
        true = (own * at_unit_length(kept * held + (1 - kept) * source)).sum(-1)
        cosines = torch.einsum("blh,lch->blc", own, at_unit_length(memory.centres))
        cosines = cosines.masked_fill(~memory.seen, -torch.inf)
        at = places[:, None, None].expand(-1, len(pairs), 1)
        outputs = self.scale * cosines.scatter(-1, at, self.with_margin(true).unsqueeze(-1))
        losses = outputs.logsumexp(-1) - outputs.gather(-1, at).squeeze(-1)
        return (losses.mean(1) * known).sum()

    def with_margin(self, cosines: "Tensor") -> "Tensor":
        """Cosines less the margin; where angle and margin are more than a half turn, a constant is taken off."""
        import math

        if self.form == "cosine":
            return cosines - self.margin
        sines = (1 - cosines.square()).clamp(min=1e-12).sqrt()
        moved = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        return moved.where(cosines > -math.cos(self.margin), cosines - self.margin * math.sin(self.margin))
