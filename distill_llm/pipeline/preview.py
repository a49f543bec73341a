"""A run before it runs: its stages, a plan by the weights alone, sizes, memory and time."""

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from distill_llm.checks.estimate import Sketch, unknown_costs
from distill_llm.checks.models import skeleton
from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.measuring.counting import count_params
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.estimating import Forecast, forecast
from distill_llm.pipeline.prices import Devices, weight_bytes
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pipeline.stages import stages_of
from distill_llm.pipeline.state import read_state
from distill_llm.pruning.cutting.surgery import prune_skeleton
from distill_llm.pruning.learning.masks import METHODS
from distill_llm.pruning.plan import PruningPlan, keep_layers
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.recipe.recipe import Recipe

CHEAP = "magnitude"
"""The criterion of the plan: it reads no data."""


@dataclass(frozen=True)
class Preview:
    """What a run will do and take.

    Attributes:
        stages: names, in order.
        done: names of those that an earlier start has finished.
        plan: by `magnitude`, from the teacher to the end of the last round; None: nothing is pruned, or see `notes`.
        teacher: without weights.
        params: of the teacher and of the student, as far as they are known.
        devices: what memory and time are for: all of this machine's.
        forecast: memory and time; None: see `notes`.
        notes: lines on what could not be found out, and why.
    """

    stages: tuple[str, ...]
    done: frozenset[str]
    plan: PruningPlan | None
    teacher: PreTrainedModel
    params: tuple[int, int | None]
    devices: Devices
    forecast: Forecast | None
    notes: tuple[str, ...]


def preview(recipe: Recipe) -> Preview:
    """Check a recipe as a run would, and look ahead; nothing is trained, and nothing is written into the run folder.

    Raises:
        InputError: one line per fault of the recipe.
    """
    context = Context(open_recipe(recipe))
    stages = tuple(stage.name for stage in stages_of(context))
    state = read_state(context.folder) if context.folder.is_dir() else None
    notes: list[str] = []
    opened = context.opened
    teacher = skeleton(opened.teacher, opened.data.task)
    plan, student, given, expected = None, None, None, None
    if recipe.pruning is not None:
        try:
            plan = _plan(context, teacher)
            student = prune_skeleton(teacher, plan)
        except InputError as error:
            notes.append(f"no plan: {faults_in(error)[0]}")
    elif opened.student is not None:
        student = given = skeleton(opened.student, opened.data.task)
    devices = devices_here()
    try:
        raise_all(unknown_costs(recipe))
        expected = forecast(Sketch(opened, teacher, given), devices, gpu=torch.cuda.is_available())
    except InputError as error:
        notes.append(f"no estimate: {faults_in(error)[0]}")
    notes += masks_note(recipe)
    params = count_params(teacher)[0], None if student is None else count_params(student)[0]
    done = frozenset(state.stages if state is not None else ())
    return Preview(stages, done, plan, teacher, params, devices, expected, tuple(notes))


def masks_note(recipe: Recipe) -> list[str]:
    """How masks will be learnt, where the recipe asks for them."""
    section = recipe.pruning
    if section is None or section.masks is None:
        return []
    masks, rate = section.masks, section.masks.learning_rate or METHODS[section.masks.by].learning_rate
    falls = f"the share of {section.cost} kept falls from 1 to {section.keep:g} over the first {masks.warm_up:.0%} of the steps"
    return [
        f"round-1/masks: {' and '.join(section.units)} get masks by {masks.by}; {falls}; learning rate of masks {rate:g}"
    ]


def devices_here() -> Devices:
    """The GPUs of this machine; without one the CPU, with the machine's memory."""
    if torch.cuda.is_available():
        return Devices(torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory)
    return Devices(1, psutil.virtual_memory().total)


def _plan(context: Context, teacher: PreTrainedModel) -> PruningPlan:
    """The whole cut in one step, by the teacher's weights."""
    section, recipe = context.recipe.pruning, context.recipe
    assert section is not None
    if section.layers is not None:
        return keep_layers(teacher, section.layers)
    assert section.keep is not None
    if weight_bytes(teacher) > psutil.virtual_memory().available:
        fix = "look at the plan on a machine with more memory: the weights do not fit in this one's"
        raise InputError("teacher.model", recipe.teacher.model, fix=fix)
    cheap = section.model_copy(update={"criterion": CHEAP, "layer_criterion": None, "search": None})
    model = load_pretrained(context.teacher_path, recipe.teacher.trust_remote_code, dtype=torch.float32)
    cutter = Cutter(recipe.model_copy(update={"pruning": cheap}), lambda number: [])
    return cutter.plan(model, model, collect_statistics(model, [], None), section.keep)
