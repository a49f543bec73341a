"""The door of measuring models: each is opened, without its tokenizer, and has positions for the batch."""

from collections.abc import Mapping

from distill_llm.common.errors import raise_all
from distill_llm.models.finding import OpenModel, open_model
from distill_llm.models.limits import length_faults, limits_of


def open_profile(models: Mapping[str, str], sequence_length: int) -> list[OpenModel]:
    """Open the models that are to be measured.

    Args:
        models: by the field that names each.
        sequence_length: tokens of each example.

    Raises:
        InputError: for the first fault, naming that field or `sequence_length`.
    """
    opened = [open_model(field, name, tokenizer=False) for field, name in models.items()]
    for each in opened:
        raise_all(length_faults(limits_of(each.config, each.name), sequence_length, "sequence_length"))
    return opened
