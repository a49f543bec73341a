"""Errors at the door: a recipe is checked whole (models, data, disk, device) before the first heavy second."""

import enum
import os
import shutil
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import torch
from transformers import AutoModel, PreTrainedConfig, TrainingArguments

from distill_llm.data.loading import load_task
from distill_llm.data.tasks import Task, TaskData
from distill_llm.errors import InputError, one_of
from distill_llm.faults import faults_in, raise_all
from distill_llm.opening import HEAD_CLASSES, OpenModel, check_head, check_length, first_line, open_model
from distill_llm.pruning.modeling_pruned import FAMILIES, family_of, lineage_of
from distill_llm.recipe import Recipe

T = TypeVar("T")
Stage = Literal["teacher", "recovery", "final"]


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
    student = found.run(open_model, "student.model", recipe.student.model) if recipe.student else None
    data = found.run(check_data, recipe)
    task = data.task if data else None
    if recipe.teacher.train is None:
        found.run(check_head, teacher, task)
    if recipe.student is not None:
        found.run(_check_student, student, teacher, task)
    found.run(_check_pruning, recipe, teacher)
    found.run(_check_lengths, recipe, teacher)
    found.run(_check_losses, recipe, task)
    if teacher is not None and (student is not None or recipe.student is None):
        found.run(_check_layer_pairs, recipe, teacher.config, student.config if student else teacher.config)
    for stage in typing.get_args(Stage):
        found.run(_check_training, recipe, stage)
    found.run(_check_output, recipe.output_dir)
    found.run(_check_disk, recipe, teacher)
    raise_all(found.faults)


def check_data(recipe: Recipe) -> TaskData:
    """Load the task's raw rows (not tokenized) and check that there are enough of them."""
    section = recipe.data
    columns = section.columns.model_dump(exclude_none=True) if section.columns else None
    with _quiet_datasets():
        data = load_task(
            section.task,
            section.path,
            columns=columns,
            train_examples=section.train_examples,
            holdout_examples=section.holdout_examples,
            seed=recipe.seed,
        )
    calibration = recipe.pruning.calibration_examples if recipe.pruning and recipe.pruning.keep else 0
    # Text is packed into blocks first, so its rows say nothing about the number of examples.
    if data.task.kind != "masked_lm" and calibration > len(data.train):
        raise InputError("pruning.calibration_examples", calibration, f"at most {len(data.train)}, the training rows")
    return data


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


def _check_student(student: OpenModel, teacher: OpenModel, task: Task) -> None:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(student.field, student.name, f"a student with the tokenizer of the teacher ({teacher.name})")
    if any(name.endswith(HEAD_CLASSES[task.kind]) for name in student.config.architectures or []):
        check_head(student, task)


def _check_pruning(recipe: Recipe, teacher: OpenModel) -> None:
    if recipe.pruning is None:
        return
    config, pruning = teacher.config, recipe.pruning
    try:
        family = family_of(config)
    except ValueError:
        raise InputError(
            teacher.field,
            f"{teacher.name} (family {config.model_type})",
            f"{one_of(FAMILIES, config.model_type)}; to add one: a row in FAMILIES (pruning/modeling_pruned.py)",
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            teacher.field, f"{teacher.name}, quantized", "its full-precision original: quantize the student"
        )
    if pruning.layers is not None and max(pruning.layers) >= config.num_hidden_layers:
        raise InputError("pruning.layers", pruning.layers, f"indices from 0 to {config.num_hidden_layers - 1}")
    width = getattr(config, family.ffn_config)
    if pruning.round_to > width:
        raise InputError("pruning.round_to", pruning.round_to, f"at most {width}, the FFN neurons of a layer")


def _check_lengths(recipe: Recipe, teacher: OpenModel) -> None:
    found = _Collector()
    found.run(check_length, teacher, "data.max_length", recipe.data.max_length)
    found.run(check_length, teacher, "evaluation.latency.sequence_length", recipe.evaluation.latency.sequence_length)
    raise_all(found.faults)


