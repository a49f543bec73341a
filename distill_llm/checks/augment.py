"""The door of `data.augment`: the task, the objective and the masked LM that it needs."""

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.kinds import KINDS
from distill_llm.data.tasks import Task
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, open_model
from distill_llm.recipe.recipe import Recipe

FIELD = "data.augment"


def augment_faults(recipe: Recipe, task: Task) -> list[InputError]:
    """What augmentation does not go with: other tasks than of one label per example, a cache, losses that it leaves nothing."""
    given = recipe.data.augment
    if given is None:
        return []
    if recipe.distillation is None:
        return [InputError(FIELD, given.model_dump(), fix="remove it, or add a distillation section that learns")]
    if task.kind.item != "example":
        fix = "remove it: only tasks with one label for an example are augmented (classification, regression, GLUE)"
        return [InputError(FIELD, task.name, fix=fix)]
    faults, losses = [], recipe.distillation.losses
    if recipe.teacher.cache is not None:
        fix = "remove it, or remove teacher.cache: a cache knows the rows of the data by their content, no changed ones"
        faults.append(InputError(FIELD, given.model_dump(exclude_none=True), fix=fix))
    if given.labels == "leave_out":
        field = f"{FIELD}.labels"
        if not losses.needs_teacher:
            fix = "set it to keep, or add a loss that compares with the teacher, such as logits"
            faults.append(InputError(field, given.labels, fix=fix))
        if not task.label_names:
            fix = "set it to keep: every row of a regression has a value"
            faults.append(InputError(field, given.labels, fix=fix))
    if given.mixup is not None:
        faults += losses.faults(Use(mixed=f"{FIELD}.mixup"), "distillation.losses")
    return faults


def open_masked_lm(recipe: Recipe, teacher: OpenModel) -> OpenModel | None:
    """Open the masked LM that proposes words, if the recipe names one.

    Raises:
        InputError: it is no masked LM, or has another tokenizer than the teacher.
    """
    augment = recipe.data.augment
    name = augment.replace.model if augment is not None and augment.replace is not None else None
    if name is None:
        return None
    found = open_model(f"{FIELD}.replace.model", name)
    assert found is not None
    if not KINDS["masked_lm"].has_head(found.config.architectures):
        given = f"{name} ({', '.join(found.config.architectures or []) or 'no class'})"
        raise InputError(found.field, given, "a ...ForMaskedLM model, or leave it out: word vectors are used then")
    tokenizer: PreTrainedTokenizerBase = found.tokenizer
    if tokenizer.get_vocab() != teacher.tokenizer.get_vocab() or tokenizer.mask_token_id is None:
        accepted = f"a masked LM with the tokenizer of the teacher ({teacher.name}); without one word vectors are used"
        raise InputError(found.field, name, accepted)
    return found
