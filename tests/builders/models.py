"""Tiny real architectures built from config, seeded, for tests."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

HEADS = {
    "base": AutoModel,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "masked-lm": AutoModelForMaskedLM,
    "multiple-choice": AutoModelForMultipleChoice,
}
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"]


def tiny_model(
    family: str = "bert",
    head: str = "sequence-classification",
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    intermediate: int = 64,
    num_labels: int = 2,
    vocab: int = 100,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A random model of `family` with the given sizes, fp32, in eval mode; weights large enough to make outputs differ."""
    torch.manual_seed(seed)
    sizes: dict[str, Any]
    if family == "distilbert":
        sizes = {"n_layers": layers, "dim": hidden, "n_heads": heads, "hidden_dim": intermediate}
    else:
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
        }
    if family == "electra":
        sizes["embedding_size"] = hidden // 2
    settings = {
        "vocab_size": vocab,
        "num_labels": num_labels,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    }
    model = HEADS[head].from_config(AutoConfig.for_model(family, **{**settings, **sizes, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def random_batch(
    model: PreTrainedModel,
    batch: int = 4,
    length: int = 10,
    padded: bool = True,
    labels: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Token ids with right padding of uneven length (where `padded`), attention mask and labels that fit the model's head."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            mask[row, max(2, length - 2 * row) :] = 0
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if labels:
        name = type(model).__name__
        if "SequenceClassification" in name:
            if model.config.num_labels == 1:
                inputs["labels"] = torch.randn(batch, generator=generator)
            else:
                inputs["labels"] = torch.randint(0, model.config.num_labels, (batch,), generator=generator)
        else:
            classes = model.config.vocab_size if "MaskedLM" in name else model.config.num_labels
            chosen = torch.randint(0, classes, (batch, length), generator=generator)
            inputs["labels"] = chosen.masked_fill(mask == 0, -100)
    return inputs
