"""What all sections of a recipe have in common."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of a recipe: unknown names are errors, and assignments are checked like input."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, given: Any, field: ValidationInfo) -> Any:
        """Pydantic would read true as 1. As the word "true" it is refused like any other word."""
        types = _types(cls.model_fields[field.field_name or ""].annotation)
        return str(given).lower() if isinstance(given, bool) and types & {int, float} and bool not in types else given


def _types(annotation: Any) -> set[Any]:
    """The types of an annotation and of its parts."""
    return {annotation}.union(*map(_types, get_args(annotation)))
