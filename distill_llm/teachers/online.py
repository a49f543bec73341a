"""A teacher that is a model in memory: its signals are computed for every batch."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from distill_llm.losses.signals import HeadSignals, Signals, Wanted
from distill_llm.models.adapters import is_quantized
from distill_llm.models.capture import Recorder
from distill_llm.models.checkpoint import converted
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed
from distill_llm.models.output_head import OutputHead, output_head


class OnlineTeacher:
    """A frozen model: evaluation mode and no gradient at every call, no part of any optimizer or checkpoint.

    Args:
        model: the teacher. It is moved to `device`; where `dtype` differs from its own, a converted copy is made there
            instead, so it is held twice: load it in `dtype` where memory is short. A quantised model stays where it is, in the
            precision that it was loaded with.
        device: where the student trains.
        dtype: what the weights are held in; None leaves them as they are.
        wanted: layers to record; None: none.

    Attributes:
        head: the output map of a language model that can do without logits (see `output_head`), else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None = None,
        wanted: Wanted | None = None,
    ):
        if not is_quantized(model):
            if dtype is not None and model.dtype != dtype:
                model = converted(model, dtype, device)
            model.to(device)  # type: ignore[arg-type]
        self.model = model
        self.head: OutputHead | None = output_head(model)
        self.recorder = Recorder(self.model, wanted or Wanted())

    def __call__(self, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor | None = None) -> Signals:
        """Signals of a batch.

        Args:
            inputs: a batch as the collator made it; what the teacher's forward does not take is left out.
            positions: token positions at which a language model gives logits (see `distill_llm.models.item_logits.packed`).
        """
        self.model.eval()
        with torch.no_grad(), self.recorder.recording() as recording, packed(self.model, positions):
            logits = self.model(**forward_inputs(self.model, inputs)).logits
        return recording.with_logits(item_logits(logits, positions))

    def below_head(self, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> HeadSignals:
        """Signals of a batch without its logits, for a teacher that has a `head`; arguments as above."""
        assert self.head is not None
        received: list[torch.Tensor] = []
        self.model.eval()
        with (
            torch.no_grad(),
            self.recorder.recording() as recording,
            packed(self.model, positions),
            self.head.handing_on(received.append),
        ):
            logits = self.model(**forward_inputs(self.model, inputs)).logits
        return HeadSignals(
            recording.hidden,
            recording.attention,
            recording.vectors,
            logits=logits,
            head=self.head.head,
            head_inputs=received[0],
        )
