"""Calibration rows from several sources: read, encoded as far as they are needed, and counted before any work."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedConfig

from distill_llm.checks.data import open_rows
from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.data.encoding import encode
from distill_llm.data.kinds.classification import SHOWN, OneClass
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import Task, TaskData
from distill_llm.models.finding import OpenModel, check_tokens
from distill_llm.recipe.calibration import counts_of, with_held_out
from distill_llm.recipe.recipe import Recipe

FIELD = "pruning.calibration"


@dataclass(frozen=True)
class MixedRows:
    """Encoded rows of several sources, and how many of each a cut gets."""

    sources: tuple[tuple[Dataset, int], ...]

    def of_cut(self, number: int) -> Dataset:
        """The rows of a cut: of each source those after the cut before, then the first ones again."""
        return concatenate_datasets(
            [
                rows.select([(number * count + i) % len(rows) for i in range(count)])
                for rows, count in self.sources
                if count
            ]
        )


def open_calibration(recipe: Recipe, spec: DataSpec, data: TaskData, reader: OpenModel) -> MixedRows | None:
    """Open the sources of a recipe's calibration rows; None where it names none.

    Args:
        spec: of the recipe's data.
        data: the recipe's raw rows.
        reader: the model whose tokens the rows have.

    Raises:
        InputError: a source that cannot be read, that has other classes than the training rows, or that has fewer rows than its
            share asks for; a share of no row.
    """
    section = recipe.pruning
    if section is None or section.calibration is None:
        return None
    if recipe.data.synthetic is not None:
        fix = "leave it out: rows of the task synthetic are made by the models, calibration rows too"
        raise InputError(FIELD, [each.path for each in section.calibration], fix=fix)
    counts = counts_of([each.share for each in section.calibration], with_held_out(section.calibration_examples))
    found, faults = [], []
    for number, (source, count) in enumerate(zip(section.calibration, counts, strict=True)):
        own, raw = f"{FIELD}.{number}", data
        try:
            if source.path is not None:
                columns = source.columns.model_dump(exclude_none=True) if source.columns else spec.columns
                config = _with_classes(reader.config, data.task)
                raw = _opened(replace(_whole(spec), path=source.path, columns=columns), config, data.task)
            rows = _encoded(raw, reader, spec, count * section.cuts)
        except InputError as error:
            faults += [_of_source(each, own, source.path) for each in faults_in(error)]
            continue
        if not count:
            due = sum(counts)
            fix = f"raise it, or pruning.calibration_examples: of {due} rows none is from there"
            faults.append(InputError(f"{own}.share", source.share, fix=fix))
        if len(rows) < count:
            fix = f"lower it, or pruning.calibration_examples: {count} rows are due from there, which has {len(rows)}"
            faults.append(InputError(f"{own}.share", source.share, fix=fix))
        found.append((rows, count))
    raise_all(faults)
    return MixedRows(tuple(found))


def _with_classes(config: PreTrainedConfig, task: Task) -> PreTrainedConfig:
    """The config with the classes of a task, so that those of a source get the same ids by their names."""
    if task.label_names:
        config = copy.copy(config)
        config.id2label = dict(enumerate(task.label_names))
    return config


def _opened(spec: DataSpec, config: PreTrainedConfig, of_data: Task) -> TaskData:
    """The rows of a source. InputError where it has not the classes of the recipe's data: its labels would be of others."""
    try:
        raw = open_rows(spec, config)
        found: tuple[str, ...] | None = raw.task.label_names
    except OneClass as error:
        found = error.names
    if found == of_data.label_names:
        return raw
    given = f"{_listed(found)}{' alone' if len(found or ()) == 1 else ''} in {spec.path}"
    accepted = f"rows of each class of the training rows, and of no other: {_listed(of_data.label_names)}"
    raise InputError("data.columns.label", given, accepted)


def _listed(names: Sequence[str] | None) -> str:
    names = names or ["no class"]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _of_source(fault: InputError, own: str, path: str | None) -> InputError:
    """A fault of the data section's fields under the names of a source's."""
    if fault.field.startswith(("data.path", "data.columns")):
        return fault.renamed(fault.field.replace("data", own, 1))
    return InputError(f"{own}.path", path, f"rows that can be read ({fault})")


def _whole(spec: DataSpec) -> DataSpec:
    """All rows of a source: the numbers of the data section are not of it."""
    return replace(spec, train_examples=None, holdout_examples=0, test_examples=None)


def _encoded(raw: TaskData, reader: OpenModel, spec: DataSpec, count: int) -> Dataset:
    """Up to so many encoded training rows, drawn with the seed. No more is encoded than is needed, since files may be long."""
    drawn, read = raw.train.shuffle(seed=spec.seed), max(count, 1)
    while True:
        part = drawn.select(range(min(read, len(drawn))))
        rows = encode(TaskData(raw.task, part, None, part), reader.tokenizer, spec.max_length)
        if len(rows.train) >= count or read >= len(drawn):
            break
        read *= 2
    kept = rows.train.select(range(min(count, len(rows.train))))
    return check_tokens(TaskData(raw.task, kept, None, kept), reader, FIELD).train