def _check_losses(recipe: Recipe, task: Task) -> None:
    if recipe.distillation is None:
        return
    logits = recipe.distillation.losses.logits
    if task.kind == "regression" and logits is not None and logits.divergence != "mse":
        raise InputError(
            "distillation.losses.logits.divergence", logits.divergence, "mse where the task is a regression"
        )


def _check_layer_pairs(recipe: Recipe, teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Layers named by the loss terms exist; `student` is the teacher's config where it is pruned from it."""
    if recipe.distillation is None:
        return
    faults = []
    teachers, students = teacher.num_hidden_layers, student.num_hidden_layers
    if recipe.pruning is not None and recipe.pruning.layers is not None:
        students = len(recipe.pruning.layers)
    for name in ("hidden", "attention"):
        term = getattr(recipe.distillation.losses, name)
        if term is None:
            continue
        field = f"distillation.losses.{name}.layers"
        if term.layers == "lineage" and recipe.student is not None and lineage_of(student) is None:
            faults.append(InputError(field, "lineage", "uniform, last or pairs where the student was not pruned here"))
        if not isinstance(term.layers, str):
            bad = [list(pair) for pair in term.layers if not (0 <= pair[0] < students and 0 <= pair[1] < teachers)]
            if bad:
                accepted = f"[student, teacher] pairs below [{students}, {teachers}], counted from 0"
                faults.append(InputError(field, bad, accepted))
    raise_all(faults)


def _check_training(recipe: Recipe, stage: Stage) -> None:
    """The stage's TrainingArguments can be made, on this device."""
    section = {"teacher": "teacher.train", "recovery": "distillation", "final": "final"}[stage]
    given = {"teacher": recipe.teacher.train, "recovery": recipe.distillation, "final": recipe.final}[stage]
    if given is None or (stage == "final" and not given):
        return
    training = recipe.training(stage)
    faults = _check_choices(section, training)
    gpu = torch.accelerator.is_available() and not training.get("use_cpu")
    if training.get("fp16") and not gpu:
        faults.append(InputError(f"{section}.fp16", True, "false on a CPU (bf16 works there)"))
    if training.get("bf16") and gpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        faults.append(InputError(f"{section}.bf16", True, "false on this GPU (fp16 works there)"))
    raise_all(faults)
    try:
        TrainingArguments(output_dir=str(recipe.output_dir), **{**training, "use_cpu": not gpu})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(
            section, training, f"fields that TrainingArguments takes together ({first_line(error)})"
        ) from None


def _check_choices(section: str, training: dict[str, Any]) -> list[InputError]:
    """Faults of the fields of TrainingArguments that take one of a few words."""
    hints, faults = typing.get_type_hints(TrainingArguments), []
    for field in fields(TrainingArguments):
        value = training.get(field.name)
        kinds = [k for k in (hints[field.name], *typing.get_args(hints[field.name])) if isinstance(k, type)]
        words = [str(member.value) for kind in kinds if issubclass(kind, enum.Enum) for member in kind]
        words = words or [str(word) for word in field.metadata.get("choices") or ()]
        if isinstance(value, str) and words and value not in words:
            faults.append(InputError(f"{section}.{field.name}", value, one_of(words, value)))
    return faults


def _check_output(folder: Path) -> None:
    """The run folder can be made; nothing is made yet."""
    above = _nearest(folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError("output_dir", str(folder), f"a folder that can be written ({above} cannot)")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check_disk(recipe: Recipe, teacher: OpenModel) -> None:
    """The run's checkpoints fit on the disk, by a generous estimate from the teacher's size."""
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in AutoModel.from_config(teacher.config).parameters())
    trained = recipe.distillation is not None or recipe.teacher.train is not None
    rounds = recipe.pruning.rounds if recipe.pruning else 0
    # A copy per round, the teacher, the student, and two Trainer checkpoints (weights and two moments each).
    needed = weights * (rounds + 2 + (6 if trained else 0))
    free = shutil.disk_usage(_nearest(recipe.output_dir)).free
    if free < needed:
        raise InputError(
            "output_dir",
            f"{recipe.output_dir} with {free / 1e9:.1f} GB free",
            f"a disk with about {needed / 1e9:.1f} GB free",
        )
