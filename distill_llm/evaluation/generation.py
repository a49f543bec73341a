"""Responses that a model gives to prompts, greedily."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.common.progress import progress_bar
from distill_llm.data.causal import CausalCollator, prompt_length
from distill_llm.losses.labels import IGNORED
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.sampling import Sampling


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

    Prompts of similar length share a batch, and answers end where `Decoder` ends them.

    Args:
        model: a causal LM.
        dataset: encoded rows of the task `prompts`, not packed.
        collator: of that task.
        max_new_tokens: most tokens of a response.
        batch_size: prompts at a time.
        progress: whether to show a progress bar.

    Returns:
        (rows,) generated and (rows,) given responses, in the order of the rows.
    """
    rows = dataset.select_columns(["input_ids", "labels"])
    lengths = [prompt_length(labels) for labels in rows["labels"]]
    order = np.argsort([-length for length in lengths], kind="stable")
    generated = [""] * len(rows)
    decoder = Decoder(model, collator, Sampling(max_new_tokens, temperature=0))
    with decoder.ready():
        for begin in progress_bar(range(0, len(order), batch_size), desc="Generating", leave=False, shown=progress):
            chosen = order[begin : begin + batch_size].tolist()
            prompts = [rows[index]["input_ids"][: lengths[index]] for index in chosen]
            for index, answer in zip(chosen, decoder(prompts), strict=True):
                generated[index] = decoder.text(answer)
    given = [collator.text([label for label in labels if label != IGNORED]) for labels in rows["labels"]]
    return generated, given
