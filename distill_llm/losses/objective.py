"""The objective: which losses a student is trained with; the same mapping in YAML and in Python."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill_llm.errors import InputError, one_of

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False, description="Factor of the term in the whole loss.")]
LayerIndex = Annotated[int, Field(ge=0)]
Layers = Literal["lineage", "uniform", "last"] | list[tuple[LayerIndex, LayerIndex]]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelsLoss(_Section):
    """Cross-entropy with the true labels (squared error for a regression task)."""

    weight: Weight = 1.0


class LogitsLoss(_Section):
    """Divergence of the teacher's and the student's outputs at a temperature (Hinton et al., 2015)."""

    weight: Weight = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "mse"] = "forward_kl"
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides both logits; the loss carries its square."
    )


class HiddenLoss(_Section):
    """Distance between hidden states of mapped layers."""

    weight: Weight = 1.0
    layers: Layers = "lineage"
    distance: Literal["mse", "cosine"] = "mse"


class AttentionLoss(_Section):
    """Distance between attention probabilities of mapped layers and heads."""

    weight: Weight = 1.0
    layers: Layers = "lineage"
    distance: Literal["kl", "mse"] = "kl"


class Objective(_Section):
    """The terms of the loss; a term that is None is left out. At least one has a positive weight."""

    labels: LabelsLoss | None = None
    logits: LogitsLoss | None = None
    hidden: HiddenLoss | None = None
    attention: AttentionLoss | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Objective":
        if not any(section.weight > 0 for section in self.terms().values()):
            raise ValueError("at least one of labels, logits, hidden, attention with a weight above zero")
        return self

    def terms(self) -> dict[str, LabelsLoss | LogitsLoss | HiddenLoss | AttentionLoss]:
        """The terms that are present, by name."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: section for name, section in sections if section is not None}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(name != "labels" for name in self.terms())


def parse_objective(mapping: "Mapping[str, Any] | Objective", field: str = "losses") -> Objective:
    """Check a mapping such as `{"logits": {"weight": 0.5, "temperature": 2.0}}` and fill in the defaults.

    Args:
        mapping: term name -> settings; an empty or missing settings mapping means the defaults.
        field: what the mapping is called in error messages.

    Raises:
        InputError: names the field, e.g. `losses.logits.temperature`.
    """
    if isinstance(mapping, Objective):
        return mapping
    if not isinstance(mapping, Mapping):
        raise InputError(field, mapping, "a mapping of " + ", ".join(Objective.model_fields))
    filled = {name: ({} if settings is None else settings) for name, settings in mapping.items()}
    try:
        return Objective.model_validate(filled)
    except ValidationError as error:
        raise _input_error(error, field) from None


def _input_error(error: ValidationError, field: str) -> InputError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        section: Any = Objective
        if len(path) > 1:
            section = {"labels": LabelsLoss, "logits": LogitsLoss, "hidden": HiddenLoss, "attention": AttentionLoss}[
                path[0]
            ]
        return InputError(".".join([field, *path]), first["input"], one_of(section.model_fields, path[-1]))
    if len(path) > 1 and path[1] == "layers":
        accepted = "lineage, uniform, last, or a list of [student layer, teacher layer] pairs counted from 0"
        settings = error.errors()[0]["input"] if len(path) == 2 else first["input"]
        return InputError(".".join([field, path[0], "layers"]), settings, accepted)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return InputError(".".join([field, *path]), first["input"], message)
