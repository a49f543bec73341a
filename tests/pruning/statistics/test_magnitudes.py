"""Magnitudes against surgery: a unit's weights are those that the layer loses when it is removed."""

import pytest
from builders.families import family_batch, family_model, groups_of, neurons_of
from builders.pruning import collect
from torch import nn

from distill_llm import prune
from distill_llm.architectures.families import layers_of
from distill_llm.pruning.plan import LayerPlan, PruningPlan


def weights_in(layer: nn.Module) -> tuple[float, float]:
    """Sums of the squared and of the absolute weights of a layer, biases and norms left out."""
    matrices = [parameter.detach().double() for parameter in layer.parameters() if parameter.dim() > 1]
    return sum(w.square().sum().item() for w in matrices), sum(w.abs().sum().item() for w in matrices)


# Layouts: apart; "q kv kv" in one linear and in a Conv1D; "(q kv kv)" with a query for each group and with two.
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom", "falcon-grouped", "falcon-multi-query"])
def test_magnitudes_are_of_the_weights_that_removal_takes_away(family):
    model = family_model(family)
    groups, neurons, layer = groups_of(model), neurons_of(model), 1
    shared = 8 // groups
    statistics = collect(model, [family_batch(model)], loss=None)
    rows = {kind: getattr(statistics, kind)[layer] for kind in ("heads", "neurons", "queries")}
    before = weights_in(layers_of(model)[layer])
    kept = {"heads": tuple(range(1, groups)), "neurons": tuple(n for n in range(neurons) if n != 7)}
    cuts = {"neurons": (LayerPlan(layer, range(groups), kept["neurons"]), [7])}
    if groups > 1:
        cuts["heads"] = LayerPlan(layer, kept["heads"], range(neurons)), [0]
    if shared > 1:  # of every group its first query
        first = list(range(0, 8, shared))
        left = [query for query in range(8) if query not in first]
        cuts["queries"] = LayerPlan(layer, range(groups), range(neurons), left), first
    for kind, (row, removed) in cuts.items():
        others = [LayerPlan(i, range(groups), range(neurons)) for i in range(5) if i != layer]
        plan = sorted([row, *others], key=lambda each: each.source)
        after = weights_in(layers_of(prune(model, PruningPlan(model.config.model_type, tuple(plan))))[layer])
        squares, absolute = rows[kind].magnitude[removed].sum(), rows[kind].magnitude_l1[removed].sum()
        assert float(squares) == pytest.approx(before[0] - after[0], rel=1e-4), kind
        assert float(absolute) == pytest.approx(before[1] - after[1], rel=1e-4), kind
