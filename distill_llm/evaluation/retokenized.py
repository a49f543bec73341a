"""Scores of a model that reads its own tokens, beside one that reads others."""

import math
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from distill_llm.losses.labels import IGNORED


def predicted_tokens(rows: Dataset) -> int:
    """Tokens that a causal language model predicts in encoded rows: those with a label, but for the first of a row."""
    return sum(int((np.asarray(labels[1:]) != IGNORED).sum()) for labels in rows["labels"])


def per_token_of(metrics: Mapping[str, float], own: int, wanted: int) -> dict[str, float]:
    """Metrics of one text with the loss counted per token of another tokenizer, so that perplexities can be compared.

    The loss of the whole text stays: it is divided by another number. A metric of generated texts stays as it is.

    Args:
        metrics: of `evaluate_model`.
        own: tokens that the model predicted.
        wanted: tokens of the other tokenizer in the same text.
    """
    ratio = own / max(wanted, 1)
    loss = metrics["loss"] * ratio
    perplexity = math.exp(min(loss, 700.0))
    found = {**metrics, "loss": loss, "perplexity": perplexity}
    if metrics["score"] == metrics["perplexity"]:
        found["score"] = perplexity
        if "standard_error" in metrics:
            found["standard_error"] = metrics["standard_error"] / metrics["perplexity"] * ratio * perplexity
    return found
