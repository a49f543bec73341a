"""Run a model over encoded rows and score it."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import NotFinite, unsound_weight
from distill_llm.common.progress import progress_bar
from distill_llm.data.causal import CausalCollator
from distill_llm.data.padding import LENGTH, Collator
from distill_llm.data.tasks import Task
from distill_llm.evaluation.generation import respond
from distill_llm.evaluation.perplexity import by_row, causal_loss
from distill_llm.evaluation.rules import PYTHON_FIELDS, ScoringFields, scoring_faults
from distill_llm.losses.labels import IGNORED, label_loss
from distill_llm.metrics.errors import ratio_error, standard_error
from distill_llm.metrics.modules import text_score
from distill_llm.metrics.registry import METRICS, find_metric
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed
from distill_llm.models.limits import limits_of


def evaluate_model(
    model: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    *,
    batch_size: int = 64,
    progress: bool = True,
    fields: ScoringFields = PYTHON_FIELDS,
) -> dict[str, float]:
    """The task's metrics of a model on encoded rows, and the main one again as `score`.

    Rows of similar length share a batch, so little time goes into padding. A language model gets `loss`, in nats per
    predicted token (masked LM: the tokens that the collator hides; prompts: those of the responses), and `perplexity`, its
    exponential. For prompts, the task's metrics of greedily generated responses come on top. `standard_error` is the score's
    (see `distill_llm.metrics.errors`; left out for modules of `evaluate`), `rows` how many rows were scored.

    Args:
        model: a model with the task's head, on any device; its training mode is restored.
        dataset: rows of `distill_llm.data.encode`.
        task: says what the outputs mean.
        collator: from `distill_llm.data.collator`.
        batch_size: rows per forward pass.
        progress: whether to show a bar.
        fields: names for messages.

    Raises:
        InputError: the dataset is empty; the model cannot read a row, or has no room for a response (see `scoring_faults`); a
            language model has no token to predict.
        NotFinite: the model gave an output that is nan or infinite; minus infinity is a class that it masks.
    """
    if not len(dataset):
        raise InputError(fields.rows, "no rows", "at least one")
    raise_all(scoring_faults(limits_of(model.config, type(model).__name__), dataset, task, fields))
    if not task.is_language_model:
        found = predict(model, dataset, task, collator, batch_size=batch_size, progress=progress)
        result = compute_metrics(task, *found)
        return _counted(result, _error(task, result["score"], *found), dataset)
    with evaluating(model):
        result, error = _losses(model, dataset, task, collator, batch_size, progress) or ({}, None)
        if not result:
            accepted = "rows with tokens to predict: words that the tokenizer knows, responses that are not empty"
            raise InputError(fields.rows, f"{len(dataset)} rows without a token to predict", accepted)
        if task.generates:
            assert isinstance(collator, CausalCollator)
            texts = respond(model, dataset, collator, task.max_new_tokens, batch_size=batch_size, progress=progress)
            result |= compute_metrics(task, *texts)
            error = _error(task, result[task.main_metric], *texts)
    if task.main_metric == "perplexity" and error is not None:  # that of the loss is known
        error *= result["perplexity"]
    return _counted({**result, "score": result[task.main_metric]}, error, dataset)


def _error(task: Task, score: float, predictions: Any, references: Any) -> float | None:
    """The standard error of a score by a metric of METRICS; None for a module of `evaluate`."""
    if task.main_metric not in METRICS:
        return None
    return standard_error(METRICS[task.main_metric], score, predictions, references, task.num_labels)


def _counted(metrics: dict[str, float], error: float | None, dataset: Dataset) -> dict[str, float]:
    return {**metrics, **({} if error is None else {"standard_error": error}), "rows": len(dataset)}


def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """What a model says of encoded rows and what it should say, in the order of the rows (see `TaskKind.predictions`).

    Returns:
        Predictions and references, (items,) each: an item is a row, or a token with a label.

    Raises:
        NotFinite: the model gave an output that is nan or infinite; minus infinity is a class that it masks.
    """
    order = by_length(dataset)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in batches_of(model, dataset, order, collator, batch_size, progress):
        labels = batch.pop("labels").cpu().numpy()
        with torch.inference_mode():
            outputs = task.kind.outputs(model(**forward_inputs(model, batch))).float().cpu()
        if not (best := outputs.amax(-1)).isfinite().all():
            raise _not_finite(model, "output", best.sum().item())
        rows = range(len(labels))
        found += [task.kind.predictions(outputs[row : row + 1], labels[row : row + 1]) for row in rows]
    in_order = [found[place] for place in np.argsort(order)]
    predictions, references = (np.concatenate(each) for each in zip(*in_order, strict=True))
    return predictions, references


def _not_finite(model: PreTrainedModel, what: str, found: float) -> NotFinite:
    fix = f"score a model with finite numbers: in {str(model.dtype).removeprefix('torch.')} it may overflow"
    if (weight := unsound_weight(model)) is not None:
        fix = "score a model with finite numbers: its weight {} holds {}".format(*weight)
    return NotFinite(f"the {what} of {type(model).__name__} in scoring", str(found), fix)


def _losses(
    model: PreTrainedModel, dataset: Dataset, task: Task, collator: Collator, batch_size: int, progress: bool
) -> tuple[dict[str, float], float | None] | None:
    """Loss and perplexity, and the standard error of the loss; None where the rows have no token to predict."""
    batch_loss = BATCH_LOSSES[task.kind.item]
    sums, counts = [], []
    for batch in batches_of(model, dataset, by_length(dataset), collator, batch_size, progress):
        with torch.inference_mode():
            row_sums, row_counts = batch_loss(model, batch)
        sums.append(row_sums.numpy())
        counts.append(row_counts.numpy())
    losses, tokens = np.concatenate(sums), np.concatenate(counts)
    if not tokens.sum():
        return None
    loss = float(losses.sum() / tokens.sum())
    if not math.isfinite(loss):
        raise _not_finite(model, "loss", loss)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, ratio_error(losses, tokens)


def _masked_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of the losses of each row's hidden tokens, and their numbers."""
    labels = batch.pop("labels")
    predicted = labels != IGNORED
    positions = predicted.flatten().nonzero().squeeze(-1)
    with packed(model, positions):  # the vocabulary's logits of what is predicted, not of every token
        logits = item_logits(model(**forward_inputs(model, batch)).logits, positions)
    return by_row(label_loss(logits, labels[predicted]), positions, labels)


