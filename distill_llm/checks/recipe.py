"""Errors at the door: a recipe is checked whole (models, data, disk, device) before the first heavy second."""

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.checks.models import adapted, check_disk, check_signals, skeleton
from distill_llm.checks.pruning import check_pruning
from distill_llm.checks.training import check_training
from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.data.encoding import most_tokens
from distill_llm.data.loading import load_task
from distill_llm.data.padding import LENGTH
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import check_tokenizer
from distill_llm.data.tasks import Task, TaskData, label_names, same_names
from distill_llm.losses.mapping import cut_from, unequal_widths
from distill_llm.losses.terms.term import Use
from distill_llm.models.checkpoint import name_labels
from distill_llm.models.finding import (
    OpenModel,
    check_head,
    check_length,
    longest_input,
    open_model,
    resolve_model,
)
from distill_llm.recipe.recipe import RECIPE, Recipe
from distill_llm.recipe.sections import PruningSection
from distill_llm.report.hub import check_push

T = TypeVar("T")


class _Collector:
    """Runs checks that raise InputError, and keeps the faults of all of them."""

    def __init__(self) -> None:
        self.faults: list[InputError] = []

    def run(self, check: Callable[..., T], *args: Any) -> T | None:
        """The check's result, or None where it found a fault or an input is None (its own fault is known already)."""
        if any(arg is None for arg in args):
            return None
        try:
            return check(*args)
        except InputError as error:
            self.faults += faults_in(error)
            return None


def check_recipe(recipe: Recipe) -> None:
    """Check everything that can be known before any weight is read or written.

    Raises:
        InputError: one line per fault (`faults_in(error)`).
    """
    found = _Collector()
    teacher = found.run(open_model, "teacher.model", recipe.teacher.model)
    name = recipe.student.model if recipe.student else None
    student = found.run(open_model, "student.model", name)
    data = found.run(check_data, recipe)
    task = data.task if data else None
    if recipe.teacher.train is None:
        found.run(check_head, teacher, task)
    if name is not None:
        found.run(_check_student, recipe, student, teacher, task)
    found.run(check_pruning, recipe, teacher, found.run(skeleton, teacher))
    shorter = _shorter(teacher, student)
    found.run(_check_lengths, recipe, shorter)
    found.run(_check_rows, recipe, teacher, shorter, task)
    found.run(_check_raw_rows, data, teacher)
    found.run(_check_losses, recipe, task)
    found.run(_check_cache, recipe, teacher)
    found.run(_check_responses, recipe, task, shorter)
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


def check_data(recipe: Recipe) -> TaskData:
    """Load the task's raw rows (not tokenized) and check that there are enough of them."""
    with _quiet_datasets():
        data = load_task(data_spec(recipe), _teacher_config(recipe))
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


def _teacher_config(recipe: Recipe) -> PreTrainedConfig | None:
    """The teacher's config, which decides what some tasks are; None where it cannot be had, which `open_model` reports."""
    try:
        return AutoConfig.from_pretrained(resolve_model(recipe.teacher.model))
    except (OSError, ValueError, StrictDataclassError):
        return None


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`, so that a fault stands alone (downloads from the Hub still show theirs)."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


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
    own = label_names(config)
    if names and own and task.label_names and not same_names(own, names):
        given = f"{student.name} with labels {list(own)}"
        raise InputError(student.field, given, f"labels as the teacher has, {list(names)}")


def _shorter(*models: OpenModel | None) -> OpenModel | None:
    """Of the models that there are, the one that takes the fewest tokens at once: teacher and student see the same rows."""
    there = [model for model in models if model is not None]
    return min(there, key=lambda model: longest_input(model.config) or math.inf, default=None)


def _check_lengths(recipe: Recipe, shorter: OpenModel) -> None:
    found = _Collector()
    found.run(check_length, shorter, "data.max_length", recipe.data.max_length)
    found.run(check_length, shorter, "evaluation.latency.sequence_length", recipe.evaluation.latency.sequence_length)
    raise_all(found.faults)


def _check_rows(recipe: Recipe, teacher: OpenModel, shorter: OpenModel, task: Task) -> None:
    """The tokenizer can make the task's rows, and the models have room for what they are to generate."""
    check_tokenizer(task, teacher.tokenizer, teacher.field)
    most_tokens(task, teacher.tokenizer, recipe.data.max_length)
    longest, cut, new = longest_input(shorter.config), recipe.data.max_length, task.max_new_tokens
    if task.kind.generates and task.metrics and longest is not None and cut < longest < cut + new:
        accepted = f"at most {longest - cut}: {shorter.name} takes {longest} tokens, data.max_length is {cut}"
        raise InputError("evaluation.max_new_tokens", new, accepted)


def _check_raw_rows(data: TaskData, teacher: OpenModel) -> None:
    data.task.kind.check_rows(data, teacher.tokenizer)


def _check_losses(recipe: Recipe, task: Task) -> None:
    if recipe.distillation is not None:
        use = Use(single_output=not task.kind.has_distribution, packed=task.packing)
        raise_all(recipe.distillation.losses.faults(use, "distillation.losses"))


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
    from distill_llm.models.finding import identity_of
    from distill_llm.teachers.cache import CachedTeacher

    local = Path(teacher.path).exists()  # a Hub id's weights may not be here yet: they are compared before training
    try:
        cache = CachedTeacher(recipe.teacher.cache, identity_of(teacher.path) if local else None, teacher.tokenizer)
    except InputError as error:
        raise InputError("teacher.cache", str(recipe.teacher.cache), f"{error.accepted} ({error.field})") from None
    given, own = recipe.teacher.dtype, cache.index.settings.dtype
    if given is not None and own not in (None, given):
        raise InputError("teacher.dtype", given, f"{own}, which the teacher of teacher.cache ran in, or nothing")
    raise_all(recipe.distillation.losses.faults(Use(teacher=cache.gives), "distillation.losses"))


def check_cached_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: datasets.Dataset) -> None:
    """The cache that a recipe learns from was written for these encoded rows; teacher and losses are checked before."""
    if recipe.teacher.cache is None:
        return
    from distill_llm.teachers.cache import CachedTeacher

    known = [name for name in train.column_names if name != LENGTH]
    try:
        CachedTeacher(recipe.teacher.cache, None, tokenizer, train.select_columns(known))
    except InputError as error:
        raise InputError("teacher.cache", str(recipe.teacher.cache), f"{error.accepted} ({error.given})") from None


def _check_responses(recipe: Recipe, task: Task, shorter: OpenModel) -> None:
    """Whether the student can answer prompts while it learns; and whether a quantised teacher can be had."""
    if recipe.teacher.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        accepted = "nothing without the package bitsandbytes (pip install bitsandbytes)"
        raise InputError("teacher.quantization", recipe.teacher.quantization, accepted)
    responses = recipe.distillation.losses.responses if recipe.distillation else None
    if responses is None:
        return
    field = "distillation.losses.responses"
    if not task.kind.generates:
        raise InputError(field, f"the task {task.name}", "the task prompts")
    if recipe.data.packing:
        raise InputError("data.packing", True, f"false with {field}: prompts must be rows of their own")
    check_length(
        shorter, f"data.max_length + {field}.max_new_tokens", recipe.data.max_length + responses.max_new_tokens
    )


def _check_hub(recipe: Recipe) -> None:
    if recipe.hub is not None:
        check_push(recipe.hub.repo_id, "hub.repo_id")
