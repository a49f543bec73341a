"""Whether a student can learn from a teacher: the same classes, the same vocabulary."""

from typing import Any

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import class_name_faults, label_names
from distill_llm.losses.items import kind_of
from distill_llm.teachers.cache import CachedTeacher


def cached_classes(student: PreTrainedModel, teacher: CachedTeacher, tokenizer: Any = None) -> int | None:
    """As `shared_classes`, for a teacher whose signals were written once.

    Raises:
        InputError: the cache is of another kind of output, of tokens that the student does not have, or of too few.
    """
    settings, kind = teacher.index.settings, kind_of(student)
    if settings.kind != kind:
        raise InputError(
            "teacher", f"a cache of kind {settings.kind}", f"one of kind {kind}, {type(student).__name__}'s"
        )
    if settings.kind == "token" and not settings.unlabelled:
        raise InputError("teacher", "a cache of labelled tokens", "one of all tokens, written with unlabelled=True")
    own = student.config.num_labels
    if type(student).__name__.endswith("ForMaskedLM") or kind == "next_token":
        own = student.config.get_text_config().vocab_size
        used = _used(tokenizer)
        if used is not None and used <= teacher.index.classes <= own:
            return None if teacher.index.classes == own else teacher.index.classes
    if teacher.index.classes != own:
        accepted = f"one of {own}, the student's (cut a padded vocabulary with CacheSettings.classes)"
        raise InputError("teacher", f"a cache of {teacher.index.classes} classes", accepted)
    return None


def shared_classes(student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any = None) -> int | None:
    """How many leading logits of two models mean the same; None: all of them.

    Vocabularies of one tokenizer are padded, to different sizes or to the same. What they are padded with is left out of the
    comparison, as a cache leaves it out: it was never trained, and takes part in every softmax.

    Args:
        student, teacher: models with the same kind of head.
        tokenizer: the tokenizer of the data, needed where the vocabularies differ in size; without it all of equal ones count.

    Raises:
        InputError: the models differ in head, classes or vocabulary, or are one object.
    """
    if student is teacher:
        raise InputError("teacher", "the student itself", "another model, for instance a copy")
    if _head(student) != _head(teacher):
        raise InputError(
            "teacher", type(teacher).__name__, f"a model with the same kind of head as {type(student).__name__}"
        )
    sizes = student.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    used = _used(tokenizer)
    if sizes[0] != sizes[1] and (used is None or used > min(sizes)):
        accepted = f"a teacher with the student's tokenizer and vocabulary ({sizes[0]} entries)"
        raise InputError("teacher", f"a vocabulary of {sizes[1]} entries", accepted)
    if _head(student) in ("MaskedLM", "next_token"):
        return used if used is not None and used < max(sizes) else None
    if student.config.num_labels != teacher.config.num_labels:
        accepted = f"a teacher with the student's number of labels ({student.config.num_labels})"
        raise InputError("teacher", f"{teacher.config.num_labels} labels", accepted)
    names = label_names(teacher.config), label_names(student.config)
    raise_all(class_name_faults(*names, "teacher", type(teacher).__name__))
    return None


def _used(tokenizer: Any) -> int | None:
    return token_count(tokenizer) if hasattr(tokenizer, "get_vocab") else None


def _head(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if kind_of(model) == "next_token":
        return "next_token"
    return name.rpartition("For")[2] if "For" in name else "Model"
