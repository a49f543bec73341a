"""The search for a better plan in a round, where the recipe asks for one."""

import hashlib
from pathlib import Path

from transformers import PreTrainedModel

from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.searching.evolution import Known, Searched, SearchSettings, evolve
from distill_llm.pruning.searching.fitness import Divergence
from distill_llm.pruning.searching.shares import Space
from distill_llm.pruning.statistics.calibration_pass import Batches
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of
from distill_llm.recipe.recipe import Recipe


def search_plan(
    recipe: Recipe,
    model: PreTrainedModel,
    scores: Importance,
    plain: PruningPlan,
    costs: Costs,
    batches: Batches,
    settings: CalibrationSettings,
    file: Path | None = None,
) -> Searched:
    """A plan that costs no more than the plain one, as the recipe's pruning section says.

    Args:
        scores: by which units stay within a layer.
        costs: of the model's units; of latency, those of single layers, in which the plain plan is the budget.
        batches: calibration data.
        file: what a stopped search goes on from.
    """
    section = recipe.pruning
    assert section is not None and section.search is not None
    search, rules = section.search, section.rules
    counts = counts_of(model)
    rows = [row.counts(counts[row.source]) for row in plain.layers]
    budget = costs.of(rows, None, [row.source for row in plain.layers])
    space = Space(model, scores, costs, budget, rules)
    fitness = Divergence(model, batches, search.tokens, settings)
    digest = hashlib.blake2b(digest_size=16)
    for batch in fitness.batches:
        for name in sorted(batch):
            digest.update(batch[name].contiguous().cpu().numpy().tobytes())
    identity = {"model": teacher_fingerprint(model), "rows": digest.hexdigest(), "precision": section.precision}
    chosen = SearchSettings(search.generations, search.population, recipe.seed)
    return evolve(space, plain, plain.kept or 1.0, fitness, chosen, Known(file, identity), progress=True)
