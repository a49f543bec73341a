"""GLUE's whole table: a model for each task, given or fine-tuned here, scored on the development sets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_llm.checks.evaluate import OpenScoring, open_scoring
from distill_llm.checks.fine_tuning import open_fine_tuning
from distill_llm.common.errors import InputError, faults_in, one_of, raise_all
from distill_llm.common.files import full_disk_named
from distill_llm.common.locks import alone_in
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import collator
from distill_llm.data.fingerprints import rows_fingerprint
from distill_llm.data.glue import GLUE, MISMATCHED, NAMES
from distill_llm.data.spec import DataSpec
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.rules import RECIPE_FIELDS
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.fingerprints import checkpoint_identity
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.listener import Listener
from distill_llm.pipeline.run import carry_out_stages
from distill_llm.pipeline.stages.teacher import Teacher
from distill_llm.recipe.recipe import Recipe, parse_recipe
from distill_llm.recipe.yaml_input import override
from distill_llm.report.glue import RECORD, glue_record, shown, write_glue

USUAL = {
    "num_train_epochs": 3,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 32,
    "train_sampling_strategy": "group_by_length",
}
"""How models are fine-tuned on GLUE as a rule (Devlin et al. 2019, 4.1; transformers' example run_glue)."""
LONGER = dict.fromkeys(("mrpc", "wnli"), 5)
"""Epochs of tasks with few rows, as in run_glue."""


@dataclass(frozen=True)
class GlueRequest:
    """What is asked for.

    Attributes:
        models: a base model to fine-tune on every task; or folders with a model for one task each (finished runs, or models
            that lie in folders named after their tasks), or a folder of such folders.
        output_dir: for the table, and for what is fine-tuned.
        data: a folder with a folder for every task, or a Hub id; None: the Hub's copy.
        tasks: to do; empty: all that there is data for and, where models are given, a model.
        max_length, batch_size: in scoring and in fine-tuning.
        settings: `a.b=c` each, for the recipes that the models are fine-tuned by.
        trust_remote_code: run code that the models bring along.
    """

    models: tuple[str, ...]
    output_dir: Path
    data: str | None = None
    tasks: tuple[str, ...] = ()
    max_length: int = 128
    batch_size: int = 64
    settings: tuple[str, ...] = ()
    trust_remote_code: bool = False


def glue(request: GlueRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Fine-tune where that is asked for, score on every task, and write `glue.json` and `glue.md`.

    Called again after a stop it goes on: what is trained is not trained again, and what is scored not scored again.

    Returns:
        The contents of glue.json: by task its metrics, the average, and what is missing.

    Raises:
        InputError: before any work, for a task, a model or data that cannot be used.
    """
    listener = listener or Listener()
    raise_all([InputError("tasks", name, one_of(GLUE, name)) for name in request.tasks if name not in GLUE])
    usable_output(request.output_dir, begun=RECORD)
    places = _places(request.data)
    given = models_by_task(request.models)
    tasks = [name for name in GLUE if name in (request.tasks or (given or places)) and name in places]
    if missing := [name for name in request.tasks if name not in tasks or (given and name not in given)]:
        fix = f"leave {missing[0]} out, or give its {'data' if missing[0] not in places else 'model'}"
        raise InputError("tasks", missing[0], fix=fix)
    if not tasks:
        raise InputError("data", request.data, "a folder with a folder for each task: CoLA, SST-2, MRPC, ...")
    with alone_in(request.output_dir), full_disk_named(request.output_dir):
        return _table(request, tasks, places, given, listener)


def models_by_task(names: Sequence[str]) -> dict[str, str] | None:
    """The folder of the model for each task; None where the one name is a base model.

    Raises:
        InputError: two models for one task, or a folder that tells no task.
    """
    found: dict[str, str] = {}
    for name in names:
        folder = Path(name).expanduser()
        inside = [own] if (own := _model_in(folder)) else [_model_in(each) for each in sorted(folder.glob("*/"))]
        for task, model in filter(None, inside):
            if task in found:
                raise InputError("MODEL_OR_RUNS", name, fix=f"give one model for {task}: {found[task]} is for it, too")
            found[task] = model
        if not any(inside) and len(names) > 1:
            accepted = "a run on a GLUE task, or a model in a folder named after its task"
            raise InputError("MODEL_OR_RUNS", name, accepted)
    return found or None


def _model_in(folder: Path) -> tuple[str, str] | None:
    """The task and the model of a run, or of a folder with a model that is named after its task or has a run's metrics."""
    model = next(
        (each for part in ("student", "teacher", "") if (each := folder / part / "config.json").is_file()), None
    )
    if model is None:
        return None
    told: Any = None
    for file, read in (("recipe.yaml", yaml.safe_load), ("metrics.json", json.loads)):
        if told is None and (folder / file).is_file():
            said = read((folder / file).read_text(encoding="utf-8"))
            told = (said.get("data") or {}).get("task") if file == "recipe.yaml" else said.get("task")
    task = told or _plain_names().get(_plain(folder.resolve().name))
    return (task, str(model.parent)) if task in GLUE else None


def _places(data: str | None) -> dict[str, str | None]:
    """Where the data of each task are, for those that have any."""
    if data is None or not (folder := Path(data).expanduser()).is_dir() or (folder / "README.md").is_file():
        return dict.fromkeys(GLUE, data)  # the Hub's, or a folder laid out like its repository
    folders = {_plain(each.name): str(each) for each in folder.glob("*/")}
    return {task: folders[name] for name, task in _plain_names().items() if name in folders}


def _plain_names() -> dict[str, str]:
    return {_plain(name): task for task, name in NAMES.items()}


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _table(
    request: GlueRequest,
    tasks: Sequence[str],
    places: Mapping[str, str | None],
    given: Mapping[str, str] | None,
    listener: Listener,
) -> dict[str, Any]:
    """Do all tasks in a folder that nobody else is using. Everything is opened before the first is begun."""
    faults: dict[str, InputError] = {}
    opened: dict[str, OpenScoring | Context] = {}
    for task in tasks:
        try:
            if given:
                opened[task] = _open(given[task], task, places[task], request)
            else:
                recipe = _recipe(request, task, places[task])
                opened[task] = Context(open_fine_tuning(recipe), listener)
        except InputError as error:
            faults |= {f"{task}: {fault}": fault.renamed(f"{task}: {fault.field}") for fault in faults_in(error)}
    raise_all(list(faults.values()))
    results = _read(request.output_dir)
    for task in tasks:
        run = opened[task]
        if isinstance(run, Context):
            with alone_in(run.folder):
                carry_out_stages(run, [Teacher(run)])
            run = _open(str(run.folder / "teacher"), task, places[task], request)
        results[task] = _scored(run, task, places[task], request, results.get(task))
        record = glue_record(request.models, {name: results[name] for name in tasks if name in results})
        write_glue(request.output_dir, record)
        listener.say(f"{NAMES[task]}: {shown(task, results[task])}")
    return record


def _recipe(request: GlueRequest, task: str, path: str | None) -> Recipe:
    """How a model is fine-tuned on a task: a run of which only the stage of the teacher is done."""
    model, train = request.models[0], {**USUAL, **({"num_train_epochs": LONGER[task]} if task in LONGER else {})}
    mapping: dict[str, Any] = {
        "output_dir": str(request.output_dir / task),
        "teacher": {"model": model, "train": train, "trust_remote_code": request.trust_remote_code},
        "student": {"model": model},
        "data": {"task": task, "path": path, "max_length": request.max_length},
        "distillation": {"losses": {"labels": {}}},
        "evaluation": {"batch_size": request.batch_size},
    }
    for text in request.settings:
        override(mapping, text)
    return parse_recipe(mapping)


def _open(model: str, task: str, path: str | None, request: GlueRequest) -> OpenScoring:
    return open_scoring(model, DataSpec(task, path, max_length=request.max_length), request.trust_remote_code)


def _scored(
    opened: OpenScoring, task: str, path: str | None, request: GlueRequest, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The metrics of a model on a task; those that are known, where model and rows are the same."""
    of = {
        "model": checkpoint_identity(opened.model.path, opened.model.config),
        "rows": rows_fingerprint(opened.data.test),
    }
    if known is not None and known["of"] == json.loads(json.dumps(of)):
        return dict(known)
    model = load_pretrained(opened.model.path, request.trust_remote_code).to(open_processes().device)  # type: ignore[arg-type]

    def metrics(each: OpenScoring) -> dict[str, float]:
        pad = collator(each.data.task, each.model.tokenizer)
        rows = each.data.test
        return evaluate_model(model, rows, each.data.task, pad, batch_size=request.batch_size, fields=RECIPE_FIELDS)

    result: dict[str, Any] = {"path": opened.model.path, "of": of, "metrics": metrics(opened)}
    if task == "mnli":
        try:
            result["mismatched"] = metrics(_open(opened.model.path, MISMATCHED.name, path, request))
        except InputError as error:
            if not error.field.startswith("data"):  # else the data have no such part, which the average says
                raise
    return result


def _read(folder: Path) -> dict[str, Any]:
    """The results of an earlier start."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8"))["tasks"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
