"""A finished model in fewer bits, outside a run: saved, loaded again, scored and timed beside itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from distill_llm.checks.quantize import OpenQuantizing
from distill_llm.common.files import full_disk_named, written_whole
from distill_llm.data.embeddings import EMBEDDINGS
from distill_llm.data.encoding import collator
from distill_llm.data.padding import Collator
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.rules import RECIPE_FIELDS
from distill_llm.measuring.profiling import Comparison, compare
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.limits import longest_input
from distill_llm.quantizing.rounding import bytes_in, bytes_of, quantize
from distill_llm.quantizing.scheme import Scheme


@dataclass(frozen=True)
class Batch:
    """The batch that is timed: examples, and tokens of each."""

    size: int = 32
    tokens: int = 64


@dataclass(frozen=True)
class Quantized:
    """What became of a model.

    Attributes:
        megabytes: of the weights, before and after.
        costs: measured side by side, the quantized model first.
        scores: metrics before and after; None where no task was named.
    """

    megabytes: tuple[float, float]
    costs: Comparison
    scores: tuple[Mapping[str, float], Mapping[str, float]] | None


def quantize_model(
    opened: OpenQuantizing, scheme: Scheme, output: Path, examples: int = 128, batch: Batch | None = None
) -> Quantized:
    """Round a model, save it with its tokenizer, load it again and measure both.

    Args:
        opened: by `open_quantizing`.
        output: the folder for it, with nothing in it.
        examples: training rows that a scheme with `smooth` is calibrated on.
        batch: to time; None: 32 examples of 64 tokens.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    whole: Any = load_pretrained(opened.model.path).eval().to(device or "cpu")  # type: ignore[arg-type]
    data, timed = opened.data, batch or Batch()
    pad = collator(data.task, opened.model.tokenizer) if data is not None else None
    batches: Any = ()
    if scheme.smooth is not None and data is not None and pad is not None:
        rows = data.train.shuffle(seed=0).select(range(min(examples, len(data.train))))
        batches = calibration_batches(rows, opened.model.tokenizer, pad)
    with full_disk_named(output), written_whole(output, folder=True) as folder:
        quantize(whole, scheme, batches).save_pretrained(folder)
        opened.model.tokenizer.save_pretrained(folder)
    rounded: Any = load_pretrained(output).eval().to(device or "cpu")  # type: ignore[arg-type]
    tokens = min(timed.tokens, longest_input(whole.config) or timed.tokens)
    costs = compare(rounded, whole, timed.size, tokens)
    scores = None
    if data is not None and pad is not None:
        test, task = data.test, data.task
        scores = tuple(evaluate_model(each, test, task, pad, fields=RECIPE_FIELDS) for each in (whole, rounded))
    return Quantized((bytes_of(whole) / 1e6, bytes_in(output) / 1e6), costs, scores)  # type: ignore[arg-type]


def calibration_batches(rows: Dataset, tokenizer: Any, pad: Collator) -> DataLoader:
    """Rows one at a time, so that there is no padding whose activations would count."""
    known = {*tokenizer.model_input_names, "position_ids", "labels", EMBEDDINGS}
    rows = rows.remove_columns([name for name in rows.column_names if name not in known])
    return DataLoader(rows, batch_size=1, collate_fn=pad)  # type: ignore[arg-type]
