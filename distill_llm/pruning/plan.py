"""The pruning plan: which layers, heads and neurons stay, chosen from scores under a budget, kept as plain JSON."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from distill_llm.errors import InputError, one_of
from distill_llm.pruning.criteria import Importance
from distill_llm.pruning.structure import Costs, LayerShape, hidden_size, layer_shapes, unit_costs

Unit = Literal["heads", "neurons", "layers"]
UNITS = ("heads", "neurons", "layers")


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
        for row in self.layers:
            _ascending(f"plan.layers[source={row.source}].heads", row.heads, shapes[row.source].heads)
            _ascending(f"plan.layers[source={row.source}].neurons", row.neurons, shapes[row.source].neurons)
            _check_queries(row, shapes[row.source])
        if self.hidden is not None:
            _ascending("plan.hidden", self.hidden, hidden_size(model))
            if not self.hidden:
                raise InputError("plan.hidden", [], "at least one channel that stays")

    def share(self, model: PreTrainedModel, cost: str = "params", sequence_length: int = 128) -> float:
        """The share of the layers' cost that the plan keeps of `model`."""
        costs = unit_costs(model, cost, sequence_length)
        shapes = [(len(r.heads), len(r.neurons), None if r.queries is None else len(r.queries)) for r in self.layers]
        return costs.of(shapes, None if self.hidden is None else len(self.hidden)) / costs.of(layer_shapes(model))


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
        raise InputError(field, list(row.queries), "equally many queries, at least one, of every kept group, and of no other")


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


def plan_pruning(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    *,
    cost: Literal["params", "flops"] = "params",
    units: Sequence[Unit] = ("heads", "neurons"),
    scope: Literal["global", "local"] = "global",
    round_to: int = 1,
    uniform: bool = False,
    sequence_length: int = 128,
) -> PruningPlan:
    """Choose what stays so that `keep` of the layers' cost remains, never more, and as near below as the units allow.

    With scope "global" units compete over all layers; where the criterion's scores are comparable between kinds of units
    (Fisher) heads, neurons and whole layers compete together by score per cost, else each kind keeps the same share.
    With scope "local" every layer keeps the same share of its heads and of its neurons. `uniform` gives every layer the same
    number, which stock configs can say for neurons.

    Args:
        scores: from `score(...)`, for this very model.
        keep: share of the layers' cost (parameters, or FLOPs at `sequence_length` tokens), in (0, 1].
        units: what may be removed.
        round_to: neurons of a layer stay in multiples of this.

    Raises:
        InputError: for a value out of range, or a `keep` that these units cannot reach.
    """
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a share above 0 and at most 1")
    if round_to < 1:
        raise InputError("round_to", round_to, "a whole number of at least 1")
    if scope not in ("global", "local"):
        raise InputError("scope", scope, one_of(("global", "local"), scope))
    wrong = [unit for unit in units if unit not in UNITS]
    if wrong or not units:
        raise InputError("units", list(units), "one or more of " + ", ".join(UNITS))
    scores.require(units)
    shapes, costs = layer_shapes(model), unit_costs(model, cost, sequence_length)
    scores.check(shapes)
    budget = keep * costs.of(shapes)
    if tuple(units) == ("layers",):
        kept = _whole_layers(scores, shapes, costs, budget)
    elif "layers" in units and not scores.comparable:
        raise InputError(
            "units",
            list(units),
            f"layers alone, or criterion fisher: {scores.criterion!r} scores do not compare over kinds",
        )
    elif scope == "global" and not uniform and scores.comparable:
        kept = _together(scores, shapes, costs, budget, tuple(units))
    else:
        kept = _per_kind(
            scores, shapes, costs, budget, tuple(units), local=scope == "local" or uniform, uniform=uniform
        )
    if "neurons" in units:
        kept = _round_neurons(kept, scores, shapes, costs, budget, round_to, uniform)
    return _to_plan(model, kept, costs, keep)


# A choice while it is being made: per layer the kept heads and neurons as boolean vectors, or None for a removed layer.
Kept = list[tuple[torch.Tensor, torch.Tensor] | None]


def _everything(shapes: Sequence[LayerShape]) -> Kept:
    return [(torch.ones(s.heads, dtype=torch.bool), torch.ones(s.neurons, dtype=torch.bool)) for s in shapes]


def _cost(kept: Kept, costs: Costs) -> float:
    return costs.of([(int(row[0].sum()), int(row[1].sum())) for row in kept if row is not None])


def _whole_layers(scores: Importance, shapes: Sequence[LayerShape], costs: Costs, budget: float) -> Kept:
    kept = _everything(shapes)
    assert scores.layers is not None
    for layer in scores.layers.argsort().tolist():
        if _cost(kept, costs) <= budget * (1 + 1e-9) or sum(row is not None for row in kept) == 1:
            break
        kept[layer] = None
    _reachable(_cost(kept, costs), budget, costs, shapes, ("layers",))
    return kept


