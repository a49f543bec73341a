"""Checks on models without weights: adapters, the signals that losses compare, room on the disk."""

import copy
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from distill_llm.architectures.configuration_pruned import stock_config_class
from distill_llm.architectures.families import FAMILIES, dims_of, layers_of
from distill_llm.architectures.lineage import lineage_of
from distill_llm.architectures.modeling_pruned import pruned_class
from distill_llm.common.errors import InputError, first_line, raise_all
from distill_llm.common.outputs import nearest
from distill_llm.data.tasks import Task
from distill_llm.losses.mapping import cut_from, unequal_widths
from distill_llm.losses.objective import Objective
from distill_llm.losses.signals import Wanted
from distill_llm.losses.terms.term import Use
from distill_llm.models.adapters import without_adapters
from distill_llm.models.capture import Recorder
from distill_llm.models.configs import unloadable
from distill_llm.models.finding import OpenModel
from distill_llm.models.quantized import quantization_faults
from distill_llm.pruning.units.sizes import second_moment_bytes
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import Recipe
from distill_llm.training.refusals import tied_adapter_faults
from distill_llm.training.terms import Terms, wanted_by


def skeleton(model: OpenModel, task: Task | None = None) -> PreTrainedModel:
    """The model on the meta device, so with modules and sizes but no weights; with the head for a task, or without a head.

    Raises:
        InputError: the family has no head for the task.
    """
    auto: Any = AutoModel if task is None else task.kind.auto
    config_class = stock_config_class(type(model.config))
    stock: Any = auto._model_mapping.get(config_class, None)
    if stock is None and not (
        model.trust_remote_code and auto.__name__ in (getattr(model.config, "auto_map", None) or {})
    ):
        kind = "transformers" if task is None else task.kind.name
        raise InputError(model.field, f"{model.name} ({model.config.model_type})", f"a family with a model for {kind}")
    with torch.device("meta"), _buildable(model):
        if type(model.config) is config_class:
            return auto.from_config(model.config, trust_remote_code=model.trust_remote_code)  # type: ignore[no-any-return]
        return pruned_class(stock)(model.config)


