"""What a plan has to know of a kind of unit. Must not import torch: recipes are checked without it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from distill_llm.architectures.family import Family
    from distill_llm.pruning.planning.candidate import Choice

Candidate = tuple[int, int, float]
"""A unit that may go: its layer, its index there, its score."""

Source = Literal["together", "change", "stream"]
"""Where the statistics of a kind come from that is not a unit inside a layer:

- "together": the units `cuts` of a layer, taken as one unit;
- "change": what a layer adds to its input;
- "stream": the channels of the residual stream, where linears read them.
"""


Line = tuple[float, float]
"""A straight line, (slope, constant): a cost is slope x channels of the residual stream + constant."""


@dataclass(frozen=True)
class Load:
    """A model and the batch that it works on, as far as costs of units depend on them.

    Attributes:
        config, family: the model's config, and the row of its family.
        head_size: channels of a head.
        batch_size, sequence_length: of the batch (B, T).
        cached: for each layer, the tokens whose keys and values it holds; empty where there is no cache.
    """

    config: "PreTrainedConfig"
    family: "Family"
    head_size: int
    batch_size: int
    sequence_length: int
    cached: Sequence[int]


class UnitKind(ABC):
    """A kind of unit that plans may remove; one object a kind, in the table `KINDS`.

    Attributes:
        name: what `units` calls it.
        scored: which of the scores of `Importance` it goes by.
        source: where statistics of its own come from; None for the units of `LAYER_UNITS`, which have some anyway, and for a
            kind that goes by the scores of another.
        cuts: which units of a layer go with it (a key of `LAYER_UNITS`); None: whole layers, or what no layer has for itself.
        block: whether it is many units at once, which have no share of their own to keep: beside other kinds it has to compete.
        in_layer: whether a unit belongs to one layer.
        in_order: whether its units go one after the other, the least first, so that only the next is a candidate.
        fine: whether it is so small that budgets are met with it.
        returns: whether a unit comes back where there is room for it again.
    """

    name: ClassVar[str]
    scored: ClassVar[str]
    source: ClassVar[Source | None] = None
    cuts: ClassVar[str | None] = None
    block: ClassVar[bool] = False
    in_layer: ClassVar[bool] = True
    in_order: ClassVar[bool] = False
    fine: ClassVar[bool] = False
    returns: ClassVar[bool] = False

    @abstractmethod
    def candidates(self, choice: "Choice") -> list[Candidate]:
        """Every unit that may go."""

    @abstractmethod
    def price(self, choice: "Choice", i: int) -> float:
        """What the next unit of layer `i` costs, in what is left."""

    @abstractmethod
    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """Remove a unit; False where it is gone already or must stay."""

    def flops(self, load: Load) -> Line:
        """FLOPs (2 x multiply-adds) of a unit, per token of the batch. Only kinds with a row in `LAYER_UNITS` are asked."""
        raise NotImplementedError(f"the kind {self.name!r} does not say what its units cost in FLOPs")

    def held(self, load: Load) -> Sequence[float]:
        """For each layer, how many numbers a unit holds beside its weights while the model works; empty: none."""
        return ()
