"""What pruning refuses of a model, each rule once; the door of recipes and the Python calls ask under their own names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.families import family_of
from distill_llm.common.errors import InputError


def quantized_faults(model: PreTrainedModel | PreTrainedConfig, field: str, given: str) -> list[InputError]:
    """A fault of a model whose weights are quantized, or whose config says that they will be.

    Args:
        field: what gave the model.
        given: what the user calls it.
    """
    if not any(getattr(model, name, None) for name in ("is_quantized", "hf_quantizer", "quantization_config")):
        return []
    return [InputError(field, given, fix="use its full-precision original: prune first, then quantize the student")]


def width_faults(
    model: PreTrainedModel | PreTrainedConfig, units: Collection[str], field: str, given: Any, name: str = "this model"
) -> list[InputError]:
    """A fault of channels of the residual stream that are to go where a convolution reads them all.

    Args:
        units: names of the kinds of units that go.
        field, given: what says so.
        name: what the user calls the model.
    """
    if "hidden" not in units or not family_of(model).anchored:
        return []
    return [InputError(field, given, fix=f"leave hidden out: a convolution follows the first layer of {name}")]


def first_layer_faults(
    model: PreTrainedModel | PreTrainedConfig, kept: Collection[int], field: str, name: str = "this model"
) -> list[InputError]:
    """A fault of layers that stay without the first, where a convolution follows it.

    Args:
        kept: the layers that stay, as `field` gives them.
        name: what the user calls the model.
    """
    if 0 in kept or not family_of(model).anchored:
        return []
    return [InputError(field, list(kept), fix=f"keep layer 0: a convolution follows the first layer of {name}")]


def step_faults(
    counts: Sequence[Mapping[str, int]], channels: int, units: Collection[str], step: int, field: str = "round_to"
) -> list[InputError]:
    """A fault of a step that is wider than what is to be kept in multiples of it: nothing would stay.

    Args:
        counts: the units of every layer.
        channels: of the residual stream.
        units: names of the kinds of units that go.
        step: of neurons in a layer and of channels.
        field: what says so.
    """
    widths = {i: each["neurons"] for i, each in enumerate(counts) if each["neurons"] and "neurons" in units}
    narrowest = min(widths, key=widths.__getitem__, default=0)
    if widths and step > widths[narrowest]:
        return [InputError(field, step, f"at most {widths[narrowest]}, the FFN neurons of layer {narrowest}")]
    if "hidden" in units and step > channels:
        return [InputError(field, step, f"at most {channels}, the channels of the residual stream")]
    return []


def in_order_faults(model: PreTrainedModel | PreTrainedConfig, narrowed: bool, field: str) -> list[InputError]:
    """A fault of compensation in order: a family whose layers do not simply add to the stream, or linears that it does not know.

    Args:
        narrowed: whether channels of the residual stream go: the two streams have other channels then.
        field: what asks for it.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    family = family_of(config)
    if narrowed:
        return [InputError(field, "in_order", fix="set it to true, or leave hidden out of the units")]
    if family.normed_after:
        fix = f"set it to true: a norm comes after attention or FFN in {config.model_type}"
        return [InputError(field, "in_order", fix=f"{fix}, so that a linear cannot correct the residual stream")]
    if family.reads:
        fix = f"set it to true: in order, {', '.join(family.reads)} of {config.model_type} would not be fitted"
        return [InputError(field, "in_order", fix=fix)]
    return []
