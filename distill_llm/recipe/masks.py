"""The section `pruning.masks`: masks over heads and neurons that are learnt before the student is cut."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from distill_llm.common.errors import InputError
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import DistillationSection, StudentSection, training_fields
from distill_llm.recipe.teacher import TeacherSection

if TYPE_CHECKING:
    from distill_llm.recipe.pruning import PruningSection

MASKED = ("heads", "neurons")
BLOCKS = {"attention": "heads", "ffn": "neurons"}
"""Blocks that may have a gate of their own, and whose units must have one too."""
IN_TRAINING = "masks are learnt in a training, which ranks the units in place of a criterion"
ONE_CUT = "with masks the student is cut once; `masks.warm_up` says how slowly the share falls"
UNUSED = {
    "criterion": IN_TRAINING,
    "layer_criterion": IN_TRAINING,
    "statistics": IN_TRAINING,
    "search": "the plan is made of the learnt masks, and no other is searched",
    "rounds": ONE_CUT,
    "cuts": ONE_CUT,
    "layers": "masks are learnt for heads and neurons, down to the share in `keep`",
}
"""Fields of the pruning section that say nothing where masks are learnt, and why."""
CALIBRATING = {
    "loss": "it is the loss whose gradients the calibration pass takes",
    "calibration": "it says where the rows of the calibration pass come from",
    "calibration_examples": "it says how many rows the calibration pass reads",
    "moment_share": "it says what compensation is fitted to in the calibration pass",
    "precision": "it is the precision of the calibration pass",
    "checkpointing": "it saves memory in the calibration pass",
}
"""Fields of the calibration pass, which only single weights (`weights`) need beside masks."""


class MasksSection(Section):
    """Learn which units stay, together with the weights and with the losses of `distillation`; then cut."""

    by: Literal["l0", "movement"] = Field(
        default="l0",
        description="l0: hard-concrete gates, with multipliers that hold the expected cost to the target; attention and ffn in"
        " `units` add a gate for each whole block. movement: scores, of which the best are kept",
    )
    warm_up: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the steps in which the target falls from 1 to `keep`: in a straight line, by movement as a cube",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="of the masks; left out: 0.1 by l0, 0.01 by movement"
    )
    train: dict[str, Any] = Field(
        default_factory=dict,
        description="TrainingArguments fields of this training that differ from those of `distillation`",
    )

    _check_train = field_validator("train")(training_fields)


def masked_pruning_faults(pruning: "PruningSection", defaults: Mapping[str, Any]) -> list[InputError]:
    """Faults of other fields of a pruning section that learns masks, named within it.

    Args:
        defaults: of the section's fields.
    """
    section = pruning.masks
    if section is None:
        return []
    faults = []
    if pruning.keep is None or pruning.keep == 1:
        faults.append(InputError("keep", pruning.keep, "a number below 1: masks are learnt for a share to keep"))
    unused = UNUSED
    if pruning.weights is None:
        without = "masks learn from the training rows without such a pass; only `weights` would need it"
        unused = unused | {name: f"{what}, and {without}" for name, what in CALIBRATING.items()}
    for name, why in unused.items():
        if getattr(pruning, name) != defaults[name]:
            shown = pruning.model_dump(mode="json", include={name})[name]
            faults.append(InputError(name, shown, fix=f"leave it out: {why}"))
    others = [unit for unit in pruning.units if unit not in (*MASKED, *BLOCKS)]
    blocks = [unit for unit in pruning.units if unit in BLOCKS]
    if others:
        faults.append(InputError("units", others, "heads, neurons, attention and ffn: these have masks"))
    elif section.by == "movement" and blocks:
        fix = f"leave {' and '.join(blocks)} out: by movement a block goes when all its units do; or set masks.by to l0"
        faults.append(InputError("units", pruning.units, fix=fix))
    elif alone := [unit for unit in blocks if BLOCKS[unit] not in pruning.units]:
        fix = f"add {' and '.join(BLOCKS[unit] for unit in alone)}: a block's gate is one beside those of its units"
        faults.append(InputError("units", pruning.units, fix=fix))
    if pruning.scope == "local" or pruning.uniform:
        name = "uniform" if pruning.uniform else "scope"
        faults.append(InputError(name, getattr(pruning, name), fix="leave it out: masks compete over all layers"))
    if pruning.cost == "latency":
        faults.append(
            InputError("cost", "latency", fix="choose params, flops or memory: masks need the cost of a unit")
        )
    if pruning.compensate == "in_order":
        faults.append(InputError("compensate", "in_order", fix="leave it out: nothing is compensated after masks"))
    if pruning.offload:
        faults.append(InputError("offload", True, fix="leave it out: no calibration pass is run with masks"))
    return faults


def mask_recipe_faults(
    pruning: "PruningSection | None",
    teacher: TeacherSection,
    student: StudentSection | None,
    distillation: DistillationSection | None,
    data: Any,
) -> list[InputError]:
    """What of a recipe's other sections does not go with learnt masks."""
    if pruning is None or pruning.masks is None:
        return []
    given, faults = pruning.masks.model_dump(mode="json"), []
    if distillation is None:
        fix = "add a distillation section, whose losses they learn with, or remove it"
        faults.append(InputError("pruning.masks", given, fix=fix))
    if student is not None and student.peft is not None:
        faults.append(InputError("student.peft", student.peft, fix="remove it, or pruning.masks: all weights learn"))
    others: Sequence[str] = ("peers", "moving_average", "checkpoints", "assistant")
    for name in (each for each in others if getattr(teacher, each) is not None):
        fix = f"remove it, or teacher.{name}: masks are learnt from the teacher itself"
        faults.append(InputError("pruning.masks", given, fix=fix))
    if data.synthetic is not None and data.synthetic.generator is not None:
        fix = "remove it, or data.synthetic.generator: masks are learnt on rows that are there"
        faults.append(InputError("pruning.masks", given, fix=fix))
    return faults
