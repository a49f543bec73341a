"""The door of `profile`: opens each model, without its tokenizer, and checks that it can read the batch."""

from collections.abc import Mapping

from distill_llm.common.errors import raise_all
from distill_llm.models.finding import OpenModel, open_model
from distill_llm.models.limits import length_faults, limits_of


def open_profile(models: Mapping[str, str], sequence_length: int, trust_remote_code: bool = False) -> list[OpenModel]:
    """Open the models to measure.

    Args:
        models: field -> name of the model.
        sequence_length: number of tokens in each example.
        trust_remote_code: whether code that the models bring along may run.

    Raises:
        InputError: for the first fault; it names the model's field or `sequence_length`.
    """
    opened = [open_model(field, name, False, trust_remote_code, exported=True) for field, name in models.items()]
    for each in opened:
        raise_all(length_faults(limits_of(each.config, each.name), sequence_length, "sequence_length"))
    return opened
