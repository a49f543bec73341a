"""Which student layer and head learns from which teacher layer and head."""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from transformers import PreTrainedConfig

from distill_llm.architectures.families import width_of
from distill_llm.architectures.lineage import LayerPlan, lineage_of, stock_values
from distill_llm.common.errors import InputError
from distill_llm.losses.layers import layer_faults


class LayerPair(NamedTuple):
    """A student layer and the teacher layer it learns from, and by student query head the teacher's; None: the same."""

    student: int
    teacher: int
    heads: tuple[int, ...] | None = None


def cut_from(student: PreTrainedConfig, teacher: PreTrainedConfig) -> bool:
    """Whether a student was pruned from this teacher: the teacher has the sizes of the model that the lineage refers to.

    For a teacher that is pruned too, the sizes of its own original must agree.
    """
    record = getattr(student, "pruning", None)
    if record is None or student.model_type != teacher.model_type:
        return False
    sizes = {name: value for name, value in record.get("stock", {}).items() if isinstance(value, int)}
    with stock_values(teacher):
        return all(getattr(teacher, name, None) == value for name, value in sizes.items())


def unequal_widths(student: PreTrainedConfig, teacher: PreTrainedConfig) -> tuple[int, int] | None:
    """The widths of student and teacher where their states must be projected to be compared, else None.

    The states of a student that kept known channels of this teacher are compared with these channels.
    """
    lineage = lineage_of(student)
    if lineage is not None and lineage.hidden is not None and cut_from(student, teacher):
        return None
    widths = width_of(student), width_of(teacher)
    return widths if widths[0] != widths[1] else None


def relative_lineage(
    student: Sequence[LayerPlan], teacher: Sequence[LayerPlan], group_size: int = 1
) -> tuple[LayerPlan, ...]:
    """The student's lineage in indices of a teacher that is itself pruned; both are given in indices of the original model.

    Args:
        student, teacher: a row per layer.
        group_size: query heads that share a key-value head in the original model.

    Raises:
        InputError: if the student has a layer, head or neuron that this teacher lacks.
    """
    position = {layer.source: index for index, layer in enumerate(teacher)}
    found, original = [], {"heads": 1, "queries": group_size}
    for layer in student:
        try:
            place = position[layer.source]
            found.append(layer.counted_in(teacher[place], place, original))
        except (KeyError, ValueError):
            accepted = "a teacher that has all layers, heads and neurons of the student"
            raise InputError("teacher", f"a pruned model that lacks parts of layer {layer.source}", accepted) from None
    return tuple(found)


def query_heads(layer: LayerPlan, group_size: int) -> tuple[int, ...]:
    """The query heads that a layer keeps; `group_size` of them share a key-value head in the original model."""
    return tuple(layer.indices("queries", {"heads": 1, "queries": group_size}))


def hidden_pairs(
    layers: str | Sequence[tuple[int, int]],
    student_layers: int,
    teacher_layers: int,
    lineage: Sequence[LayerPlan] | None,
    field: str = "losses.hidden.layers",
) -> list[LayerPair]:
    """The layers whose outputs are compared.

    `lineage`: the output of a student layer is what the next student layer reads. That next layer was copied from a teacher
    layer, so the output is compared with what this teacher layer reads: the output of the teacher layer before it. The
    last student layer is compared with the last teacher layer.

    Args:
        layers: lineage, uniform, last or explicit pairs.
        student_layers, teacher_layers: numbers of layers.
        lineage: of the student, counted in the teacher; None: the student was not cut from this teacher.
        field: what the setting is called in error messages.

    Raises:
        InputError: for `lineage` without lineage, for indices out of range.
    """
    if layers == "lineage":
        sources = [layer.source for layer in need_lineage(lineage, teacher_layers, field)]
        ends = [source - 1 for source in sources[1:]] + [teacher_layers - 1]
        return [LayerPair(index, end) for index, end in enumerate(ends)]
    return _plain_pairs(layers, student_layers, teacher_layers, field)


def attention_pairs(
    layers: str | Sequence[tuple[int, int]],
    student_layers: int,
    teacher_layers: int,
    lineage: Sequence[LayerPlan] | None,
    field: str = "losses.attention.layers",
    group_size: int = 1,
) -> list[LayerPair]:
    """The layers, and by `lineage` the heads, whose attention is compared: each with the one it was copied from.

    Arguments and errors as in `hidden_pairs`; `group_size` as in `query_heads`. With `lineage`, student layers without any
    head are left out.
    """
    if layers == "lineage":
        rows = need_lineage(lineage, teacher_layers, field)
        heads = [query_heads(row, group_size) for row in rows]
        return [LayerPair(index, row.source, heads[index]) for index, row in enumerate(rows) if row.heads]
    return _plain_pairs(layers, student_layers, teacher_layers, field)


def need_lineage(lineage: Sequence[LayerPlan] | None, teacher_layers: int, field: str) -> Sequence[LayerPlan]:
    """The lineage, once it is known that there is one, in a teacher of so many layers; `field` is what errors name."""
    for fault in layer_faults("lineage", None, cut=lineage is not None):
        raise fault.renamed(field)
    assert lineage is not None
    if max(layer.source for layer in lineage) >= teacher_layers:
        accepted = "the teacher that the student was pruned from: this one has too few layers"
        raise InputError("teacher", f"{teacher_layers} layers", accepted)
    return lineage


def _plain_pairs(
    layers: str | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int, field: str
) -> list[LayerPair]:
    if layers == "last":
        return [LayerPair(student_layers - 1, teacher_layers - 1)]
    if layers == "uniform":
        ends = [ceil((index + 1) * teacher_layers / student_layers) - 1 for index in range(student_layers)]
        return [LayerPair(index, end) for index, end in enumerate(ends)]
    for fault in layer_faults(layers, (student_layers, teacher_layers), None):
        raise fault.renamed(field)
    return [LayerPair(*pair) for pair in layers]  # type: ignore[arg-type]
