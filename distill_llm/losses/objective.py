"""The objective: which losses a student is trained with; the same mapping in YAML and in Python."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.common.validation import faults_of
from distill_llm.losses.responses import Responses as Responses
from distill_llm.losses.schedules import largest, value_at
from distill_llm.losses.terms.term import TERMS, Term, Use, all_terms


def sections() -> dict[str, type[BaseModel]]:
    """What an objective may have, by name: the terms, and `responses`."""
    return {**all_terms(), "responses": Responses}


class Objective(BaseModel):
    """The terms of the loss, each under its name; None leaves a term out. At least one has a positive weight.

    Which terms there are, and what is a setting of each, the registry says (`distill_llm.losses.terms.term`): a term that a
    module of the user registers is one of them.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    responses: Responses | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _read_terms(cls, given: Any, handler: ModelWrapValidatorHandler["Objective"]) -> "Objective":
        if isinstance(given, cls):
            return handler(given)
        known = sections()
        if not isinstance(given, Mapping):
            raise InputError("", given, f"a mapping with {', '.join(known)}")
        faults = [InputError(str(name), given[name], one_of(known, str(name))) for name in given if name not in known]
        read: dict[str, Any] = {}
        for name, section in known.items():
            if given.get(name) is None:
                continue
            try:
                read[name] = _read(section, given[name])
            except ValidationError as error:
                faults += [fault.renamed(f"{name}.{fault.field}".rstrip(".")) for fault in faults_of(error, section)]
            except InputError as fault:
                faults.append(fault.renamed(name))
        raise_all(faults)
        return handler(read)

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Objective":
        if not any(largest(term.weight) > 0 for term in self.terms().values()):
            raise ValueError(f"at least one of {', '.join(all_terms())} with a weight above zero")
        counted = {name: term for name, term in self.terms().items() if largest(term.weight) > 0}
        if self.responses is not None and not any(term.needs_teacher and not term.of_data for term in counted.values()):
            accepted = (
                "a term that compares with the teacher on the student's answers, e.g. logits: answers have no labels"
            )
            raise InputError("responses", f"{' and '.join(counted)} alone", accepted)
        truths = [name for name, term in self.terms().items() if term.of_data]
        if self.responses is not None and self.responses.beside and truths:
            fix = f"leave out {truths[0]}, which has no truth of the student's answers, or set it to false"
            raise InputError("responses.beside", True, fix=fix)
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """In the order of the registry, without what is left out."""
        plain = handler(self)
        return {name: plain[name] for name in (*all_terms(), "responses") if plain.get(name) is not None}

    def __getattr__(self, name: str) -> Any:
        """A term by its name; None: it is left out."""
        if name in TERMS:
            return (self.__pydantic_extra__ or {}).get(name)
        return super().__getattr__(name)  # type: ignore[misc]

    def terms(self) -> dict[str, Term]:
        """The terms that are present, by name."""
        found = self.__pydantic_extra__ or {}
        return {name: found[name] for name in all_terms() if found.get(name) is not None}

    def only(self, names: Collection[str]) -> "Objective":
        """The objective with these of its terms alone."""
        return self.model_copy(update={name: None for name in self.terms() if name not in names})

    def weights(self, step: int, total: int) -> dict[str, float]:
        """The weight of each term at an optimizer step: after `step` steps of `total`."""
        return {name: value_at(term.weight, step, total) for name, term in self.terms().items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms().values())

    @property
    def compares_outputs(self) -> bool:
        """Whether any term compares with a teacher's outputs."""
        return any(term.needs_teacher and "logits" in term.signals for term in self.terms().values())

    @property
    def differentiates(self) -> tuple[str, ...]:
        """The terms that take gradients of both models."""
        return tuple(name for name, term in self.terms().items() if term.differentiates())

    @property
    def looks_inside(self) -> tuple[str, ...]:
        """The terms that read what is made inside of layers."""
        return tuple(name for name, term in self.terms().items() if term.looks_inside())

    def faults(self, use: Use, field: str = "losses") -> list[InputError]:
        """Everything in the objective that does not go with what it is to be used with; each term is asked.

        Args:
            use: what is known about that.
            field: what the objective is called in the faults.
        """
        found = []
        asked: dict[str, Any] = dict(self.terms())
        if self.responses is not None:
            asked["responses"] = self.responses
        for name, section in asked.items():
            found += [fault.renamed(f"{field}.{name}.{fault.field}".rstrip(".")) for fault in section.faults(use)]
        if use.reentrant is not None:
            # Its first forward runs without gradients, so what was seen inside of layers would carry none.
            found += [InputError(use.reentrant, True, f"false with losses.{name}") for name in self.looks_inside[:1]]
        return found


def _read(section: type[BaseModel], given: Any) -> BaseModel:
    if not isinstance(given, Mapping | section):
        raise InputError("", given, f"a mapping with {', '.join(section.model_fields)}")
    return section.model_validate(given)


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
        raise InputError(field, mapping, "a mapping of " + ", ".join(sections()))
    filled = {name: ({} if settings is None else settings) for name, settings in mapping.items()}
    try:
        return Objective.model_validate(filled)
    except ValidationError as error:
        fault = faults_of(error, Objective)[0]
        raise fault.renamed(".".join(filter(None, (field, fault.field)))) from None
