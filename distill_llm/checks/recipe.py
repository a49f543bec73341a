"""The door of `run` and `distill`: the whole recipe is checked (models, data, disk, device) before any heavy work."""

import copy
import math
from dataclasses import dataclass, field

from distill_llm.checks.augment import augment_faults, open_masked_lm
from distill_llm.checks.cached import open_cached
from distill_llm.checks.calibration import MixedRows, open_calibration
from distill_llm.checks.data import open_rows
from distill_llm.checks.ensemble import (
    assistant_faults,
    check_held_out,
    check_names,
    open_others,
    with_numbers,
)
from distill_llm.checks.evaluate import check_harness
from distill_llm.checks.exits import exit_recipe_faults
from distill_llm.checks.export import check_export
from distill_llm.checks.faults import Collector
from distill_llm.checks.models import (
    Disk,
    adapted,
    check_disk,
    check_layer_pairs,
    check_quantized,
    check_signals,
    projected,
    skeleton,
)
from distill_llm.checks.peers import open_peers
from distill_llm.checks.pruning import check_pruning, sparse_student_faults
from distill_llm.checks.quantize import check_quantize
from distill_llm.checks.server import check_server
from distill_llm.checks.stages import open_stages
from distill_llm.checks.synthetic import open_sampler, open_synthetic, synthetic_faults
from distill_llm.checks.tokenizers import check_alignment, check_tokenizers
from distill_llm.checks.training import check_training
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.data.answer_choice import AnswerChoice
from distill_llm.data.encoding import encode, most_tokens
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import check_tokenizer
from distill_llm.data.tasks import Task, TaskData, class_name_faults, label_names
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.losses.terms.term import Use
from distill_llm.models.checkpoint import name_labels
from distill_llm.models.finding import (
    OpenModel,
    check_head,
    check_tokens,
    open_model,
)
from distill_llm.models.limits import length_faults, limits_of, longest_input, room_faults
from distill_llm.recipe.recipe import BACKUP, RECIPE, STATE, Recipe
from distill_llm.report.hub import check_push
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.training.refusals import router_faults

NOT_READ = ("augment", "synthetic", "test")
"""Fields of the data section that say nothing about the rows of its task."""


@dataclass(frozen=True)
class Opened:
    """What the checks opened and read for a recipe; the stages use it.

    Attributes:
        recipe: the checked recipe.
        teacher: config and tokenizer.
        student: config and tokenizer of the recipe's student; None: pruning makes the student from the teacher.
        data: the task's raw rows.
        cache: the cache that the student learns from, if the recipe names one.
        masked_lm: config and tokenizer of the masked LM that proposes words, if the recipe names one.
        disk: what the run takes on the disk.
        others: config and tokenizer of the further teachers of an ensemble.
        peers: of the further students; None: pruning makes it.
        stages: of the teacher's checkpoints that the recipe names.
        sampler: config and tokenizer of the language model that synthetic texts are sampled from, if the recipe has such rows.
        calibration: encoded rows of the sources that the recipe names for calibration, if it names any.
    """

    recipe: Recipe
    teacher: OpenModel
    student: OpenModel | None
    data: TaskData
    cache: CachedTeacher | None = None
    masked_lm: OpenModel | None = None
    disk: Disk = field(default_factory=Disk)
    others: tuple[OpenModel, ...] = ()
    peers: tuple[OpenModel | None, ...] = ()
    stages: tuple[OpenModel, ...] = ()
    sampler: OpenModel | None = None
    calibration: MixedRows | None = None

    @property
    def reader(self) -> OpenModel:
        """The model whose tokens the rows have: the teacher, whose tokenizer is the student's too unless it keeps its own."""
        return self.student if self.recipe.teacher.tokenizer is not None and self.student else self.teacher


