"""The setting that says which layers are compared."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from distill_llm.common.errors import InputError, one_of

MAPPINGS = ("lineage", "uniform", "last")
MATCHINGS = ("nearest", "attention")
"""Ways to match layers by their states, in training."""
CHOICES = MAPPINGS + MATCHINGS


def _read_layers(given: Any, names: tuple[str, ...] = MAPPINGS) -> Any:
    pairs = given if given and isinstance(given, list | tuple) else [()]
    sound = (isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if given in names or (all(sound) and all(type(index) is int and index >= 0 for pair in pairs for index in pair)):
        return given
    words = "a list of [student layer, teacher layer] pairs, whole numbers from 0"
    raise InputError("", given, f"{one_of(names, str(given))}, or {words}")


def _read_choices(given: Any) -> Any:
    return _read_layers(given, CHOICES)


Layers = Annotated[Literal[MAPPINGS] | list[tuple[int, int]], BeforeValidator(_read_layers)]  # type: ignore[valid-type]
MatchedLayers = Annotated[Literal[CHOICES] | list[tuple[int, int]], BeforeValidator(_read_choices)]  # type: ignore[valid-type]


def layer_faults(
    layers: str | Sequence[tuple[int, int]], counts: tuple[int, int] | None, cut: bool | None
) -> Iterator[InputError]:
    """What is wrong with the setting for two models; the fault's field is `layers`.

    Args:
        layers: as an objective gives them.
        counts: layers of the student and of the teacher; None: not known.
        cut: whether the student was pruned from this teacher; None: not known.
    """
    if layers == "lineage" and cut is False:
        accepted = "uniform, last or pairs [[student, teacher], ...]: this student was not pruned from this teacher"
        yield InputError("layers", layers, accepted)
    if counts is None or isinstance(layers, str):
        return
    beyond = [list(pair) for pair in layers if not (0 <= pair[0] < counts[0] and 0 <= pair[1] < counts[1])]
    if beyond:
        last = [count - 1 for count in counts]
        accepted = f"[student, teacher] pairs of student layers 0 to {last[0]} and teacher layers 0 to {last[1]}"
        yield InputError("layers", beyond, accepted)


class Matching(BaseModel):
    """How layers are matched by their states in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    each: Literal["student", "teacher"] = Field(
        default="student", description="With `nearest`: the model whose layers get one partner each."
    )
    ordered: bool = Field(
        default=False, description="With `nearest`: whether a later layer may not be matched before an earlier one."
    )
    teacher: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="The teacher's layers that take part, from 0; left out: all."
    )
    form: Literal["states", "distances"] = Field(
        default="states",
        description="With `attention`: what is mixed, the teacher's states or the distances from them.",
    )
    temperature: float = Field(default=0.1, gt=0, description="With `attention`: divides the cosines of pooled states.")
    pool: Literal["mean", "first", "last"] = Field(
        default="mean",
        description="With `attention`: state of an example, the mean of its tokens', or the first or last token's.",
    )

    def faults(self, layers: Any, counts: tuple[int, int] | None) -> Iterator[InputError]:
        """Settings that say nothing with these `layers`, or layers that do not exist; fields as within the term's section."""
        taken = {"nearest": {"each", "ordered", "teacher"}, "attention": {"form", "temperature", "pool", "teacher"}}
        if not isinstance(layers, str) or layers not in taken:
            yield InputError("matching", "settings", fix="remove it, or set layers to nearest or attention")
            return
        fields = type(self).model_fields  # a default says nothing
        changed = {name for name, field in fields.items() if getattr(self, name) != field.default}
        for name in sorted(changed - taken[layers]):
            fix = f"remove it: layers {layers} takes {', '.join(sorted(taken[layers]))}"
            yield InputError(f"matching.{name}", getattr(self, name), fix=fix)
        chosen = self.teacher or []
        if len(set(chosen)) < len(chosen):
            yield InputError("matching.teacher", chosen, "each layer once")
        if counts is not None and (beyond := [layer for layer in chosen if layer >= counts[1]]):
            yield InputError("matching.teacher", beyond, f"teacher layers 0 to {counts[1] - 1}")
