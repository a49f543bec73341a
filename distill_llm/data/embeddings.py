"""Rows that hold embeddings in the place of tokens: their columns, and batches of them."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, List, Value
from torch import Tensor

from distill_llm.data.padding import LENGTH, Collator
from distill_llm.data.padding import Features as Given

EMBEDDINGS = "inputs_embeds"


def embedding_rows(embeddings: Tensor, ids: Tensor, labels: Sequence[int]) -> Dataset:
    """A data set of rows of one length, which gives its columns as arrays.

    Args:
        embeddings: (n, T, H) of the rows.
        ids: (T,) of tokens that stand for `input_ids`: they give the length and are not read.
        labels: n class ids.
    """
    count, length, width = embeddings.shape
    numbers = List(Value("int64"))
    features = Features(
        {
            EMBEDDINGS: Array2D((length, width), "float32"),
            "input_ids": numbers,
            "attention_mask": numbers,
            "labels": Value("int64"),
            LENGTH: Value("int64"),
        }
    )
    columns = {
        EMBEDDINGS: embeddings.float().cpu().numpy(),
        "input_ids": [ids.tolist()] * count,
        "attention_mask": [[1] * length] * count,
        "labels": list(labels),
        LENGTH: [length] * count,
    }
    return as_arrays(Dataset.from_dict(columns, features=features))


def as_arrays(rows: Dataset) -> Dataset:
    """The rows with their columns as arrays where they hold embeddings, as lists they would be slow to read; else as they are."""
    return rows.with_format("numpy") if EMBEDDINGS in rows.column_names else rows


class EmbeddingCollator:
    """Stacks rows of embeddings, which are all of one length; other rows go to another collator.

    Args:
        plain: of rows of token ids.
    """

    def __init__(self, plain: Collator):
        self.plain = plain

    def __call__(self, features: Given) -> dict[str, Tensor]:
        """One batch, without `length`."""
        if not features or EMBEDDINGS not in features[0]:
            return self.plain(features)
        names = [name for name in features[0] if name != LENGTH]
        return {name: torch.as_tensor(np.stack([np.asarray(row[name]) for row in features])) for name in names}