BATCH_LOSSES: dict[str, Callable[[PreTrainedModel, dict[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "token": _masked_loss,
    "next_token": causal_loss,
}
"""(B,) sums of the losses of each row's labelled tokens and (B,) their numbers, by what an output of the model is about."""


def by_length(dataset: Dataset) -> np.ndarray:
    """Row numbers, longest first: a batch that does not fit in memory fails at once."""
    return np.argsort(-np.asarray(dataset[LENGTH]), kind="stable")


def batches_of(
    model: PreTrainedModel, dataset: Dataset, order: np.ndarray, collator: Collator, batch_size: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of the rows of `order` on the model's device, which is in evaluation mode meanwhile."""
    accepted = {*inspect.signature(model.forward).parameters, "labels"}
    rows = dataset.remove_columns([name for name in dataset.column_names if name not in accepted])
    with evaluating(model):
        for begin in progress_bar(range(0, len(order), batch_size), desc="Evaluating", leave=False, shown=progress):
            columns = rows[order[begin : begin + batch_size].tolist()]
            features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield {name: values.to(model.device) for name, values in collator(features).items()}


def compute_metrics(task: Task, predictions: Any, references: Any) -> dict[str, float]:
    """All metrics of a task by name, and the main one again as `score`.

    Args:
        task: one with metrics.
        predictions: (items,) class ids, values or texts.
        references: (items,) of the same kind.
    """
    result: dict[str, float] = {}
    for name in task.metrics:
        if task.generates:
            result[task.main_metric] = text_score(name, predictions, references)
        else:
            result[name] = find_metric(name)(predictions, references, task.num_labels)
    return {**result, "score": result[task.main_metric]}
