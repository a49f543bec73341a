"""The statistics of every unit of a model that one pass over calibration data finds, and their file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from distill_llm.architectures.family import READER_NAMES
from distill_llm.architectures.lineage import LAYER_UNITS
from distill_llm.common.files import written_whole
from distill_llm.common.finite import NotFinite, first_unsound
from distill_llm.common.tensors import saved_tensors
from distill_llm.pruning.statistics.moments import Moments
from distill_llm.pruning.units.kinds import KINDS

NUMBERS = ("examples", "tokens", "has_gradients", "has_weight_gradients", "has_refit")
"""Attributes of `Statistics` that its file holds as whole numbers."""


@dataclass(frozen=True)
class UnitStatistics:
    """Sums over the calibration data, a value per unit.

    Attributes:
        taylor: over examples, |sum over tokens of a g|.
        fisher: over examples, (sum over tokens of a g)^2.
        activation: over tokens, a^2.
        wanda: over the unit's channels, the norm over tokens of the channel times the L1 norm of the weights that read it. No
            weights read whole layers: there it is the norm alone.
        magnitude: over the weights that make and use the unit, their squares (needs no data).
        magnitude_l1: over the same weights, their absolute values.
        fluctuation: no sum, but standardised: (f - mean) / standard deviation over the channels of the layer, averaged over the
            unit's; f is the variance of a channel over tokens times the squared norm of the weights that read it. 0 for
            units that are not in a layer.
        weight_taylor: over the weights of magnitude, |weight times the loss's gradient there, summed over examples|. 0 where no
            gradients of weights were collected.
        refit: what removal adds to the squared error per token of the output of the linear that reads the unit, if the units that
            are left take over; the cheapest goes first (see `removal_costs`). 0 before `refit_costs`, and for units that are
            not in a layer.
        removal: the same where none takes over, for each unit alone.
    """

    taylor: torch.Tensor
    fisher: torch.Tensor
    activation: torch.Tensor
    wanda: torch.Tensor
    magnitude: torch.Tensor
    magnitude_l1: torch.Tensor
    fluctuation: torch.Tensor
    weight_taylor: torch.Tensor
    refit: torch.Tensor
    removal: torch.Tensor


class StreamTensor(NamedTuple):
    """A tensor of the residual stream's channels: the name of the norm that gives it out ("": none), and its readers'."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Statistics:
    """What one pass found.

    Each kind of unit is an attribute, too: `heads` (KV groups where queries share keys), `neurons` and `queries` are a tuple
    with a row per layer, a value per unit; `layers`, `attention` and `ffn` have a value per layer; `hidden` has one per
    channel of the residual stream.

    Attributes:
        units: by kind, these statistics: a row per layer for the kinds of `LAYER_UNITS`, one row for the others.
        similarity: per layer, the sum over tokens of the cosine between its input and output.
        without: per layer, the loss per example without it, less that of the whole model; None before `leave_one_out`.
        moments: per layer, weighted first and second moments of the inputs of the linears that read its units (`Family.readers`:
            attention-output, FFN-down); empty if they were not collected. `LayerMoments` collects them when they are read.
        hidden_moments: the same of the tensors that norms of the residual stream give out and linears read; empty if they were
            not collected.
        examples, tokens: how many were seen, padding left out.
        has_gradients: whether the pass had a loss.
        has_weight_gradients: whether it took gradients of the weights, too.
        has_refit: whether `refit_costs` has completed them.
    """

    units: Mapping[str, tuple[UnitStatistics, ...] | UnitStatistics]
    similarity: torch.Tensor
    moments: Sequence[tuple[Moments, ...]]
    examples: int
    tokens: int
    has_gradients: bool
    without: torch.Tensor | None = None
    hidden_moments: tuple[tuple[StreamTensor, Moments], ...] = ()
    has_weight_gradients: bool = False
    has_refit: bool = False

    def __getattr__(self, kind: str) -> Any:
        if kind == "units" or kind not in self.units:
            raise AttributeError(f"Statistics has no {kind!r}")
        return self.units[kind]

    def check(self) -> "Statistics":
        """The statistics themselves, once every number is finite: by others any units would be removed.

        Moments that are collected when they are read are looked at where they are used.

        Raises:
            NotFinite: names the statistic, its kind of unit and the layer.
        """
        tensors = self._tensors(isinstance(self.moments, tuple))
        if (found := first_unsound(tensors)) is None:
            return self
        name, *rest = found[0].split(".")
        layer = int(rest[0]) if rest and name in (*LAYER_UNITS, "moments") else None
        if layer is None and name != "hidden_moments":
            unsound = (~tensors[found[0]].isfinite()).nonzero()[0].item()
            layer = None if name == "hidden" else int(unsound)
        what = f"{rest[-1]} of {name}" if rest else name
        fix = "calibrate a model with finite outputs, in float32 or bfloat16: in float16 it may overflow"
        raise NotFinite(what, found[1], fix, stage="statistics", layer=layer)

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors, whole or not at all; errors as of `check`."""
        metadata = {name: str(int(getattr(self.check(), name))) for name in NUMBERS}
        metadata["hidden_moments"] = json.dumps([tensor for tensor, _ in self.hidden_moments])
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        with written_whole(Path(path)) as file:
            save_file(tensors, file, metadata)

    def _tensors(self, with_moments: bool = True) -> dict[str, torch.Tensor]:
        """All numbers by the names that they have in files."""
        tensors = {"similarity": self.similarity}
        if self.without is not None:
            tensors["without"] = self.without
        for kind, rows in self.units.items():
            for i, row in enumerate(rows if isinstance(rows, tuple) else (rows,)):
                tensors.update({f"{kind}.{i}.{f.name}": getattr(row, f.name) for f in fields(UnitStatistics)})
        for i, pair in enumerate(self.moments if with_moments else ()):
            for name, moments in zip(READER_NAMES, pair, strict=True):
                tensors[f"moments.{i}.{name}.mean"], tensors[f"moments.{i}.{name}.second"] = moments
        for i, (_, moments) in enumerate(self.hidden_moments):
            tensors[f"hidden_moments.{i}.mean"], tensors[f"hidden_moments.{i}.second"] = moments
        return tensors

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            InputError: if the file is not of statistics, or they are not finite.
        """
        with saved_tensors(path, "statistics", "statistics saved by Statistics.save") as file:
            names, get, meta = set(file.keys()), file.get_tensor, file.metadata()

            def units(kind: str) -> tuple[UnitStatistics, ...]:
                count = sum(name.startswith(f"{kind}.") and name.endswith(".taylor") for name in names)
                return tuple(
                    UnitStatistics(*(get(f"{kind}.{i}.{f.name}") for f in fields(UnitStatistics))) for i in range(count)
                )

            def moments(name: str) -> Moments:
                return Moments(get(f"{name}.mean"), get(f"{name}.second"))

            inside = {kind: rows for kind in LAYER_UNITS if (rows := units(kind))}
            whole = {kind: rows[0] for kind, its in KINDS.items() if its.source and (rows := units(kind))}
            count = sum(name.startswith("moments.") and name.endswith(f".{READER_NAMES[0]}.mean") for name in names)
            read = cls(
                units={**inside, **whole},
                similarity=get("similarity"),
                moments=tuple(
                    tuple(
                        moments(f"moments.{i}.{name}") for name in READER_NAMES if f"moments.{i}.{name}.mean" in names
                    )
                    for i in range(count)
                ),
                examples=int(meta["examples"]),
                tokens=int(meta["tokens"]),
                has_gradients=bool(int(meta["has_gradients"])),
                has_weight_gradients=bool(int(meta["has_weight_gradients"])),
                has_refit=bool(int(meta["has_refit"])),
                without=get("without") if "without" in names else None,
                hidden_moments=tuple(
                    (StreamTensor(norm, tuple(readers)), moments(f"hidden_moments.{i}"))
                    for i, (norm, readers) in enumerate(json.loads(meta["hidden_moments"]))
                ),
            )
        return read.check()
