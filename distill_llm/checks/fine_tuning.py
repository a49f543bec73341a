"""The door of fine-tuning alone, as `glue` does it: of a recipe the teacher, its rows and how it is trained."""

from distill_llm.checks.faults import Collector
from distill_llm.checks.models import check_room, skeleton
from distill_llm.checks.recipe import Opened, check_raw_rows, check_rows, length_faults_of, load_rows
from distill_llm.checks.training import check_training
from distill_llm.common.errors import raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.models.finding import open_model
from distill_llm.recipe.recipe import BACKUP, RECIPE, STATE, Recipe


def open_fine_tuning(recipe: Recipe) -> Opened:
    """Open the teacher and the rows of a recipe, and check that the teacher can be trained on them.

    Raises:
        InputError: one line per fault (`faults_in(error)`).
    """
    found = Collector()
    teacher = found.run(open_model, "teacher.model", recipe.teacher.model, True, recipe.teacher.trust_remote_code)
    data = found.run(lambda: load_rows(recipe, teacher))
    task = data.task if data else None
    found.ask(length_faults_of, recipe, teacher)
    found.run(check_rows, recipe, teacher, task)
    found.run(check_raw_rows, data, teacher)
    found.run(lambda: check_training(recipe, data))
    found.run(usable_output, recipe.output_dir, "output_dir", (RECIPE, STATE, BACKUP))
    whole = found.run(skeleton, teacher, task)
    if whole is not None:  # the model, and two checkpoints with two moments of each weight
        found.run(check_room, recipe.output_dir, 7 * 4 * whole.num_parameters())
    raise_all(found.faults)
    assert teacher is not None and data is not None
    return Opened(recipe, teacher, None, data)