def open_recipe(recipe: Recipe) -> Opened:
    """Open everything that a recipe names, and check all that can be checked before any weight is read or written.

    Raises:
        InputError: one line per fault (`faults_in(error)`).
    """
    found = Collector()
    teacher = found.run(open_model, "teacher.model", recipe.teacher.model, True, recipe.teacher.trust_remote_code)
    name = recipe.student.model if recipe.student else None
    student = found.run(open_model, "student.model", name)
    data = found.run(lambda: load_rows(recipe, teacher))
    task = data.task if data else None
    if recipe.teacher.train is None:
        found.run(check_head, teacher, task)
    if name is not None:
        found.run(_check_student, recipe, student, teacher, task)
    found.run(check_pruning, recipe, teacher, found.run(skeleton, teacher))
    found.ask(sparse_student_faults, recipe, student)
    others = found.run(open_others, recipe, teacher, task) or ()
    peers = found.run(open_peers, recipe, teacher, task) or ()
    stages = found.run(open_stages, recipe, teacher, task) or ()
    found.ask(assistant_faults, recipe)
    shorter = _shorter(teacher, student, *others, *peers)
    found.ask(length_faults_of, recipe, shorter)
    reader = teacher if recipe.teacher.tokenizer is None else student
    found.run(check_rows, recipe, reader, task)
    calibration = found.run(open_calibration, recipe, None if found.faults else data_spec(recipe), data, reader)
    found.ask(_answer_faults, recipe, shorter, task)
    found.run(check_raw_rows, data, reader)
    if name is not None and not found.faults:
        found.run(check_alignment, recipe, data, student, teacher)
    found.ask(_loss_faults, recipe, task)
    found.ask(exit_recipe_faults, recipe, teacher if name is None else student, task)
    found.ask(augment_faults, recipe, task)
    masked_lm = found.run(open_masked_lm, recipe, teacher)
    found.ask(_mixture_faults, recipe, teacher, teacher if name is None else student, task)
    found.ask(synthetic_faults, recipe, teacher, teacher if name is None else student, task, shorter)
    sampler = found.run(open_sampler, recipe, teacher, task)
    found.run(check_server, recipe, teacher, task)
    cache = found.run(open_cached, recipe, teacher, others)
    found.ask(_response_faults, recipe, task, shorter)
    pruned = teacher if name is None else student
    taught_by = pruned if recipe.teacher.is_own else teacher  # its layers are those that are compared
    paired = found.run(check_layer_pairs, recipe, taught_by, pruned)
    found.run(lambda: check_training(recipe, data, projected(student, taught_by)))
    found.run(usable_output, recipe.output_dir, "output_dir", (RECIPE, STATE, BACKUP))
    if recipe.hub is not None:
        found.run(check_push, recipe.hub.repo_id, "hub.repo_id")
    found.run(lambda: check_quantized(recipe, student))
    found.run(check_export, recipe, student or teacher)
    found.run(check_harness, recipe, task)
    found.run(check_quantize, recipe, pruned, found.run(skeleton, pruned))
    whole = found.run(skeleton, teacher, task)
    learner = whole if name is None else found.run(skeleton, student, task)
    if paired:
        found.run(check_signals, recipe, learner if recipe.teacher.is_own else whole, learner)
    disk = found.run(check_disk, recipe, whole, found.run(adapted, recipe, learner))
    raise_all(found.faults)
    assert teacher is not None and data is not None and disk is not None
    return Opened(recipe, teacher, student, data, cache, masked_lm, disk, others, peers, stages, sampler, calibration)


def load_rows(recipe: Recipe, teacher: OpenModel | None) -> TaskData:
    """The task's raw rows (not tokenized), after a check that there are enough.

    Args:
        teacher: some tasks depend on it; None if it could not be opened.
    """
    if recipe.data.synthetic is not None:
        return open_synthetic(recipe, teacher)
    data = open_rows(data_spec(recipe), teacher.config if teacher else None)
    check_names(recipe, data)
    check_held_out(recipe, data)
    calibration = recipe.pruning.least_rows if recipe.pruning and recipe.pruning.keep else 0
    # Text is still to be cut into blocks, and packed sequences share rows: the number of examples is not known yet.
    blocks = data.task.kind.joins_documents or data.task.packing
    if not blocks and calibration > len(data.train):
        raise InputError(
            "pruning.calibration_examples", calibration, f"at most {len(data.train)}, the number of training rows"
        )
    return data


def data_spec(recipe: Recipe) -> DataSpec:
    """The data that a recipe describes."""
    columns = recipe.data.columns.model_dump(exclude_none=True) if recipe.data.columns else None
    metric, new = recipe.evaluation.metric, recipe.evaluation.max_new_tokens
    answers = AnswerChoice(**recipe.data.answers.model_dump()) if recipe.data.answers else None
    own = {name: value for name, value in recipe.data if name not in NOT_READ}
    own |= {"columns": columns, "answers": answers}
    return DataSpec(**own, seed=recipe.seed, metric=metric, max_new_tokens=new)


def encoded_rows(opened: Opened) -> TaskData:
    """The task's rows as token ids, after a check that the models can read them and answer their prompts.

    Raises:
        InputError: a token has no embedding, or a prompt leaves no room for its response.
    """
    recipe, tokenizer = opened.recipe, opened.reader.tokenizer
    rows = with_numbers(recipe, encode(opened.data, tokenizer, recipe.data.max_length))
    data = check_tokens(rows, opened.reader, RECIPE_FIELDS.rows)
    shorter = _shorter(opened.teacher, opened.student, *opened.others, *opened.peers)
    if recipe.teacher.tokenizer is not None:
        shorter = opened.reader  # the teacher reads rows of its own (see `teacher_rows`)
    assert shorter is not None
    limits = limits_of(shorter.config, shorter.name)
    for split in (data.test, data.validation):
        raise_all(scoring_faults(limits, split, data.task, RECIPE_FIELDS) if split is not None else [])
    return data


