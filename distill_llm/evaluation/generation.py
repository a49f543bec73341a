"""Responses that a model gives to prompts, greedily."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from distill_llm.data.causal import IGNORED, CausalCollator, prompt_length
from distill_llm.data.special_tokens import document_end


def respond(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: CausalCollator,
    max_new_tokens: int,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[list[str], list[str]]:
    """Greedy responses to the prompts of a data set, and the data's own responses, as text without special tokens.

    Prompts of like length share a batch, padded on the left. Generation ends at the tokenizer's EOS, at the ends that the model's
    generation config names, or after `max_new_tokens`; nothing else of that config counts.

    Args:
        model: a causal LM in evaluation mode.
        dataset: encoded rows of the task `prompts`, not packed.
        collator: of that task.
        max_new_tokens: most tokens of a response.
        batch_size: prompts at a time.
        progress: whether to show a bar.

    Returns:
        (rows,) generated and (rows,) given responses, in the order of the rows.
    """
    rows = dataset.select_columns(["input_ids", "labels"])
    order = np.argsort([-prompt_length(labels) for labels in rows["labels"]], kind="stable")
    generated = [""] * len(rows)
    with torch.inference_mode(), _greedy(model, collator, max_new_tokens):
        for begin in tqdm(range(0, len(order), batch_size), desc="Generating", leave=False, disable=not progress):
            chosen = order[begin : begin + batch_size].tolist()
            batch = {
                name: values.to(model.device) for name, values in collator.prompts(list(rows.select(chosen))).items()
            }
            output = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()  # type: ignore[operator]
            for index, ids in zip(chosen, output, strict=True):
                generated[index] = collator.text(ids)
    given = [collator.text([label for label in labels if label != IGNORED]) for labels in rows["labels"]]
    return generated, given


@contextmanager
def _greedy(model: PreTrainedModel, collator: CausalCollator, max_new_tokens: int) -> Iterator[None]:
    """Sets plain greedy decoding; the model's own settings come back afterwards."""
    before = model.generation_config
    own = before.eos_token_id if before is not None else None
    ends = {document_end(collator.tokenizer), *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=collator.pad
    )
    try:
        yield
    finally:
        model.generation_config = before
