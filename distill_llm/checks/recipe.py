"""Errors at the door: a recipe is checked whole (models, data, disk, device) before the first heavy second."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import datasets

from distill_llm.checks.data import open_rows
from distill_llm.checks.faults import Collector
from distill_llm.checks.models import adapted, check_disk, check_signals, skeleton
from distill_llm.checks.pruning import check_pruning
from distill_llm.checks.training import check_training
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.data.encoding import encode, most_tokens
from distill_llm.data.padding import LENGTH
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import check_tokenizer
from distill_llm.data.tasks import Task, TaskData, class_name_faults, label_names
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.losses.mapping import cut_from, unequal_widths
from distill_llm.losses.terms.term import Use
from distill_llm.models.checkpoint import name_labels
from distill_llm.models.finding import (
    OpenModel,
    check_head,
    check_tokens,
    identity_of,
    open_model,
)
from distill_llm.models.limits import length_faults, limits_of, longest_input, room_faults
from distill_llm.models.quantized import quantization_faults
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import RECIPE, Recipe
from distill_llm.report.hub import check_push
from distill_llm.teachers.cache import CachedTeacher


@dataclass(frozen=True)
class Opened:
    """What the door opened and read of a recipe, for the stages to go on with.

    Attributes:
        recipe: checked.
        teacher: with config and tokenizer.
        student: of a student that is given; None: pruning makes it of the teacher.
        data: the task's raw rows.
    """

    recipe: Recipe
    teacher: OpenModel
    student: OpenModel | None
    data: TaskData


def open_recipe(recipe: Recipe) -> Opened:
    """Open everything that a recipe names, and check all that can be known before any weight is read or written.

    Raises:
        InputError: one line per fault (`faults_in(error)`).
    """
    found = Collector()
    teacher = found.run(open_model, "teacher.model", recipe.teacher.model)
    name = recipe.student.model if recipe.student else None
    student = found.run(open_model, "student.model", name)
    data = found.run(lambda: load_rows(recipe, teacher))
    task = data.task if data else None
    if recipe.teacher.train is None:
        found.run(check_head, teacher, task)
    if name is not None:
        found.run(_check_student, recipe, student, teacher, task)
    found.run(check_pruning, recipe, teacher, found.run(skeleton, teacher))
    shorter = _shorter(teacher, student)
    found.ask(_length_faults, recipe, shorter)
    found.run(_check_rows, recipe, teacher, task)
    found.ask(_answer_faults, recipe, shorter, task)
    found.run(_check_raw_rows, data, teacher)
    found.ask(_loss_faults, recipe, task)
    found.run(_check_cache, recipe, teacher)
    found.ask(_response_faults, recipe, task, shorter)
    paired = found.run(_check_layer_pairs, recipe, teacher, teacher if name is None else student)
    found.run(lambda: check_training(recipe, data, _projected(student, teacher)))
    found.run(usable_output, recipe.output_dir, "output_dir", RECIPE)
    found.run(_check_hub, recipe)
    whole = found.run(skeleton, teacher, task)
    learner = whole if name is None else found.run(skeleton, student, task)
    if paired:
        found.run(check_signals, recipe, whole, learner)
    found.run(check_disk, recipe, whole, found.run(adapted, recipe, learner))
    raise_all(found.faults)
    assert teacher is not None and data is not None
    return Opened(recipe, teacher, student, data)


def load_rows(recipe: Recipe, teacher: OpenModel | None) -> TaskData:
    """The task's raw rows (not tokenized), once it is known that there are enough of them.

    Args:
        teacher: decides what some tasks are; None where it could not be opened.
    """
    data = open_rows(data_spec(recipe), teacher.config if teacher else None)
    calibration = recipe.pruning.calibration_examples if recipe.pruning and recipe.pruning.keep else 0
    if calibration == PruningSection.model_fields["calibration_examples"].default:
        calibration = 0  # asks for no number: all rows where there are fewer
    # Text is cut into blocks first, and packed sequences share rows: the number of examples shows later.
    blocks = data.task.kind.joins_documents or data.task.packing
    if not blocks and calibration > len(data.train):
        raise InputError("pruning.calibration_examples", calibration, f"at most {len(data.train)}, the training rows")
    return data


def data_spec(recipe: Recipe) -> DataSpec:
    """What a recipe says about its data."""
    columns = recipe.data.columns.model_dump(exclude_none=True) if recipe.data.columns else None
    metric, new = recipe.evaluation.metric, recipe.evaluation.max_new_tokens
    own = {**dict(recipe.data), "columns": columns}
    return DataSpec(**own, seed=recipe.seed, metric=metric, max_new_tokens=new)


def encoded_rows(opened: Opened) -> TaskData:
    """The task's rows as token ids, once it is known that the models can read them and answer their prompts.

    Raises:
        InputError: a token without an embedding; a prompt that leaves no room for its response.
    """
    recipe, tokenizer = opened.recipe, opened.teacher.tokenizer
    rows = encode(opened.data, tokenizer, recipe.data.max_length)
    data = check_tokens(rows, opened.teacher, RECIPE_FIELDS.rows)
    shorter = _shorter(opened.teacher, opened.student)
    assert shorter is not None
    limits = limits_of(shorter.config, shorter.name)
    for split in (data.test, data.validation):
        raise_all(scoring_faults(limits, split, data.task, RECIPE_FIELDS) if split is not None else [])
    return data


def _check_student(recipe: Recipe, student: OpenModel, teacher: OpenModel, task: Task) -> None:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(student.field, student.name, f"a student with the tokenizer of the teacher ({teacher.name})")
    if task.kind.has_head(student.config.architectures):
        check_head(student, task)
    compared = recipe.distillation is not None and recipe.distillation.losses.needs_teacher
    if task.is_language_model or recipe.teacher.cache is not None or not compared:
        return
    names = task.label_names if recipe.teacher.train is not None else label_names(teacher.config)
    config = copy.deepcopy(student.config)
    name_labels(config, task, names, of_task=True)
    raise_all(class_name_faults(label_names(config), names, student.field, student.name))


def _shorter(*models: OpenModel | None) -> OpenModel | None:
    """Of the models that there are, the one that takes the fewest tokens at once: teacher and student see the same rows."""
    there = [model for model in models if model is not None]
    return min(there, key=lambda model: longest_input(model.config) or math.inf, default=None)


def _length_faults(recipe: Recipe, shorter: OpenModel) -> list[InputError]:
    limits, latency = limits_of(shorter.config, shorter.name), recipe.evaluation.latency
    return [
        *length_faults(limits, recipe.data.max_length, "data.max_length"),
        *length_faults(limits, latency.sequence_length, "evaluation.latency.sequence_length"),
    ]


def _check_rows(recipe: Recipe, teacher: OpenModel, task: Task) -> None:
    """The tokenizer can make the task's rows."""
    check_tokenizer(task, teacher.tokenizer, teacher.field)
    most_tokens(task, teacher.tokenizer, recipe.data.max_length)


