"""Prune and distill Hugging Face models.

The public names load on first use, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.common.errors import InputError
    from distill_llm.measuring.profiling import Comparison, Profile, compare, profile
    from distill_llm.models.checkpoint import load_pretrained
    from distill_llm.pipeline.run import RunResult, run
    from distill_llm.pruning.compensation.bypass import fit_bypasses
    from distill_llm.pruning.criteria import criterion
    from distill_llm.pruning.cutting.masking import masked
    from distill_llm.pruning.cutting.surgery import prune
    from distill_llm.pruning.importance import Importance, score
    from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
    from distill_llm.pruning.planning.candidate import Limits
    from distill_llm.pruning.planning.latency import latency_costs, plan_for_latency
    from distill_llm.pruning.planning.planner import plan_pruning
    from distill_llm.pruning.statistics.collecting import collect_statistics
    from distill_llm.pruning.statistics.leave_one_out import leave_one_out
    from distill_llm.pruning.statistics.record import Statistics
    from distill_llm.recipe.recipe import Recipe, load_recipe
    from distill_llm.report.plans import plan_figure, plan_table
    from distill_llm.training.config import DistillationConfig
    from distill_llm.training.trainer import DistillationTrainer

_HOMES = {
    "load_pretrained": "models.checkpoint",
    "InputError": "common.errors",
    "RunResult": "pipeline.run",
    "run": "pipeline.run",
    "Comparison": "measuring.profiling",
    "Profile": "measuring.profiling",
    "compare": "measuring.profiling",
    "profile": "measuring.profiling",
    "Limits": "pruning.planning.candidate",
    "Importance": "pruning.importance",
    "criterion": "pruning.criteria",
    "score": "pruning.importance",
    "latency_costs": "pruning.planning.latency",
    "plan_for_latency": "pruning.planning.latency",
    "leave_one_out": "pruning.statistics.leave_one_out",
    "masked": "pruning.cutting.masking",
    "LayerPlan": "pruning.plan",
    "PruningPlan": "pruning.plan",
    "keep_layers": "pruning.plan",
    "plan_pruning": "pruning.planning.planner",
    "Statistics": "pruning.statistics.record",
    "fit_bypasses": "pruning.compensation.bypass",
    "collect_statistics": "pruning.statistics.collecting",
    "prune": "pruning.cutting.surgery",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.recipe",
    "plan_figure": "report.plans",
    "plan_table": "report.plans",
    "DistillationConfig": "training.config",
    "DistillationTrainer": "training.trainer",
}

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "DistillationConfig",
    "DistillationTrainer",
    "Importance",
    "InputError",
    "LayerPlan",
    "Limits",
    "Profile",
    "PruningPlan",
    "Recipe",
    "RunResult",
    "Statistics",
    "collect_statistics",
    "compare",
    "criterion",
    "fit_bypasses",
    "keep_layers",
    "latency_costs",
    "leave_one_out",
    "load_pretrained",
    "load_recipe",
    "masked",
    "plan_figure",
    "plan_for_latency",
    "plan_pruning",
    "plan_table",
    "profile",
    "prune",
    "run",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
