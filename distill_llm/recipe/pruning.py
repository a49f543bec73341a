"""The pruning section: its fields, and which of them go together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.pruning.criteria import CRITERIA, Need, find_criterion, ranks_layers_only
from distill_llm.pruning.names import competing_faults, find_unit, unscored_faults
from distill_llm.pruning.planning.rules import Limits, PlanningRules
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.recipe.calibration import CalibrationSection
from distill_llm.recipe.masks import BLOCKS, MasksSection, masked_pruning_faults
from distill_llm.recipe.scales import ScalesSection, scales_faults
from distill_llm.recipe.search import SearchSection, searching_faults
from distill_llm.recipe.section import Section
from distill_llm.recipe.weights import WeightsSection


def _known_criterion(given: Any) -> str:
    return find_criterion(str(given), field="").name


def _known_unit(given: Any) -> str:
    return find_unit(str(given), field="").name


Criterion = Annotated[str, BeforeValidator(_known_criterion)]
"""The name of a registered criterion: the package's, or one that a module of the user registered."""
Unit = Annotated[str, BeforeValidator(_known_unit)]
"""The name of a kind in the table of units, likewise."""


def _known_compensation(given: Any) -> Any:
    found = {"true": True, "false": False, "in_order": "in_order"}.get(str(given).lower())
    if found is None:
        raise InputError("", given, "true, false or in_order")
    return found