def _answer_faults(recipe: Recipe, shorter: OpenModel, task: Task) -> list[InputError]:
    """The models have room for what they are to generate, however long the prompts are."""
    limits, cut = limits_of(shorter.config, shorter.name), recipe.data.max_length
    if not task.generates or limits.longest is None or cut >= limits.longest:
        return []
    return room_faults(limits, cut, task.max_new_tokens, "evaluation.max_new_tokens", "data.max_length")


def _check_raw_rows(data: TaskData, teacher: OpenModel) -> None:
    data.task.kind.check_rows(data, teacher.tokenizer)


def _loss_faults(recipe: Recipe, task: Task) -> list[InputError]:
    if recipe.distillation is None:
        return []
    use = Use(single_output=not task.kind.has_distribution, packed="data.packing" if task.packing else None)
    return recipe.distillation.losses.faults(use, "distillation.losses")


def _projected(student: OpenModel | None, teacher: OpenModel | None) -> tuple[int, int] | None:
    """The widths of a given student and its teacher, where its states must be projected to be compared."""
    return None if student is None or teacher is None else unequal_widths(student.config, teacher.config)


def _check_layer_pairs(recipe: Recipe, teacher: OpenModel, student: OpenModel) -> bool:
    """Layers named by the loss terms exist; `student` is the teacher where it is pruned from it."""
    if recipe.distillation is None:
        return True
    teachers, students = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if recipe.pruning is not None and recipe.pruning.layers is not None:
        students = len(recipe.pruning.layers)
    cut = recipe.pruning is not None or cut_from(student.config, teacher.config)
    raise_all(recipe.distillation.losses.faults(Use(layers=(students, teachers), cut=cut), "distillation.losses"))
    return True


def _check_cache(recipe: Recipe, teacher: OpenModel) -> None:
    """The cache is whole, of this teacher, precision and tokenizer, and has what the losses need; its rows are compared later."""
    if recipe.teacher.cache is None or recipe.distillation is None:
        return
    local = Path(teacher.path).exists()  # a Hub id's weights may not be here yet: they are compared before training
    try:
        cache = CachedTeacher(recipe.teacher.cache, identity_of(teacher.path) if local else None, teacher.tokenizer)
    except InputError as error:
        raise InputError("teacher.cache", str(recipe.teacher.cache), f"{error.accepted} ({error.field})") from None
    given, own = recipe.teacher.dtype, cache.index.settings.dtype
    if given is not None and own not in (None, given):
        fix = f"leave it out, or take {own}, in which the teacher of teacher.cache ran"
        raise InputError("teacher.dtype", given, fix=fix)
    raise_all(recipe.distillation.losses.faults(Use(teacher=cache.gives), "distillation.losses"))


def check_cached_rows(opened: Opened, train: datasets.Dataset) -> None:
    """The cache that a recipe learns from was written for these encoded rows; teacher and losses are checked before."""
    folder = opened.recipe.teacher.cache
    if folder is None:
        return
    known = [name for name in train.column_names if name != LENGTH]
    try:
        CachedTeacher(folder, None, opened.teacher.tokenizer, train.select_columns(known))
    except InputError as error:
        raise InputError("teacher.cache", str(folder), f"{error.accepted} ({error.given})") from None


def _response_faults(recipe: Recipe, task: Task, shorter: OpenModel) -> list[InputError]:
    """The student can answer prompts while it learns; a quantised teacher can be had."""
    faults = quantization_faults(recipe.teacher.quantization, "teacher.quantization")
    responses = recipe.distillation.losses.responses if recipe.distillation else None
    if responses is None:
        return faults
    field = "distillation.losses.responses"
    if not task.kind.generates:
        return [*faults, InputError(field, f"the task {task.name}", "the task prompts")]
    most = recipe.data.max_length + responses.max_new_tokens
    limits = limits_of(shorter.config, shorter.name)
    return faults + length_faults(limits, most, f"data.max_length + {field}.max_new_tokens")


def _check_hub(recipe: Recipe) -> None:
    if recipe.hub is not None:
        check_push(recipe.hub.repo_id, "hub.repo_id")