def _check_student(recipe: Recipe, student: OpenModel, teacher: OpenModel, task: Task) -> None:
    check_tokenizers(recipe, student, teacher, task)
    task.kind.check(data_spec(recipe), student.config)
    if task.kind.has_head(student.config.architectures):
        check_head(student, task)
    elif recipe.student is not None and recipe.student.quantization is not None:
        given, fix = recipe.student.quantization, f"remove it: {student.name} gets a new head, which must learn whole"
        raise InputError("student.quantization", given, fix=fix)
    compared = recipe.distillation is not None and recipe.distillation.losses.needs_teacher
    if task.is_language_model or recipe.teacher.cache is not None or not compared:
        return
    names = task.label_names if recipe.teacher.train is not None else label_names(teacher.config)
    config = copy.deepcopy(student.config)
    name_labels(config, task, names, of_task=True)
    raise_all(class_name_faults(label_names(config), names, student.field, student.name))


def _shorter(*models: OpenModel | None) -> OpenModel | None:
    """The model that takes the fewest tokens at once. Both must read the same rows; None stands for no model."""
    there = [model for model in models if model is not None]
    return min(there, key=lambda model: longest_input(model.config) or math.inf, default=None)


def length_faults_of(recipe: Recipe, shorter: OpenModel) -> list[InputError]:
    """Faults of rows, or of a batch to measure, that are longer than the model with the shorter input reads."""
    limits, latency = limits_of(shorter.config, shorter.name), recipe.evaluation.latency
    return [
        *length_faults(limits, recipe.data.max_length, "data.max_length"),
        *length_faults(limits, latency.sequence_length, "evaluation.latency.sequence_length"),
    ]


def check_rows(recipe: Recipe, teacher: OpenModel, task: Task) -> None:
    """Check that the tokenizer can make the task's rows."""
    check_tokenizer(task, teacher.tokenizer, teacher.field)
    most_tokens(task, teacher.tokenizer, recipe.data.max_length)


def _answer_faults(recipe: Recipe, shorter: OpenModel, task: Task) -> list[InputError]:
    """Faults if the models may have no room for their responses, however long the prompts are."""
    limits, cut = limits_of(shorter.config, shorter.name), recipe.data.max_length
    if not task.generates or limits.longest is None or cut >= limits.longest:
        return []
    return room_faults(limits, cut, task.max_new_tokens, "evaluation.max_new_tokens", "data.max_length")


def check_raw_rows(data: TaskData, teacher: OpenModel) -> None:
    """Check rows that are not encoded yet, as their kind does (labels, templates of chats)."""
    data.task.kind.check_rows(data, teacher.tokenizer)


def _loss_faults(recipe: Recipe, task: Task) -> list[InputError]:
    if recipe.distillation is None:
        return []
    single, packed = not task.kind.has_distribution, "data.packing" if task.packing else None
    classes, kind = None if task.is_language_model else task.num_labels, task.kind.item
    use = Use(single_output=single, classes=classes, packed=packed, kind=kind)
    together = recipe.distillation.generations is not None and recipe.distillation.generations.ensemble
    fix = "leave it out: the mean of language models is not scored, of classifiers and regressions it is"
    unscored = (
        [InputError("distillation.generations.ensemble", True, fix=fix)] if together and task.is_language_model else []
    )
    return recipe.distillation.losses.faults(use, "distillation.losses") + unscored


def _mixture_faults(recipe: Recipe, teacher: OpenModel, student: OpenModel, task: Task) -> list[InputError]:
    trained = [student] if recipe.distillation is not None else []
    if recipe.teacher.train is not None and student is not teacher:
        trained.append(teacher)
    several = [router_faults(each.config, f"{each.field}: config.json") for each in trained]
    return [fault for faults in several for fault in faults] if task.is_language_model else []


def _response_faults(recipe: Recipe, task: Task, shorter: OpenModel) -> list[InputError]:
    """Faults of `responses`: the student must be able to answer prompts."""
    responses = recipe.distillation.losses.responses if recipe.distillation else None
    if responses is None:
        return []
    field = "distillation.losses.responses"
    if not task.kind.generates:
        return [InputError(field, f"the task {task.name}", fix="remove it, or use data of the task prompts")]
    most = recipe.data.max_length + responses.max_new_tokens
    limits = limits_of(shorter.config, shorter.name)
    return length_faults(limits, most, f"data.max_length + {field}.max_new_tokens")
