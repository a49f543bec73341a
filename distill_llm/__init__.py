"""Prune and distill Hugging Face models.

The public names load on first use, so that the command line answers at once.
"""

from typing import TYPE_CHECKING

from distill_llm.common.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distill_llm.common.errors import InputError as InputError
    from distill_llm.measuring.profiling import Comparison as Comparison
    from distill_llm.measuring.profiling import Profile as Profile
    from distill_llm.measuring.profiling import compare as compare
    from distill_llm.measuring.profiling import profile as profile
    from distill_llm.models.checkpoint import load_pretrained as load_pretrained
    from distill_llm.models.exits import with_exits as with_exits
    from distill_llm.models.masks import Masks as Masks
    from distill_llm.pipeline.run import RunResult as RunResult
    from distill_llm.pipeline.run import run as run
    from distill_llm.pipeline.sweep import SweepResult as SweepResult
    from distill_llm.pipeline.sweep import sweep as sweep
    from distill_llm.pruning.compensation.bypass import fit_bypasses as fit_bypasses
    from distill_llm.pruning.compensation.in_order import InOrder as InOrder
    from distill_llm.pruning.criteria import criterion as criterion
    from distill_llm.pruning.cutting.in_order import prune_in_order as prune_in_order
    from distill_llm.pruning.cutting.masking import masked as masked
    from distill_llm.pruning.cutting.strength import Strength as Strength
    from distill_llm.pruning.cutting.strength import choose_strength as choose_strength
    from distill_llm.pruning.cutting.surgery import prune as prune
    from distill_llm.pruning.importance import Importance as Importance
    from distill_llm.pruning.importance import score as score
    from distill_llm.pruning.learning.masks import MaskBudget as MaskBudget
    from distill_llm.pruning.learning.masks import learned_masks as learned_masks
    from distill_llm.pruning.learning.scales import fold_scales as fold_scales
    from distill_llm.pruning.learning.scales import learn_scales as learn_scales
    from distill_llm.pruning.learning.scales import scale_units as scale_units
    from distill_llm.pruning.learning.scaling import Scaling as Scaling
    from distill_llm.pruning.plan import LayerPlan as LayerPlan
    from distill_llm.pruning.plan import PruningPlan as PruningPlan
    from distill_llm.pruning.plan import keep_layers as keep_layers
    from distill_llm.pruning.planning.latency import LatencySettings as LatencySettings
    from distill_llm.pruning.planning.latency import plan_for_latency as plan_for_latency
    from distill_llm.pruning.planning.latency_costs import latency_costs as latency_costs
    from distill_llm.pruning.planning.planner import plan_pruning as plan_pruning
    from distill_llm.pruning.planning.rules import Limits as Limits
    from distill_llm.pruning.planning.rules import PlanningRules as PlanningRules
    from distill_llm.pruning.statistics.collecting import collect_statistics as collect_statistics
    from distill_llm.pruning.statistics.leave_one_out import leave_one_out as leave_one_out
    from distill_llm.pruning.statistics.record import Statistics as Statistics
    from distill_llm.pruning.statistics.refit import refit_costs as refit_costs
    from distill_llm.pruning.statistics.settings import CalibrationSettings as CalibrationSettings
    from distill_llm.pruning.units.costs import unit_costs as unit_costs
    from distill_llm.pruning.weights.rules import SparsityRules as SparsityRules
    from distill_llm.pruning.weights.sparsify import sparsify as sparsify
    from distill_llm.quantizing.rounding import imitate as imitate
    from distill_llm.quantizing.rounding import quantize as quantize
    from distill_llm.quantizing.scheme import Scheme as Scheme
    from distill_llm.recipe.recipe import Recipe as Recipe
    from distill_llm.recipe.recipe import load_recipe as load_recipe
    from distill_llm.report.plans import plan_figure as plan_figure
    from distill_llm.report.plans import plan_table as plan_table
    from distill_llm.training.config import DistillationConfig as DistillationConfig
    from distill_llm.training.mask_trainer import MaskTrainer as MaskTrainer
    from distill_llm.training.trainer import DistillationTrainer as DistillationTrainer
    from distill_llm.training.zeros import KeepZeros as KeepZeros

__getattr__, __dir__, __all__ = lazy_names(  # the names above, which are for type checkers and editors
    __name__,
    {
        "common.errors": "InputError",
        "measuring.profiling": "Comparison Profile compare profile",
        "models.checkpoint": "load_pretrained",
        "models.exits": "with_exits",
        "models.masks": "Masks",
        "pipeline.run": "RunResult run",
        "pipeline.sweep": "SweepResult sweep",
        "pruning.compensation.bypass": "fit_bypasses",
        "pruning.compensation.in_order": "InOrder",
        "pruning.criteria": "criterion",
        "pruning.cutting.in_order": "prune_in_order",
        "pruning.cutting.masking": "masked",
        "pruning.cutting.strength": "Strength choose_strength",
        "pruning.cutting.surgery": "prune",
        "pruning.importance": "Importance score",
        "pruning.learning.masks": "MaskBudget learned_masks",
        "pruning.learning.scales": "fold_scales learn_scales scale_units",
        "pruning.learning.scaling": "Scaling",
        "pruning.plan": "LayerPlan PruningPlan keep_layers",
        "pruning.planning.latency": "LatencySettings plan_for_latency",
        "pruning.planning.latency_costs": "latency_costs",
        "pruning.planning.planner": "plan_pruning",
        "pruning.planning.rules": "Limits PlanningRules",
        "pruning.statistics.collecting": "collect_statistics",
        "pruning.statistics.leave_one_out": "leave_one_out",
        "pruning.statistics.refit": "refit_costs",
        "pruning.statistics.record": "Statistics",
        "pruning.statistics.settings": "CalibrationSettings",
        "pruning.units.costs": "unit_costs",
        "pruning.weights.rules": "SparsityRules",
        "pruning.weights.sparsify": "sparsify",
        "quantizing.rounding": "imitate quantize",
        "quantizing.scheme": "Scheme",
        "recipe.recipe": "Recipe load_recipe",
        "report.plans": "plan_figure plan_table",
        "training.config": "DistillationConfig",
        "training.mask_trainer": "MaskTrainer",
        "training.trainer": "DistillationTrainer",
        "training.zeros": "KeepZeros",
    },
)
