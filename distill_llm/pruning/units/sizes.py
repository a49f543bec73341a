"""How many units a model's layers have, and views of a layer's weights."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import dims_of, family_of, layers_of
from distill_llm.architectures.family import Family
from distill_llm.architectures.lineage import lineage_of
from distill_llm.architectures.modeling_pruned import layer_counts, outputs_of
from distill_llm.architectures.row_check import check_row
from distill_llm.common.errors import raise_all
from distill_llm.models.adapters import unmerged_faults
from distill_llm.pruning.units.refusals import quantized_faults


def linear(layer: nn.Module, path: str) -> nn.Linear | Conv1D:
    """The linear at a path of the family's row (GPT-2's are Conv1D: its weight is transposed)."""
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear | Conv1D), f"{path} is {type(found).__name__}"
    return found


def weight_of(module: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight as (outputs, inputs), a view."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def second_moment_bytes(model: PreTrainedModel, inner: bool = True, hidden: bool = False) -> int:
    """About the bytes of a model's second moments: fp32, channels x channels for each tensor.

    Args:
        inner: of the inputs of all attention-output and FFN-down linears.
        hidden: of what the norms of the residual stream give out, two in a layer.
    """
    family, layers = family_of(model), layers_of(model)
    readers = family.readers if inner else ()
    channels = [weight_of(linear(layer, path)).shape[1] for layer in layers for path, _ in readers]
    channels += [hidden_size(model)] * (2 * len(layers) + 1) if hidden else []
    return sum(4 * count**2 for count in channels)


def counts_of(model: PreTrainedModel) -> list[dict[str, int]]:
    """How many units of every kind each layer has now.

    Raises:
        InputError: for a quantized model, or one with adapters.
        ValueError: for a model that the row of its family does not fit.
    """
    family, dims = _family(model), dims_of(model.config)
    return [layer_counts(layer, family, dims) for layer in layers_of(model)]


def _family(model: PreTrainedModel) -> Family:
    raise_all(quantized_faults(model, "model", "a quantized model"))
    raise_all(unmerged_faults(model))
    check_row(model)
    return family_of(model)


def hidden_size(model: PreTrainedModel) -> int:
    """Channels of the residual stream, as they are now."""
    return outputs_of(linear(layers_of(model)[0], _family(model).ffn_out))


def sources_in(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    """The layer of `teacher` (which may be pruned itself) that each layer of a student was pruned from."""
    lineage, before = lineage_of(student), lineage_of(teacher)
    if lineage is None:
        return list(range(len(layers_of(student))))
    place = {row.source: i for i, row in enumerate(before.layers)} if before else None
    return [row.source if place is None else place[row.source] for row in lineage.layers]


def head_size_of(model: PreTrainedModel) -> int:
    """Channels per head, of the model whether pruned or not."""
    return dims_of(model.config).head_size
