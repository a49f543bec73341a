"""What does not go together with several teachers, or with a served one."""

from distill_llm.common.errors import InputError
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import DataSection, DistillationSection
from distill_llm.recipe.teacher import TeacherSection

BESIDE_SERVER = (
    "train",
    "ensemble",
    "quantization",
    "dtype",
    "moving_average",
    "peers",
    "checkpoints",
    "assistant",
    "tokenizer",
)
"""Fields of a teacher that is in memory, or is another one."""


def several_faults(
    teacher: TeacherSection, data: DataSection, distillation: DistillationSection | None
) -> list[InputError]:
    """The faults of `teacher.ensemble`, the column that names teachers, `teacher.server`, and a tokenizer that rows have not."""
    ensemble, column = teacher.ensemble, data.columns.teacher_of if data.columns else None
    faults = _server_faults(teacher, distillation)
    if teacher.tokenizer is not None and data.synthetic is not None:
        fix = "remove it, or data.synthetic: rows that are made hold the teacher's own tokens"
        faults.append(InputError("teacher.tokenizer", teacher.tokenizer, fix=fix))
    if ensemble is not None and ensemble.one_at_a_time and teacher.quantization is not None:
        fix = "remove it, or teacher.quantization: quantized weights stay in memory"
        faults.append(InputError("teacher.ensemble.one_at_a_time", True, fix=fix))
    if ensemble is not None and teacher.assistant is not None:
        given = {name: getattr(ensemble, name) for name in ("one_at_a_time", "learn_weights")}
        given |= {"teaches": ensemble.teaches} if ensemble.by_row else {}
        fix = "remove it, or teacher.assistant: the student of a round joins a mean of fixed weights, in memory"
        faults += [InputError(f"teacher.ensemble.{name}", value, fix=fix) for name, value in given.items() if value]
    if ensemble is not None and ensemble.learn_weights and data.synthetic is not None:
        fix = "remove it, or data.synthetic: weights are learnt on labelled rows"
        faults.append(InputError("teacher.ensemble.learn_weights", True, fix=fix))
    if ensemble is None or not ensemble.by_row:
        if column is not None:
            fix = "remove it, or say in teacher.ensemble which of its names each teacher `teaches`"
            faults.append(InputError("data.columns.teacher_of", column, fix=fix))
        return faults
    if column is None:
        fix = "name the column that says which teacher teaches a row, or leave out `teaches` in teacher.ensemble"
        faults.append(InputError("data.columns.teacher_of", None, fix=fix))
    for name in ("packing", "augment", "synthetic"):
        if value := getattr(data, name):
            fix = "remove it: each row is to be read by the one teacher that its column teacher_of names"
            shown = value.model_dump() if isinstance(value, Section) else value
            faults.append(InputError(f"data.{name}", shown, fix=fix))
    return faults


def _server_faults(teacher: TeacherSection, distillation: DistillationSection | None) -> list[InputError]:
    if teacher.server is None:
        return []
    faults, fix = list[InputError](), "remove it, or remove teacher.server: the served model teaches, as it is"
    for name in BESIDE_SERVER:
        if (value := getattr(teacher, name)) is not None:
            shown = value.model_dump() if isinstance(value, Section) else value
            faults.append(InputError(f"teacher.{name}", shown, fix=fix))
    if distillation is None or not distillation.losses.compares_outputs:
        fix = "remove it, or add a loss that compares outputs, such as logits"
        faults.append(InputError("teacher.server", teacher.server.url, fix=fix))
    return faults
