"""What the student of a run learns from: its teacher, the teacher's cached outputs, or several models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.checks.server import classes_of, endpoint_of
from distill_llm.data.padding import Collator
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import OpenModel
from distill_llm.models.quantized import load_teacher
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.prices import precision_of
from distill_llm.pipeline.train_model import Fields
from distill_llm.recipe.ensemble import EnsembleSection
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.by_row import ByRow
from distill_llm.teachers.ensemble import Ensemble
from distill_llm.teachers.mixing_weights import HeldOut, learn_weights
from distill_llm.teachers.served import ServedTeacher
from distill_llm.teachers.shelf import ShelvedTeacher

WEIGHTS = "ensemble"
"""The stage whose result has weights that were learnt on held-out rows."""

Load = Callable[[Path | str, bool], PreTrainedModel]
"""Loads a model by its path, and whether its code is trusted."""


def served_teacher(run: Context) -> ServedTeacher:
    """The recipe's served teacher."""
    section = run.recipe.teacher
    assert section.server is not None
    endpoint, asking = endpoint_of(section.server, section.model)
    return ServedTeacher(endpoint, run.tokenizer, asking, classes_of(run.opened.teacher))


def loader(run: Context, fields: Fields) -> Load:
    """Loads teachers as the recipe has them held."""
    section, precision = run.recipe.teacher, precision_of(run.recipe.training(fields))

    def load(path: Path | str, code: bool) -> PreTrainedModel:
        if section.quantization is None:
            dtype = getattr(torch, section.dtype) if section.dtype else precision or torch.float32
            return load_pretrained(path, code, dtype=dtype)
        dtype = getattr(torch, section.dtype or "bfloat16")
        return load_teacher(path, section.quantization, dtype, run.processes.device, code)

    return load


def trusted(others: Sequence[OpenModel]) -> list[tuple[str, bool]]:
    """Path of each further teacher, and that no code of its own may run."""
    return [(other.path, False) for other in others]


def several(
    section: EnsembleSection,
    paths: Sequence[tuple[Path | str, bool]],
    load: Load,
    weights: Sequence[float] | None,
    folder: Path,
) -> PreTrainedModel | Teacher:
    """The teachers of an ensemble, loaded one after the other. Those whose learnt weight is 0 are left out.

    Args:
        paths: of all its models, and whether their code is trusted.
        load: loads one of them.
        weights: that were learnt; None: those of the section.
        folder: for weights that wait in files.
    """

    def member(path: Path | str, code: bool) -> PreTrainedModel | ShelvedTeacher:
        model = load(path, code)
        return ShelvedTeacher(model, folder) if section.one_at_a_time else model

    if section.by_row:
        return ByRow([member(*each) for each in paths])
    shares = section.weights if weights is None else weights
    taken = [number for number, share in enumerate(shares) if share or not number]  # layers are those of the first
    members = [member(*paths[number]) for number in taken]
    if len(members) == 1:
        return members[0]
    return Ensemble(members, [shares[number] for number in taken], section.average, section.confidence)


def learnt(run: Context, results: Mapping[str, Mapping[str, Any]]) -> list[float] | None:
    """The weights that were learnt for the recipe's ensemble; None: those of the recipe hold."""
    section = run.recipe.teacher.ensemble
    if section is None or not section.learn_weights:
        return None
    if run.opened.cache is not None:
        return list(run.opened.cache.index.weights or ()) or None
    return list(results[WEIGHTS]["weights"])


@dataclass(frozen=True)
class HeldOutRows:
    """Encoded rows with labels, that weights are learnt on.

    Attributes:
        names: of the classes, in the order of the labels.
    """

    rows: Dataset | None
    collator: Collator
    batch_size: int
    device: torch.device
    tokenizer: Any = None
    names: Sequence[str] | None = None

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Padded batches on the device, the same each time."""
        assert self.rows is not None, "checked at the door"
        for start in range(0, len(self.rows), self.batch_size):
            some = self.rows[start : start + self.batch_size]
            features = [dict(zip(some, values, strict=True)) for values in zip(*some.values(), strict=True)]
            yield {name: each.to(self.device) for name, each in self.collator(features).items()}


def learn(
    section: EnsembleSection, paths: Sequence[tuple[Path | str, bool]], load: Load, held: HeldOutRows, folder: Path
) -> HeldOut:
    """The weights of an ensemble by held-out rows; arguments as of `several`."""
    teacher = several(section, paths, load, [1.0] * len(paths), folder)
    assert isinstance(teacher, Ensemble)
    teacher.agree(held.tokenizer, held.names)
    teacher.place(held.device)
    return learn_weights(teacher, held.batches)


def record(found: HeldOut) -> dict[str, Any]:
    """What held-out rows say, as plain JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()}
