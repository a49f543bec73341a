"""A term that compares layers of the student with layers of the teacher."""

from collections.abc import Iterator

from distill_llm.common.errors import InputError
from distill_llm.losses.layers import Layers, layer_faults
from distill_llm.losses.terms.term import Term, Use


class PairedTerm(Term):
    """Base of terms with the setting `layers`; `layer_pairs` says what it means for the signals of the term."""

    layers: Layers = "lineage"

    def faults(self, use: Use) -> Iterator[InputError]:
        """The layers must exist, and have a lineage where the setting says so."""
        yield from super().faults(use)
        yield from layer_faults(self.layers, use.layers, use.cut)
