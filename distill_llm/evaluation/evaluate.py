"""Run a model over encoded rows and score it."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.common.progress import progress_bar
from distill_llm.data.causal import CausalCollator
from distill_llm.data.padding import LENGTH, Collator
from distill_llm.data.tasks import Task
from distill_llm.evaluation.generation import respond
from distill_llm.evaluation.perplexity import causal_loss
from distill_llm.metrics.registry import METRICS, load_metric, text_score
from distill_llm.models.item_logits import item_logits, packed


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

    Rows of like length share a batch, so little time goes into padding. Language models have `loss`, in nats per
    predicted token (masked LM: over the masks that the collator fixes; prompts: over the responses), and `perplexity`,
    its exponential. Prompts also have the task's metrics of responses that the model generates greedily.

    Args:
        model: a model with the task's head, on any device; its training mode is restored.
        dataset: rows of `distill_llm.data.encode`.
        task: says what the outputs mean.
        collator: from `distill_llm.data.collator`.
        batch_size: rows per forward pass.
        progress: whether to show a bar.

    Raises:
        ValueError: the dataset is empty.
        InputError: a language model has no token to predict in it.
        FloatingPointError: the model gave an output that is not finite.
    """
    if not len(dataset):
        raise ValueError("dataset: got no rows; accepted: at least one")
    if task.is_language_model:
        with _evaluating(model):
            result = _losses(model, dataset, task, collator, batch_size, progress)
            if task.metrics:
                assert isinstance(collator, CausalCollator)
                texts = respond(model, dataset, collator, task.max_new_tokens, batch_size=batch_size, progress=progress)
                result |= compute_metrics(task, *texts)
        return {**result, "score": result[task.main_metric]}
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
        with torch.inference_mode():
            logits.append(model(**batch).logits.float().cpu())
    back = torch.from_numpy(np.argsort(order))
    return torch.cat(logits)[back], torch.cat(labels)[back]


def _losses(
    model: PreTrainedModel, dataset: Dataset, task: Task, collator: Collator, batch_size: int, progress: bool
) -> dict[str, float]:
    batch_loss = _masked_loss if task.kind == "masked_lm" else causal_loss
    total, tokens = 0.0, 0
    for batch in _batches(model, dataset, _by_length(dataset), collator, batch_size, progress):
        with torch.inference_mode():
            loss_sum, count = batch_loss(model, batch)
        total, tokens = total + float(loss_sum), tokens + int(count)
    if tokens == 0:
        accepted = "rows with tokens to predict: words that the tokenizer knows, responses that are not empty"
        raise InputError("data.path", f"{len(dataset)} rows without a token to predict", accepted)
    loss = total / tokens
    if not math.isfinite(loss):
        raise FloatingPointError(f"{type(model).__name__} gave a loss that is not finite")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _masked_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a batch's hidden tokens, and their number."""
    labels = batch.pop("labels")
    predicted = labels != -100
    positions = predicted.flatten().nonzero().squeeze(-1)
    with packed(model, positions):  # the vocabulary's logits of what is predicted, not of every token
        logits = item_logits(model(**batch).logits, positions).float()
    return cross_entropy(logits, labels[predicted], reduction="sum"), predicted.sum()


def _by_length(dataset: Dataset) -> np.ndarray:
    """Row numbers, longest first: what does not fit in memory fails at once."""
    return np.argsort(-np.asarray(dataset[LENGTH]), kind="stable")


def _batches(
    model: PreTrainedModel, dataset: Dataset, order: np.ndarray, collator: Collator, batch_size: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    accepted = {*inspect.signature(model.forward).parameters, "labels"}
    rows = dataset.remove_columns([name for name in dataset.column_names if name not in accepted])
    with _evaluating(model):
        for begin in progress_bar(range(0, len(order), batch_size), desc="Evaluating", leave=False, shown=progress):
            columns = rows[order[begin : begin + batch_size].tolist()]
            features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield {name: values.to(model.device) for name, values in collator(features).items()}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def compute_metrics(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """All metrics of a task, under the names of their modules, and the main one again as `score`.

    Args:
        task: one with metrics; F1 is that of class 1 for two classes, else the mean over classes.
        predictions: (rows,) class ids, values or texts.
        references: (rows,) of the same kind.
    """
    result: dict[str, float] = {}
    for name in task.metrics:
        if name not in METRICS:
            result[task.main_metric] = text_score(name, predictions, references)
            continue
        options = {"average": "macro"} if name == "f1" and task.num_labels > 2 else {}
        result |= load_metric(name).compute(predictions=predictions, references=references, **options)
    return {**result, "score": result[task.main_metric]}
