"""The outputs of a teacher with another tokenizer, compared where the tokens of the two begin and end together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from distill_llm.common.errors import InputError
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.registry import NameIn
from distill_llm.losses.schedules import Temperature, value_at
from distill_llm.losses.terms.term import Signal, Term, Use, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("cross_tokenizer")
class CrossTokenizerLoss(Term):
    """Three comparisons with a teacher that has another tokenizer, over chunks of text that both tokenizers cut out.

    `exact`: a chunk that is one token of the same text for both: the divergence of the next token, over the tokens that both
    vocabularies have. `likelihood`: any other chunk: the probability of the whole chunk (chain rule), against that of any other
    text. `sorted`: where such a chunk begins: the sorted probabilities of the next token (ULD, Boizard et al., 2024).
    """

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)
    of_teacher: ClassVar[tuple[Signal, ...]] = ("linked",)

    exact: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="Share of chunks of one and the same token."
    )
    likelihood: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="Share of the likelihood of all other chunks."
    )
    sorted: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="Share of sorted probabilities, where other chunks begin."
    )
    divergence: Annotated[str, BeforeValidator(NameIn(DIVERGENCES))] = Field(
        default="forward_kl", description="Of exact: a divergence that goes with top_k."
    )
    temperature: Temperature = Field(
        default=1.0, description="Of exact: divides the logits of both models; multiplied by its square."
    )
    chunk_temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Of likelihood: divides the logarithms of both probabilities.",
    )

    @model_validator(mode="after")
    def _settings_belong(self) -> "CrossTokenizerLoss":
        merging = [name for name, row in DIVERGENCES.items() if "top_k" in row.settings]
        if self.divergence not in merging:
            raise InputError("divergence", self.divergence, " or ".join(merging))
        if not self.exact + self.likelihood + self.sorted:
            raise InputError("exact", self.exact, "at least one share above 0, of exact, likelihood and sorted")
        return self

    def faults(self, use: Use) -> Iterator[InputError]:
        """Texts are compared: a head that predicts the next token."""
        yield from super().faults(use)
        if use.kind not in (None, "next_token"):
            yield InputError("", f"a student with an output per {use.kind}", "a causal language model")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over chunks, each part times its share."""
        from distill_llm.losses.cross_tokenizer import (
            chunk_divergence,
            chunk_log_probabilities,
            shared_divergence,
            sorted_distance,
        )
        from distill_llm.losses.signals import LinkedSignals

        assert isinstance(batch.target, LinkedSignals)
        links = batch.target.links
        student, teacher = batch.own.logits[:, : links.sizes[0]], batch.target.logits[:, : links.sizes[1]]
        total = student[:0].float().sum()  # 0, and a part of the graph where there is no chunk
        own, other = links.own, links.other
        is_same = [links.same[tokens[:, 2]] for tokens in (own, other)]
        if self.exact:
            both = student[own[is_same[0], 0]], teacher[other[is_same[1], 0]]
            temperature = value_at(self.temperature, batch.step, batch.steps)
            total = total + self.exact * shared_divergence(*both, links, self.divergence, temperature).sum()
        own, other = own[~is_same[0]], other[~is_same[1]]
        if self.likelihood:
            counts = [
                chunk_log_probabilities(logits[tokens[:, 0]], tokens[:, 1], tokens[:, 2], len(links.same))[~links.same]
                for logits, tokens in ((student, own), (teacher, other))
            ]
            total = total + self.likelihood * chunk_divergence(counts[0], counts[1], self.chunk_temperature).sum()
        if self.sorted:
            starts = (_starts(own[:, 2]), _starts(other[:, 2]))
            both = student[own[starts[0], 0]], teacher[other[starts[1], 0]]
            total = total + self.sorted * sorted_distance(*both).sum()
        return total


def _starts(chunks: "Tensor") -> "Tensor":
    """Where in the order of tokens a chunk begins."""
    return chunks.diff(prepend=chunks.new_full((1,), -1)) != 0
