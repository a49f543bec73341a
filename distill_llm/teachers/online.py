"""A teacher that is a model in memory: its signals are computed for every batch."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.capture import Recorder, Signals, item_logits, packed


def accepted_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, without labels, that the model's forward names; all of them where it names none."""
    names = inspect.signature(model.forward).parameters
    everything = "input_ids" not in names
    return {name: value for name, value in inputs.items() if name != "labels" and (everything or name in names)}


class OnlineTeacher:
    """A frozen model: evaluation mode and no gradient at every call, no part of any optimizer or checkpoint.

    Args:
        model: the teacher. It is moved to `device`; where `dtype` differs from its own, a copy is converted instead.
        device: where the student trains.
        dtype: what the weights are held in; None leaves them as they are.
        hidden: layers whose hidden states are wanted.
        attention: layers whose queries and keys are wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None = None,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
    ):
        if dtype is not None and model.dtype != dtype:
            model = copy.deepcopy(model)
            model.to(dtype=dtype)  # type: ignore[call-arg]
        model.to(device)  # type: ignore[arg-type]
        self.model = model
        self.recorder = Recorder(self.model, hidden, attention)
        self.has_cache = "use_cache" in inspect.signature(self.model.forward).parameters

    def __call__(self, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor | None = None) -> Signals:
        """Signals of a batch.

        Args:
            inputs: a batch as the collator made it; what the teacher's forward does not take is left out.
            positions: token positions at which a masked-LM teacher gives logits (see `distill_llm.capture.packed`).
        """
        self.model.eval()
        features = accepted_inputs(self.model, inputs)
        if self.has_cache:
            features["use_cache"] = False
        with torch.no_grad(), self.recorder.recording() as recording, packed(self.model, positions):
            logits = self.model(**features).logits
        return Signals(recording.hidden, recording.attention, logits=item_logits(logits, positions))
