"""What evaluation refuses: rows that a model cannot read, and prompts that leave no room for a response."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.tasks import Task
from distill_llm.models.limits import InputLimits, longest_prompt, read_rows, room_faults, row_faults


@dataclass(frozen=True)
class ScoringFields:
    """What a caller calls the rows, and the most tokens of a generated response."""

    rows: str = "dataset"
    max_new_tokens: str = "task.max_new_tokens"


PYTHON_FIELDS = ScoringFields()
"""What Python calls them."""
RECIPE_FIELDS = ScoringFields("data.path", "evaluation.max_new_tokens")
"""What a recipe calls them."""


def scoring_faults(
    limits: InputLimits,
    rows: Dataset,
    task: Task,
    fields: ScoringFields = PYTHON_FIELDS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[InputError]:
    """The faults of encoded rows that a model is to be scored on.

    Args:
        limits: of the model.
        rows: of `distill_llm.data.encode`.
        task: says whether responses are generated, and how long they may be.
        fields: names for messages.
        tokenizer: names a token without an embedding.
    """
    faults = row_faults(limits, read_rows(rows, limits), fields.rows, tokenizer)
    if not task.generates or faults:
        return faults
    return room_faults(limits, longest_prompt(rows), task.max_new_tokens, fields.max_new_tokens, fields.rows)
