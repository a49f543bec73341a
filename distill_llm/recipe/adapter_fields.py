"""The fields of peft's LoraConfig that a recipe may set, and their check."""

import importlib.util
from typing import Any

from distill_llm.common.errors import InputError, one_of


def check_adapter_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as given. Without peft any pass: a recipe can be read and listed, and a run says what to install.

    Raises:
        InputError: LoraConfig does not take a name or a value.
    """
    if importlib.util.find_spec("peft") is None:
        return fields
    from dataclasses import fields as dataclass_fields

    from peft import LoraConfig

    names = [field.name for field in dataclass_fields(LoraConfig) if field.init]
    for name in fields:
        if name not in names:
            raise InputError(name, fields[name], one_of(names, name))
    if "r" in fields and not (type(fields["r"]) is int and fields["r"] > 0):
        raise InputError("r", fields["r"], "a whole number above 0")
    if "lora_dropout" in fields and not (
        type(fields["lora_dropout"]) in (int, float) and 0 <= fields["lora_dropout"] < 1
    ):
        raise InputError("lora_dropout", fields["lora_dropout"], "a number from 0 to below 1")
    try:
        LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError("", fields, f"fields of LoraConfig ({error})") from None
    return fields
