"""What a scheme does not go with, each rule once, as functions from facts to faults."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import dims_of, layers_of
from distill_llm.architectures.modeling_pruned import EmptyLinear
from distill_llm.common.errors import InputError
from distill_llm.quantizing.scheme import Scheme


def model_faults(model: PreTrainedModel, scheme: Scheme, field: str, name: str) -> list[InputError]:
    """Faults of a model whose layers torchao cannot round, or not in groups of this size.

    Args:
        model: perhaps on the meta device.
        field: what gave the model, or the scheme.
        name: what the user calls the model.
    """
    if any(getattr(model, flag, None) for flag in ("is_quantized", "hf_quantizer")):
        return [InputError(field, name, fix="use its full-precision original: it is quantized already")]
    try:
        layers = layers_of(model)
    except ValueError:
        return [InputError(field, name, "a model with one list of layers, an encoder or a decoder")]
    linears = [each for each in layers.modules() if isinstance(each, nn.Linear) and each.weight.numel()]
    held = {id(each.weight) for each in linears}
    matrices = [each for each in layers.parameters() if each.dim() > 1 and each.numel()]
    others = sum(each.numel() for each in matrices if id(each) not in held)
    if 2 * others > sum(each.numel() for each in matrices):
        accepted = "a model whose layers hold their weights in nn.Linear, which alone torchao rounds"
        return [InputError(field, name, accepted)]
    if scheme.group_size is None:
        return []
    widths = {each.in_features for each in linears if not isinstance(each, EmptyLinear)}
    odd = sorted(width for width in widths if width % scheme.group_size)
    if not odd:
        return []
    fix = f"take a size that divides {', '.join(map(str, odd[:3]))}, inputs of linear layers of {name}; or leave it out"
    return [InputError("group_size", scheme.group_size, fix=fix)]


def cut_faults(
    model: PreTrainedModel, scheme: Scheme, units: Collection[str], step: int, field: str
) -> list[InputError]:
    """A fault of a group size that need not divide the widths that pruning leaves.

    Args:
        model: the teacher, without weights.
        units: names of the kinds of units that go.
        step: FFN neurons and channels stay in multiples of it.
        field: of the group size.
    """
    size = scheme.group_size
    if size is None:
        return []
    head, faults = dims_of(model.config).head_size, []
    if not {"heads", "queries"}.isdisjoint(units) and head % size:
        fix = (
            f"take a size that divides {head}, the width of a head: pruning leaves any number of heads; or leave it out"
        )
        faults.append(InputError(field, size, fix=fix))
    if not {"neurons", "hidden"}.isdisjoint(units) and step % size:
        fix = f"set pruning.round_to to a multiple of it, for it to divide the widths that pruning leaves (round_to is {step})"
        faults.append(InputError(field, size, fix=fix))
    return faults
