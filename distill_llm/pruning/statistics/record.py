"""The statistics of every unit of a model that one pass over calibration data finds, and their file."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from distill_llm.common.tensors import saved_tensors
from distill_llm.pruning.statistics.moments import Moments

# Statistics with a row per layer, a value per unit of the layer; and those with one row.
BY_LAYER = ("heads", "neurons", "queries")
WHOLE = ("layers", "attention", "ffn", "hidden")


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
    """

    taylor: torch.Tensor
    fisher: torch.Tensor
    activation: torch.Tensor
    wanda: torch.Tensor
    magnitude: torch.Tensor
    magnitude_l1: torch.Tensor


class StreamTensor(NamedTuple):
    """A tensor of the residual stream's channels: the name of the norm that gives it out ("": none), and its readers'."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Statistics:
    """What one pass found.

    Attributes:
        heads, neurons, queries: a row per layer, with a value per unit. A head is a KV group where queries share keys.
        layers, attention, ffn: a value per layer, of all of it, its attention or its FFN.
        hidden: a value per channel of the residual stream.
        similarity: per layer, the sum over tokens of the cosine between its input and output.
        without: per layer, the loss per example without it, less that of the whole model; None before `leave_one_out`.
        moments: per layer, weighted first and second moments of the inputs of the attention-output and FFN-down linears; empty
            if they were not collected. `LayerMoments` collects them when they are read.
        hidden_moments: the same of the tensors that norms of the residual stream give out and linears read; empty if they were
            not collected.
        examples, tokens: how many were seen, padding left out.
        has_gradients: whether the pass had a loss.
    """

    heads: tuple[UnitStatistics, ...]
    neurons: tuple[UnitStatistics, ...]
    queries: tuple[UnitStatistics, ...]
    layers: UnitStatistics
    attention: UnitStatistics
    ffn: UnitStatistics
    hidden: UnitStatistics
    similarity: torch.Tensor
    moments: Sequence[tuple[Moments, Moments]]
    examples: int
    tokens: int
    has_gradients: bool
    without: torch.Tensor | None = None
    hidden_moments: tuple[tuple[StreamTensor, Moments], ...] = ()

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors."""
        tensors = {"similarity": self.similarity}
        if self.without is not None:
            tensors["without"] = self.without
        for kind in (*BY_LAYER, *WHOLE):
            rows: Iterable[UnitStatistics] = getattr(self, kind) if kind in BY_LAYER else (getattr(self, kind),)
            for i, row in enumerate(rows):
                tensors.update({f"{kind}.{i}.{f.name}": getattr(row, f.name) for f in fields(UnitStatistics)})
        for i, pair in enumerate(self.moments):
            for kind, moments in zip(("attention", "ffn"), pair, strict=True):
                tensors[f"moments.{i}.{kind}.mean"], tensors[f"moments.{i}.{kind}.second"] = moments
        for i, (_, moments) in enumerate(self.hidden_moments):
            tensors[f"hidden_moments.{i}.mean"], tensors[f"hidden_moments.{i}.second"] = moments
        metadata = {name: str(int(getattr(self, name))) for name in ("examples", "tokens", "has_gradients")}
        metadata["hidden_moments"] = json.dumps([tensor for tensor, _ in self.hidden_moments])
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            InputError: if the file is not of statistics.
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

            count = sum(name.startswith("moments.") and name.endswith(".ffn.mean") for name in names)
            return cls(
                heads=units("heads"),
                neurons=units("neurons"),
                queries=units("queries"),
                layers=units("layers")[0],
                attention=units("attention")[0],
                ffn=units("ffn")[0],
                hidden=units("hidden")[0],
                similarity=get("similarity"),
                moments=tuple((moments(f"moments.{i}.attention"), moments(f"moments.{i}.ffn")) for i in range(count)),
                examples=int(meta["examples"]),
                tokens=int(meta["tokens"]),
                has_gradients=bool(int(meta["has_gradients"])),
                without=get("without") if "without" in names else None,
                hidden_moments=tuple(
                    (StreamTensor(norm, tuple(readers)), moments(f"hidden_moments.{i}"))
                    for i, (norm, readers) in enumerate(json.loads(meta["hidden_moments"]))
                ),
            )
