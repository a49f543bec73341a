"""The pruning section: its fields, and which of them go together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.pruning.criteria import CRITERIA, Need, find_criterion, ranks_layers_only
from distill_llm.pruning.names import competing_faults, find_unit
from distill_llm.pruning.planning.rules import Limits, PlanningRules
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.recipe.section import Section


def _known_criterion(given: Any) -> str:
    return find_criterion(str(given), field="").name


def _known_unit(given: Any) -> str:
    return find_unit(str(given), field="").name


Criterion = Annotated[str, BeforeValidator(_known_criterion)]
"""The name of a registered criterion: one of the package's or of a module of the user's."""
Unit = Annotated[str, BeforeValidator(_known_unit)]
"""The name of a kind in the table of units, likewise."""


class PruningSection(Section):
    """What to remove, and how to choose it."""

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the transformer layers' cost that remains; of the whole model's with cost latency",
    )
    rounds: int = Field(default=1, ge=1, description="times to prune and recover until `keep` is reached")
    schedule: Literal["linear", "cubic"] = Field(
        default="cubic", description="how the kept share falls over the rounds"
    )
    cuts: int = Field(
        default=1,
        ge=1,
        description="small cuts that a round's removal is done in, each keeping the same part of what it finds, importance"
        " measured anew before each on rows of its own, no training between",
    )
    units: list[Unit] = Field(
        default=["heads", "neurons"],
        min_length=1,
        description="what may be removed: heads (KV groups), queries of every group, FFN neurons, whole layers, the attention"
        " or ffn of a layer, hidden (channels of the residual stream)",
    )
    criterion: Criterion = Field(
        default="fisher", description=f"how the importance of a unit is measured: {', '.join(CRITERIA)}"
    )
    layer_criterion: Criterion | None = Field(
        default=None,
        description="how that of whole layers is measured, where `units` has them beside others; left out: by `criterion`",
    )
    loss: Literal["labels", "kl"] | None = Field(
        default=None,
        description="what gradients are taken of: the task's labels, or kl, the model's own predictions; left out: labels"
        " where the rows have them",
    )
    cost: Literal["params", "flops", "memory", "latency"] = Field(
        default="params",
        description="what `keep` is a share of; memory counts a decoder's keys and values too; latency is measured on this"
        " device; both for the batch of evaluation.latency",
    )
    scope: Literal["global", "local"] = Field(
        default="global", description="rank units over all layers, or in each layer"
    )
    round_to: int = Field(
        default=1, ge=1, description="kept FFN neurons of a layer, and channels (hidden), are a multiple of this"
    )
    uniform: bool = Field(
        default=False,
        description="the same number of heads and of neurons in every layer, such as plain transformers can load where the budget"
        " allows",
    )
    min_heads: int = Field(default=0, ge=0, description="heads (KV groups) that every remaining layer keeps at least")
    min_neurons: int = Field(default=0, ge=0, description="FFN neurons that every remaining layer keeps at least")
    compensate: bool = Field(
        default=True,
        description="fold what removed units contributed into the kept columns, and what removed layers added into the FFN"
        " before them",
    )
    calibration_examples: int = Field(
        default=1024,
        ge=1,
        description="training rows that importance is measured on; with several cuts, of each: other rows while there are"
        " any, then the first ones again",
    )
    moment_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the calibration tokens, drawn at random, that compensation is fitted to (removed layers: always"
        " all); left out: all until"
        " there are half as many as a layer has neurons, then one in four; 1 takes half a forward pass more",
    )
    moment_layers: int | None = Field(
        default=None,
        ge=1,
        description="layers whose second moments are held at a time, with a calibration pass for each so many, where those of all"
        " do not fit: about 1 GB a layer of an 8B model; left out: all in the pass that measures importance, kept in its file"
        " (what takes over removed layers has moments of its own, as large, all at once)",
    )
    precision: Literal["bfloat16"] | None = Field(
        default=None, description="run the calibration passes under autocast in this precision; sums stay in float32"
    )
    offload: bool = Field(
        default=False,
        description="hold what is pruned in main memory and bring one layer at a time to the GPU for calibration, for models of"
        " which not even the float32 weights fit there; goes with checkpointing",
    )
    checkpointing: bool = Field(
        default=False,
        description="hold one layer's activations at a time in calibration, for models of which all do not fit, for about"
        " one more forward pass in time",
    )
    statistics: Path | None = Field(
        default=None,
        description="file for what round 1 measures, in place of one in its folder: used where it is of the same model"
        " and rows, measured alike, so that another criterion or budget reads no data; else written, with gradients whatever the"
        " criterion. Data are read again for another loss, leave_one_out, moment_layers, what takes over removed layers, and"
        " compensation of heads and neurons, or of hidden, where the first run had no such units",
    )
    layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="indices of the layers to keep, in place of `keep`: nothing else is removed",
    )

    @property
    def criteria(self) -> set[str]:
        """Every criterion that is asked for."""
        return {self.criterion, self.layer_criterion or self.criterion}

    def needs(self, need: Need) -> bool:
        """Whether one of the criteria needs this of the statistics."""
        return any(need in CRITERIA[name].needs for name in self.criteria)

    @property
    def reads_loss(self) -> bool:
        """Whether one of the criteria depends on the calibration loss."""
        return any(CRITERIA[name].reads_loss for name in self.criteria)

    @property
    def rules(self) -> PlanningRules:
        """What a plan may remove."""
        limits = Limits(self.min_heads, self.min_neurons)
        return PlanningRules(self.units, self.scope, self.round_to, self.uniform, limits)

    @property
    def folds(self) -> bool:
        """Whether compensation needs statistics: whole layers alone leave nothing to fold into."""
        return self.compensate and self.layers is None and self.units != ["layers"]

    @property
    def holds_moments(self) -> bool:
        """Whether the pass that measures importance collects the second moments of heads and neurons, of all layers at once."""
        return self.folds and self.moment_layers is None and not set(self.units) <= {"layers", "hidden"}

    @model_validator(mode="after")
    def _consistent(self) -> "PruningSection":
        raise_all(_contradictions(self))
        return self


def _contradictions(section: PruningSection) -> list[InputError]:
    """A fault for every field that contradicts another, named within the section."""
    units: set[str] = set(section.units)
    faults = _explicit_layers(section) if section.layers is not None else []
    if section.keep is None and section.layers is None:
        faults.append(InputError("keep", None, "a number above 0 and at most 1 (or a list of layers in `layers`)"))
    if len(units) != len(section.units):
        faults.append(InputError("units", section.units, "each unit at most once"))
    if ranks_layers_only(section.criterion) and section.units != ["layers"]:
        accepted = f"[layers] with criterion {section.criterion} (beside other units: `layer_criterion`)"
        faults.append(InputError("units", section.units, accepted))
    if section.layer_criterion is not None and ("layers" not in units or units == {"layers"}):
        fix = "leave it out: it counts only where units has layers beside others"
        faults.append(InputError("layer_criterion", section.layer_criterion, fix=fix))
    reads_loss = section.reads_loss or section.statistics is not None
    if section.loss is not None and not reads_loss:
        named = " and ".join(sorted(section.criteria))
        faults.append(InputError("loss", section.loss, fix=f"leave it out: criterion {named} reads no loss"))
    for name, wanted in (
        ("round_to", ("neurons", "hidden")),
        ("uniform", ("heads", "neurons", "queries")),
        ("min_heads", [name for name, kind in KINDS.items() if kind.cuts == "heads"]),
        ("min_neurons", [name for name, kind in KINDS.items() if kind.cuts == "neurons"]),
    ):
        value = getattr(section, name)
        if value != PruningSection.model_fields[name].default and not units & set(wanted):
            fix = f"leave it out: it counts only where units has {' or '.join(wanted)}"
            faults.append(InputError(name, value, fix=fix))
    if section.moment_layers is not None and not section.folds:
        fix = "leave it out: there are second moments only where heads, neurons or channels are compensated"
        faults.append(InputError("moment_layers", section.moment_layers, fix=fix))
    if section.offload and not section.checkpointing:
        faults.append(InputError("checkpointing", False, fix="set it to true: offload needs it"))
    if section.offload and section.cost == "latency":
        faults.append(
            InputError("cost", "latency", "params, flops or memory with offload: latency is measured on the device")
        )
    if section.scope == "local" and not any(KINDS[unit].in_layer for unit in units):
        faults.append(InputError("scope", "local", "global where units is [hidden]: all layers share their channels"))
    return faults + competing_faults(units, section.criterion, section.scope, section.uniform, section.layer_criterion)


def _explicit_layers(section: PruningSection) -> list[InputError]:
    faults, layers = [], section.layers or []
    if section.keep is not None:
        faults.append(InputError("keep", section.keep, fix="leave it out: `layers` says what to keep"))
    for name in ("rounds", "cuts"):
        if getattr(section, name) > 1:
            faults.append(InputError(name, getattr(section, name), fix="leave it out: `layers` says what to keep"))
    if section.statistics is not None:
        faults.append(InputError("statistics", str(section.statistics), fix="leave it out: `layers` says what to keep"))
    if section.cost == "latency":
        faults.append(InputError("cost", "latency", "params, flops or memory where `layers` says what to keep"))
    if min(layers) < 0 or sorted(set(layers)) != layers:
        faults.append(InputError("layers", layers, "distinct indices of layers, counted from 0, ascending"))
    return faults
