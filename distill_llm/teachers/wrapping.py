"""From what a user hands to a trainer to a Teacher."""

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.online import OnlineTeacher


def as_teacher(given: object) -> Teacher | None:
    """A Teacher as it is, a model as an OnlineTeacher, None as None.

    Raises:
        InputError: it is something else.
    """
    if given is None or isinstance(given, Teacher):
        return given
    if isinstance(given, PreTrainedModel):
        return OnlineTeacher(given)
    raise InputError("teacher", type(given).__name__, "a transformers model, a distill_llm.teachers.Teacher, or None")
