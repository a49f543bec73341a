"""What does not go together in a recipe's teacher and what the student does with it."""

from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.recipe.changing_teachers import PeersSection
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.sections import DistillationSection, StudentSection
from distill_llm.recipe.teacher import TeacherSection

IN_PLACE = {
    "moving_average": "the student's own average teaches",
    "peers": "the students teach each other",
    "checkpoints": "the teacher's own checkpoints teach",
}
"""Fields that put another teacher in the place of `teacher.model`, and who teaches then. At most one may be given."""

OF_ONE_TOKENIZER = {
    "train": "fine-tune the teacher in a run of its own",
    "cache": "a cache holds outputs at the tokens of one tokenizer",
    "ensemble": "several teachers read the same tokens",
    "server": "a served teacher answers in the student's tokens",
    **IN_PLACE,
    "assistant": "the student before reads its own tokens",
}
"""Fields that a teacher with a tokenizer of its own does not go with, and why."""


def teacher_faults(
    teacher: TeacherSection,
    student: StudentSection | None,
    pruning: PruningSection | None,
    distillation: DistillationSection | None,
    final: dict[str, Any],
) -> list[InputError]:
    """The faults of a teacher section beside the others of a recipe."""
    needed = distillation is not None and distillation.losses.needs_teacher
    if teacher.cache is not None:
        faults = _cache_faults(teacher, needed)
    elif teacher.quantization is not None and not needed:
        faults = [InputError("teacher.quantization", teacher.quantization, fix="remove it: no loss needs the teacher")]
    else:
        faults = []
    if teacher.ensemble is not None and not (distillation and distillation.losses.compares_outputs):
        fix = "remove it, or add a loss that compares outputs, such as logits"
        faults.append(InputError("teacher.ensemble", teacher.ensemble.model_dump(), fix=fix))
    if distillation is not None and distillation.generations is not None:
        faults += _generation_faults(teacher, distillation.generations.count, needed)
    if teacher.peers is not None:
        faults += _peer_faults(teacher.peers, teacher, student, pruning)
    if teacher.checkpoints is not None:
        faults += _stage_faults(teacher)
    if teacher.assistant is not None:
        faults += _assistant_faults(teacher, pruning, distillation)
    faults += _tokenizer_faults(teacher, pruning, distillation)
    return faults + _in_place_faults(teacher, needed) + _best_faults(teacher, distillation, final)


def _tokenizer_faults(
    teacher: TeacherSection, pruning: PruningSection | None, distillation: DistillationSection | None
) -> list[InputError]:
    """What a teacher with a tokenizer of its own does not go with."""
    compares = distillation is not None and distillation.losses.cross_tokenizer is not None
    if teacher.tokenizer is None:
        fix = "add teacher.tokenizer: own, or use the loss logits: it is for a teacher with another tokenizer"
        return [InputError("distillation.losses.cross_tokenizer", "one tokenizer", fix=fix)] if compares else []
    field, given = "teacher.tokenizer", teacher.tokenizer
    if pruning is not None:
        fix = "remove it, or remove pruning: that makes the student from the teacher, with its tokenizer"
        return [InputError(field, given, fix=fix)]
    faults = [
        InputError(field, given, fix=f"remove it, or remove teacher.{name}: {OF_ONE_TOKENIZER[name]}")
        for name in OF_ONE_TOKENIZER
        if getattr(teacher, name) is not None
    ]
    if distillation is not None and distillation.generations is not None:
        fix = "remove it, or remove distillation.generations: a student that teaches has its own tokenizer"
        faults.append(InputError(field, given, fix=fix))
    if not compares:
        fix = "add the loss cross_tokenizer to distillation.losses, or remove it"
        faults.append(InputError(field, given, fix=fix))
    return faults


def _cache_faults(teacher: TeacherSection, needed: bool) -> list[InputError]:
    faults, cache = [], str(teacher.cache)
    if teacher.train is not None:
        fix = "remove it, or remove teacher.train: a cache belongs to a teacher that is already trained"
        faults.append(InputError("teacher.cache", cache, fix=fix))
    if teacher.quantization is not None:
        fix = "remove it: with teacher.cache there is no teacher in memory"
        faults.append(InputError("teacher.quantization", teacher.quantization, fix=fix))
    if not needed:
        faults.append(InputError("teacher.cache", cache, fix="remove it: no loss needs the teacher"))
    return faults


def _stage_faults(teacher: TeacherSection) -> list[InputError]:
    """A fault of stages of a training that is not of this run, or is already over."""
    if isinstance(teacher.checkpoints, int) and teacher.train is None:
        fix = "give a mapping of steps to folders, or teacher.train: a number asks for stages of the run's own teacher"
        return [InputError("teacher.checkpoints", teacher.checkpoints, fix=fix)]
    return []


