"""What every unit of a model is worth: scores by a criterion, and their file."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save_file

from distill_llm.architectures.lineage import Counts
from distill_llm.common.errors import InputError
from distill_llm.common.tensors import saved_tensors
from distill_llm.pruning.criteria import Criterion, Seen, find_criterion, is_comparable, ranks_layers_only
from distill_llm.pruning.declared import Declared, checked_scores
from distill_llm.pruning.statistics.record import BY_LAYER, WHOLE, Statistics, UnitStatistics


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
        return is_comparable(self.criterion) and ("layers" not in units or self.layer_criterion is None)

    def require(self, units: Sequence[str]) -> None:
        """Raise InputError if there are no scores for one of the units."""
        for unit in units:
            found = getattr(self, unit)
            if found is None or not len(found):
                scored_by = f"statistics collected with {unit}"
                if ranks_layers_only(self.criterion):
                    scored_by = f"a criterion other than {self.criterion}, which ranks layers"
                raise InputError("criterion", self.criterion, f"scores of {unit}: {scored_by}")

    def check(self, counts: Sequence[Counts], hidden: int) -> None:
        """Raise InputError unless the scores are of a model with these units in its layers and `hidden` channels."""
        # What is empty was not scored: `require` judges that.
        own = {kind: list(map(len, rows)) for kind in BY_LAYER if (rows := getattr(self, kind))}
        wanted = {kind: [each[kind] for each in counts] for kind in own}
        width = 0 if self.hidden is None else len(self.hidden)
        if len(self.layers) != len(counts) or own != wanted or width not in (0, hidden):
            sizes = _in_words(len(self.layers), own, width), _in_words(len(counts), wanted, hidden)
            raise InputError("scores", sizes[0], f"scores of this model, {sizes[1]}")

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
        """Read what `save` wrote.

        Raises:
            InputError: if the file is not of scores.
        """
        with saved_tensors(path, "scores", "scores saved by Importance.save") as file:
            keys = list(file.keys())
            found: dict[str, Any] = {kind: file.get_tensor(kind) for kind in WHOLE if kind in keys}
            for kind in BY_LAYER:
                count = sum(key.startswith(f"{kind}.") for key in keys)
                found[kind] = tuple(file.get_tensor(f"{kind}.{i}") for i in range(count))
            return cls(**file.metadata(), **found)


def _in_words(layers: int, counts: Mapping[str, Sequence[int]], width: int) -> str:
    """A model's size for a message: "4 layers, heads 4 4 2 4, neurons 64 64 64 64, 32 channels", cut after five layers."""
    units = [f"{kind} {' '.join(map(str, row[:5]))}{' ...' if len(row) > 5 else ''}" for kind, row in counts.items()]
    return ", ".join([f"{layers} layers", *units, f"{width} channels"])


def score(
    statistics: Statistics, criterion: str = "fisher", seed: int = 0, layer_criterion: str | None = None
) -> Importance:
    """Scores of all units, a pure function of the statistics: another criterion costs no data.

    Args:
        statistics: from `collect_statistics`.
        criterion: one of `distill_llm.pruning.criteria`, where each is explained, or one of your own.
        seed: of criterion random.
        layer_criterion: a criterion of their own for the scores of whole layers; None: `criterion`.

    Raises:
        InputError: there is no such criterion, the statistics lack what it needs, or its scores are not a finite number for each
            unit.
    """
    if layer_criterion is not None:
        layers = score(statistics, layer_criterion, seed).layers
        return replace(score(statistics, criterion, seed), layers=layers, layer_criterion=layer_criterion)
    chosen = find_criterion(criterion)
    _check_needs(statistics, chosen)
    if chosen.layers_only:
        layers = chosen.scores(Declared(statistics, chosen))
        return Importance(criterion, (), (), checked_scores(layers, len(statistics.similarity), criterion, "layers"))
    generator = torch.Generator().manual_seed(seed)
    seen = Seen(max(statistics.examples, 1), max(statistics.tokens, 1), generator)

    def scores_of(units: UnitStatistics, kind: str) -> torch.Tensor:
        found = chosen.scores(Declared(units, chosen), seen)
        return checked_scores(found, len(units.magnitude), criterion, kind)

    rows = {kind: tuple(scores_of(units, kind) for units in getattr(statistics, kind)) for kind in BY_LAYER}
    whole = {kind: scores_of(getattr(statistics, kind), kind) for kind in WHOLE}
    return Importance(criterion, **rows, **whole)  # type: ignore[arg-type]


def _check_needs(statistics: Statistics, criterion: Criterion) -> None:
    """Raise InputError where the statistics lack what the criterion needs."""
    if "gradients" in criterion.needs and not statistics.has_gradients:
        raise InputError(
            "criterion", criterion.name, "statistics collected with a loss, or a criterion without gradients"
        )
    if "leave_one_out" in criterion.needs and statistics.without is None:
        raise InputError("criterion", criterion.name, fix="complete the statistics with leave_one_out(...) first")
    if "activations" in criterion.needs and not statistics.tokens:
        raise InputError(
            "criterion", criterion.name, fix="collect the statistics over calibration data: they saw no token"
        )
