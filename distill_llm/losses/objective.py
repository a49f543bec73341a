"""The objective: which losses a student is trained with; the same mapping in YAML and in Python."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distill_llm.common.errors import InputError, one_of
from distill_llm.common.validation import faults_of
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.schedules import Temperature, Weight, largest, value_at

# A new distance of hidden states is a name here and a function of that name in distill_llm/losses/hidden.py.
DISTANCES = ("mse", "cosine", "normalized_mse")

MAPPINGS = ("lineage", "uniform", "last")
Distance = Literal[DISTANCES]  # type: ignore[valid-type]


def _read_layers(given: Any) -> Any:
    pairs = given if given and isinstance(given, list | tuple) else [()]
    sound = (isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if given in MAPPINGS or (all(sound) and all(type(index) is int and index >= 0 for pair in pairs for index in pair)):
        return given
    words = "a list of [student layer, teacher layer] pairs, whole numbers from 0"
    raise InputError("", given, f"{one_of(MAPPINGS, str(given))}, or {words}")


def _read_divergence(given: Any) -> Any:
    if isinstance(given, str) and given in DIVERGENCES:
        return given
    raise InputError("", given, one_of(DIVERGENCES, str(given)))


Layers = Annotated[Literal[MAPPINGS] | list[tuple[int, int]], BeforeValidator(_read_layers)]  # type: ignore[valid-type]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Weight = Field(default=1.0, description="Factor of the term in the whole loss: a number or a schedule.")


class LabelsLoss(_Section):
    """Cross-entropy with the true labels (squared error for a regression task)."""


class LogitsLoss(_Section):
    """Divergence of the teacher's and the student's outputs at a temperature (Hinton et al., 2015)."""

    divergence: Annotated[str, BeforeValidator(_read_divergence)] = "forward_kl"
    temperature: Temperature = Field(default=1.0, description="Divides both logits; the loss carries its square.")
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="Of jsd (below 1) and dkd.")
    skew: float | None = Field(default=None, gt=0, lt=1, description="Share of the other distribution in the mixture.")
    alpha: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Of dkd: weight of the target's part."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Compare the teacher's k likeliest classes and the rest as one."
    )

    @model_validator(mode="after")
    def _settings_belong(self) -> "LogitsLoss":
        for name in type(self).model_fields:
            given = getattr(self, name)
            general = name in ("weight", "divergence", "temperature")
            if given is not None and not general and name not in DIVERGENCES[self.divergence].settings:
                owners = [divergence for divergence, row in DIVERGENCES.items() if name in row.settings]
                raise InputError(name, given, f"none with {self.divergence}; it is a setting of {', '.join(owners)}")
        if self.divergence == "jsd" and self.beta is not None and self.beta >= 1:
            raise InputError("beta", self.beta, "a number above 0 and below 1 with jsd")
        return self

    def settings(self) -> dict[str, Any]:
        """The settings of the divergence that were given; the others are at its own defaults."""
        own = {name: getattr(self, name, None) for name in DIVERGENCES[self.divergence].settings}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def needs_labels(self) -> bool:
        """Whether the divergence treats the true class apart."""
        return DIVERGENCES[self.divergence].needs_labels


class EmbeddingsLoss(_Section):
    """Distance between the outputs of the embedding layers (TinyBERT, Jiao et al., 2020)."""

    distance: Distance = "mse"


class HiddenLoss(_Section):
    """Distance between hidden states of mapped layers."""

    layers: Layers = "lineage"
    distance: Distance = "mse"


class AttentionLoss(_Section):
    """Distance between attention probabilities of mapped layers and heads."""

    layers: Layers = "lineage"
    distance: Literal["kl", "mse"] = "kl"


class RelationsLoss(_Section):
    """Divergence between the relations of tokens by queries, keys and values (MiniLMv2, Wang et al., 2021)."""

    layers: Layers = "last"
    pairs: list[Literal["qq", "kk", "vv"]] = Field(default=["qq", "kk", "vv"], min_length=1, description="qq, kk or vv")
    heads: int | None = Field(
        default=None,
        ge=1,
        description="Relation heads, which the widths of both models are divided into; left out: the most up to 12.",
    )


class Responses(BaseModel):
    """On-policy distillation (GKD, Agarwal et al., 2024, algorithm 1): a share of the batches is answered by the student itself.

    Prompts are those of the batch; the terms compare student and teacher on the student's answers. `labels` counts rows of the
    data only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(default=0.5, gt=0, le=1, description="Share of the batches that the student answers.")
    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Draw from the likeliest tokens with this mass.")
    top_k: int = Field(default=0, ge=0, description="Draw from the k likeliest tokens; 0: from all.")


class Objective(BaseModel):
    """The terms of the loss; a term that is None is left out. At least one has a positive weight.

    A new term is a section here and a method of its name in `distill_llm.training.terms.Terms`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: LabelsLoss | None = None
    logits: LogitsLoss | None = None
    embeddings: EmbeddingsLoss | None = None
    hidden: HiddenLoss | None = None
    attention: AttentionLoss | None = None
    relations: RelationsLoss | None = None
    responses: Responses | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Objective":
        if not any(largest(section.weight) > 0 for section in self.terms().values()):
            raise ValueError(f"at least one of {', '.join(_TERMS)} with a weight above zero")
        if self.responses is not None and not self.needs_teacher:
            raise InputError("responses", "labels alone", "a term that compares with the teacher, e.g. logits")
        return self

    def terms(self) -> dict[str, Any]:
        """The sections of the terms that are present, by name."""
        sections = ((name, getattr(self, name)) for name in _TERMS)
        return {name: section for name, section in sections if section is not None}

    def weights(self, step: int, total: int) -> dict[str, float]:
        """The weight of each term at an optimizer step: after `step` steps of `total`."""
        return {name: value_at(section.weight, step, total) for name, section in self.terms().items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(name != "labels" for name in self.terms())


_TERMS = tuple(name for name in Objective.model_fields if name != "responses")


def parse_objective(mapping: "Mapping[str, Any] | Objective", field: str = "losses") -> Objective:
    """Check a mapping such as `{"logits": {"weight": 0.5, "temperature": 2.0}}` and fill in the defaults.

    Args:
        mapping: term name -> settings; an empty or missing settings mapping means the defaults.
        field: what the mapping is called in error messages.

    Raises:
        InputError: names the first field at fault, e.g. `losses.logits.temperature`.
    """
    if isinstance(mapping, Objective):
        return mapping
    if not isinstance(mapping, Mapping):
        raise InputError(field, mapping, "a mapping of " + ", ".join(Objective.model_fields))
    filled = {name: ({} if settings is None else settings) for name, settings in mapping.items()}
    try:
        return Objective.model_validate(filled)
    except ValidationError as error:
        fault = faults_of(error, Objective)[0]
        raise fault.renamed(".".join(filter(None, (field, fault.field)))) from None
