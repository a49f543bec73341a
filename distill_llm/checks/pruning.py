"""Checks of the pruning section against the model to prune and the files to write."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.families import FAMILIES, NotPrunable, family_of
from distill_llm.checks.faults import Collector
from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.common.outputs import usable_statistics
from distill_llm.losses.items import kind_of_class
from distill_llm.models.exits import exits_to_prune
from distill_llm.models.finding import OpenModel
from distill_llm.models.masks import masks_in
from distill_llm.pruning.learning.units import mask_faults
from distill_llm.pruning.planning.budgets import least_share
from distill_llm.pruning.units.refusals import (
    first_layer_faults,
    in_order_faults,
    quantized_faults,
    step_faults,
    width_faults,
)
from distill_llm.pruning.units.sizes import counts_of, head_size_of, hidden_size
from distill_llm.pruning.weights.sparsify import weight_faults
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import Recipe, budget_batch


def check_pruning(recipe: Recipe, teacher: OpenModel, skeleton: PreTrainedModel) -> None:
    """Check that a recipe's pruning section fits its teacher.

    Args:
        skeleton: the teacher without its head, on the meta device.

    Raises:
        InputError: one line per fault; of a model that cannot be pruned one alone.
    """
    if recipe.pruning is None:
        return
    config, pruning = teacher.config, recipe.pruning
    raise_all(exits_to_prune(config, teacher.field, teacher.name))
    try:
        family_of(config)
    except NotPrunable as error:
        given, accepted = f"{teacher.name} (family {config.model_type})", error.accepted
        if config.model_type not in FAMILIES and config.get_text_config().model_type not in FAMILIES:
            accepted = f"{one_of(FAMILIES, config.model_type)}; to add one, write a row in FAMILIES (architectures/families.py)"
        raise InputError(teacher.field, given, accepted) from None
    found = Collector()
    found.ask(quantized_faults, config, teacher.field, f"{teacher.name}, quantized")
    if pruning.layers is not None:
        found.ask(_layer_faults, config, pruning.layers, teacher.name)
    if pruning.statistics is not None:
        found.run(_check_statistics, pruning.statistics.expanduser(), recipe.output_dir)
    found.ask(width_faults, config, pruning.units, "pruning.units", pruning.units, teacher.name)
    if pruning.compensate == "in_order":
        found.ask(in_order_faults, config, "hidden" in pruning.units, "pruning.compensate")
    if pruning.masks is not None:
        found.ask(mask_faults, skeleton, pruning.units, "pruning.masks", pruning.masks.by, teacher.name)
    counts = counts_of(skeleton)
    found.ask(step_faults, counts, hidden_size(skeleton), pruning.units, pruning.round_to, "pruning.round_to")
    found.ask(_limit_faults, pruning, counts)
    if pruning.weights is not None:
        found.ask(_weight_faults, pruning, skeleton)
    raise_all(found.faults)  # the least share is that of settings without a fault
    raise_all(_share_faults(recipe, config, skeleton))


def _layer_faults(config: PreTrainedConfig, layers: list[int], name: str) -> list[InputError]:
    """Faults of the layers to keep: one that the model lacks, or a first one that must stay."""
    if max(layers) >= config.num_hidden_layers:
        return [InputError("pruning.layers", layers, f"indices from 0 to {config.num_hidden_layers - 1}")]
    return first_layer_faults(config, layers, "pruning.layers", name)


def _check_statistics(file: Path, output_dir: Path) -> None:
    usable_statistics(file, "pruning.statistics")
    if file.resolve().is_relative_to(output_dir.resolve()):  # `prune` replaces it, `run` has files of its own
        raise InputError("pruning.statistics", str(file), f"a file outside the output folder {output_dir}")


def _weight_faults(pruning: PruningSection, skeleton: PreTrainedModel) -> list[InputError]:
    """Faults of single weights: a criterion that does not fit, or groups N:M that inputs of a linear may not divide into."""
    assert pruning.weights is not None
    rules = pruning.weights.rules
    faults = [fault.renamed(f"pruning.weights.{fault.field}") for fault in weight_faults(skeleton, rules)]
    if rules.groups is None or pruning.keep in (None, 1):
        return faults
    size, steps = rules.groups[1], sorted({"neurons", "hidden"} & set(pruning.units))
    if steps and pruning.round_to % size:
        fix = f"set it to a multiple of {size}: {rules.pattern} needs groups of so many {' and '.join(steps)}"
        faults.append(InputError("pruning.round_to", pruning.round_to, fix=fix))
    head, counts = head_size_of(skeleton), counts_of(skeleton)
    channels = {
        "queries": {head},
        "heads": {head * each["queries"] // each["heads"] for each in counts if each["heads"]},
    }
    for unit in [unit for unit in pruning.units if any(each % size for each in channels.get(unit, ()))]:
        odd = min(each for each in channels[unit] if each % size)
        fix = (
            f"leave {unit} out: of this model one takes {odd} inputs of a linear with it, which are no groups of {size}"
        )
        faults.append(InputError("pruning.units", pruning.units, fix=fix))
    return faults


def sparse_student_faults(recipe: Recipe, student: OpenModel | None) -> list[InputError]:
    """A fault of adapters on a given student that is sparse."""
    peft = recipe.student.peft if recipe.student is not None else None
    if student is None or peft is None or masks_in(student.path) is None:
        return []
    fix = f"remove it: adapters that are merged would fill the zeros of {student.name}"
    return [InputError("student.peft", peft, fix=fix)]


def _limit_faults(pruning: PruningSection, counts: Sequence[Mapping[str, int]]) -> list[InputError]:
    """Faults of limits that are higher than what any layer has."""
    faults = []
    for kind, what in (("heads", "heads (KV groups)"), ("neurons", "FFN neurons")):
        name, most = f"min_{kind}", max(each[kind] for each in counts)
        if (value := getattr(pruning, name)) > most:
            faults.append(InputError(f"pruning.{name}", value, f"at most {most}, the number of {what} in a layer"))
    return faults


def _share_faults(recipe: Recipe, config: PreTrainedConfig, skeleton: PreTrainedModel) -> list[InputError]:
    """A fault of a share that is smaller than what the units can reach."""
    pruning = recipe.pruning
    if pruning is None or pruning.keep is None or pruning.cost == "latency":
        return []
    decoder = "next_token" in map(kind_of_class, config.architectures or ())
    rules = replace(pruning.rules, anchored=family_of(config).anchored)
    least = least_share(skeleton, rules, pruning.cost, *budget_batch(recipe, decoder))
    if pruning.keep >= least * (1 - 1e-9):
        return []
    shown = math.ceil(least * 1e4) / 1e4
    accepted = f"at least {shown:g}, the smallest share that units [{', '.join(pruning.units)}] can reach"
    return [InputError("pruning.keep", pruning.keep, accepted)]
