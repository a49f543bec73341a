"""The door of `data.task: synthetic`: what the task is then, and whether the models can learn from rows that are made."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.checks.data import open_rows
from distill_llm.checks.models import skeleton
from distill_llm.common.errors import InputError, InputErrors, faults_in, one_of, raise_all
from distill_llm.data.kinds import KINDS, kind_of_head
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.classification import classification
from distill_llm.data.kinds.masked_lm import masked_lm
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import Task, TaskData, label_names
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, open_model
from distill_llm.models.limits import length_faults, limits_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.synthetic import TASK
from distill_llm.synthesis.spaces import frame_of
from distill_llm.synthesis.texts import begin_of

FIELD = "data.synthetic"
SAMPLED = f"{FIELD}.sampled"
LANGUAGE_MODELS = {"causal_lm": causal_lm, "masked_lm": masked_lm}


def open_synthetic(recipe: Recipe, teacher: OpenModel | None) -> TaskData:
    """The task of a recipe without data, and its rows as far as they are there: real ones to score on, or none.

    In the place of rows that are yet to be made stand as many without content.

    Args:
        teacher: says what the task is where there are no real rows; None if it could not be opened.

    Raises:
        InputError: the real rows cannot be read, or the teacher has no head that rows can be made for.
    """
    section, test = recipe.data.synthetic, recipe.data.test
    assert section is not None
    if test is None:
        task = _task_of(teacher, recipe)
        rows = _blank(section.test_examples, task)
    else:
        found = _real_rows(recipe, teacher)
        task, rows = found.task, found.test
    return TaskData(task, _blank(section.examples, task), None, rows)


def _real_rows(recipe: Recipe, teacher: OpenModel | None) -> TaskData:
    """The rows of `data.test`, with faults under its name."""
    test = recipe.data.test
    assert test is not None
    if test.task == TASK:
        raise InputError("data.test.task", test.task, "the task of real rows, for example sst2 or classification")
    spec = DataSpec(
        test.task,
        test.path,
        test.columns.model_dump(exclude_none=True) if test.columns else None,
        recipe.data.max_length,
        seed=recipe.seed,
        metric=recipe.evaluation.metric,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        test_examples=test.examples,
    )
    try:
        return open_rows(spec, teacher.config if teacher else None, training=False)
    except InputError as error:
        names = {"data.test_examples": "data.test.examples"}
        raise InputErrors(
            fault.renamed(names.get(fault.field, fault.field.replace("data.", "data.test.", 1)))
            for fault in faults_in(error)
        ) from None


def _task_of(teacher: OpenModel | None, recipe: Recipe) -> Task:
    """The task that a teacher's head is for; of a classifier it is scored by agreement with the teacher."""
    if teacher is None:
        fix = "name a teacher that can be opened: without data it says what the task is"
        raise InputError("teacher.model", recipe.teacher.model, fix=fix)
    kind = kind_of_head(teacher.config.architectures)
    if kind is not None and kind.name in LANGUAGE_MODELS:
        task = LANGUAGE_MODELS[kind.name](TASK, "text")
        return kind.scored_by(task, recipe.evaluation.metric) if recipe.evaluation.metric else task
    if kind is None or kind.name != "classification" or (classes := teacher.config.num_labels or 0) < 2:
        given = f"{teacher.name} ({', '.join(teacher.config.architectures or []) or 'no class'})"
        accepted = "a classifier of texts with two classes or more, or a language model: no others learn without data"
        raise InputError("teacher.model", given, accepted)
    names = label_names(teacher.config) or tuple(map(str, range(classes)))
    task = classification(TASK, ("text",), names, ("agreement",))
    if recipe.evaluation.metric not in (None, "agreement"):
        fix = "leave it out, or name real rows in data.test: without them there is only agreement with the teacher"
        raise InputError("evaluation.metric", recipe.evaluation.metric, fix=fix)
    return task


def _blank(count: int, task: Task) -> Dataset:
    columns: dict[str, list] = {name: [""] * count for name in task.text_columns}
    if task.label_names:
        columns["labels"] = [number % task.num_labels for number in range(count)]
    return Dataset.from_dict(columns)


