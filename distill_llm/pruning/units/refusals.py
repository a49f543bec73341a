"""What pruning refuses of a model, each rule once; the door of recipes and the Python calls ask under their own names."""

from collections.abc import Collection
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
    return [InputError(field, given, "its full-precision original: prune first, then quantize the student")]


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
