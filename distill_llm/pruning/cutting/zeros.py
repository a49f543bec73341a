"""Where the zeros of a sparse model are once it is cut."""

import copy

import torch
from transformers import PreTrainedModel

from distill_llm.models.masks import Masks, linears_of
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan


def masks_after(model: PreTrainedModel, masks: Masks, plan: PruningPlan) -> Masks:
    """The masks of what a plan keeps of a sparse model.

    A copy of the model, whose weights are the masks, is cut. What goes leaves no groups of N:M whole, so a model that loses units
    is called unstructured.

    Args:
        model: before the cut; not changed.
        masks: of its single weights.

    Raises:
        InputError: the masks are of another model, or the plan is.
    """
    masks.check(model)
    marked = copy.deepcopy(model)
    linears = linears_of(marked)
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(masks.kept.get(name, torch.ones(())))
    kept = {name: linear.weight.detach() != 0 for name, linear in linears_of(prune(marked, plan)).items()}
    whole = {name: mask.shape for name, mask in kept.items()} == {
        name: linear.weight.shape for name, linear in linears.items()
    }
    return Masks(kept, masks.pattern if whole else "unstructured", masks.criterion)