def synthetic_faults(
    recipe: Recipe, teacher: OpenModel, student: OpenModel, task: Task, shorter: OpenModel
) -> list[InputError]:
    """What synthetic rows do not go with.

    Args:
        student: the one that is given; else the teacher, which it is cut from.
        shorter: the model that takes the fewest tokens at once.
    """
    section = recipe.data.synthetic
    if section is None:
        return []
    if task.kind.name not in ("classification", *LANGUAGE_MODELS):
        assert recipe.data.test is not None
        accepted = "a task of classes, or text: rows are made for no others"
        return [InputError("data.test.task", recipe.data.test.task, accepted)]
    faults = [
        *_other_faults(recipe),
        *length_faults(limits_of(shorter.config, shorter.name), section.length, f"{FIELD}.length"),
    ]
    special = sum(map(len, frame_of(teacher.tokenizer)))
    if section.length <= special:
        faults.append(InputError(f"{FIELD}.length", section.length, f"at least {special + 1}, with special tokens"))
    if section.embeds:
        return [*faults, *_embedding_faults(recipe, teacher, student, task)]
    if len(task.text_columns) > 1:
        fix = "make rows in another way, such as noise: sampled texts are single ones, and these rows are pairs"
        faults.append(InputError(SAMPLED, task.name, fix=fix))
    if section.length > recipe.data.max_length:
        faults.append(
            InputError(f"{FIELD}.length", section.length, f"at most data.max_length ({recipe.data.max_length})")
        )
    return faults


def _other_faults(recipe: Recipe) -> Iterator[InputError]:
    """Faults of sections that need real rows, or a training."""
    section = recipe.data.synthetic
    assert section is not None
    given: dict[str, tuple[Any, str]] = {
        "teacher.train": (recipe.teacher.train, "there are no rows to train the teacher on: name one that is trained"),
        "teacher.cache": (recipe.teacher.cache, "a cache holds outputs for the rows of real data"),
    }
    if section.embeds:
        given["teacher.ensemble"] = (recipe.teacher.ensemble, "rows of embeddings are made for teacher.model alone")
        given["teacher.peers"] = (recipe.teacher.peers, "peers may have embeddings of another width")
        given["data.augment"] = (recipe.data.augment, "rows of embeddings have no words to change")
    if section.generator is not None:
        alone = "the generator plays against teacher.model, and no other teacher"
        for name in ("moving_average", "checkpoints", "assistant"):
            given[f"teacher.{name}"] = (getattr(recipe.teacher, name), alone)
        if recipe.distillation is not None and recipe.distillation.generations is not None:
            given["distillation.generations"] = (recipe.distillation.generations.model_dump(), alone)
    for field, (value, why) in given.items():
        if value is not None:
            yield InputError(field, value, fix=f"remove it: {why}")
    if section.generator is not None and recipe.distillation is None:
        fix = "add a distillation section, or make rows in another way: the generator learns beside the student"
        yield InputError(f"{FIELD}.generator", section.generator.model_dump(), fix=fix)
    calibration = recipe.pruning.calibration_examples if recipe.pruning and recipe.pruning.keep else 0
    if "calibration_examples" in (recipe.pruning.model_fields_set if recipe.pruning else ()) and (
        calibration > section.examples
    ):
        accepted = f"at most {section.examples}, the number of synthetic rows"
        yield InputError("pruning.calibration_examples", calibration, accepted)


