"""How many tokens a model makes of an image."""

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.counting import random_images


def image_tokens(model: PreTrainedModel) -> int | None:
    """The tokens of an image in a model's layers, those in front of the patches among them; None of a model without tokens.

    Args:
        model: reads images of the size in its config.
    """
    with evaluating(model), torch.no_grad():
        states = model.base_model(pixel_values=random_images(model, 1)).last_hidden_state
    return states.shape[1] if states.dim() == 3 else None
