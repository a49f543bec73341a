"""The door of `estimate`: what a recipe names, without weights; the devices are not this machine's."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from distill_llm.checks.faults import Collector
from distill_llm.checks.models import adapted, skeleton
from distill_llm.checks.peers import open_peers
from distill_llm.checks.pruning import check_pruning
from distill_llm.checks.recipe import Opened, load_rows
from distill_llm.common.errors import InputError, raise_all
from distill_llm.models.finding import open_model
from distill_llm.recipe.recipe import Recipe


@dataclass(frozen=True)
class Sketch:
    """A recipe's data, and its models on the meta device.

    Attributes:
        opened: the recipe with its rows.
        teacher: with the task's head.
        student: the given student; None: pruning makes it.
    """

    opened: Opened
    teacher: PreTrainedModel
    student: PreTrainedModel | None

    @property
    def peers(self) -> tuple[PreTrainedModel | None, ...]:
        """Further students that learn together with the student; None: pruning makes it."""
        task = self.opened.data.task
        return tuple(None if each is None else skeleton(each, task) for each in self.opened.peers)

    def adapted(self, student: PreTrainedModel) -> nn.Module:
        """A student as it trains: with adapters, where only those learn."""
        return adapted(self.opened.recipe, student)


def unknown_costs(recipe: Recipe) -> list[InputError]:
    """A fault where a recipe has parts whose cost shows only in training."""
    if recipe.teacher.ensemble is not None:
        fix = "remove it for the estimate: the memory and time of one teacher alone are known on paper"
        return [InputError("teacher.ensemble", recipe.teacher.ensemble.model_dump(), fix=fix)]
    if recipe.teacher.moving_average is not None:
        fix = "remove it for the estimate, which knows teacher.model alone: a copy of the student teaches here"
        return [InputError("teacher.moving_average", recipe.teacher.moving_average.model_dump(), fix=fix)]
    if recipe.teacher.assistant is not None:
        fix = "remove it for the estimate: the memory and time of one teacher alone are known on paper"
        return [InputError("teacher.assistant", recipe.teacher.assistant.model_dump(), fix=fix)]
    if recipe.data.synthetic is not None:
        fix = "name real rows for the estimate: how long it takes to make rows shows only in the run"
        return [InputError("data.synthetic", recipe.data.synthetic.method, fix=fix)]
    if recipe.teacher.server is not None and recipe.teacher.cache is None:
        fix = "remove it for the estimate: how long a server takes shows only in training"
        return [InputError("teacher.server", recipe.teacher.server.url, fix=fix)]
    if recipe.teacher.tokenizer is not None:
        fix = "remove it for the estimate: how many tokens of its own the teacher reads shows only in training"
        return [InputError("teacher.tokenizer", recipe.teacher.tokenizer, fix=fix)]
    if recipe.distillation is None or recipe.distillation.losses.responses is None:
        return []
    fix = "remove it for the estimate: how long the student's own answers are shows only in training"
    return [InputError("distillation.losses.responses", "answers of the student", fix=fix)]


def open_sketch(recipe: Recipe) -> Sketch:
    """Open the configs, the tokenizer and the rows of a recipe.

    Raises:
        InputError: one line per fault (`faults_in(error)`).
    """
    found = Collector()
    trust = recipe.teacher.trust_remote_code
    teacher = found.run(open_model, "teacher.model", recipe.teacher.model, True, trust)
    student = found.run(open_model, "student.model", recipe.student.model if recipe.student else None)
    data = found.run(lambda: load_rows(recipe, teacher))
    task = data.task if data else None
    whole = found.run(skeleton, teacher, task)
    given = found.run(skeleton, student, task)
    found.run(check_pruning, recipe, teacher, found.run(skeleton, teacher))
    if recipe.student is not None and recipe.student.peft is not None:
        found.run(adapted, recipe, whole if recipe.student.model is None else given)
    peers = found.run(open_peers, recipe, teacher, task) or ()
    found.faults += unknown_costs(recipe)
    raise_all(found.faults)
    assert teacher is not None and data is not None and whole is not None
    return Sketch(Opened(recipe, teacher, student, data, peers=peers), whole, given)
