"""Single weights that stay zero: a mask for every linear of a model's layers, kept in a file beside the weights."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.tensors import saved_tensors

MASKS = "masks.safetensors"
"""The file of a sparse model's masks, in its folder."""
SHOWN = 0.001
"""The share of zeros from which a model is called sparse: a dense one has some by chance."""


def linears_of(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The linears inside the transformer layers by name, in order. Embeddings, norms, poolers and heads are not among them."""
    inside = {id(module) for module in layers_of(model).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D) and module.weight.numel()
    }


def sparsity_of(model: PreTrainedModel) -> float:
    """The share of the weights of `linears_of` that are zero, in [0, 1]; 0 for a model without such linears or layers.

    Weights that are packed into fewer bits do not count.
    """
    try:
        linears = linears_of(model)
    except (AttributeError, ValueError):  # no single list of layers
        return 0.0
    plain = [module.weight.data for module in linears.values() if type(module.weight.data) is torch.Tensor]
    weights = [weight for weight in plain if weight.is_floating_point()]
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


@dataclass(frozen=True)
class Masks:
    """Which weights of a model's linears stay: the plan of a sparse model.

    Attributes:
        kept: by the name of a linear, bool, in the shape of its weight; True: the weight stays, False: it is zero.
        pattern: "unstructured", or "N:M" where N of every M weights in a row stay.
        criterion: by what the weights were chosen.
    """

    kept: Mapping[str, torch.Tensor]
    pattern: str = "unstructured"
    criterion: str = ""

    @property
    def weights(self) -> int:
        """How many weights the masks cover."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return self.weights - sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def sparsity(self) -> float:
        """The share of them that is zero."""
        return self.zeros / self.weights if self.weights else 0.0

    def check(self, model: PreTrainedModel) -> None:
        """Raise InputError unless the masks are of linears that the model has, in these shapes."""
        linears = linears_of(model)
        for name, mask in self.kept.items():
            found = tuple(linears[name].weight.shape) if name in linears else "no such linear"
            if found != tuple(mask.shape):
                raise InputError(
                    "masks", f"{name} of shape {tuple(mask.shape)}", f"masks of this model: it has {found}"
                )

    def apply(self, model: PreTrainedModel) -> None:
        """Set the weights that do not stay to zero, in place.

        Raises:
            InputError: the masks are of another model.
        """
        self.check(model)
        linears = linears_of(model)
        with torch.no_grad():
            for name, mask in self.kept.items():
                weight = linears[name].weight
                weight.masked_fill_(~mask.to(weight.device), 0.0)

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors: of every linear a bit for each weight, eight to a byte, the first the highest; shapes beside."""
        packed = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in self.kept.items()
        }
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.kept.items()})
        metadata = {"shapes": shapes, "pattern": self.pattern, "criterion": self.criterion}
        with written_whole(Path(path)) as file:
            save_file(packed, file, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Masks":
        """Read what `save` wrote.

        Raises:
            InputError: the file holds no masks.
        """
        with saved_tensors(path, "masks", "masks saved by Masks.save") as file:
            about, kept = file.metadata() or {}, {}
            for name, shape in json.loads(about["shapes"]).items():
                bits = np.unpackbits(file.get_tensor(name).numpy(), count=prod(shape))
                if len(bits) != prod(shape):
                    raise ValueError(f"{name} has too few bits")
                kept[name] = torch.from_numpy(bits).bool().view(shape)
            return cls(kept, about["pattern"], about["criterion"])


def masks_in(folder: str | os.PathLike | None) -> Masks | None:
    """The masks beside a model's weights; None where the model was not made sparse, or is not in a folder."""
    path = None if folder is None else Path(folder) / MASKS
    return Masks.load(path) if path is not None and path.is_file() else None
