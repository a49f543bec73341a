"""From what a user hands to a trainer to a Teacher."""

import inspect

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.online import OnlineTeacher


def as_teacher(given: object) -> Teacher | None:
    """A Teacher as it is, a model as an OnlineTeacher, None as None.

    Raises:
        InputError: it is something else, or a Teacher whose `signals` cannot be called as the trainer does.
    """
    if isinstance(given, Teacher):
        signature = inspect.signature(given.signals)
        try:
            signature.bind({}, 0, None, compact=False)
        except TypeError:
            accepted = "signals(batch, step, positions, compact)"
            raise InputError("teacher", f"{type(given).__name__} with signals{signature}", accepted) from None
        return given
    if given is None:
        return None
    if isinstance(given, PreTrainedModel):
        return OnlineTeacher(given)
    raise InputError("teacher", type(given).__name__, "a transformers model, a distill_llm.teachers.Teacher, or None")
