"""Run a model over encoded rows and score it."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from distill_llm.capture import item_logits, packed
from distill_llm.data.encoding import LENGTH, Collator
from distill_llm.data.tasks import Task
from distill_llm.evaluation.metrics import compute_metrics


def evaluate_model(
    model: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """The task's metrics of a model on encoded rows, and the main one again as `score`.

    Rows of like length share a batch, so little time goes into padding. For masked LM the metrics are `loss` (nats per
    masked token, over the masks that the collator fixes) and `perplexity` (its exponential).

    Args:
        model: a model with the task's head, on any device; its training mode is restored.
        dataset: rows of `distill_llm.data.encode`.
        task: says what the outputs mean.
        collator: from `distill_llm.data.collator`.
        batch_size: rows per forward pass.
        progress: whether to show a bar.

    Raises:
        ValueError: the dataset is empty.
        FloatingPointError: the model gave an output that is not finite.
    """
    if not len(dataset):
        raise ValueError("dataset: got no rows; accepted: at least one")
    if task.kind == "masked_lm":
        return _masked_loss(model, dataset, collator, batch_size, progress)
    logits, labels = predict(model, dataset, collator, batch_size=batch_size, progress=progress)
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"{type(model).__name__} gave outputs that are not finite on {task.name}")
    predictions = logits.squeeze(-1) if task.kind == "regression" else logits.argmax(-1)
    return compute_metrics(task, predictions.tolist(), labels.tolist())


def predict(
    model: PreTrainedModel, dataset: Dataset, collator: Collator, *, batch_size: int = 64, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits (rows, C) in fp32 and labels (rows,) of a data set, on the CPU, in the order of its rows."""
    order = _by_length(dataset)
    logits, labels = [], []
    for batch in _batches(model, dataset, order, collator, batch_size, progress):
        labels.append(batch.pop("labels").cpu())
        logits.append(_logits(model, batch).float().cpu())
    back = torch.from_numpy(np.argsort(order))
    return torch.cat(logits)[back], torch.cat(labels)[back]


def _masked_loss(
    model: PreTrainedModel, dataset: Dataset, collator: Collator, batch_size: int, progress: bool
) -> dict[str, float]:
    total, tokens = 0.0, 0
    for batch in _batches(model, dataset, _by_length(dataset), collator, batch_size, progress):
        labels = batch.pop("labels")
        predicted = labels != -100
        positions = predicted.flatten().nonzero().squeeze(-1)
        with packed(model, positions):  # the vocabulary's logits of what is predicted, not of every token
            logits = item_logits(_logits(model, batch), positions).float()
        total += float(cross_entropy(logits, labels[predicted], reduction="sum"))
        tokens += int(predicted.sum())
    loss = total / max(tokens, 1)
    if not math.isfinite(loss):
        raise FloatingPointError(f"{type(model).__name__} gave a loss that is not finite")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "score": loss}


def _by_length(dataset: Dataset) -> np.ndarray:
    """Row numbers, longest first: what does not fit in memory fails at once."""
    return np.argsort(-np.asarray(dataset[LENGTH]), kind="stable")


def _batches(
    model: PreTrainedModel, dataset: Dataset, order: np.ndarray, collator: Collator, batch_size: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    accepted = {*inspect.signature(model.forward).parameters, "labels"}
    rows = dataset.remove_columns([name for name in dataset.column_names if name not in accepted])
    with _evaluating(model):
        for begin in tqdm(range(0, len(order), batch_size), desc="Evaluating", leave=False, disable=not progress):
            columns = rows[order[begin : begin + batch_size].tolist()]
            features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield {name: values.to(model.device) for name, values in collator(features).items()}


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**batch).logits


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
