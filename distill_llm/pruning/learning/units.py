"""The units that masks are learnt for: in one row, with what each costs, and where its channels are."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.modeling_pruned import layer_axes
from distill_llm.common.errors import InputError, raise_all
from distill_llm.pruning.cutting.masking import is_norm
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of, linear, weight_of

BLOCKS = {"heads": "attention", "neurons": "ffn"}
"""The kinds of units that have masks, and the kind that is all of them in a layer."""
LETTERS = {"q": "heads", "n": "neurons"}
"""Which units the inputs of a linear are, by its layout in the family's row."""


def mask_faults(
    model: PreTrainedModel, units: Collection[str], field: str, given: Any, name: str = "this model"
) -> list[InputError]:
    """A fault of a model whose units cannot be masked one by one, because a norm spans them: each mask would move the others.

    Args:
        units: names of the kinds of units that get masks.
        field, given: what asks for masks.
        name: what the user calls the model.
    """
    spanned, family = set(), family_of(model)
    for layer in layers_of(model):
        for path, (_, layout) in layer_axes(layer, family).items():
            module, _, last = path.rpartition(".")
            if last == "weight" and is_norm(layer.get_submodule(module)):
                spanned.add("neurons" if layout == "n" else "heads")
    found = [kind for kind in BLOCKS if kind in spanned and kind in units]
    fix = f"leave {' and '.join(found)} out of units, or masks out: a norm of {name} spans all {' and '.join(found)} of a layer"
    return [InputError(field, given, fix=fix)] if found else []


@dataclass(frozen=True)
class Run:
    """The units of one kind in one layer, side by side in the row of all."""

    kind: str
    layer: int
    start: int
    count: int

    @property
    def where(self) -> slice:
        """Their places."""
        return slice(self.start, self.start + self.count)


class MaskedUnits:
    """The heads (KV groups) and neurons of a model in one row, U of them: layer by layer, heads first.

    Args:
        model: see `mask_faults`.
        units: "heads", "neurons", or both; "attention" beside heads and "ffn" beside neurons give a layer's a block of their own.
        costs: what units cost.
        may_go: whether units are masked until they are cut; a norm that spans them is then refused.

    Attributes:
        runs: the row, part by part.
        costs: (U,) of each unit, as shares of what all layers cost.
        rest: the share that stays whatever goes.
        blocks: the runs that have a block of their own; block_of: (U,) the number of a unit's block, or that of blocks.

    Raises:
        InputError: the units of this model cannot be masked.
    """

    def __init__(self, model: PreTrainedModel, units: Sequence[str], costs: Costs, may_go: bool = True):
        if may_go:
            raise_all(mask_faults(model, units, "units", list(units)))
        counts, runs, prices, start = counts_of(model), [], [], 0
        for layer, has in enumerate(counts):
            for kind in BLOCKS:
                if kind in units and (count := has[kind]):
                    price = costs.at(kind, layer=layer)
                    if kind == "heads":
                        price += has["queries"] // count * costs.at("queries", layer=layer)
                    runs.append(Run(kind, layer, start, count))
                    prices.append(torch.full((count,), price, dtype=torch.float64))
                    start += count
        if not runs:
            raise InputError("units", list(units), "heads or neurons that the model has")
        self.runs, self.total = tuple(runs), costs.of(counts)
        self.costs = torch.cat(prices) / self.total
        self.rest = 1 - float(self.costs.sum())
        self.blocks = tuple(run for run in runs if BLOCKS[run.kind] in units)
        self.block_of = torch.full((start,), len(self.blocks))
        for number, run in enumerate(self.blocks):
            self.block_of[run.where] = number

    def __len__(self) -> int:
        return len(self.costs)

    def with_blocks(self, units: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """(U,) what each unit gets of its own number and its block's: their product."""
        return units * torch.cat([blocks, blocks.new_ones(1)])[self.block_of.to(blocks.device)]

    def share(self, units: torch.Tensor) -> torch.Tensor:
        """The share of the cost that stays when so much of every unit (U,) does."""
        return self.rest + (units * self.costs.to(units)).sum()

    def readers(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, Run, int]]:
        """The linears that read the units, which units, and how many inputs a unit is."""
        family, layers = family_of(model), layers_of(model)
        places = {(run.kind, run.layer): run for run in self.runs}
        for index, layer in enumerate(layers):
            for path, layout in family.readers:
                run = places.get((LETTERS[layout], index))
                if run is not None:
                    module = linear(layer, path)
                    yield module, run, weight_of(module).shape[1] // run.count

    @contextmanager
    def multiplied(self, model: PreTrainedModel, values: Callable[[], torch.Tensor]) -> Iterator[None]:
        """Within, every unit is multiplied by its number of `values()` (U,), which is asked for once in a forward pass."""
        held: list[torch.Tensor] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            held[:] = [values()]

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for module, run, size in self.readers(model):
                stack.callback(module.register_forward_pre_hook(_multiply(held, run, size)).remove)
            yield

    @torch.no_grad()
    def fold(self, model: PreTrainedModel, values: torch.Tensor) -> None:
        """Multiply the weights that read the units by `values` (U,), in place: the model gives what it gave when multiplied."""
        for module, run, size in self.readers(model):
            weight = weight_of(module)  # type: ignore[arg-type]
            factors = values[run.where].repeat_interleave(size).to(weight.device)
            weight.copy_(weight * factors)  # in the wider of both dtypes: a factor near 1 is 1 in bf16


def _multiply(held: list[torch.Tensor], run: Run, size: int) -> Callable:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        factors = held[0][run.where].repeat_interleave(size).to(args[0].device)
        return ((args[0] * factors).to(args[0].dtype), *args[1:])

    return hook
