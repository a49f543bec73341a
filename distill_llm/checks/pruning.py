"""Checks of the pruning section against the model to prune and the files to write."""

import math
from dataclasses import replace

from transformers import PreTrainedModel

from distill_llm.architectures.families import FAMILIES, NotPrunable, family_of
from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.common.outputs import usable_statistics
from distill_llm.losses.items import kind_of_class
from distill_llm.models.finding import OpenModel
from distill_llm.pruning.planning.budgets import least_share
from distill_llm.pruning.units.refusals import first_layer_faults, quantized_faults, step_faults, width_faults
from distill_llm.pruning.units.sizes import counts_of, hidden_size
from distill_llm.recipe.recipe import Recipe, budget_batch


def check_pruning(recipe: Recipe, teacher: OpenModel, skeleton: PreTrainedModel) -> None:
    """Check that a recipe's pruning section fits its teacher.

    Args:
        skeleton: the teacher without its head, on the meta device.

    Raises:
        InputError: for the first fault.
    """
    if recipe.pruning is None:
        return
    config, pruning = teacher.config, recipe.pruning
    try:
        family_of(config)
    except NotPrunable as error:
        given, accepted = f"{teacher.name} (family {config.model_type})", error.accepted
        if config.model_type not in FAMILIES and config.get_text_config().model_type not in FAMILIES:
            accepted = f"{one_of(FAMILIES, config.model_type)}; to add one, write a row in FAMILIES (architectures/families.py)"
        raise InputError(teacher.field, given, accepted) from None
    raise_all(quantized_faults(config, teacher.field, f"{teacher.name}, quantized"))
    if pruning.layers is not None and max(pruning.layers) >= config.num_hidden_layers:
        raise InputError("pruning.layers", pruning.layers, f"indices from 0 to {config.num_hidden_layers - 1}")
    if pruning.statistics is not None:
        file = pruning.statistics.expanduser()
        usable_statistics(file, "pruning.statistics")
        if file.resolve().is_relative_to(
            recipe.output_dir.resolve()
        ):  # `prune` replaces it, `run` has files of its own
            raise InputError("pruning.statistics", str(file), f"a file outside the output folder {recipe.output_dir}")
    faults = width_faults(config, pruning.units, "pruning.units", pruning.units, teacher.name)
    if pruning.layers is not None:
        faults += first_layer_faults(config, pruning.layers, "pruning.layers", teacher.name)
    raise_all(faults)
    counts = counts_of(skeleton)
    raise_all(step_faults(counts, hidden_size(skeleton), pruning.units, pruning.round_to, "pruning.round_to"))
    heads, neurons = (max(each[kind] for each in counts) for kind in ("heads", "neurons"))
    for name, most, what in (
        ("min_heads", heads, "heads (KV groups)"),
        ("min_neurons", neurons, "FFN neurons"),
    ):
        if (value := getattr(pruning, name)) > most:
            raise InputError(f"pruning.{name}", value, f"at most {most}, the number of {what} in a layer")
    if pruning.keep is not None and pruning.cost != "latency":
        decoder = "next_token" in map(kind_of_class, config.architectures or ())
        rules = replace(pruning.rules, anchored=family_of(config).anchored)
        least = least_share(skeleton, rules, pruning.cost, *budget_batch(recipe, decoder))
        if pruning.keep < least * (1 - 1e-9):
            shown = math.ceil(least * 1e4) / 1e4
            accepted = f"at least {shown:g}, the smallest share that units [{', '.join(pruning.units)}] can reach"
            raise InputError("pruning.keep", pruning.keep, accepted)