def _embedding_faults(recipe: Recipe, teacher: OpenModel, student: OpenModel, task: Task) -> Iterator[InputError]:
    """Faults of rows that are no tokens: the head, what the models read, and their widths."""
    section, losses = recipe.data.synthetic, recipe.distillation.losses if recipe.distillation else None
    assert section is not None
    field = f"{FIELD}.{section.method}"
    if task.kind.name != "classification":
        fix = "use sampled: rows of embeddings are made for classes"
        yield InputError(field, task.name, fix=fix)
        return
    models = {model.field: skeleton(model, task) for model in (teacher, student)}
    for model in (teacher, student):
        if "inputs_embeds" not in inspect.signature(models[model.field].forward).parameters:
            fix = "use sampled: the model's forward takes no inputs_embeds"
            yield InputError(model.field, model.name, fix=fix)
            return
    widths = {name: _width(model) for name, model in models.items()}
    if len(set(widths.values())) > 1:
        accepted = f"a student whose embeddings have {widths[teacher.field]} channels, as the teacher's; or use sampled"
        yield InputError(student.field, f"{student.name} with {widths[student.field]}", accepted)
    if recipe.pruning is not None and "hidden" in recipe.pruning.units:
        fix = "remove hidden, or use sampled: rows of embeddings are as wide as the teacher's"
        yield InputError("pruning.units", recipe.pruning.units, fix=fix)
    if section.generator is not None and losses is not None:
        yield from losses.faults(Use(unlabelled="rows of a generator"), "distillation.losses")
        if not losses.needs_teacher:
            fix = "add a term that compares with the teacher, such as logits: the generator plays against both"
            yield InputError("distillation.losses", list(losses.terms()), fix=fix)


def _width(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[1])  # type: ignore[index, operator]


def open_sampler(recipe: Recipe, teacher: OpenModel, task: Task) -> OpenModel | None:
    """Open the model that texts are sampled from: the recipe's, else the teacher; None where none are sampled.

    Raises:
        InputError: it is no language model, has another tokenizer where that matters, or lacks a token; prompts cannot be read.
    """
    section = recipe.data.synthetic.sampled if recipe.data.synthetic else None
    if section is None:
        return None
    if section.model is None and not task.is_language_model:
        fix = "name a causal or masked LM: the teacher is a classifier, from which no text can be sampled"
        raise InputError(f"{SAMPLED}.model", None, fix=fix)
    found = teacher if section.model is None else open_model(f"{SAMPLED}.model", section.model)
    kind = kind_of_head(found.config.architectures)
    if kind is None or kind.name not in LANGUAGE_MODELS:
        heads = [head for name in LANGUAGE_MODELS for head in KINDS[name].head_classes]
        given = f"{found.name} ({', '.join(found.config.architectures or []) or 'no class'})"
        raise InputError(f"{SAMPLED}.model", given, f"a language model, {one_of(heads)}")
    if task.is_language_model and found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        accepted = f"a language model with the tokenizer of the teacher ({teacher.name})"
        raise InputError(f"{SAMPLED}.model", found.name, accepted)
    _check_begin(recipe, found, causal=kind.name == "causal_lm")
    return found


def _check_begin(recipe: Recipe, sampler: OpenModel, causal: bool) -> None:
    """Whether there is something that texts begin with, or masks to fill."""
    synthetic = recipe.data.synthetic
    assert synthetic is not None and synthetic.sampled is not None
    sampled, prompts = synthetic.sampled, synthetic.sampled.prompts
    for name in ("sweeps",) if causal else ("top_k", "top_p"):
        if (given := getattr(sampled, name)) != type(sampled).model_fields[name].default:
            fix = f"remove it: a {'causal' if causal else 'masked'} LM does not use it"
            raise InputError(f"{SAMPLED}.{name}", given, fix=fix)
    if not causal:
        if prompts is not None:
            fix = "remove it: a masked LM fills texts, it does not go on with them"
            raise InputError(f"{SAMPLED}.prompts", str(prompts), fix=fix)
        if sampler.tokenizer.mask_token_id is None:
            raise InputError(f"{SAMPLED}.model", sampler.name, "a masked LM whose tokenizer has a mask token")
    raise_all(length_faults(limits_of(sampler.config, sampler.name), synthetic.length, f"{FIELD}.length"))
    if not causal:
        return
    if prompts is not None:
        if not read_prompts(prompts):
            raise InputError(f"{SAMPLED}.prompts", str(prompts), "a text file with a prompt on each line")
    elif begin_of(sampler.tokenizer) is None:
        fix = "name a file of prompts: the tokenizer has no token that begins or ends a text"
        raise InputError(f"{SAMPLED}.prompts", None, fix=fix)


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty; none where it cannot be read as text."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        return []
