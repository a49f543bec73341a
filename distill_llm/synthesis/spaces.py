"""What an input that is no text is made of: embeddings of tokens, or pixels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError

TEXT = "a"
"""A text of one token: what a tokenizer puts before and behind it stands around every text."""


@dataclass(frozen=True)
class Space(ABC):
    """Inputs of one shape. They are made from standardised values: 0 is the middle of the space, 1 its spread.

    Attributes:
        mean, std: the middle and the spread of each value, broadcast to the shape of an input.
    """

    mean: Tensor
    std: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""

    @abstractmethod
    def whole(self, values: Tensor) -> Tensor:
        """Inputs (B, *shape) from standardised values of that shape; differentiable."""

    @abstractmethod
    def batch(self, inputs: Tensor) -> dict[str, Tensor]:
        """The batch that a model reads for inputs (B, *shape), without labels."""

    def noise(self, rows: int, draws: torch.Generator) -> Tensor:
        """Standardised values (rows, *shape) from a normal distribution, drawn on the CPU."""
        return torch.randn(rows, *self.shape, generator=draws).to(self.mean.device)


@dataclass(frozen=True)
class EmbeddingSpace(Space):
    """Rows of T embeddings, as wide as a model's: special tokens keep their own, all others are free.

    Attributes:
        mean, std: (H,) of the model's embeddings of all its tokens.
        fixed: (T, H) the embeddings of special tokens at their places, 0 elsewhere.
        free: (T, 1) of bool, where no special token is.
        ids: (T,) tokens to stand in the batch as `input_ids`, which no model reads there.
    """

    fixed: Tensor
    free: Tensor
    ids: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> "EmbeddingSpace":
        """The space of a model's inputs.

        Args:
            length: T, special tokens included.

        Raises:
            InputError: no place is left beside the special tokens.
        """
        table = model.get_input_embeddings().weight.detach().float()  # type: ignore[union-attr, operator]
        before, behind = frame_of(tokenizer)
        if length <= len(before) + len(behind):
            raise InputError("length", length, f"at least {len(before) + len(behind) + 1}, with special tokens")
        unknown = tokenizer.unk_token_id
        middle = [0 if unknown is None else unknown] * (length - len(before) - len(behind))
        ids = torch.tensor([*before, *middle, *behind], device=table.device)
        places = torch.arange(length, device=table.device)
        free = ((places >= len(before)) & (places < length - len(behind))).unsqueeze(-1)
        return cls(table.mean(0), table.std(0), table[ids].masked_fill(free, 0), free, ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, H)."""
        return tuple(self.fixed.shape)

    def whole(self, values: Tensor) -> Tensor:
        """Embeddings (B, T, H)."""
        return torch.where(self.free, self.mean + self.std * values, self.fixed)

    def batch(self, inputs: Tensor) -> dict[str, Tensor]:
        """`inputs_embeds`, with `input_ids` and `attention_mask` of their shape."""
        ids = self.ids.expand(len(inputs), -1)
        return {"inputs_embeds": inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class PixelSpace(Space):
    """Images (C, h, w) whose values lie between two bounds; standardised values beyond them are cut off.

    Attributes:
        low, high: the bounds.
    """

    image: tuple[int, int, int]
    low: float = -1.0
    high: float = 1.0

    @classmethod
    def of(cls, image: Sequence[int], low: float = -1.0, high: float = 1.0) -> "PixelSpace":
        """The space of images (channels, height, width) with values from `low` to `high`, the spread half of the range."""
        if not low < high:
            raise InputError("high", high, f"a number above low ({low})")
        channels, height, width = image
        middle, spread = torch.tensor((low + high) / 2), torch.tensor((high - low) / 2)
        return cls(middle, spread, (channels, height, width), low, high)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return self.image

    def whole(self, values: Tensor) -> Tensor:
        """Images within the bounds."""
        return (self.mean + self.std * values).clamp(self.low, self.high)

    def batch(self, inputs: Tensor) -> dict[str, Tensor]:
        """`pixel_values`."""
        return {"pixel_values": inputs}


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    ids = tokenizer(TEXT)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # TEXT itself may be unknown
    own = [place for place, token in enumerate(ids) if token not in special]
    if not own:  # a tokenizer that takes the text away
        return list(ids), []
    return list(ids[: own[0]]), list(ids[own[-1] + 1 :])