class PruningSection(Section):
    """What to remove, and how to choose it."""

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the transformer layers' cost that stays; with cost latency, the share of the whole model's time",
    )
    rounds: int = Field(default=1, ge=1, description="how many times to prune and recover until `keep` is reached")
    schedule: Literal["linear", "cubic"] = Field(
        default="cubic", description="how the kept share falls over the rounds"
    )
    cuts: int = Field(
        default=1,
        ge=1,
        description="how many small cuts a round is made of. Each keeps the same share of the model before it. Importance is"
        " measured anew before each, on other rows; nothing is trained in between",
    )
    units: list[Unit] = Field(
        default=["heads", "neurons"],
        min_length=1,
        description="what may be removed: heads (KV groups), queries (equally many of every group), neurons (FFN), layers,"
        " the whole attention or ffn of a layer, hidden (channels of the residual stream)",
    )
    criterion: Criterion = Field(
        default="fisher", description=f"how the importance of a unit is measured: {', '.join(CRITERIA)}"
    )
    layer_criterion: Criterion | None = Field(
        default=None,
        description="how the importance of whole layers is measured, if `units` has layers and other units; left out: by"
        " `criterion`",
    )
    loss: Literal["labels", "kl"] | None = Field(
        default=None,
        description="the loss whose gradients are taken: against the task's labels, or, with kl, against the model's own"
        " predictions; left out: labels if the rows have them, else kl",
    )
    cost: Literal["params", "flops", "memory", "latency"] = Field(
        default="params",
        description="what `keep` is a share of; memory includes the KV cache of a decoder; latency is measured on this"
        " device; both are for the batch of evaluation.latency",
    )
    scope: Literal["global", "local"] = Field(
        default="global", description="rank units over all layers, or within each layer"
    )
    round_to: int = Field(
        default=1, ge=1, description="keep a multiple of this many FFN neurons in each layer, and of channels (hidden)"
    )
    uniform: bool = Field(
        default=False,
        description="keep the same number of heads and of neurons in every layer; plain transformers can then load the student,"
        " if its family and the budget allow it",
    )
    min_heads: int = Field(default=0, ge=0, description="least number of heads (KV groups) in every layer that stays")
    min_neurons: int = Field(default=0, ge=0, description="least number of FFN neurons in every layer that stays")
    compensate: Annotated[bool | Literal["in_order"], BeforeValidator(_known_compensation)] = Field(
        default=True,
        description="let the kept columns take over what removed units contributed, and the FFN before a removed layer what that"
        " layer added. How strongly, or not at all, is chosen by what the cut model does on rows that this is not fitted to: a"
        " quarter as many as calibration_examples. in_order: also try to fit the linears one after the other to what they read in"
        " the cut model, and to what the residual stream is off by; takes several times as long, and holds four residual streams"
        " of all rows in main memory. Not where a norm comes after attention or FFN (BERT, Gemma 2), nor with hidden",
    )
    calibration_examples: int = Field(
        default=1024,
        ge=1,
        description="number of training rows that importance is measured on; a quarter as many more are held out, to choose the"
        " strength of compensation by. Each cut gets this many: rows that no cut has used while there are any, then the first"
        " ones again",
    )
    calibration: list[CalibrationSection] | None = Field(
        default=None,
        min_length=1,
        description="where the calibration rows come from; left out: from the training rows alone. Every cut gets rows of each"
        " source in proportion to its share",
    )
    moment_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the calibration tokens, drawn at random, that compensation of removed units is fitted to (for"
        " removed layers it is always all); left out: all tokens until there are half as many as a layer has neurons, then one in"
        " four; 1 takes about half a forward pass more",
    )
    moment_layers: int | None = Field(
        default=None,
        ge=1,
        description="number of layers whose second moments are held at a time, with a calibration pass for each such group of"
        " layers and each strength of compensation that is tried. Set it if the moments of all layers do not fit: they take"
        " about 1 GB per layer of an 8B model. Left out: all"
        " are collected in the pass that measures importance, and kept in its file. What takes over removed layers needs moments"
        " of its own, of the same size, always all at once",
    )
    precision: Literal["bfloat16", "auto"] | None = Field(
        default=None,
        description="run the calibration passes under autocast in this dtype; sums stay in float32. auto: in bfloat16 where the"
        " device is fast in it",
    )
    offload: bool = Field(
        default=False,
        description="keep the model in main memory and bring one layer at a time to the GPU for calibration, for models whose"
        " float32 weights do not fit there; needs checkpointing",
    )
    checkpointing: bool = Field(
        default=False,
        description="hold the activations of one layer at a time in calibration, for models whose activations do not all fit;"
        " costs the time of about one more forward pass",
    )
    statistics: Path | None = Field(
        default=None,
        description="file for the statistics of round 1, in place of one in the round's folder. If it holds statistics of the"
        " same model, rows and settings, they are used, so that another criterion or budget needs no pass over the data. If not,"
        " it is written, with gradients whatever the criterion. A pass is still needed for another loss, for leave_one_out, for"
        " moment_layers, for what takes over removed layers, and for compensation of units that the run of the file had not",
    )
    layers: list[int] | None = Field(
        default=None, min_length=1, description="indices of the layers to keep, in place of `keep`; they stay whole"
    )
    weights: WeightsSection | None = Field(
        default=None,
        description="single weights to set to zero, after whole units are removed; with neither `keep` nor `layers`, no unit is."
        " Over several rounds their share follows `schedule`",
    )
    search: SearchSection | None = Field(
        default=None,
        description="evolution over how many heads and neurons each layer keeps, and which layers go, that starts from the plain"
        " plan and costs no more; `{}` for its defaults",
    )
    scales: ScalesSection | None = Field(
        default=None,
        description="learn one factor for every kept head and neuron after a round's cuts, from the model before them; `{}` for"
        " the defaults. Kept if they bring the outputs nearer on the rows that are held out",
    )
    masks: MasksSection | None = Field(
        default=None,
        description="learn which units stay, while the student still has all of them, in place of measuring it; `{}` for the"
        " defaults. Nothing is compensated",
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_units_stay(cls, given: Any) -> Any:
        """Single weights alone go where nothing says how much of the units stays."""
        alone = isinstance(given, dict) and given.get("weights") is not None
        return {**given, "keep": 1.0} if alone and given.get("keep") is None and given.get("layers") is None else given

    @property
    def least_rows(self) -> int:
        """How many training rows there must be: of the default number fewer are fine, and sources are counted themselves."""
        default = type(self).model_fields["calibration_examples"].default
        return 0 if self.calibration is not None or self.calibration_examples == default else self.calibration_examples

    @property
    def criteria(self) -> set[str]:
        """The criteria that the section names."""
        return {self.criterion, self.layer_criterion or self.criterion}

    def needs(self, need: Need) -> bool:
        """Whether one of the criteria needs this kind of statistics."""
        return any(need in CRITERIA[name].needs for name in self.criteria)

    @property
    def reads_loss(self) -> bool:
        """Whether one of the criteria depends on the calibration loss."""
        return any(CRITERIA[name].reads_loss for name in self.criteria)

    @property
    def rules(self) -> PlanningRules:
        """What a plan may remove. Blocks with masks go when all their units do."""
        limits = Limits(self.min_heads, self.min_neurons)
        units = self.units if self.masks is None else [unit for unit in self.units if unit not in BLOCKS]
        return PlanningRules(units, self.scope, self.round_to, self.uniform, limits)

    @property
    def folds(self) -> bool:
        """Whether compensation needs statistics; it does not if only whole layers go."""
        ranked = self.layers is None and self.masks is None
        return bool(self.compensate) and ranked and self.units != ["layers"]

    @property
    def holds_moments(self) -> bool:
        """Whether the pass that measures importance also collects the second moments of all heads and neurons."""
        wanted = self.needs("refit") or (self.folds and not set(self.units) <= {"layers", "hidden"})
        return wanted and self.moment_layers is None

    @model_validator(mode="after")
    def _consistent(self) -> "PruningSection":
        raise_all(_contradictions(self))
        return self


def _contradictions(section: PruningSection) -> list[InputError]:
    """A fault for every field that contradicts another, named within the section."""
    units: set[str] = set(section.units)
    faults = _explicit_layers(section) if section.layers is not None else []
    if section.keep is None and section.layers is None:
        faults.append(InputError("keep", None, "a number above 0 and at most 1, or a list of layers in `layers`"))
    if len(units) != len(section.units):
        faults.append(InputError("units", section.units, "each unit at most once"))
    if ranks_layers_only(section.criterion) and section.units != ["layers"]:
        fix = f"set them to [layers], or set {section.criterion} as `layer_criterion` and choose another `criterion`"
        faults.append(InputError("units", section.units, fix=fix))
    if section.layer_criterion is not None and ("layers" not in units or units == {"layers"}):
        fix = "leave it out: it counts only if units has layers and other units"
        faults.append(InputError("layer_criterion", section.layer_criterion, fix=fix))
    reads_loss = section.reads_loss or section.statistics is not None
    reads_loss |= section.weights is not None and section.weights.rules.needs == "gradients"
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
            fix = f"leave it out: it counts only if units has {' or '.join(wanted)}"
            faults.append(InputError(name, value, fix=fix))
    if section.compensate == "in_order" and "hidden" in units:
        fix = "set it to true, or leave hidden out of the units"
        faults.append(InputError("compensate", "in_order", fix=fix))
    if section.moment_layers is not None and not section.folds and not section.needs("refit"):
        fix = "leave it out: only compensation of heads, neurons or channels, obs and fisher_obs need second moments"
        faults.append(InputError("moment_layers", section.moment_layers, fix=fix))
    if section.search is not None:
        faults += searching_faults(section)
    faults += scales_faults(section)
    if section.masks is not None:
        defaults = {name: field.default for name, field in PruningSection.model_fields.items()}
        return faults + masked_pruning_faults(section, defaults)
    if section.offload and not section.checkpointing:
        faults.append(InputError("checkpointing", False, fix="set it to true: offload needs it"))
    if section.offload and section.cost == "latency":
        fix = "choose params, flops or memory: with offload no latency can be measured"
        faults.append(InputError("cost", "latency", fix=fix))
    if section.scope == "local" and not any(KINDS[unit].in_layer for unit in units):
        faults.append(InputError("scope", "local", fix="set it to global: these units are not of one layer"))
    faults += unscored_faults(section.units, section.criterion, section.layer_criterion)
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
        faults.append(InputError("cost", "latency", fix="choose params, flops or memory: `layers` says what to keep"))
    if min(layers) < 0 or sorted(set(layers)) != layers:
        faults.append(InputError("layers", layers, "different indices of layers, counted from 0, in ascending order"))
    return faults
