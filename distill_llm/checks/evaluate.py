"""The door of `evaluate`: opens the model, reads and encodes the rows, all before any weights are loaded."""

from dataclasses import dataclass

from distill_llm.checks.data import open_rows
from distill_llm.checks.faults import Collector
from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.decoders import is_decoder
from distill_llm.data.encoding import encode
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import Task, TaskData
from distill_llm.evaluation.harness import Benchmarks, check_benchmarks
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.models.finding import OpenModel, check_head, check_tokens, open_model
from distill_llm.models.limits import length_faults, limits_of
from distill_llm.recipe.recipe import Recipe


@dataclass(frozen=True)
class OpenScoring:
    """A model without its weights, and the encoded rows that it is scored on, as the split `test`."""

    model: OpenModel
    data: TaskData


def open_scoring(model: str, spec: DataSpec, trust_remote_code: bool = False) -> OpenScoring:
    """Open a model and its rows.

    Args:
        model: Hub id, folder, GGUF file, package:// path, or the folder of an ONNX export.
        spec: the task, its rows and their length.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        InputError: one line per fault. Fields are named as in a recipe; the model is `model`.
    """
    found = Collector()
    opened = found.run(open_model, "model", model, True, trust_remote_code, True)
    rows = found.run(lambda: open_rows(spec, opened.config if opened else None, training=False))
    found.run(check_head, opened, rows.task if rows else None)
    limits = limits_of(opened.config, opened.name) if opened else None
    found.ask(length_faults, limits, spec.max_length, "data.max_length")
    raise_all(found.faults)
    assert opened is not None and rows is not None and limits is not None
    rows.task.kind.check_rows(rows, opened.tokenizer)
    data = check_tokens(encode(rows, opened.tokenizer, spec.max_length), opened, RECIPE_FIELDS.rows)
    raise_all(scoring_faults(limits, data.test, data.task, RECIPE_FIELDS, opened.tokenizer))
    return OpenScoring(opened, data)


def benchmarks_of(recipe: Recipe) -> Benchmarks | None:
    """The benchmarks that a recipe asks for."""
    section = recipe.evaluation.harness
    return None if section is None else Benchmarks(**{**dict(section), "tasks": tuple(section.tasks)})


def check_harness(recipe: Recipe, task: Task) -> None:
    """Check the benchmarks of a recipe: its models are decoders, and the tasks and their data are there.

    Raises:
        InputError: one line.
    """
    field = "evaluation.harness"
    if (benchmarks := benchmarks_of(recipe)) is None:
        return
    if task.kind.item != "next_token":
        fix = f"remove it: benchmarks are for decoders that predict the next token, and the task {task.name} makes no such model"
        raise InputError(field, ", ".join(benchmarks.tasks), fix=fix)
    check_benchmarks(benchmarks, field)


def open_benchmarks(model: str, benchmarks: Benchmarks, trust_remote_code: bool = False) -> OpenModel:
    """Open a model to score by benchmarks, and check these.

    Raises:
        InputError: one line; the model is `model`, the tasks are `harness`.
    """
    opened = open_model("model", model, True, trust_remote_code)
    if not is_decoder(opened.config):
        raise InputError("model", model, "a decoder, which predicts the next token: benchmarks are for those")
    check_benchmarks(benchmarks)
    return opened
