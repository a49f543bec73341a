"""What stays of a model, by kind of unit: the record that plans are made of, and that a pruned model's config holds.

Needs nothing but transformers' config class: checkpoints of pruned models hold a copy of this file.

A lineage is the plan that makes a pruned model of its original teacher. A pruned model's `config.pruning` holds it: `layers`,
a row per layer, with the `source` layer in the original and, by kind of unit, the kept indices there, as ranges ("0,3-5"); by
kind too, what stays of the model as a whole (`hidden`); and `stock`, the sizes in the original's config.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

Counts = Mapping[str, int]
"""How many units of every kind a layer has."""


@dataclass(frozen=True)
class LayerUnit:
    """A kind of unit inside a layer.

    Attributes:
        letter: how the layouts of a family's row call the channels of these units.
        by_head: whether a unit is as many channels as a head has; else one.
        within: the kind whose units each hold equally many of these, one after the other.
        named: whether every row of a plan names this kind; of others, a row that names none keeps all (that are within what
            it keeps).
    """

    letter: str
    by_head: bool = False
    within: str | None = None
    named: bool = False


LAYER_UNITS: dict[str, LayerUnit] = {
    "heads": LayerUnit("kv", by_head=True, named=True),
    "neurons": LayerUnit("n", named=True),
    "queries": LayerUnit("q", by_head=True, within="heads"),
}
"""In the order of files, and of `LayerPlan`'s arguments."""


def kinds_of(letter: str) -> list[str]:
    """The kinds of units that the channels of this letter are: the one that is called so, then those that it is within."""
    kind = next((kind for kind, unit in LAYER_UNITS.items() if unit.letter == letter), None)
    found = []
    while kind is not None:
        found.append(kind)
        kind = LAYER_UNITS[kind].within
    return found


MODEL_UNITS: list[str] = ["hidden"]
"""Kinds of units that belong to the model as a whole: the channels of the residual stream."""


@dataclass(frozen=True, init=False)
class LayerPlan:
    """What stays of one layer: for each kind of unit the indices that are kept, ascending, in the layer `source`.

    They count in the model that is pruned; in a lineage, in the original teacher. `heads` are KV groups where queries share
    keys; `queries`, where named, are the query heads that stay of the kept groups, equally many of each. Each kind is an
    attribute: None for one that is not named, of which all stay.

    Args:
        source: index of the layer.
        in_order: indices of `heads`, `neurons`, `queries`; or give them by name.
        units: the same by kind; names win.

    Raises:
        TypeError: without heads or neurons, or for a kind that does not exist.
    """

    source: int
    units: Mapping[str, tuple[int, ...]]

    def __init__(
        self,
        source: int,
        *in_order: Iterable[int] | None,
        units: Mapping[str, Iterable[int] | None] | None = None,
        **named: Iterable[int] | None,
    ):
        given = {**(units or {}), **dict(zip(LAYER_UNITS, in_order, strict=False)), **named}
        missing = [kind for kind, unit in LAYER_UNITS.items() if unit.named and given.get(kind) is None]
        if missing or given.keys() - LAYER_UNITS.keys() or len(in_order) > len(LAYER_UNITS):
            raise TypeError(f"LayerPlan takes units of {', '.join(LAYER_UNITS)}, and always those of heads and neurons")
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "units", _in_order(given, LAYER_UNITS))

    def __getattr__(self, kind: str) -> Any:
        if kind not in LAYER_UNITS:
            raise AttributeError(f"LayerPlan has no {kind!r}")
        return self.units.get(kind)

    def __hash__(self) -> int:
        return hash((self.source, *self.units.items()))

    def indices(self, kind: str, counts: Counts) -> Sequence[int]:
        """The units of a kind that stay of a layer with `counts`, named or not."""
        if kind in self.units:
            return self.units[kind]
        if (outer := LAYER_UNITS[kind].within) is None:
            return range(counts[kind])
        return _inside(self.indices(outer, counts), kind, counts)

    def counts(self, counts: Counts) -> dict[str, int]:
        """How many units of every kind stay of a layer with `counts`."""
        return {kind: len(self.indices(kind, counts)) for kind in LAYER_UNITS if kind in counts}

    def then(self, second: "LayerPlan", counts: Counts) -> "LayerPlan":
        """What stays of a layer with `counts` after `self`, and then `second` of what is left."""
        found: dict[str, Sequence[int] | None] = {}
        for kind, unit in LAYER_UNITS.items():
            if unit.within is None or not {kind} & {*self.units, *second.units}:
                found[kind] = _then(self.units.get(kind), second.units.get(kind))
                continue
            known = self.indices(kind, counts)
            left = {kind: len(known), unit.within: len(self.indices(unit.within, counts))}
            kept = tuple(known[i] for i in second.indices(kind, left))
            outer = found[unit.within]
            every = _inside(range(counts[unit.within]) if outer is None else outer, kind, counts)
            found[kind] = None if kept == every else kept
        return LayerPlan(self.source, units=found)

    def counted_in(self, other: "LayerPlan", place: int, counts: Counts) -> "LayerPlan":
        """The same units counted in what `other` left of the same layer, which is now at `place`: `other` then it is `self`.

        Kinds that are within another are named.

        Raises:
            ValueError: where `other` left less than `self`.
        """
        found: dict[str, Sequence[int]] = {}
        for kind in LAYER_UNITS:
            if kind in counts or kind in self.units:
                there = {unit: i for i, unit in enumerate(other.indices(kind, counts))}
                kept = self.indices(kind, counts)
                if not there.keys() >= set(kept):
                    raise ValueError(f"some {kind} are not there")
                found[kind] = tuple(there[unit] for unit in kept)
        return LayerPlan(place, units=found)


