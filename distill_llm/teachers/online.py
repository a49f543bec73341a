"""A teacher that is a model in memory: its signals are computed for every batch."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.capture import Recorder, Signals, Wanted, item_logits, packed
from distill_llm.data.decoders import without_packed_mask


def forward_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, without labels, that the model's forward names, all of them where it names none; and no cache.

    A packed batch goes without its attention mask (see `distill_llm.data.decoders.without_packed_mask`).
    """
    names, inputs = inspect.signature(model.forward).parameters, without_packed_mask(inputs)
    everything = "input_ids" not in names
    chosen = {name: value for name, value in inputs.items() if name != "labels" and (everything or name in names)}
    return {**chosen, "use_cache": False} if "use_cache" in names else chosen


class OnlineTeacher:
    """A frozen model: evaluation mode and no gradient at every call, no part of any optimizer or checkpoint.

    Args:
        model: the teacher. It is moved to `device`; where `dtype` differs from its own, a copy is converted instead.
        device: where the student trains.
        dtype: what the weights are held in; None leaves them as they are.
        wanted: layers to record; None: none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None = None,
        wanted: Wanted | None = None,
    ):
        if dtype is not None and model.dtype != dtype:
            model = copy.deepcopy(model)
            model.to(dtype=dtype)  # type: ignore[call-arg]
        model.to(device)  # type: ignore[arg-type]
        self.model = model
        self.recorder = Recorder(self.model, wanted or Wanted())

    def __call__(self, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor | None = None) -> Signals:
        """Signals of a batch.

        Args:
            inputs: a batch as the collator made it; what the teacher's forward does not take is left out.
            positions: token positions at which a language model gives logits (see `distill_llm.capture.packed`).
        """
        self.model.eval()
        with torch.no_grad(), self.recorder.recording() as recording, packed(self.model, positions):
            logits = self.model(**forward_inputs(self.model, inputs)).logits
        return recording.with_logits(item_logits(logits, positions))
