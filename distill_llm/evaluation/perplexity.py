"""The loss of a causal language model over a batch, with logits of a few tokens at a time."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head_parts import LabelPart
from distill_llm.losses.items import targets
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.output_head import head_of


def causal_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihoods, in nats, of a batch's labelled tokens, each given those before it.

    The body of the model runs on the whole batch. Its head runs only on the tokens that predict a label, in chunks, with
    log-softmax in fp32, so the logits of the whole batch never exist.

    Args:
        model: a causal LM in evaluation mode.
        batch: from the collator of `causal_lm` or `prompts`, on the model's device; `labels` (B, T) are not shifted, -100
            where no token is predicted.

    Returns:
        The sum (fp32 scalar) and the number of predicted tokens.

    Raises:
        InputError: the model's logits are not those of a linear head, scaled or capped by its config.
    """
    positions, labels = targets(batch, "next_token")
    assert labels is not None
    body = model.base_model
    hidden = body(**forward_inputs(body, batch)).last_hidden_state.flatten(0, 1)
    return head_losses(head_of(model), hidden[positions], [LabelPart(labels)]).sums[0], len(positions)
