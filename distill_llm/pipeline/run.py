"""A run: its stages in order, those that are done read from the run folder; and pruning alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distill_llm.checks.cached import check_cached_rows
from distill_llm.checks.prune import open_pruning
from distill_llm.checks.recipe import open_recipe
from distill_llm.common.files import full_disk_named, written_whole
from distill_llm.common.locks import alone_in
from distill_llm.common.outputs import usable_output
from distill_llm.evaluation.baselines import baselines, no_better
from distill_llm.metrics.errors import shown_score
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.folder import RunFolder
from distill_llm.pipeline.inputs import inputs_of
from distill_llm.pipeline.listener import Listener, StageDone
from distill_llm.pipeline.reporting import rewrite_finished
from distill_llm.pipeline.sharing import take_teacher
from distill_llm.pipeline.stage import Stage
from distill_llm.pipeline.stages import own_sections, stages_of
from distill_llm.pipeline.stages.prune import cut_model, models_to_cut, save_cut, show
from distill_llm.pipeline.state import read_state
from distill_llm.pruning.cutting.strength import described
from distill_llm.pruning.learning.scales import described_scales
from distill_llm.recipe.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class RunResult:
    """What a run made: the contents of metrics.json, and where student, report.md and report.html are."""

    metrics: dict[str, Any]
    student_dir: Path
    report: Path
    page: Path


def run(
    recipe: Recipe | Mapping[str, Any], output_dir: str | Path | None = None, listener: Listener | None = None
) -> RunResult:
    """Carry out a recipe. Called again after a stop, it continues where it stopped and ends with the same weights.

    Args:
        recipe: a `Recipe`, or its plain mapping.
        output_dir: the run folder; default: the recipe's own.
        listener: is told what the run does; by default that is printed.

    Raises:
        InputError: for anything wrong in the recipe, before any work; or where another run is using the folder, a model or rows
            that the recipe names have changed since the run began, or a file of the run is damaged that cannot be made again.
    """
    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(dict(recipe))
    if output_dir is not None:
        recipe = recipe.model_copy(update={"output_dir": Path(output_dir).expanduser()})
    return carry_out(Context(open_recipe(recipe), listener))


def carry_out(context: Context, donor: Path | None = None) -> RunResult:
    """Carry out a checked recipe.

    Args:
        donor: the folder of a run with the same teacher, which is taken over where this run has not begun.
    """
    with alone_in(context.folder), full_disk_named(context.folder):
        if donor is not None:
            take_teacher(context, donor)
        return _run(context)


def _run(context: Context) -> RunResult:
    """Carry out a checked recipe in a folder that nobody else is using."""
    carry_out_stages(context, stages_of(context))
    if context.processes.is_main_process and not context.page_file.is_file():  # the run of a version without pages
        state = read_state(context.folder)
        assert state is not None
        rewrite_finished(context.folder, state)
    metrics = json.loads(context.metrics_file.read_text())
    return RunResult(metrics, context.student_dir, context.report_file, context.page_file)


def carry_out_stages(context: Context, stages: Sequence[Stage]) -> None:
    """Carry out some of the stages of a checked recipe, the first ones, in a folder that nobody else is using."""
    # on all processes at once: reading rows waits for process 0
    if context.recipe.data.synthetic is None:
        check_cached_rows(context.opened, context.data.train)
    else:
        _ = context.real_test
    folder = RunFolder(
        context.folder, context.recipe.to_yaml(), stages, own_sections(), partial(inputs_of, context.opened)
    )
    for note in folder.notes:
        context.say(note)
    for stage in stages:
        before = folder.has(stage)
        result = folder.result(stage)
        context.done(StageDone(stage.name, result, stage.line(result), before))
        stage.tidy()


def prune_recipe(recipe: Recipe) -> Path:
    """Importance, plan, prune, compensate, save; no training.

    Args:
        recipe: a teacher fine-tuned on the task, its data, how to prune it, and how to score and time both.

    Returns:
        The folder of the pruned model, in the dtype of the teacher's checkpoint, with tokenizer and plan.json.

    Raises:
        InputError: before any work, for anything wrong in the recipe or that pruning alone would ignore.
    """
    context = Context(open_pruning(recipe))
    with alone_in(recipe.output_dir), full_disk_named(recipe.output_dir):
        usable_output(recipe.output_dir)  # another command may have filled it since it was checked
        return _prune(context)


def _prune(context: Context) -> Path:
    """Carry out a checked recipe that only prunes."""
    recipe = context.recipe
    target, section = recipe.output_dir, recipe.pruning
    assert section is not None and section.keep is not None
    file = section.statistics.expanduser() if section.statistics is not None else None
    teacher = models_to_cut(context, context.teacher_path, context.teacher_path)[0]
    cut = cut_model(context, teacher, teacher, section.keep, file)
    if not context.processes.is_main_process:
        return target
    plan, student = cut.plan, context.as_written(cut.model)
    strengths = [described(strength.record()) for strength in cut.strengths]
    scales = [described_scales(cut.scaled.record())] if cut.scaled is not None else []
    zeros = [f"{cut.masks.sparsity:.1%} of the linears' weights are zero"] if cut.masks is not None else []
    cut = replace(cut, model=student)  # two models at a time
    with written_whole(target, folder=True) as folder:
        save_cut(context, cut, student, folder)
        context.say(show(plan, teacher, folder, "plan"))
    teacher = context.as_written(teacher)
    before, after = (context.evaluate(model) for model in (teacher, student))
    task, raw = context.data.task, context.opened.data
    if (warning := no_better(task, before, baselines(task, raw.train, raw.test), "the model")) is not None:
        context.say(f"WARNING: {warning}")
    of = "the latency" if section.cost == "latency" else f"the layers' {section.cost}"
    share = f"{plan.kept:.1%} of {of} kept" + (f" ({plan.note})" if plan.note else "")
    line = f"prune: {share}, {context.named(before)} -> {shown_score(after)} on {after['rows']} rows"
    context.say(", ".join([line, *zeros, *strengths, *scales]))
    return target
