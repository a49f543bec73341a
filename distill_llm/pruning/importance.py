"""What every unit of a model is worth: scores by a criterion, and their file."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distill_llm.architectures.lineage import LAYER_UNITS, Counts
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.finite import NotFinite, first_unsound
from distill_llm.common.tensors import saved_tensors
from distill_llm.pruning.criteria import CRITERIA, Criterion, Seen, find_criterion, is_comparable, ranks_layers_only
from distill_llm.pruning.declared import Declared, checked_scores
from distill_llm.pruning.statistics.record import Statistics, UnitStatistics
from distill_llm.pruning.units.kinds import KINDS

Scores = torch.Tensor | tuple[torch.Tensor, ...]
"""Of a kind inside layers a vector per layer, with a score per unit; of another kind one vector."""
IN_ORDER = ("heads", "neurons", "layers", "queries", "attention", "ffn", "hidden")
"""Kinds in the order of `Importance`'s arguments; others are given by name."""


@dataclass(frozen=True, init=False)
class Importance:
    """Scores of a model's units.

    Each kind is an attribute, too. `heads` (KV groups), `neurons` and `queries` have a vector per layer, with a score per unit;
    they are empty where the criterion ranks layers only. `layers`, `attention` and `ffn` have a score per layer, `hidden` one
    per channel of the residual stream; these are None where they were not scored.

    Args:
        in_order: scores of `IN_ORDER`; or give them by name.
        units: the same by kind; names win.

    Attributes:
        units: the scores by kind.
        layer_criterion: what ranked the layers, where it was not `criterion`.

    Raises:
        TypeError: for a kind that has no scores.
    """

    criterion: str
    units: Mapping[str, Scores]
    layer_criterion: str | None

    def __init__(
        self,
        criterion: str,
        *in_order: Iterable[torch.Tensor] | None,
        units: Mapping[str, Scores] | None = None,
        layer_criterion: str | None = None,
        **named: Iterable[torch.Tensor] | None,
    ):
        given = {**(units or {}), **dict(zip(IN_ORDER, in_order, strict=False)), **named}
        if (unknown := [kind for kind in given if not _is_scored(kind)]) or len(in_order) > len(IN_ORDER):
            raise TypeError(
                f"Importance takes scores of kinds that have their own, not of {unknown or in_order[len(IN_ORDER) :]}"
            )
        scored = {
            kind: tuple(rows) if kind in LAYER_UNITS else rows for kind, rows in given.items() if rows is not None
        }
        object.__setattr__(self, "criterion", criterion)
        object.__setattr__(self, "units", scored)
        object.__setattr__(self, "layer_criterion", layer_criterion)

    def __getattr__(self, kind: str) -> Any:
        if not _is_scored(kind):
            raise AttributeError(f"Importance has no {kind!r}")
        return self.units.get(kind, () if kind in LAYER_UNITS else None)

    def comparable(self, units: Collection[str]) -> bool:
        """Whether scores of these kinds of units may be ranked together (they are in the same unit, squared loss)."""
        return is_comparable(self.criterion) and ("layers" not in units or self.layer_criterion is None)

    @property
    def by_cost(self) -> bool:
        """Whether units that compete are ranked by score per cost."""
        return self.criterion not in CRITERIA or CRITERIA[self.criterion].by_cost

    def require(self, units: Sequence[str]) -> None:
        """Raise InputError if there are no scores for one of the units."""
        for unit in units:
            found = getattr(self, unit)
            if found is None or not len(found):
                scored_by = f"statistics collected with {unit}"
                if ranks_layers_only(self.criterion):
                    scored_by = f"a criterion other than {self.criterion}, which ranks layers"
                elif self.criterion in CRITERIA and CRITERIA[self.criterion].units:
                    scored_by = f"a criterion other than {self.criterion}, which does not score them"
                raise InputError("criterion", self.criterion, f"scores of {unit}: {scored_by}")

    def check(self, counts: Sequence[Counts], hidden: int) -> None:
        """Raise InputError unless the scores are finite, and of a model with these units in its layers and `hidden` channels."""
        tensors = self._tensors()
        if (found := first_unsound(tensors)) is not None:
            kind, _, layer = found[0].partition(".")
            fix = "score statistics of finite numbers: by these scores any units would be removed"
            layer = layer or str((~tensors[found[0]].isfinite()).nonzero()[0].item())
            raise NotFinite(f"a score of {kind}", found[1], fix, layer=None if kind == "hidden" else int(layer))
        # What is empty was not scored: `require` judges that.
        own = {kind: list(map(len, rows)) for kind in LAYER_UNITS if (rows := getattr(self, kind))}
        wanted = {kind: [each[kind] for each in counts] for kind in own}
        width = 0 if self.hidden is None else len(self.hidden)
        layers = len(next(iter(own.values()), ()) if self.layers is None else self.layers)
        if layers != len(counts) or own != wanted or width not in (0, hidden):
            sizes = _in_words(layers, own, width), _in_words(len(counts), wanted, hidden)
            raise InputError("scores", sizes[0], f"scores of this model, {sizes[1]}")

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors."""
        tensors = self._tensors()
        names = {"criterion": self.criterion, "layer_criterion": self.layer_criterion}
        metadata = {name: value for name, value in names.items() if value is not None}
        with written_whole(Path(path)) as file:
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All scores by the names that they have in files."""
        tensors: dict[str, torch.Tensor] = {}
        for kind, rows in self.units.items():
            tensors |= {f"{kind}.{i}": row for i, row in enumerate(rows)} if isinstance(rows, tuple) else {kind: rows}
        return tensors

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read what `save` wrote.

        Raises:
            InputError: if the file is not of scores.
        """
        with saved_tensors(path, "scores", "scores saved by Importance.save") as file:
            keys = list(file.keys())
            units: dict[str, Scores] = {kind: file.get_tensor(kind) for kind in keys if "." not in kind}
            for kind in LAYER_UNITS:
                count = sum(key.startswith(f"{kind}.") for key in keys)
                units[kind] = tuple(file.get_tensor(f"{kind}.{i}") for i in range(count))
            return cls(**file.metadata(), units=units)


def _is_scored(kind: str) -> bool:
    """Whether a kind has scores of its own."""
    return kind in LAYER_UNITS or (kind in KINDS and KINDS[kind].source is not None)


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
        scores, ranked = score(statistics, criterion, seed), score(statistics, layer_criterion, seed)
        return replace(scores, units={**scores.units, "layers": ranked.layers}, layer_criterion=layer_criterion)
    chosen = find_criterion(criterion)
    _check_needs(statistics, chosen)
    if chosen.layers_only:
        layers = chosen.scores(Declared(statistics, chosen))
        return Importance(criterion, layers=checked_scores(layers, len(statistics.similarity), criterion, "layers"))
    generator = torch.Generator().manual_seed(seed)
    seen = Seen(max(statistics.examples, 1), max(statistics.tokens, 1), generator)

    def scores_of(units: UnitStatistics, kind: str) -> torch.Tensor:
        scores = chosen.scores(Declared(units, chosen), seen)
        return checked_scores(scores, len(units.magnitude), criterion, kind)

    found: dict[str, Scores] = {
        kind: tuple(scores_of(row, kind) for row in rows) if isinstance(rows, tuple) else scores_of(rows, kind)
        for kind, rows in statistics.units.items()
        if not chosen.units or kind in chosen.units
    }
    return Importance(criterion, units=found)


def _check_needs(statistics: Statistics, criterion: Criterion) -> None:
    """Raise InputError where the statistics lack what the criterion needs."""
    if "gradients" in criterion.needs and not statistics.has_gradients:
        raise InputError(
            "criterion", criterion.name, "statistics collected with a loss, or a criterion that needs no gradients"
        )
    if "weight_gradients" in criterion.needs and not statistics.has_weight_gradients:
        fix = "collect the statistics with a loss and CalibrationSettings(weight_gradients=True)"
        raise InputError("criterion", criterion.name, fix=fix)
    if "refit" in criterion.needs and not statistics.has_refit:
        raise InputError("criterion", criterion.name, fix="complete the statistics with refit_costs(...) first")
    if "leave_one_out" in criterion.needs and statistics.without is None:
        raise InputError("criterion", criterion.name, fix="complete the statistics with leave_one_out(...) first")
    if "activations" in criterion.needs and not statistics.tokens:
        raise InputError(
            "criterion", criterion.name, fix="collect the statistics over calibration data: they saw no token"
        )
