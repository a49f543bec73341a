"""What an estimate is made from and of: devices, rows, bytes of weights, the price of a stage."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.lineage import LAYER_UNITS
from distill_llm.common.errors import InputError
from distill_llm.data.padding import LENGTH
from distill_llm.data.tasks import TaskData
from distill_llm.losses.labels import IGNORED
from distill_llm.models.adapters import without_adapters
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.units.sizes import counts_of, hidden_size

Sharing = Literal["ddp", "fsdp2", "zero3"]
OPTIMIZER_BYTES = ((r".*8bit.*", 2.0), (r".*4bit.*", 1.0), (r"sgd|adafactor", 0.0), (r"lion.*|adagrad|rmsprop.*", 4.0))
"""Bytes of an optimizer's state for each weight that is trained, by its name; all others hold AdamW's two moments, 8."""
MASKED = 0.15
"""Share of the tokens that masked language modelling masks."""


@dataclass(frozen=True)
class Devices:
    """Equal devices of one machine.

    Attributes:
        count: how many.
        size: bytes of each.
        sharing: how several divide a model in training.
    """

    count: int
    size: int
    sharing: Sharing = "ddp"

    @classmethod
    def named(cls, text: str, sharing: Sharing = "ddp") -> "Devices":
        """The devices of `8x80GB`, or of `80GB` for one.

        Raises:
            InputError: the text says something else.
        """
        found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*GB", text.strip(), re.IGNORECASE)
        if found is None or int(found[1] or 1) < 1 or float(found[2]) <= 0:
            raise InputError("devices", text, "NUMBERxMEMORY, for example 8x80GB")
        return cls(int(found[1] or 1), int(float(found[2]) * 1e9), sharing)


@dataclass(frozen=True)
class Models:
    """A run's models on the meta device.

    Attributes:
        teacher: with the task's head.
        student: the given student; None: pruning makes it.
        adapted: puts the recipe's adapters around a student, where only those learn.
        tokenizer: of both.
        peers: further students that learn together with the student; None: pruning makes it.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel | None = None
    adapted: Callable[[PreTrainedModel], nn.Module] = lambda model: model
    tokenizer: PreTrainedTokenizerBase | None = None
    peers: tuple[PreTrainedModel | None, ...] = ()


@dataclass(frozen=True)
class StageCost:
    """What a stage takes.

    Attributes:
        name: of the stage.
        parts: bytes on the fullest device, by what they are.
        flops: floating point operations of the device with most.
    """

    name: str
    parts: Mapping[str, float]
    flops: float

    @property
    def bytes(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Rows:
    """The rows of a run, as to their lengths.

    Attributes:
        train, test: how many.
        longest: tokens of the longest training row.
        padded: tokens of a training row on average, padded to the longest of its batch.
        scored: tokens of a test row on average.
        counted: share of the tokens that has a label.
    """

    train: int
    test: int
    longest: int
    padded: float
    scored: float
    counted: float = 1.0

    @classmethod
    def of(cls, data: TaskData, batch: int) -> "Rows":
        """Of encoded rows; `batch` is the number of rows of a micro-batch."""
        lengths = np.asarray(data.train[LENGTH])
        drawn = np.random.default_rng(0).permutation(lengths)
        padded = np.mean([drawn[start : start + batch].max() for start in range(0, len(drawn), batch)])
        counted = 1.0
        if data.task.kind.changes_inputs:
            counted = MASKED
        elif data.task.is_language_model and "labels" in data.train.column_names:
            labels = data.train.select(range(min(256, len(lengths))))["labels"]
            counted = sum(sum(token != IGNORED for token in row) for row in labels) / sum(map(len, labels))
        scored = float(np.mean(data.test[LENGTH]))
        return cls(len(lengths), len(data.test), int(lengths.max()), float(padded), scored, counted)


def steps_of(fields: Mapping[str, Any], rows: int, batch: int) -> int:
    """The number of optimizer steps; `batch` is the number of rows of all devices and micro-batches."""
    if (most := fields.get("max_steps", -1)) > 0:
        return most
    return math.ceil(fields.get("num_train_epochs", 3) * math.ceil(rows / batch))


def optimizer_bytes(name: str) -> float:
    """Bytes of the optimizer's state for each weight that it trains."""
    return next((size for pattern, size in OPTIMIZER_BYTES if re.fullmatch(pattern, name)), 8.0)


def precision_of(fields: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of mixed precision that training fields ask for."""
    return torch.bfloat16 if fields.get("bf16") else torch.float16 if fields.get("fp16") else None


def checkpointing_in(fields: Mapping[str, Any]) -> bool:
    """Whether training fields have activations computed again in the backward pass."""
    return bool(fields.get("activation_checkpointing") or fields.get("gradient_checkpointing"))


def weight_bytes(model: nn.Module, dtype: torch.dtype = torch.float32, learned: bool = False) -> int:
    """Bytes of a model's weights in a dtype; with `learned`, of those alone that are trained."""
    return dtype.itemsize * sum(each.numel() for each in model.parameters() if each.requires_grad or not learned)


def gathered_bytes(model: nn.Module, precision: torch.dtype | None) -> int:
    """Bytes that a device holds whole of a divided model: what is outside the layers, a layer and the next one, and the
    gradients of a layer.
    """
    outside, largest = _outside_and_largest(model)
    return (outside + 3 * largest) * (precision or torch.float32).itemsize


def resident_bytes(model: nn.Module) -> int:
    """Bytes in fp32 of what is outside a model's layers, and of its largest layer."""
    return torch.float32.itemsize * sum(_outside_and_largest(model))


def _outside_and_largest(model: nn.Module) -> tuple[int, int]:
    """Numbers of weights."""
    own = without_adapters(model)
    layers = [sum(each.numel() for each in layer.parameters()) for layer in layers_of(own)]
    return sum(each.numel() for each in own.parameters()) - sum(layers), max(layers, default=0)


def held_bytes(model: nn.Module, dtype: torch.dtype, quantization: str | None) -> float:
    """Bytes of a model in memory that is not trained: the weights of its layers take fewer bits where it is quantized."""
    whole = weight_bytes(model, dtype)
    if quantization is None:
        return whole
    layers = sum(each.numel() for each in layers_of(without_adapters(model)).parameters())
    return whole - layers * (dtype.itemsize - {"8bit": 1.0, "4bit": 0.5}[quantization])


def even_scores(model: PreTrainedModel) -> Importance:
    """Scores at random for everything that a plan may rank."""
    draw, counts = torch.Generator().manual_seed(0), counts_of(model)
    layers, width = len(counts), hidden_size(model)
    rows: dict[str, Any] = {
        kind: tuple(torch.rand(each[kind], generator=draw) for each in counts) for kind in LAYER_UNITS
    }
    whole = {kind: torch.rand(layers, generator=draw) for kind in ("layers", "attention", "ffn")}
    return Importance("random", units={**rows, **whole, "hidden": torch.rand(width, generator=draw)})
