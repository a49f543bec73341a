"""The loss of a causal language model over a batch, with logits of a few tokens at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head_parts import LabelPart, Place
from distill_llm.losses.items import targets
from distill_llm.losses.labels import label_loss
from distill_llm.models.exported import ExportedNetwork
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.output_head import head_of


class _Recorded(LabelPart):
    """Cross-entropy of which the value of every item is kept, `values` (N,) in fp32."""

    def __init__(self, labels: Tensor):
        super().__init__(labels)
        self.values = torch.zeros(len(labels), device=labels.device)

    def block(self, logits: Tensor, gradient: Tensor, place: Place, untouched: bool) -> Tensor:
        """See `Part.block`."""
        values = super().block(logits, gradient, place, untouched)
        self.values[place.first : place.last] = values
        return values


def causal_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of the negative log-likelihoods, in nats, of the labelled tokens of each row, each given those before it.

    The body of the model runs on the whole batch. Its head runs only on the tokens that predict a label, in chunks, with
    log-softmax in fp32, so the logits of the whole batch never exist.

    Args:
        model: a causal LM in evaluation mode.
        batch: from the collator of `causal_lm` or `prompts`, on the model's device; `labels` (B, T) are not shifted, -100
            where no token is predicted.

    Returns:
        (B,) sums in fp64 and (B,) numbers of predicted tokens.

    Raises:
        InputError: the model's logits are not those of a linear head, scaled or capped by its config.
    """
    positions, labels = targets(batch, "next_token")
    assert labels is not None
    if isinstance(model, ExportedNetwork):  # its head cannot be run alone
        logits = model(**forward_inputs(model, batch)).logits.flatten(0, 1)[positions]
        return by_row(label_loss(logits, labels), positions, batch["input_ids"])
    body = model.base_model
    hidden = body(**forward_inputs(body, batch)).last_hidden_state.flatten(0, 1)
    part = _Recorded(labels)
    head_losses(head_of(model), hidden[positions], [part])
    return by_row(part.values, positions, batch["input_ids"])


def by_row(losses: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of single tokens as sums and numbers of each row.

    Args:
        losses: (N,) of the tokens at these places.
        positions: (N,) places in the flattened batch.
        tokens: (B, T) of the batch.
    """
    rows, size = positions // tokens.shape[1], tokens.shape[0]
    values = losses.to("cpu", torch.float64)  # some devices have no fp64
    return torch.zeros(size, dtype=torch.float64).index_add_(0, rows.cpu(), values), rows.cpu().bincount(minlength=size)
