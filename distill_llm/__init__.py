"""Prune and distill Hugging Face models.

The public names load on first use, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.checkpoint import load_pretrained
    from distill_llm.distillation_config import DistillationConfig
    from distill_llm.errors import InputError
    from distill_llm.pipeline import RunResult, run
    from distill_llm.profiling import Comparison, Profile, compare, profile
    from distill_llm.pruning.bypass import fit_bypasses
    from distill_llm.pruning.choice import Limits
    from distill_llm.pruning.collecting import collect_statistics
    from distill_llm.pruning.criteria import Importance, score
    from distill_llm.pruning.latency import latency_costs, plan_for_latency
    from distill_llm.pruning.leave_one_out import leave_one_out
    from distill_llm.pruning.masking import masked
    from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
    from distill_llm.pruning.planning import plan_pruning
    from distill_llm.pruning.statistics import Statistics
    from distill_llm.pruning.surgery import prune
    from distill_llm.recipe import Recipe, load_recipe
    from distill_llm.report.plans import plan_figure, plan_table
    from distill_llm.trainer import DistillationTrainer

_HOMES = {
    "load_pretrained": "checkpoint",
    "InputError": "errors",
    "RunResult": "pipeline",
    "run": "pipeline",
    "Comparison": "profiling",
    "Profile": "profiling",
    "compare": "profiling",
    "profile": "profiling",
    "Limits": "pruning.choice",
    "Importance": "pruning.criteria",
    "score": "pruning.criteria",
    "latency_costs": "pruning.latency",
    "plan_for_latency": "pruning.latency",
    "leave_one_out": "pruning.leave_one_out",
    "masked": "pruning.masking",
    "LayerPlan": "pruning.plan",
    "PruningPlan": "pruning.plan",
    "keep_layers": "pruning.plan",
    "plan_pruning": "pruning.planning",
    "Statistics": "pruning.statistics",
    "fit_bypasses": "pruning.bypass",
    "collect_statistics": "pruning.collecting",
    "prune": "pruning.surgery",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "plan_figure": "report.plans",
    "plan_table": "report.plans",
    "DistillationConfig": "distillation_config",
    "DistillationTrainer": "trainer",
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
