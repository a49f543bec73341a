"""A model as if pruned: masks at the very places where pruning cuts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.pruning.modeling_pruned import family_of, layers_of
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.structure import head_size_of, linear


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Within the context the model gives what `prune(model, plan)` gives, and nothing is removed.

    Removed heads and neurons are zeroed where they enter the attention-output and FFN-down linears; a removed layer passes
    its input on.

    Raises:
        InputError: if the plan does not fit the model.
    """
    plan.check(model)
    family, head_size = family_of(model), head_size_of(model)
    rows = {row.source: row for row in plan.layers}
    with ExitStack() as stack:
        for index, layer in enumerate(layers_of(model)):
            if index not in rows:
                stack.callback(layer.register_forward_hook(_pass_on, with_kwargs=True).remove)
                continue
            row = rows[index]
            for path, kept, size in ((family.attention_out, row.heads, head_size), (family.ffn_out, row.neurons, 1)):
                module = linear(layer, path)
                mask = torch.zeros(module.in_features // size, device=module.weight.device, dtype=module.weight.dtype)
                mask[list(kept)] = 1
                hook = _multiply(mask.repeat_interleave(size))
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield model


def _multiply(mask: torch.Tensor) -> Callable:
    return lambda module, args: (args[0] * mask.to(args[0].dtype), *args[1:])


def _pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    entering = args[0] if args else kwargs["hidden_states"]
    return (entering, *output[1:]) if isinstance(output, tuple) else entering
