"""How well each exit of a language model says the next token, from one pass over the rows."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.data.padding import Collator
from distill_llm.evaluation.evaluate import batches_of, by_length
from distill_llm.losses.head import Head
from distill_llm.losses.items import targets
from distill_llm.losses.labels import label_loss
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import packed
from distill_llm.models.language_exits import ExitReader, language_exits
from distill_llm.models.output_head import output_head

ITEMS = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class TokenScore:
    """How an exit does at the labelled tokens.

    Attributes:
        layers: before it.
        perplexity: of the labels.
        agreement: the share of tokens for which its likeliest next token is that of all layers.
    """

    layers: int
    perplexity: float
    agreement: float


def token_scores(model: PreTrainedModel, rows: Dataset, collator: Collator, batch_size: int = 64) -> list[TokenScore]:
    """The scores of the exits of a language model in order, and, last, of all its layers.

    Args:
        model: with exits, on any device.
        rows: of `distill_llm.data.encode`.
        collator: makes batches.
        batch_size: rows per forward pass.
    """
    reader, layers = ExitReader(model, output_head(model)), [*language_exits(model), model.config.num_hidden_layers]
    sums, count = torch.zeros(len(layers), 2, dtype=torch.float64), 0
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(model, rows, by_length(rows), collator, batch_size, progress=True):
            positions, labels = targets(batch, "next_token")
            assert labels is not None
            with (
                packed(model, positions),
                reader.head.handing_on(lambda hidden: None),
                reader.reading(positions) as read,
            ):
                model(**forward_inputs(model, batch))
            for begin in range(0, len(labels), ITEMS):
                part = slice(begin, begin + ITEMS)
                sums += _sums([states[part] for states in read[0].states], read[0].head, labels[part])
            count += len(labels)
    return [
        TokenScore(each, math.exp(min(loss / count, 700.0)), same / count)
        for each, (loss, same) in zip(layers, sums.tolist(), strict=True)
    ]


def _sums(states: list[torch.Tensor], head: Head, labels: torch.Tensor) -> torch.Tensor:
    """(exits, 2) in fp64: the loss of the labels, and how many likeliest tokens are those of the last states."""
    found, best = [], None
    for each in reversed(states):
        products = each.new_empty(len(each), len(head.weight))
        head.products(each, products)
        logits = head.finish(products, torch.empty_like(products, dtype=torch.float32))
        own = logits.argmax(-1)
        best = own if best is None else best
        found.append(torch.stack([label_loss(logits, labels).sum(), (own == best).sum()]).to("cpu", torch.float64))
    return torch.stack(found[::-1])
