"""The fields of peft's LoraConfig that a recipe may set, checked without torch where they are only names."""

import importlib.util
from typing import Any

from distill_llm.errors import InputError, one_of


def check_adapter_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as given.

    Raises:
        InputError: peft is missing, or a name or value that LoraConfig does not take.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("", fields, "nothing without the package peft (pip install distill_llm[peft])")
    from dataclasses import fields as dataclass_fields

    from peft import LoraConfig

    names = [field.name for field in dataclass_fields(LoraConfig) if field.init]
    for name in fields:
        if name not in names:
            raise InputError(name, fields[name], one_of(names, name))
    for name in ("r", "lora_alpha"):
        if name in fields and not (isinstance(fields[name], int | float) and fields[name] > 0):
            raise InputError(name, fields[name], "a number above 0")
    try:
        LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError("", fields, f"fields of LoraConfig ({error})") from None
    return fields
