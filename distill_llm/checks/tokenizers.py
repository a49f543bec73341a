"""The door of `teacher.tokenizer`: a student with another tokenizer than its teacher."""

from dataclasses import replace

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.notices import tell
from distill_llm.data.aligning import Aligner
from distill_llm.data.alignment import ROWS, alignment_of, marks_without_counterpart
from distill_llm.data.encoding import encode, most_tokens
from distill_llm.data.special_tokens import check_tokenizer
from distill_llm.data.tasks import Task, TaskData
from distill_llm.data.unlearnable import NUMBER, places_of
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel
from distill_llm.models.limits import limits_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cross_tokenizer import GIVES

FIELD = "teacher.tokenizer"
SAMPLE = 20
"""Rows of the data, which may be long documents, that are looked at before all are encoded."""


def check_tokenizers(recipe: Recipe, student: OpenModel, teacher: OpenModel, task: Task) -> None:
    """Check that a student reads what its teacher reads: the same tokens, or the same text.

    Raises:
        InputError: tokenizers that differ, where the recipe does not say that the teacher keeps its own; or, where it does, a
            task or losses without such a comparison.
    """
    if recipe.teacher.tokenizer is None:
        if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            accepted = f"a student with the same tokenizer as the teacher ({teacher.name})"
            if task.kind.item == "next_token":
                accepted += f", or {FIELD}: own with the loss cross_tokenizer"
            raise InputError(student.field, student.name, accepted)
        return
    if task.kind.item != "next_token":
        fix = "remove it: tokenizers may differ only where the next token is predicted (text of a decoder, prompts)"
        raise InputError(FIELD, recipe.teacher.tokenizer, fix=fix)
    assert recipe.distillation is not None
    raise_all(recipe.distillation.losses.faults(Use(teacher=GIVES), "distillation.losses"))


def check_alignment(recipe: Recipe, data: TaskData, student: OpenModel, teacher: OpenModel) -> None:
    """Look at some rows in both tokenizers, and say how much of them can be compared token by token.

    Raises:
        InputError: the teacher cannot read such rows, or they hold marks that it does not have.
    """
    if recipe.teacher.tokenizer is None:
        return
    task, own = data.task, teacher.tokenizer
    check_tokenizer(task, own, teacher.field)
    most_tokens(task, own, recipe.data.max_length)
    task.kind.check_rows(data, own)
    aligner = Aligner(student.tokenizer, own)
    some = data.train.select(range(min(SAMPLE if task.kind.joins_documents else ROWS, len(data.train))))
    work = task.kind.encoder(task, student.tokenizer, recipe.data.max_length)
    rows = work({**some[:], NUMBER: places_of(some, range(len(some)))})["input_ids"][:ROWS]
    if marks := marks_without_counterpart(aligner, rows):
        shown = ", ".join(marks[:3])
        fix = f"use rows without {shown}: the tokenizer of {teacher.name} has no such token (prompts in place of chats)"
        raise InputError(FIELD, recipe.teacher.tokenizer, fix=fix)
    tell(f"{FIELD}: {alignment_of(aligner, rows)}")


def teacher_rows(recipe: Recipe, data: TaskData, teacher: OpenModel) -> TaskData:
    """The rows that models are scored on, in the teacher's own tokens; those to learn from are not encoded."""
    rows = encode(
        replace(data, train=data.test, task=replace(data.task, packing=False)),
        teacher.tokenizer,
        recipe.data.max_length,
    )
    limits = limits_of(teacher.config, teacher.name)
    for split in (rows.test, rows.validation):
        raise_all(scoring_faults(limits, split, data.task, RECIPE_FIELDS) if split is not None else [])
    return rows