@dataclass(frozen=True, init=False)
class ModelPlan:
    """What stays of a model: a row per layer that stays, and the kept indices of units that belong to the model as a whole.

    Each kind of these is an attribute, as `hidden`, the channels of the residual stream; None for one that is not named, of
    which all stay.
    """

    layers: tuple[LayerPlan, ...]
    whole: Mapping[str, tuple[int, ...]]

    def __init__(
        self,
        layers: Iterable[LayerPlan],
        *,
        whole: Mapping[str, Iterable[int] | None] | None = None,
        **named: Iterable[int] | None,
    ):
        given = {**(whole or {}), **named}
        if given.keys() - set(MODEL_UNITS):
            raise TypeError(
                f"a plan takes units of {', '.join(MODEL_UNITS)} of the model as a whole, not {sorted(given)}"
            )
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "whole", _in_order(given, MODEL_UNITS))

    def __getattr__(self, kind: str) -> Any:
        if kind not in MODEL_UNITS:
            raise AttributeError(f"{type(self).__name__} has no {kind!r}")
        return self.whole.get(kind)

    def __hash__(self) -> int:
        return hash((self.layers, *self.whole.items()))


def compose(first: ModelPlan, second: ModelPlan, counts: Callable[[int], Counts]) -> ModelPlan:
    """What stays after two plans, the second for what the first leaves.

    Args:
        counts: how many units a layer has of the model that `first` is for.
    """
    layers = []
    for row in second.layers:
        before = first.layers[row.source]
        layers.append(before.then(row, counts(before.source)))
    return ModelPlan(layers, whole={kind: _then(first.whole.get(kind), second.whole.get(kind)) for kind in MODEL_UNITS})


def _inside(outer: Iterable[int], kind: str, counts: Counts) -> tuple[int, ...]:
    """All units of a kind that are within these `outer` ones, in a layer with `counts`."""
    of = counts[LAYER_UNITS[kind].within or kind]
    each = counts[kind] // of if of else 0
    return tuple(unit * each + i for unit in outer for i in range(each))


def _then(first: Sequence[int] | None, second: Sequence[int] | None) -> Sequence[int] | None:
    if first is None or second is None:
        return first if second is None else second
    return tuple(first[i] for i in second)


def _in_order(units: Mapping[str, Iterable[int] | None], kinds: Iterable[str]) -> dict[str, tuple[int, ...]]:
    found = ((kind, units.get(kind)) for kind in kinds)
    return {kind: tuple(indices) for kind, indices in found if indices is not None}


# What a pruned model's config says.


def pack_indices(indices: Iterable[int]) -> str:
    """Ascending indices as ranges: (0, 3, 4, 5) -> "0,3-5"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def unpack_indices(text: str) -> tuple[int, ...]:
    """The reverse of `pack_indices`."""
    indices: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


def packed(lineage: ModelPlan, stock: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage as `config.pruning` holds it, beside `stock`, what the original's config says."""
    rows = [
        {"source": row.source} | {kind: pack_indices(kept) for kind, kept in row.units.items()}
        for row in lineage.layers
    ]
    return {"layers": rows, "stock": stock} | {kind: pack_indices(kept) for kind, kept in lineage.whole.items()}


def lineage_of(model: PreTrainedModel | PreTrainedConfig) -> ModelPlan | None:
    """What a pruned model keeps of its original; None for a model that was never pruned."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    record = getattr(config, "pruning", None)
    if record is None:
        return None
    rows = [
        LayerPlan(row["source"], units={kind: unpack_indices(row[kind]) for kind in LAYER_UNITS if kind in row})
        for row in record["layers"]
    ]
    return ModelPlan(rows, whole={kind: unpack_indices(record[kind]) for kind in MODEL_UNITS if kind in record})


@contextmanager
def stock_values(config: PreTrainedConfig) -> Iterator[None]:
    """Within the context a pruned model's config says what its original's config said."""
    stock = (getattr(config, "pruning", None) or {}).get("stock", {})
    own = {name: getattr(config, name) for name in stock}
    for name, value in stock.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)