def _assistant_faults(
    teacher: TeacherSection, pruning: PruningSection | None, distillation: DistillationSection | None
) -> list[InputError]:
    """Faults of an assistant: there must be a round before, and outputs to learn from."""
    field, asked = "teacher.assistant", teacher.assistant
    assert asked is not None
    faults = []
    if pruning is None or pruning.rounds < 2:
        fix = "remove it, or set pruning.rounds to 2 or more: it is the student of the round before"
        faults.append(InputError(field, asked.model_dump(), fix=fix))
    if distillation is None or not distillation.losses.needs_teacher:
        faults.append(InputError(field, asked.model_dump(), fix="remove it: no loss needs a teacher"))
    elif asked.share < 1 and not distillation.losses.compares_outputs:
        fix = "set its share to 1, or add a loss that compares outputs, such as logits: they are what is averaged"
        faults.append(InputError(field, asked.model_dump(), fix=fix))
    for name in ("cache", *IN_PLACE):
        if getattr(teacher, name) is not None:
            fix = f"remove it, or remove teacher.{name}: it teaches together with teacher.model or alone"
            faults.append(InputError(field, asked.model_dump(), fix=fix))
    return faults


def _peer_faults(
    peers: PeersSection, teacher: TeacherSection, student: StudentSection | None, pruning: PruningSection | None
) -> list[InputError]:
    """Faults of peers: those that are cut need a budget to be cut by, and all weights of all students learn."""
    faults = []
    if teacher.dtype is not None:
        fix = "remove it: no teacher is in memory, and peers compute as the student does"
        faults.append(InputError("teacher.dtype", teacher.dtype, fix=fix))
    if student is not None and student.peft is not None:
        fix = "remove it, or remove teacher.peers: all weights of students that learn together are trained"
        faults.append(InputError("student.peft", student.peft, fix=fix))
    if pruning is not None and pruning.rounds > 1:
        fix = "set it to 1, or remove teacher.peers: students learn together after a single cut"
        faults.append(InputError("pruning.rounds", pruning.rounds, fix=fix))
    if peers.cut and (pruning is None or pruning.keep is None):
        field, fix = (
            f"teacher.peers.others.{peers.cut[0]}.keep",
            "give its `model`, or set pruning.keep: no share is cut here",
        )
        faults.append(InputError(field, peers.others[peers.cut[0]].keep, fix=fix))
    return faults


def _generation_faults(teacher: TeacherSection, count: int, needed: bool) -> list[InputError]:
    """Faults of generations: each must be able to teach the next."""
    field = "distillation.generations"
    if not needed:
        return [InputError(field, count, fix="remove it: no loss needs a teacher, so none would learn from another")]
    given = [f"teacher.{name}" for name in IN_PLACE if getattr(teacher, name) is not None]
    fix = "remove it, or remove {}: each generation learns from the one before"
    return [InputError(field, count, fix=fix.format(name)) for name in given]


def _in_place_faults(teacher: TeacherSection, needed: bool) -> list[InputError]:
    """Faults of what stands in for `teacher.model`."""
    given = [name for name in IN_PLACE if getattr(teacher, name) is not None]
    if not given:
        return []
    (name, *more), faults = given, []
    value = _shown(teacher, name)
    if not needed:
        faults.append(InputError(f"teacher.{name}", value, fix="remove it: no loss needs a teacher"))
    for other in [
        *more,
        *(each for each in ("cache", "ensemble", "quantization") if getattr(teacher, each) is not None),
    ]:
        fix = f"remove it, or remove teacher.{name}: {IN_PLACE[name]}"
        faults.append(InputError(f"teacher.{other}", _shown(teacher, other), fix=fix))
    return faults


def _best_faults(
    teacher: TeacherSection, distillation: DistillationSection | None, final: dict[str, Any]
) -> list[InputError]:
    """A fault of weights that are taken back at the end of a training whose result is not them alone."""
    if not teacher.saves_average and teacher.peers is None:
        return []
    fields = {"distillation": (distillation.model_extra if distillation else None) or {}, "final": final}
    fix = "set it to false, or teacher.moving_average.as_student: the average is that of the last step"
    if teacher.peers is not None:
        fix = "set it to false, or remove teacher.peers: only the student's weights would be those of its best step"
    name = "load_best_model_at_end"
    return [InputError(f"{part}.{name}", True, fix=fix) for part, given in fields.items() if given.get(name)]


def _shown(teacher: TeacherSection, name: str) -> Any:
    value = getattr(teacher, name)
    return value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else str(value)
