"""Criteria: pure functions from statistics to scores, so another criterion costs no data.

A score says how much is lost when the unit is removed; the lowest go first.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill_llm.errors import InputError, one_of
from distill_llm.pruning.statistics import Statistics
from distill_llm.pruning.structure import LayerShape

CRITERIA = ("random", "magnitude", "taylor", "fisher", "activation", "block_influence")
_COMPARABLE = ("fisher",)


@dataclass(frozen=True)
class Importance:
    """Scores of a model's units.

    Attributes:
        heads: per layer, a vector with a score per head. Empty where the criterion scores layers only.
        neurons: per layer, a vector with a score per FFN neuron. Empty where the criterion scores layers only.
        layers: a score per layer.
    """

    criterion: str
    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
    layers: torch.Tensor

    @property
    def comparable(self) -> bool:
        """Whether scores of different kinds of units may be ranked together (they are in the same unit, squared loss)."""
        return self.criterion in _COMPARABLE

    def require(self, units: Sequence[str]) -> None:
        """Raise InputError if the criterion has no scores for one of the units."""
        if not self.heads and set(units) != {"layers"}:
            raise InputError(
                "criterion", self.criterion, "for heads and neurons: random, magnitude, taylor, fisher, activation"
            )

    def check(self, shapes: Sequence[LayerShape]) -> None:
        """Raise InputError unless the scores are of a model with these layers."""
        own = [LayerShape(len(h), len(n)) for h, n in zip(self.heads, self.neurons, strict=True)]
        if len(self.layers) != len(shapes) or (own and own != list(shapes)):
            raise InputError(
                "scores", f"{len(self.layers)} layers {own[:2]}...", f"scores of this model, {list(shapes)[:2]}..."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors."""
        tensors = {"layers": self.layers}
        for kind, rows in (("heads", self.heads), ("neurons", self.neurons)):
            tensors.update({f"{kind}.{i}": row for i, row in enumerate(rows)})
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"criterion": self.criterion})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            rows = {
                kind: tuple(file.get_tensor(f"{kind}.{i}") for i in range(sum(k.startswith(f"{kind}.") for k in keys)))
                for kind in ("heads", "neurons")
            }
            return cls(file.metadata()["criterion"], rows["heads"], rows["neurons"], file.get_tensor("layers"))


def score(statistics: Statistics, criterion: str = "fisher", seed: int = 0) -> Importance:
    """Scores of all heads, neurons and layers.

    With a the input of the attention-output or FFN-down linear, g the loss's gradient there, and sums over a head's channels:

    - random: uniform, from `seed`.
    - magnitude: L2 norm of the weights that make and use the unit (Li et al. 2017, section 3.1).
    - taylor: mean over examples of |sum over tokens of a g| (Molchanov et al. 2019, equation 8; Michel et al. 2019, equation 2).
    - fisher: mean over examples of (sum over tokens of a g)^2 (Kwon et al. 2022, section 4.1).
    - activation: root mean square of a over tokens (Muralidharan et al. 2024, section 2.2).
    - block_influence: for layers, 1 - mean cosine of a layer's input and output (Men et al. 2024, equation 1).

    For layers, a is what the layer adds to its input and g the gradient at its output.

    Raises:
        InputError: for another criterion, or statistics without gradients where it needs them.
    """
    if criterion not in CRITERIA:
        raise InputError("criterion", criterion, one_of(CRITERIA, criterion))
    stats = statistics
    if criterion in ("taylor", "fisher") and not stats.has_gradients:
        raise InputError("criterion", criterion, "statistics collected with a loss, or a criterion without gradients")
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return Importance(
            criterion,
            tuple(torch.rand(len(u.activation), generator=generator) for u in stats.heads),
            tuple(torch.rand(len(u.activation), generator=generator) for u in stats.neurons),
            torch.rand(len(stats.layers.activation), generator=generator),
        )
    if criterion == "block_influence":
        return Importance(criterion, (), (), 1 - stats.similarity / max(stats.tokens, 1))
    count = max(stats.tokens if criterion == "activation" else stats.examples, 1)

    def values(unit: object) -> torch.Tensor:
        raw = getattr(unit, criterion)
        if criterion == "magnitude":
            return raw.sqrt()
        return (raw / count).sqrt() if criterion == "activation" else raw / count

    return Importance(
        criterion, tuple(map(values, stats.heads)), tuple(map(values, stats.neurons)), values(stats.layers)
    )
