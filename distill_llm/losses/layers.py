"""The setting that says which layers are compared."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from distill_llm.common.errors import InputError, one_of

MAPPINGS = ("lineage", "uniform", "last")


def _read_layers(given: Any) -> Any:
    pairs = given if given and isinstance(given, list | tuple) else [()]
    sound = (isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if given in MAPPINGS or (all(sound) and all(type(index) is int and index >= 0 for pair in pairs for index in pair)):
        return given
    words = "a list of [student layer, teacher layer] pairs, whole numbers from 0"
    raise InputError("", given, f"{one_of(MAPPINGS, str(given))}, or {words}")


Layers = Annotated[Literal[MAPPINGS] | list[tuple[int, int]], BeforeValidator(_read_layers)]  # type: ignore[valid-type]


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
