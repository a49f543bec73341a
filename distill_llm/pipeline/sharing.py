"""A teacher that several runs share: trained in one, and linked into the folders of the others."""

import shutil
from pathlib import Path

import yaml

from distill_llm.common.files import linked_or_copied, written_whole
from distill_llm.common.seals import broken
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.folder import keep_recipe
from distill_llm.pipeline.inputs import inputs_of
from distill_llm.pipeline.stages.benchmarks import TeacherBenchmarks
from distill_llm.pipeline.stages.teacher import Teacher
from distill_llm.pipeline.state import State, read_state, write_state

SHARED = ("teacher.model", "data.path")
"""What the teacher of a run was made from."""


def has_teacher(folder: Path) -> bool:
    """Whether the teacher of a run is trained and scored, and its files are whole."""
    state = read_state(folder)
    return state is not None and Teacher.name in state.stages and not broken(state.files[Teacher.name], folder)


def take_teacher(context: Context, donor: Path) -> None:
    """Begin a run with the teacher of another one, so that it goes on as if it had trained that itself.

    Nothing is done where the run has begun, or where model or rows are no longer those that the donor was made from. Files are
    linked, or copied where the disk has no links: both folders stay whole if the other is removed.

    Args:
        context: of a recipe with the same teacher, data and seed; nobody else is using its folder.
        donor: the folder of a run whose teacher is done.
    """
    if context.processes.is_main_process and read_state(context.folder) is None:
        state = read_state(donor)
        assert state is not None
        own, files = inputs_of(context.opened, state.inputs), state.files[Teacher.name]
        if all(own[field] == state.inputs[field] for field in SHARED):
            text = context.recipe.to_yaml()
            context.folder.mkdir(parents=True, exist_ok=True)
            keep_recipe(context.folder, text)  # first: it marks a folder that is stopped in as a run's
            for path in Teacher(context).outputs if files else ():
                with written_whole(path, folder=True) as target:
                    shutil.copytree(donor / path.relative_to(context.folder), target, copy_function=linked_or_copied)
            recipe = yaml.safe_load(text)
            done = {Teacher.name: state.stages[Teacher.name]}
            same = recipe["evaluation"]["harness"] == state.recipe["evaluation"].get("harness")
            if same and (scores := state.stages.get(TeacherBenchmarks.name)) is not None:
                done[TeacherBenchmarks.name] = scores
            write_state(context.folder, State(recipe, own, done, {name: state.files[name] for name in done}))
    context.processes.wait_for_everyone()
