"""What a draft sets by the kind of model, its size, the task and the number of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_llm.common.precision import fast_bf16
from distill_llm.drafting.model import ModelFacts
from distill_llm.drafting.target import timed_batch

MILLION, BILLION = 10**6, 10**9


@dataclass(frozen=True)
class Setting:
    """What decides.

    Attributes:
        model: of the teacher.
        task: as `data.task`.
        rows: for training.
        length: `data.max_length`.
        keep: the share that stays.
    """

    model: ModelFacts
    task: str
    rows: int
    length: int
    keep: float


@dataclass(frozen=True)
class Settings:
    """Fields of a recipe's sections, comments by dotted field, and lines on what was chosen."""

    teacher: dict[str, Any]
    pruning: dict[str, Any]
    distillation: dict[str, Any]
    final: dict[str, Any]
    evaluation: dict[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def settings_for(given: Setting) -> Settings:
    """The settings of a model that writes text, or of one that reads it."""
    return _writer(given) if given.model.writes else _reader(given)


def _reader(given: Setting) -> Settings:
    """An encoder, or any model with the head of a classifier."""
    model, regression = given.model, given.task in ("regression", "stsb")
    documents = given.task == "text"
    epochs, rounds = _epochs(given.rows), 3 if given.keep < 0.3 else 2 if given.keep < 0.45 else 1
    rate = 1e-4 if model.params < 60 * MILLION else 5e-5 if model.params < 200 * MILLION else 2e-5
    train: dict[str, Any] = {
        "learning_rate": rate,
        "per_device_train_batch_size": 32 if given.length <= 256 else 16,
        "warmup_steps": 0.1,
    }
    train |= _precision() | ({} if documents else {"train_sampling_strategy": "group_by_length"})
    logits: dict[str, Any] = {"weight": 0.5, "divergence": "mse"} if regression else {"weight": 0.5, "temperature": 2.0}
    losses = {"labels": {"weight": 0.5}, "logits": logits, "hidden": {"weight": 1.0, "layers": "lineage"}}
    comments = {
        "distillation.losses": "labels of the data; outputs and hidden states of the teacher",
        "distillation.num_train_epochs": f"by the number of rows ({given.rows:,}); more epochs keep more of the score",
    }
    teacher: dict[str, Any] = {}
    said = [_training(epochs, rate) + (f", {rounds} rounds" if rounds > 1 else "")]
    if model.task is None and not (documents and model.masked):
        teacher["train"] = {"num_train_epochs": max(2, epochs), **train}
        comments["teacher.train"] = (
            "the model has no head for the task yet, so it is fine-tuned first; remove it if it has"
        )
        said.insert(0, "the model has no head for the task, so it is fine-tuned first")
    final = {"num_train_epochs": epochs} if rounds > 1 else {}
    batch, tokens = timed_batch(model, given.length)
    return Settings(
        teacher,
        {**({"rounds": rounds} if rounds > 1 else {}), **_round_to(model)},
        {"losses": losses, "num_train_epochs": max(1, epochs // rounds), **train},
        final,
        {"batch_size": 64, "latency": {"batch_size": batch, "sequence_length": tokens}},
        comments,
        tuple(said),
    )


def _writer(given: Setting) -> Settings:
    """A decoder."""
    model = given.model
    large = model.params >= BILLION
    rate = 2e-4 if model.params < 300 * MILLION else 1e-4 if model.params < 3 * BILLION else 5e-5
    train: dict[str, Any] = {
        "num_train_epochs": 1 if given.task == "text" or given.rows >= 20_000 else 2,
        "learning_rate": rate,
        "per_device_train_batch_size": 2 if given.length > 512 or large else 4,
        "gradient_accumulation_steps": 8 if given.length > 512 or large else 4,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        **_precision(),
    }
    pruning: dict[str, Any] = {**_round_to(model), "min_heads": 1}
    comments = {
        "pruning.min_heads": "each layer keeps a head, so that every program reads the student",
        "distillation.losses": "the next token of the data, and what the teacher says of it",
    }
    teacher: dict[str, Any] = {}
    if large:
        teacher["dtype"] = "bfloat16"
        train["activation_checkpointing"] = True
        pruning |= {"criterion": "activation", "moment_layers": 4, "calibration_examples": 128}
        comments["pruning.criterion"] = "needs no gradients, which a model of this size has no room for"
    else:
        pruning |= {"cuts": 4, "calibration_examples": min(64, given.rows) if given.task != "text" else 64}
        comments["pruning.cuts"] = "small cuts, each with its own measurement, lose less"
    batch, tokens = timed_batch(model, given.length)
    return Settings(
        teacher,
        pruning,
        {"losses": {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}, **train},
        {},
        {"batch_size": 8, "latency": {"batch_size": batch, "sequence_length": tokens}},
        comments,
        (_training(train["num_train_epochs"], rate),),
    )


def _training(epochs: int, rate: float) -> str:
    return f"training: {epochs} epoch{'s' if epochs > 1 else ''}, learning rate {rate:g}"


def _epochs(rows: int) -> int:
    """Small data need more passes: so that there are some hundred steps."""
    return next((epochs for most, epochs in ((2000, 8), (10_000, 5), (50_000, 3), (200_000, 2)) if rows < most), 1)


def _round_to(model: ModelFacts) -> dict[str, int]:
    """Multiples that kernels like, where a layer has many of them."""
    return {"round_to": 32} if model.neurons >= 1024 else {"round_to": 16} if model.neurons >= 256 else {}


def _precision() -> dict[str, bool]:
    """Mixed precision, where this machine computes in it."""
    return {"bf16": True} if fast_bf16() else {}
