"""Several models scored as one."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from distill_llm.models.inputs import forward_inputs


class Together(nn.Module):
    """The mean of what models say: of their probabilities, or, of single values, of these. Made to be scored, not trained.

    Args:
        models: with the same classes in the same order, on one device.
    """

    def __init__(self, models: Sequence[PreTrainedModel]):
        super().__init__()
        self.models = nn.ModuleList(models)
        first = models[0]
        self.config, self.device, self.dtype = first.config, first.device, first.dtype

        def forward(**batch: torch.Tensor) -> SequenceClassifierOutput:
            """The logarithm of the mean of probabilities (..., C), or the mean of values (..., 1)."""
            found = torch.stack([model(**forward_inputs(model, batch)).logits.float() for model in models])
            if found.shape[-1] == 1:
                return SequenceClassifierOutput(logits=found.mean(0))  # type: ignore[arg-type]
            shares = found.log_softmax(-1).logsumexp(0) - math.log(len(models))
            return SequenceClassifierOutput(logits=shares)  # type: ignore[arg-type]

        signature: Any = inspect.signature(first.forward)
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward
