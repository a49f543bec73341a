"""Where the neurons of an FFN are seen before their activation."""

from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import any_layers_of, row_of
from distill_llm.architectures.family import Family


def neuron_layer(layer: nn.Module, family: Family) -> tuple[nn.Module, int] | None:
    """The linear whose outputs are the neurons, and of how many equal parts the first is: in a gated FFN that is the gate.

    None where the layer has no FFN.
    """
    path, layout = next(iter(family.ffn_in.items()), ("", ""))
    try:
        module = layer.get_submodule(path) if path else None
    except AttributeError:
        return None
    return None if module is None or module is layer else (module, len(layout.split()))


def neuron_widths(model: PreTrainedModel) -> list[int]:
    """Neurons of each layer; 0 where none can be seen."""
    family = row_of(model.config)
    found = [neuron_layer(layer, family) if family else None for layer in any_layers_of(model)]
    return [0 if each is None else _outputs(each[0]) // each[1] for each in found]


def _outputs(module: nn.Module) -> int:
    width = getattr(module, "out_features", getattr(module, "nf", 0))  # `nf` of GPT-2's Conv1D
    return int(width) if isinstance(width, int) else 0
