"""The pruning plan: which layers, heads, neurons and channels stay. It is saved as plain JSON."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill_llm.architectures.lineage import LAYER_UNITS, MODEL_UNITS, Counts, LayerPlan, ModelPlan, pack_indices
from distill_llm.common.errors import InputError, first_line, raise_all
from distill_llm.common.files import written_whole
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.refusals import first_layer_faults, width_faults
from distill_llm.pruning.units.sizes import counts_of, hidden_size


@dataclass(frozen=True, init=False)
class PruningPlan(ModelPlan):
    """Which layers, heads and neurons of a model stay.

    A layer that is not in `layers` is removed. An empty tuple removes the attention or the FFN of a layer, except its output
    bias. `hidden` are the channels of the residual stream that stay; None: all.

    `kept` is the share of the layers' cost that stays. `note` says why this is not the share that was asked for.
    """

    model_type: str
    kept: float | None
    note: str | None

    def __init__(
        self,
        model_type: str,
        layers: Iterable[LayerPlan],
        kept: float | None = None,
        note: str | None = None,
        *,
        whole: Mapping[str, Iterable[int] | None] | None = None,
        **named: Iterable[int] | None,
    ):
        super().__init__(layers, whole=whole, **named)
        for name, value in (("model_type", model_type), ("kept", kept), ("note", note)):
            object.__setattr__(self, name, value)

    __hash__ = ModelPlan.__hash__

    def __str__(self) -> str:
        """A short summary, for `print`: the layers, how many units they keep, the share that is kept, the note."""
        sources = pack_indices(row.source for row in self.layers)
        parts = [f"{len(self.layers)} layers ({sources})"]
        for kind in LAYER_UNITS:
            counts = sorted({len(row.units[kind]) for row in self.layers if kind in row.units})
            if counts:
                parts.append(f"{kind} {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") + " per layer")
        parts += [f"{kind} {len(kept)}" for kind, kept in self.whole.items()]
        if self.kept is not None:
            parts.append(f"{100 * self.kept:.1f}% kept")
        return f"{self.model_type} plan: {', '.join(parts)}" + (f" ({self.note})" if self.note else "")

    def record(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        rows = [{"source": row.source, **row.units} for row in self.layers]
        return {"model_type": self.model_type, "layers": rows, "kept": self.kept, "note": self.note, **self.whole}

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        with written_whole(Path(path)) as file:
            file.write_text(json.dumps(self.record()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningPlan":
        """Read a plan from JSON.

        Raises:
            InputError: the file holds no plan.
        """
        try:
            record = json.loads(Path(path).read_text())
            layers = [LayerPlan(row["source"], units={k: row.get(k) for k in LAYER_UNITS}) for row in record["layers"]]
            whole = {kind: record.get(kind) for kind in MODEL_UNITS}
            return cls(record["model_type"], layers, record.get("kept"), record.get("note"), whole=whole)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("plan", str(path), f"a file that PruningPlan.save wrote ({first_line(error)})") from error

    def check(self, model: PreTrainedModel) -> None:
        """Raise InputError unless the plan is of the model's family, and its indices exist, are ascending and occur once."""
        if self.model_type != model.config.model_type:
            raise InputError(
                "plan.model_type", self.model_type, f"{model.config.model_type!r}, the family of the model"
            )
        if self.kept is not None and not isfinite(self.kept):
            raise InputError("plan.kept", self.kept, "the share of the layers' cost that stays, or null")
        counts = counts_of(model)
        _ascending("plan.layers[].source", [row.source for row in self.layers], len(counts))
        if not self.layers:
            raise InputError("plan.layers", [], "at least one layer to keep")
        raise_all(first_layer_faults(model, [row.source for row in self.layers], "plan.layers"))
        raise_all(width_faults(model, self.whole, "plan.hidden", self.hidden))
        for row in self.layers:
            for kind in row.units:
                _check_units(f"plan.layers[source={row.source}].{kind}", kind, row, counts[row.source])
        if self.hidden is not None:
            _ascending("plan.hidden", self.hidden, hidden_size(model))
            if not self.hidden:
                raise InputError("plan.hidden", [], "at least one channel to keep")

    def share(
        self, model: PreTrainedModel, cost: str = "params", batch_size: int = 32, sequence_length: int = 64
    ) -> float:
        """The share of the layers' cost (see `unit_costs`) that the plan keeps in `model`."""
        costs, counts = unit_costs(model, cost, batch_size, sequence_length), counts_of(model)
        layers = [row.source for row in self.layers]
        kept = [row.counts(counts[row.source]) for row in self.layers]
        return costs.of(kept, None if self.hidden is None else len(self.hidden), layers) / costs.of(counts)


def _check_units(field: str, kind: str, row: LayerPlan, counts: Counts) -> None:
    """Raise InputError unless a row's units of a kind exist; units within others (queries) must be equally many in each."""
    _ascending(field, kept := row.units[kind], counts[kind])
    if (outer := LAYER_UNITS[kind].within) is None:
        return
    each = counts[kind] // counts[outer] if counts[outer] else 1
    found = Counter(unit // each for unit in kept)
    if set(found) != set(row.indices(outer, counts)) or len(set(found.values())) > 1:
        raise InputError(
            field,
            list(kept),
            "the same number of queries (at least 1) from every kept group, and none from other groups",
        )


def _ascending(field: str, indices: Sequence[int], size: int) -> None:
    whole = all(isinstance(index, int) for index in indices)
    if not whole or list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise InputError(field, list(indices), f"indices from 0 to {size - 1} in ascending order, each once")


def full_plan(model: PreTrainedModel) -> PruningPlan:
    """The plan that keeps everything."""
    named = [kind for kind, unit in LAYER_UNITS.items() if unit.named]
    layers = [LayerPlan(i, units={k: range(has[k]) for k in named}) for i, has in enumerate(counts_of(model))]
    return PruningPlan(model.config.model_type, layers, 1.0)


def keep_layers(model: PreTrainedModel, sources: Sequence[int]) -> PruningPlan:
    """The plan that keeps the named layers whole and removes the others.

    Raises:
        InputError: an index does not exist.
    """
    count = len(counts_of(model))
    _ascending("layers", sources, count)
    if not sources:
        raise InputError("layers", [], "at least one layer to keep")
    layers = tuple(full_plan(model).layers[i] for i in sources)
    plan = PruningPlan(model.config.model_type, layers)
    return PruningPlan(plan.model_type, layers, plan.share(model))
