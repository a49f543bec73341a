"""What losses are averaged over: which outputs of a model count, and which label belongs to each."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.units import Kind

# Causal heads of another name. XLM's and XLNet's, which end so too, do not predict the next token.
_CAUSAL = ("BertLMHeadModel", "CTRLLMHeadModel", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel")
ITEMS: dict[str, Kind] = {
    "ForSequenceClassification": "example",
    "ForImageClassification": "example",
    "ForTokenClassification": "token",
    "ForMaskedLM": "token",
    "ForCausalLM": "next_token",
    **dict.fromkeys(_CAUSAL, "next_token"),
}
"""What an output is about, by the end of the model's class name: all heads that can be trained. A task kind adds its own."""

VOCABULARY_HEADS = {"ForMaskedLM", "ForCausalLM", *_CAUSAL}
"""Of the heads in ITEMS, those of language models. A task kind adds its own."""


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether the outputs of the model's head are tokens of its vocabulary."""
    return type(model).__name__.endswith(tuple(VOCABULARY_HEADS))


def kind_of(model: PreTrainedModel) -> Kind:
    """What an output of the model's head is about: the `example`, its own `token`, or the `next_token` (causal LM)."""
    return kind_of_class(type(model).__name__)


def kind_of_class(name: str) -> Kind:
    """As `kind_of`, by the name of the model's class."""
    return next((item for head, item in ITEMS.items() if name.endswith(head)), "example")


def valid_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """(B, T) of bool: not padding. Of images without an `attention_mask` the number of tokens is not known: T is 1."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.bool()
    ids = batch["input_ids"] if "input_ids" in batch else batch["pixel_values"].flatten(1)[:, :1]
    return torch.ones_like(ids, dtype=torch.bool)


def check_tokens_known(batch: Mapping[str, Any], field: str) -> None:
    """Check that a batch says how many tokens its rows have, where something looks at the tokens inside a model.

    Args:
        field: what gave the batch.

    Raises:
        InputError: images without an `attention_mask`.
    """
    if "pixel_values" in batch and "attention_mask" not in batch and "input_ids" not in batch:
        fix = (
            "let the collator add attention_mask, 1 for each token of an image (distill_llm.data.images.ImageCollator)"
        )
        raise InputError(field, f"batches with {', '.join(batch)}", fix=fix)


def token_ids(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T) the tokens that the rows of a batch are of; None of images, and of embeddings, whose ids only give the shape."""
    return None if "inputs_embeds" in batch else batch.get("input_ids")


def row_count(batch: Mapping[str, Any]) -> int:
    """The number of rows of a batch of texts or images."""
    return len(batch["input_ids"] if "input_ids" in batch else batch["pixel_values"])


def sequence_numbers(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T) the number, within its row, of each token's sequence, from 0; None without `position_ids` of that shape.

    A sequence begins where the position of a token is not beyond that of the token before it, padding left out: that a batch
    has positions does not mean that its rows are packed. Without a mask it begins wherever the position is not the next one,
    as transformers divides attention then. Padding counts to the sequence before it. Positions of an encoder may start again
    within one sequence: ask only about models that predict the next token.
    """
    positions, valid = batch.get("position_ids"), valid_tokens(batch)
    if positions is None or positions.dim() != 2:
        return None
    places = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).masked_fill(~valid, -1)
    before = torch.nn.functional.pad(places.cummax(-1).values[:, :-1], (1, 0), value=-1)
    positions = positions.expand_as(valid)
    steps = positions - positions.gather(1, before.clamp(min=0))
    apart = steps != 1 if batch.get("attention_mask") is None else steps <= 0
    return (valid & (before >= 0) & apart).cumsum(-1)


def aligned_labels(batch: Mapping[str, Any], kind: Kind) -> torch.Tensor:
    """The label of each output: (B, T) with an output per token, else (B,).

    The output of a causal LM at position t has the label at t + 1. An output without a label gets -100:
    where the data says -100, at padding, and, for a causal LM, at the last position of a row and of each sequence in it.
    Floats, the values of a regression, always count as labels.
    """
    labels = batch["labels"]
    if kind == "example":
        return labels.flatten()
    return _shifted(labels, IGNORED, kind).masked_fill(~_in_text(batch, kind), IGNORED)


def counted(batch: Mapping[str, Any], kind: Kind, unlabelled: bool = False) -> torch.Tensor:
    """Which outputs count: (B, T) of bool with an output per token, else (B,).

    Those with a label; where the batch has no labels, or with `unlabelled`, those that are not of padding, and of a
    causal LM have a next token in their own sequence.
    """
    if unlabelled or batch.get("labels") is None:
        return _in_text(batch, kind)
    labels = aligned_labels(batch, kind)
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What says which items count, of the first `rows` of a batch."""
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids", "labels")
    return {name: batch[name][:rows] for name in names if name in batch}


def targets(batch: Mapping[str, Any], kind: Kind, unlabelled: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs per token that count, to be picked from (B * T) flattened ones; waits for the device.

    Args:
        batch: with `input_ids` (B, T), and `attention_mask`, `position_ids` and `labels` of that shape if any.
        kind: token or next_token (see `kind_of`).
        unlabelled: count outputs without a label too (see `counted`).

    Returns:
        positions (items,), and the labels of these positions, (items,), or None where the batch has none.
    """
    positions = counted(batch, kind, unlabelled).flatten().nonzero().squeeze(-1)
    if batch.get("labels") is None:
        return positions, None
    return positions, aligned_labels(batch, kind).flatten()[positions]


def count_items(batch: Mapping[str, Any], kind: Kind) -> torch.Tensor:
    """(3,) numbers of items in the order of `losses.units.UNITS`; made without waiting for the device."""
    valid = valid_tokens(batch)
    examples = valid.new_full((), len(valid), dtype=torch.long)
    return torch.stack([counted(batch, kind).sum(), examples, valid.sum()])


def _in_text(batch: Mapping[str, Any], kind: Kind) -> torch.Tensor:
    valid = valid_tokens(batch)
    if kind == "example":
        return valid.new_ones(len(valid))
    within = valid & _shifted(valid, False, kind)
    numbers = sequence_numbers(batch) if kind == "next_token" else None
    return within if numbers is None else within & (numbers == _shifted(numbers, -1, kind))


def _shifted(values: torch.Tensor, last: int | bool, kind: Kind) -> torch.Tensor:
    """What an output at each position predicts from: the value there, or, of a causal LM, the one after it."""
    if kind == "token":
        return values
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)


def values_of_items(values: Any, items: int, function: str) -> torch.Tensor:
    """What a function of the outputs returned, once its shape is known to be (items,); its numbers are not looked at.

    Args:
        values: returned by the function.
        items: how many it was given.
        function: what messages call it.

    Raises:
        InputError: another shape, or no tensor: its sum would be another loss.
    """
    if isinstance(values, torch.Tensor) and values.shape == (items,):
        return values
    given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
    raise InputError(function, given, fix=f"return a tensor of shape ({items},): a value for each item")