def _together(
    scores: Importance, shapes: Sequence[LayerShape], costs: Costs, budget: float, units: tuple[str, ...]
) -> Kept:
    """Remove the least score per cost first until the budget holds. (What this removes too much, `_round_neurons` puts back.)"""
    kept = _everything(shapes)
    order: list[tuple[float, str, int, int]] = []
    for i, shape in enumerate(shapes):
        if "heads" in units:
            order += [(v / costs.head, "heads", i, j) for j, v in enumerate(scores.heads[i].tolist())]
        if "neurons" in units:
            order += [(v / costs.neuron, "neurons", i, j) for j, v in enumerate(scores.neurons[i].tolist())]
        if "layers" in units:
            order.append((scores.layers[i].item() / costs.of([shape]), "layers", i, 0))
    left = costs.of(shapes)
    for _, kind, i, j in sorted(order):
        row = kept[i]
        if left <= budget:
            break
        if row is None:
            continue
        if kind == "layers":
            price = costs.of([(int(row[0].sum()), int(row[1].sum()))])
            if left - price < 0.99 * budget or sum(other is not None for other in kept) == 1:
                continue
            kept[i] = None
        else:
            price = costs.head if kind == "heads" else costs.neuron
            row[kind == "neurons"][j] = False
        left -= price
    _reachable(left, budget, costs, shapes, units)
    return kept


def _per_kind(
    scores: Importance,
    shapes: Sequence[LayerShape],
    costs: Costs,
    budget: float,
    units: tuple[str, ...],
    *,
    local: bool,
    uniform: bool,
) -> Kept:
    """Each kind keeps the same share: over all layers, or within each (`local`); neurons take up what heads leave over."""
    kept = _everything(shapes)
    heads, neurons = sum(s.heads for s in shapes), sum(s.neurons for s in shapes)
    movable_neurons = neurons * costs.neuron * ("neurons" in units)
    movable = heads * costs.head * ("heads" in units) + movable_neurons
    _reachable(costs.of(shapes) - movable, budget, costs, shapes, units)
    if not movable:
        return kept
    share = (budget - (costs.of(shapes) - movable)) / movable
    if "heads" in units:
        # A head is dear: the nearest number, if the neurons can make up the difference.
        _keep_top(kept, 0, scores.heads, share, local, uniform, nearest=True)
        if _cost(kept, costs) - movable_neurons > budget:
            _keep_top(kept, 0, scores.heads, share, local, uniform)
    if movable_neurons:
        left = budget - (_cost(kept, costs) - movable_neurons)
        _keep_top(kept, 1, scores.neurons, left / movable_neurons, local, uniform)
    return kept


def _keep_top(
    kept: Kept,
    kind: int,
    scores: Sequence[torch.Tensor],
    share: float,
    local: bool,
    uniform: bool,
    nearest: bool = False,
) -> None:
    rows = [row[kind] for row in kept if row is not None]
    share = min(max(share, 0.0), 1.0)
    if local:
        fewest = min(len(row) for row in rows)
        for row, values in zip(rows, scores, strict=True):
            count = share * (fewest if uniform else len(row))
            count = round(count) if nearest else int(count + 1e-6)
            row[:] = False
            row[values.argsort(descending=True)[:count]] = True
    else:
        flat = torch.cat(list(scores))
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[flat.argsort(descending=True)[: int(share * len(flat) + 1e-6)]] = True
        for row, part in zip(rows, chosen.split([len(row) for row in rows]), strict=True):
            row[:] = part


def _round_neurons(
    kept: Kept,
    scores: Importance,
    shapes: Sequence[LayerShape],
    costs: Costs,
    budget: float,
    round_to: int,
    uniform: bool,
) -> Kept:
    """Bring every layer's neurons to a multiple of `round_to`, then spend what is left of the budget on whole blocks."""
    alive = [i for i, row in enumerate(kept) if row is not None]
    counts = {i: int(kept[i][1].sum()) // round_to * round_to for i in alive}  # type: ignore[index, misc]
    ranked = {i: scores.neurons[i].argsort(descending=True) for i in alive}
    spare = budget - (_cost(kept, costs) - costs.neuron * sum(int(kept[i][1].sum()) - counts[i] for i in alive))  # type: ignore[index, misc]
    while True:
        group = alive if uniform else []
        if not uniform:
            best = -1.0
            for i in alive:
                block = ranked[i][counts[i] : counts[i] + round_to]
                worth = scores.neurons[i][block].sum().item() if len(block) == round_to else -1.0
                if worth > best:
                    best, group = worth, [i]
        price = costs.neuron * round_to * len(group)
        if not group or price > spare or any(counts[i] + round_to > shapes[i].neurons for i in group):
            break
        for i in group:
            counts[i] += round_to
        spare -= price
    for i in alive:
        mask = kept[i][1]  # type: ignore[index, misc]
        mask[:] = False
        mask[ranked[i][: counts[i]]] = True
    return kept


def _reachable(left: float, budget: float, costs: Costs, shapes: Sequence[LayerShape], units: tuple[str, ...]) -> None:
    if left > budget * (1 + 1e-9):
        total = costs.of(shapes)
        raise InputError(
            "keep",
            round(budget / total, 4),
            f"at least {left / total:.4f} when only {' and '.join(units)} can be removed",
        )


def _to_plan(model: PreTrainedModel, kept: Kept, costs: Costs, keep: float) -> PruningPlan:
    layers = tuple(
        LayerPlan(i, tuple(row[0].nonzero().flatten().tolist()), tuple(row[1].nonzero().flatten().tolist()))
        for i, row in enumerate(kept)
        if row is not None
    )
    share = _cost(kept, costs) / costs.of(layer_shapes(model))
    note = None
    if abs(share - keep) > 0.01 * keep:
        note = (
            f"kept {share:.4f} of the layers' {costs.name} where {keep} was asked for: these units come in larger steps"
        )
    return PruningPlan(model.config.model_type, layers, share, note)
