"""Whether a model has the modules that the row of its family names, with the sizes that it says."""

from collections.abc import Iterator
from itertools import chain
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import Dims, dims_of, family_of, layers_of
from .family import Family
from .lineage import LAYER_UNITS, Counts, LayerPlan, lineage_of
from .modeling_pruned import inputs_of, layer_counts, outputs_of

_fitting: "WeakKeyDictionary[PreTrainedModel, Family]" = WeakKeyDictionary()
"""Models that were checked, and the row that fitted."""


def check_row(model: PreTrainedModel) -> None:
    """Check the row of a model's family against the model, pruned or not: by the shapes of its modules, once per model.

    Raises:
        ValueError: one line with the first thing that does not fit.
    """
    family = family_of(model)
    if _fitting.get(model) == family:
        return
    fault = next(_faults(model, family), None)
    if fault is not None:
        raise ValueError(
            f"model: the row of family {model.config.model_type!r} does not fit it: {fault}. "
            "Mend the row in FAMILIES (docs/development/add-a-family.md)"
        )
    _fitting[model] = family


def _faults(model: PreTrainedModel, family: Family) -> Iterator[str]:
    for path, layout in (*family.attention_in.items(), *family.ffn_in.items(), *family.readers):
        if not _is_known(layout):
            yield f"the layout {layout!r} of {path} is unknown (the page of families lists all layouts)"
    dims, lineage, layers = dims_of(model.config), lineage_of(model), layers_of(model)
    rows = lineage.layers if lineage is not None else [None] * len(layers)
    for index, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        # One after the other: what comes later reads what is there by then.
        for fault in chain(_missing(layer, family), _unnamed(layer, family), _misfits(layer, family, dims, row)):
            yield f"layer {index}: {fault}"


def _is_known(layout: str) -> bool:
    letters = {unit.letter for unit in LAYER_UNITS.values()}
    if layout == "(q kv kv)" or layout.removesuffix("/") in letters or layout.removesuffix("[]") in letters:
        return True
    return bool(layout) and set(layout.split()) <= letters


def _missing(layer: nn.Module, family: Family) -> Iterator[str]:
    """Modules that every layer has, pruned or not. What feeds the heads is not among them: some configs leave norms out."""
    modules = dict(layer.named_modules())
    if family.attention not in modules:
        yield f"it has no {family.attention!r} (attention)"
    fields = {family.attention_out: " (attention_out)", family.ffn_out: " (ffn_out)"}
    for path, layout in family.readers:
        if not isinstance(modules.get(path), nn.Linear | Conv1D):
            yield f"it has no linear {path!r} that reads {layout!r}{fields.get(path, '')}"


def _unnamed(layer: nn.Module, family: Family) -> Iterator[str]:
    """Linears that span heads or neurons, to which the row gives no layout: they would stay whole."""
    named = {*family.attention_in, *family.ffn_in, *(path for path, _ in family.readers)}
    absent = sorted(path for path in named if path not in dict(layer.named_modules()))
    hint = f" (it names {', '.join(absent)}, which are not there)" if absent else ""
    down = layer.get_submodule(family.ffn_out)
    neurons, width = inputs_of(down), outputs_of(down)
    for path, module in layer.named_modules():
        if path in named or not isinstance(module, nn.Linear | Conv1D):
            continue
        if path.startswith(f"{family.attention}."):
            yield f"{path} is a linear of the attention, and attention_in gives it no layout{hint}"
        elif neurons != width and neurons in (inputs_of(module), outputs_of(module)):
            yield f"{path} is a linear over the {neurons} neurons, and ffn_in gives it no layout{hint}"


def _misfits(layer: nn.Module, family: Family, dims: Dims, row: LayerPlan | None) -> Iterator[str]:
    """Modules that have more or fewer channels than their layouts say."""
    modules, size = dict(layer.named_modules()), dims.head_size
    for path in (*family.attention_in, *family.ffn_in):
        if path in modules and not isinstance(modules[path], nn.ModuleList) and not hasattr(modules[path], "weight"):
            yield f"{path} has no weight"
            return
    original = {"heads": dims.groups, "queries": dims.queries}
    counts = layer_counts(layer, family, dims) | (original if row is None else row.counts(original))
    for path, layout in family.readers:
        found, (wanted, said) = inputs_of(modules[path]), _size(layout, counts, size)
        if found != wanted:
            yield f"{path} reads {found} channels, and not {wanted} ({said})"
    for path, layout in (*family.attention_in.items(), *family.ffn_in.items()):
        if path not in modules:
            continue
        module, (wanted, said) = modules[path], _size(layout, counts, size)
        listed = isinstance(module, nn.ModuleList)
        found = len(module) if isinstance(module, nn.ModuleList) else outputs_of(module)
        if found != wanted or listed != layout.endswith("[]"):
            yield f"{path} has {found} {'modules' if listed else 'outputs'}, and {layout!r} says {wanted} ({said})"


def _size(layout: str, counts: Counts, head_size: int) -> tuple[int, str]:
    """How long a dimension with a layout is, and the units of the layout in words: "4 heads of 16 channels"."""
    parts, said = [part.rstrip("/[]") for part in layout.strip("()").split()], []
    channels = head_size if layout.strip("()").replace(" ", "").isalpha() else 1  # a row or a module per head
    total = 0
    for kind, unit in LAYER_UNITS.items():
        if unit.letter in parts:
            total += parts.count(unit.letter) * counts[kind] * (channels if unit.by_head else 1)
            said.append(f"{counts[kind]} {kind}" + (f" of {head_size} channels" if unit.by_head else ""))
    return total, ", ".join(said)
