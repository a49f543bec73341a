"""Pruned models to save, and ways to spoil what was saved."""

from pathlib import Path

import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.surgery import prune

UNEVEN = ((0, (1, 3), range(5, 40)), (1, (), range(0, 64, 3)), (3, range(4), ()))
HEADS_OF = {"bert": "sequence-classification", "roberta": "masked-lm", "electra": "token-classification"}


def plan_of(model: PreTrainedModel, rows=UNEVEN) -> PruningPlan:
    return PruningPlan(model.config.model_type, tuple(LayerPlan(i, tuple(h), tuple(n)) for i, h, n in rows))


def student_of(family="bert", head="sequence-classification", **sizes) -> PreTrainedModel:
    """A pruned model that no stock config can say."""
    model = tiny_model(family, head, layers=4, **sizes)
    return prune(model, plan_of(model))


def stock_student(kind: str, family: str = "bert") -> PreTrainedModel:
    """A pruned model that a stock config can say."""
    model = tiny_model(family, layers=4)
    if kind == "layers":
        return prune(model, keep_layers(model, [0, 3]))
    return prune(model, plan_of(model, [(i, range(4), range(i, i + 40)) for i in range(4)]))


def spoil(folder: Path, how: str, name: str) -> None:
    """Make a tensor of a checkpoint missing, unexpected or of another size."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    if how == "missing":
        del weights[name]
    elif how == "unexpected":
        weights[name + "_extra"] = torch.ones(3)
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, file, {"format": "pt"})
