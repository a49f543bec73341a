"""The pruning plan: which layers, heads, neurons and channels stay, kept as plain JSON."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import LayerShape, hidden_size, layer_shapes


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer: indices into the layer `source` of the model that is pruned.

    `heads` are KV groups where queries share keys; `queries`, where not None, the query heads that stay of the kept groups,
    equally many of each.
    """

    source: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    queries: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PruningPlan:
    """Which layers, heads and neurons of a model stay. A layer not in `layers` is removed; an empty tuple removes the
    attention or the FFN of a layer but its output bias. `hidden` are the channels of the residual stream that stay, None: all.

    `kept` is the share of the layers' cost that remains, `note` says why it is not the share that was asked for.
    """

    model_type: str
    layers: tuple[LayerPlan, ...]
    kept: float | None = None
    note: str | None = None
    hidden: tuple[int, ...] | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        record = asdict(self)
        rows = [{k: v for k, v in row.items() if v is not None} for row in record.pop("layers")]
        record = {k: v for k, v in record.items() if v is not None or k != "hidden"}
        Path(path).write_text(json.dumps({"model_type": record.pop("model_type"), "layers": rows, **record}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningPlan":
        """Read a plan from JSON.

        Raises:
            InputError: if the file is not a plan.
        """
        try:
            record = json.loads(Path(path).read_text())
            layers = tuple(
                LayerPlan(r["source"], tuple(r["heads"]), tuple(r["neurons"]), _optional(r.get("queries")))
                for r in record["layers"]
            )
            hidden = _optional(record.get("hidden"))
            return cls(record["model_type"], layers, record.get("kept"), record.get("note"), hidden)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("plan", str(path), f"a plan saved by PruningPlan.save ({error})") from error

    def check(self, model: PreTrainedModel) -> None:
        """Raise InputError unless the plan fits the model's family and every index exists in it, once and ascending."""
        if self.model_type != model.config.model_type:
            raise InputError("plan.model_type", self.model_type, f"the model's {model.config.model_type!r}")
        shapes = layer_shapes(model)
        _ascending("plan.layers[].source", [row.source for row in self.layers], len(shapes))
        if not self.layers:
            raise InputError("plan.layers", [], "at least one layer that stays")
        if family_of(model).anchored and (self.layers[0].source or self.hidden is not None):
            what = "without layer 0" if self.layers[0].source else "with hidden"
            raise InputError("plan", what, "layer 0 and every channel of a model with a convolution after that layer")
        for row in self.layers:
            _ascending(f"plan.layers[source={row.source}].heads", row.heads, shapes[row.source].heads)
            _ascending(f"plan.layers[source={row.source}].neurons", row.neurons, shapes[row.source].neurons)
            _check_queries(row, shapes[row.source])
        if self.hidden is not None:
            _ascending("plan.hidden", self.hidden, hidden_size(model))
            if not self.hidden:
                raise InputError("plan.hidden", [], "at least one channel that stays")

    def share(
        self, model: PreTrainedModel, cost: str = "params", batch_size: int = 32, sequence_length: int = 64
    ) -> float:
        """The share of the layers' cost (see `unit_costs`) that the plan keeps of `model`."""
        costs, shapes, kept = unit_costs(model, cost, batch_size, sequence_length), layer_shapes(model), []
        for row in self.layers:
            whole = shapes[row.source]
            shared = (whole.queries or whole.heads) // whole.heads if whole.heads else 0
            queries = len(row.heads) * shared if row.queries is None else len(row.queries)
            kept.append((len(row.heads), len(row.neurons), queries))
        width, layers = None if self.hidden is None else len(self.hidden), [row.source for row in self.layers]
        return costs.of(kept, width, layers) / costs.of(shapes)


def _optional(indices: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if indices is None else tuple(indices)


def _check_queries(row: LayerPlan, shape: LayerShape) -> None:
    if row.queries is None:
        return
    field, every = f"plan.layers[source={row.source}].queries", shape.queries or shape.heads
    _ascending(field, row.queries, every)
    shared = every // shape.heads if shape.heads else 1
    of_group = Counter(query // shared for query in row.queries)
    if set(of_group) != set(row.heads) or len(set(of_group.values())) > 1:
        raise InputError(
            field, list(row.queries), "equally many queries, at least one, of every kept group, and of no other"
        )


def _ascending(field: str, indices: Sequence[int], size: int) -> None:
    whole = all(isinstance(index, int) for index in indices)
    if not whole or list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise InputError(field, list(indices), f"ascending indices from 0 to {size - 1}, each once")


def full_plan(model: PreTrainedModel) -> PruningPlan:
    """The plan that keeps everything."""
    layers = tuple(
        LayerPlan(i, tuple(range(shape.heads)), tuple(range(shape.neurons)))
        for i, shape in enumerate(layer_shapes(model))
    )
    return PruningPlan(model.config.model_type, layers, 1.0)


def keep_layers(model: PreTrainedModel, sources: Sequence[int]) -> PruningPlan:
    """The plan that keeps the named layers whole and removes the others.

    Raises:
        InputError: if an index does not exist.
    """
    count = len(layer_shapes(model))
    _ascending("layers", sources, count)
    if not sources:
        raise InputError("layers", [], "at least one layer that stays")
    layers = tuple(full_plan(model).layers[i] for i in sources)
    plan = PruningPlan(model.config.model_type, layers)
    return PruningPlan(plan.model_type, layers, plan.share(model))
