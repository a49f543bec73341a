"""The door of `quantize`, of the recipe's section and of the command: whether a student can be rounded in this way."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from distill_llm.architectures.families import FAMILIES
from distill_llm.checks.data import open_rows
from distill_llm.checks.faults import Collector
from distill_llm.checks.models import skeleton
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.data.encoding import encode
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.models.finding import OpenModel, check_head, check_tokens, open_model
from distill_llm.models.limits import length_faults, limits_of
from distill_llm.pruning.units.refusals import quantized_faults
from distill_llm.quantizing.refusals import cut_faults, model_faults
from distill_llm.quantizing.scheme import Scheme
from distill_llm.recipe.recipe import Recipe


def check_quantize(recipe: Recipe, begun: OpenModel, model: PreTrainedModel) -> None:
    """Check the section `quantize` against the model that the student begins as.

    Args:
        begun: the student of the recipe, or the teacher that it is cut from.
        model: the same, without weights.

    Raises:
        InputError: one line per fault.
    """
    section, pruning = recipe.quantize, recipe.pruning
    if section is None:
        return
    faults = _model_faults(begun, model, section.scheme)
    if pruning is not None and pruning.keep is not None and begun.config.model_type in FAMILIES:
        faults = cut_faults(model, section.scheme, pruning.units, pruning.round_to, "group_size") or faults
    raise_all([each.renamed("quantize.group_size") if each.field == "group_size" else each for each in faults])


@dataclass(frozen=True)
class OpenQuantizing:
    """A model without its weights, and the encoded rows of a task to calibrate and score on; None where no task was named."""

    model: OpenModel
    data: TaskData | None


def open_quantizing(model: str, scheme: Scheme, spec: DataSpec | None, output: Path) -> OpenQuantizing:
    """Open a model and perhaps rows for `distill-llm quantize`.

    Args:
        model: folder, Hub id or package:// path.
        spec: the task and its rows.
        output: the folder to fill.

    Raises:
        InputError: one line per fault.
    """
    found = Collector()
    found.faults += scheme.faults()
    opened = found.run(open_model, "model", model)
    found.ask(_model_faults, opened, found.run(skeleton, opened), scheme)
    found.run(usable_output, output, "output")
    if scheme.smooth is not None and spec is None:
        found.faults.append(InputError("task", None, fix="name the task whose rows `smooth` is calibrated on"))
    rows = found.run(lambda: open_rows(spec, opened.config if opened else None)) if spec is not None else None
    limits = limits_of(opened.config, opened.name) if opened else None
    if spec is not None:
        found.run(check_head, opened, rows.task if rows else None)
        found.ask(length_faults, limits, spec.max_length, "data.max_length")
    raise_all(found.faults)
    assert opened is not None and limits is not None
    if rows is None or spec is None:
        return OpenQuantizing(opened, None)
    rows.task.kind.check_rows(rows, opened.tokenizer)
    data = check_tokens(encode(rows, opened.tokenizer, spec.max_length), opened, RECIPE_FIELDS.rows)
    raise_all(scoring_faults(limits, data.test, data.task, RECIPE_FIELDS, opened.tokenizer))
    return OpenQuantizing(opened, data)


def _model_faults(opened: OpenModel, model: PreTrainedModel, scheme: Scheme) -> list[InputError]:
    faults = quantized_faults(opened.config, opened.field, f"{opened.name}, quantized")
    return faults or model_faults(model, scheme, opened.field, opened.name)
