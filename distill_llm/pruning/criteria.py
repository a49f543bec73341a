"""Criteria: pure functions from statistics to scores, so another criterion costs no data.

A score says how much is lost when the unit is removed; the lowest go first.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill_llm.architectures.lineage import Counts
from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.names import COMPARABLE, CRITERIA, NEEDS_GRADIENTS, RANKS_LAYERS
from distill_llm.pruning.statistics.record import BY_LAYER, WHOLE, Statistics, UnitStatistics

# What each criterion reads of a unit's statistics, from the sums and the numbers of examples and tokens.
_PER_UNIT: dict[str, Callable[[UnitStatistics, int, int], torch.Tensor]] = {
    "taylor": lambda unit, examples, tokens: unit.taylor / examples,
    "fisher": lambda unit, examples, tokens: unit.fisher / examples,
    "activation": lambda unit, examples, tokens: (unit.activation / tokens).sqrt(),
    "wanda": lambda unit, examples, tokens: unit.wanda / tokens**0.5,
    "magnitude": lambda unit, examples, tokens: unit.magnitude.sqrt(),
    "magnitude_l1": lambda unit, examples, tokens: unit.magnitude_l1,
}


@dataclass(frozen=True)
class Importance:
    """Scores of a model's units.

    Attributes:
        heads: per layer, a vector with a score per head (KV group). Empty where the criterion scores layers only.
        neurons: per layer, a vector with a score per FFN neuron. Empty where the criterion scores layers only.
        layers: a score per layer.
        queries: per layer, a vector with a score per query head; empty where there are none.
        attention, ffn: a score per layer for the whole of its attention, of its FFN; None where there are none.
        hidden: a score per channel of the residual stream; None where there are none.
        layer_criterion: what ranked the layers, where it was not `criterion`.
    """

    criterion: str
    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
    layers: torch.Tensor
    queries: tuple[torch.Tensor, ...] = ()
    attention: torch.Tensor | None = None
    ffn: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    layer_criterion: str | None = None

    def comparable(self, units: Collection[str]) -> bool:
        """Whether scores of these kinds of units may be ranked together (they are in the same unit, squared loss)."""
        return self.criterion in COMPARABLE and ("layers" not in units or self.layer_criterion is None)

    def require(self, units: Sequence[str]) -> None:
        """Raise InputError if there are no scores for one of the units."""
        for unit in units:
            found = getattr(self, unit)
            if found is None or not len(found):
                accepted = f"scores of {unit}: " + (
                    f"a criterion other than {self.criterion}, which ranks layers"
                    if self.criterion in RANKS_LAYERS
                    else f"statistics collected with {unit}"
                )
                raise InputError("criterion", self.criterion, accepted)

    def check(self, counts: Sequence[Counts], hidden: int) -> None:
        """Raise InputError unless the scores are of a model with these layers, `hidden` channels wide."""
        found = {kind: [len(row) for row in getattr(self, kind)] for kind in BY_LAYER}
        width = 0 if self.hidden is None else len(self.hidden)
        # Empty: not scored, which `require` judges.
        differ = [own != [each[kind] for each in counts] for kind, own in found.items() if own]
        if len(self.layers) != len(counts) or any(differ) or width not in (0, hidden):
            own = f"{len(self.layers)} layers { ({k: v[:2] for k, v in found.items() if v}) }..., {width} channels"
            raise InputError("scores", own, f"scores of this model, {list(counts)[:2]}..., {hidden} channels")

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors."""
        tensors = {kind: getattr(self, kind) for kind in WHOLE if getattr(self, kind) is not None}
        for kind in BY_LAYER:
            tensors.update({f"{kind}.{i}": row for i, row in enumerate(getattr(self, kind))})
        names = {"criterion": self.criterion, "layer_criterion": self.layer_criterion}
        metadata = {name: value for name, value in names.items() if value is not None}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            found: dict[str, Any] = {kind: file.get_tensor(kind) for kind in WHOLE if kind in keys}
            for kind in BY_LAYER:
                count = sum(key.startswith(f"{kind}.") for key in keys)
                found[kind] = tuple(file.get_tensor(f"{kind}.{i}") for i in range(count))
            return cls(**file.metadata(), **found)


def score(
    statistics: Statistics, criterion: str = "fisher", seed: int = 0, layer_criterion: str | None = None
) -> Importance:
    """Scores of all units; those of whole layers by a criterion of their own, where `layer_criterion` names one.

    With a the input of the attention-output or FFN-down linear, g the loss's gradient there, and sums over a unit's channels:

    - random: uniform, from `seed`.
    - magnitude, magnitude_l1: L2 and L1 norm of the weights that make and use the unit (Li et al. 2017, section 3.1).
    - taylor: mean over examples of |sum over tokens of a g| (Molchanov et al. 2019, equation 8), which is the gradient of a mask
      on the unit (Michel et al. 2019, equation 2).
    - fisher: mean over examples of (sum over tokens of a g)^2 (Kwon et al. 2022, section 4.1).
    - activation: root mean square of a over tokens (Muralidharan et al. 2024, section 2.2).
    - wanda: root mean square of a channel of a times the L1 norm of the weights that read it (Sun et al. 2024, section 3, summed
      over the weights of the unit).
    - block_influence: for layers, 1 - mean cosine of a layer's input and output (Men et al. 2024, equation 1).
    - leave_one_out: for layers, the loss without the layer less the loss with it (see `leave_one_out`).

    For layers, a is what the layer adds to its input and g the gradient at its output; no weights of its own read it, so that
    wanda is activation there. For channels of the residual stream a is what linears read of it, summed over these tensors within
    an example (see `channel_readers`).

    Raises:
        InputError: for another criterion, or statistics without what it needs.
    """
    if layer_criterion is not None:
        layers = score(statistics, layer_criterion, seed).layers
        return replace(score(statistics, criterion, seed), layers=layers, layer_criterion=layer_criterion)
    if criterion not in CRITERIA:
        raise InputError("criterion", criterion, one_of(CRITERIA, criterion))
    if criterion in NEEDS_GRADIENTS and not statistics.has_gradients:
        raise InputError("criterion", criterion, "statistics collected with a loss, or a criterion without gradients")
    if criterion == "block_influence":
        return Importance(criterion, (), (), 1 - statistics.similarity / max(statistics.tokens, 1))
    if criterion == "leave_one_out":
        if statistics.without is None:
            raise InputError("criterion", criterion, "statistics completed by leave_one_out(...)")
        return Importance(criterion, (), (), statistics.without)
    generator = torch.Generator().manual_seed(seed)
    examples, tokens = max(statistics.examples, 1), max(statistics.tokens, 1)

    def values(unit: UnitStatistics) -> torch.Tensor:
        if criterion == "random":
            return torch.rand(len(unit.activation), generator=generator)
        return _PER_UNIT[criterion](unit, examples, tokens)

    rows = {kind: tuple(map(values, getattr(statistics, kind))) for kind in BY_LAYER}
    whole = {kind: values(getattr(statistics, kind)) for kind in WHOLE}
    return Importance(criterion, **rows, **whole)  # type: ignore[arg-type]
