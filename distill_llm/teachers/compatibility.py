"""Whether a student can learn from a teacher: the same classes, the same vocabulary."""

from typing import Any

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import class_name_faults, label_names
from distill_llm.losses.items import is_language_model, kind_of
from distill_llm.models.sharing import check_apart


def shared_classes(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any = None, any_order: bool = False
) -> int | None:
    """How many leading logits of two models mean the same; None: all of them.

    Vocabularies of one tokenizer are padded, to different sizes or to the same. The padding is left out of the comparison, as
    a cache leaves it out: it was never trained, and takes part in every softmax.

    Args:
        student, teacher: models with the same kind of head.
        tokenizer: the tokenizer of the data, needed where the vocabularies differ in size; without it all of equal ones count.
        any_order: leave the names of classes to the caller.

    Raises:
        InputError: the models differ in head, classes or vocabulary, or share weights that are trained.
    """
    check_apart(student, teacher)
    if _head(student) != _head(teacher):
        raise InputError(
            "teacher", type(teacher).__name__, f"a model with the same kind of head as {type(student).__name__}"
        )
    # a model of images has none
    sizes = [getattr(model.config.get_text_config(), "vocab_size", 0) for model in (student, teacher)]
    used = tokens_in_use(tokenizer)
    if sizes[0] != sizes[1] and (used is None or used > min(sizes)):
        accepted = f"a teacher with the student's tokenizer and vocabulary ({sizes[0]} entries)"
        raise InputError("teacher", f"a vocabulary of {sizes[1]} entries", accepted)
    if is_language_model(student):
        return used if used is not None and used < max(sizes) else None
    if student.config.num_labels != teacher.config.num_labels:
        accepted = f"a teacher with the student's number of labels ({student.config.num_labels})"
        raise InputError("teacher", f"{teacher.config.num_labels} labels", accepted)
    if any_order:
        return None
    names = label_names(teacher.config), label_names(student.config)
    raise_all(class_name_faults(*names, "teacher", type(teacher).__name__))
    return None


def tokens_in_use(tokenizer: Any) -> int | None:
    """How many tokens a tokenizer has; None where it does not say."""
    return token_count(tokenizer) if hasattr(tokenizer, "get_vocab") else None


def _head(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if kind_of(model) == "next_token":
        return "next_token"
    return name.rpartition("For")[2] if "For" in name else "Model"