@contextmanager
def _buildable(model: OpenModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each class raises its own kinds where a config makes no sense
        raise unloadable(model.field, model.name, error) from error


def adapted(recipe: Recipe, student: PreTrainedModel) -> nn.Module:
    """The student as it will train; if only adapters learn, a copy with the adapters.

    Raises:
        InputError: peft is not installed, or the adapters do not fit the student, or change weights that two modules share.
    """
    fields = recipe.student.peft if recipe.student else None
    if fields is None:
        return student
    if find_spec("peft") is None:
        fix = "install peft (pip install 'distill_llm[peft]'), or remove this field"
        raise InputError("student.peft", fields, fix=fix)
    from peft import LoraConfig, get_peft_model

    try:
        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(copy.deepcopy(student), LoraConfig(**fields))
    except Exception as error:
        raise InputError("student.peft", fields, f"adapters that fit the model ({first_line(error)})") from None
    raise_all(tied_adapter_faults(model, "student.peft.target_modules"))
    return model


def check_quantized(recipe: Recipe, student: OpenModel | None = None) -> None:
    """Check that models which are to be held in fewer bits can be, and that none is to learn whose weights are rounded."""
    held = {"teacher": recipe.teacher.quantization, "student": recipe.student.quantization if recipe.student else None}
    faults = [fault for side in held for fault in quantization_faults(held[side], f"{side}.quantization")]
    alone = student is not None and recipe.student is not None and recipe.student.peft is None
    if student is not None and alone and getattr(student.config, "quantization_config", None):
        fix = "use its full-precision original: rounded weights cannot learn"
        faults.append(InputError(student.field, f"{student.name}, quantized", fix=fix))
    raise_all(faults)


def check_signals(recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Check that the attention which losses compare can be recorded in both models, and divided into relation heads.

    Args:
        student: the student of the recipe; not used if pruning makes the student.

    Raises:
        InputError: the one that the first training step would raise.
    """
    losses = recipe.distillation.losses if recipe.distillation else None
    if losses is None or not losses.looks_inside:
        return
    inside = losses.only(losses.looks_inside)
    try:
        if recipe.pruning is not None:
            faults = _faults_of_any_cut(inside, teacher, recipe.pruning)
        else:
            terms = Terms(inside, student, teacher)
            seen = {
                side: _widths(model, terms.wanted(side)) for side, model in (("student", student), ("teacher", teacher))
            }
            faults = []
            for name, pairs in terms.pairs.items():
                for pair in pairs:
                    both = seen["student"].get(pair.student, set()) | seen["teacher"].get(pair.teacher, set())
                    faults += inside.only([name]).faults(Use(vector_widths=frozenset(both)))
    except InputError as error:
        raise error.renamed(f"distillation.{error.field}") from None
    for fault in faults:
        raise fault.renamed(f"distillation.{fault.field}")


def _faults_of_any_cut(losses: Objective, teacher: PreTrainedModel, pruning: PruningSection) -> list[InputError]:
    """Faults of losses that look inside layers, for any choice of the teacher's layers and heads that pruning may make."""
    lineage = lineage_of(teacher)
    layers = tuple(i for i in range(len(layers_of(teacher))) if lineage is None or lineage.layers[i].heads)
    widths = _widths(teacher, wanted_by(losses, dict.fromkeys(losses.terms(), layers)))
    moving = pruning.keep is not None and not {"heads", "queries"}.isdisjoint(pruning.units)
    size = dims_of(teacher.config).head_size if moving and teacher.config.model_type in FAMILIES else None
    return losses.faults(Use(vector_widths=frozenset().union(*widths.values()), head_size=size))


def _widths(model: PreTrainedModel, wanted: Wanted) -> dict[int, set[int]]:
    """The widths of all heads' queries and keys by layer, in a forward without numbers; of a family that has none such, nothing.

    Raises:
        InputError: a layer's attention cannot be seen, or not its probabilities.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), Recorder(model, wanted).recording() as found:
            model.base_model(inputs_embeds=model.get_input_embeddings()(tokens))
    except InputError:
        raise
    except Exception:  # a forward that needs values; the first training step will show
        return {}
    return {index: {each.shape[1] * each.shape[3] for each in vectors[:2]} for index, vectors in found.vectors.items()}


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes on the disk, generously: a pruned student counts as large as its teacher.

    Attributes:
        teacher: that is trained in the run.
        students: of all rounds, and the finished one.
        statistics: of all rounds.
        checkpoints: of the training with the largest ones, while it lasts.
    """

    teacher: int = 0
    students: int = 0
    statistics: int = 0
    checkpoints: int = 0

    @property
    def total(self) -> int:
        """All of it together."""
        return self.teacher + self.students + self.statistics + self.checkpoints


def check_disk(recipe: Recipe, teacher: PreTrainedModel, student: nn.Module) -> Disk:
    """Check that the run's models and checkpoints fit on the disk.

    Args:
        teacher, student: without weights; the student as it will train.

    Raises:
        InputError: the disk is too small.
    """
    own, learned = _size(without_adapters(student)), _size(student, learned=True)
    training, trained = [0], 0  # a Trainer checkpoint holds the trained weights and two moments of each
    rounds = recipe.pruning.rounds if recipe.pruning is not None else 1
    students, statistics = own, 0
    if recipe.teacher.train is not None:
        kept = recipe.teacher.checkpoints
        trained = _size(teacher)
        training.append(3 * trained)
        trained *= kept if isinstance(kept, int) else 1
    if recipe.distillation is not None:
        again = recipe.distillation.generations.count - 1 if recipe.distillation.generations else 0
        peers = recipe.teacher.peers.others if recipe.teacher.peers else []
        students += (rounds + again + 2 * len(peers)) * own
        training.append(3 * learned * (1 + len(peers)))
    if recipe.quantize is not None:
        students += own + (own if recipe.quantize.train is not None else 0)
    if (section := recipe.pruning) is not None:
        students += rounds * own + (own if section.masks is not None else 0)
        if section.folds and teacher.config.model_type in FAMILIES:  # otherwise there is a fault already
            statistics = rounds * second_moment_bytes(teacher, section.holds_moments, "hidden" in section.units)
    needed = Disk(trained, students, statistics, 2 * max(training))
    check_room(recipe.output_dir, needed.total)
    return needed


def check_room(folder: Path, needed: int) -> None:
    """Check that a folder's disk has so many bytes left.

    Raises:
        InputError: it has not.
    """
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise InputError(
            "output_dir",
            f"{folder} with {free / 1e9:.1f} GB free",
            fix=f"free some space, or choose another disk: about {needed / 1e9:.1f} GB are needed",
        )


def _size(model: nn.Module, learned: bool = False) -> int:
    """Bytes of a model's weights in fp32; with `learned`, only of the weights that are trained."""
    return 4 * sum(each.numel() for each in model.parameters() if each.requires_grad or not learned)


def projected(student: OpenModel | None, teacher: OpenModel | None) -> tuple[int, int] | None:
    """The widths of a given student and its teacher, if its hidden states need a projection."""
    return None if student is None or teacher is None else unequal_widths(student.config, teacher.config)


def check_layer_pairs(recipe: Recipe, teacher: OpenModel, student: OpenModel) -> bool:
    """Check that the layers which loss terms name exist. If pruning makes the student, `student` is the teacher."""
    if recipe.distillation is None:
        return True
    teachers, students = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if recipe.pruning is not None and recipe.pruning.layers is not None:
        students = len(recipe.pruning.layers)
    cut = recipe.pruning is not None or cut_from(student.config, teacher.config)
    compared = [teachers, students] if recipe.distillation.generations else [teachers]  # each with the one before
    for layers in compared:
        use = Use(layers=(students, layers), cut=cut)
        raise_all(recipe.distillation.losses.faults(use, "distillation.losses"))
    return True
