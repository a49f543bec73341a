"""Records of what stays: composed and counted in each other by hand; a new kind of unit is a key and no field."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import PreTrainedConfig

from distill_llm.architectures.lineage import (
    LAYER_UNITS,
    MODEL_UNITS,
    LayerPlan,
    LayerUnit,
    ModelPlan,
    compose,
    lineage_of,
    packed,
)
from distill_llm.architectures.modeling_pruned import kept_channels
from distill_llm.pruning.plan import PruningPlan

COUNTS = {"heads": 4, "neurons": 8, "queries": 8, "experts": 6}


@pytest.fixture
def more_kinds(monkeypatch):
    """Experts, equally many cross heads in each expert, and a vocabulary: rows of the tables and nothing else."""
    monkeypatch.setitem(LAYER_UNITS, "experts", LayerUnit("e"))
    monkeypatch.setitem(LAYER_UNITS, "cross_heads", LayerUnit("x", by_head=True, within="experts"))
    MODEL_UNITS.append("vocabulary")
    yield
    MODEL_UNITS.remove("vocabulary")


def test_queries_that_no_row_names_are_all_of_the_kept_heads():
    row = LayerPlan(2, (1, 3), (0, 7))
    assert row.queries is None and row.indices("queries", COUNTS) == (2, 3, 6, 7)
    assert row.counts({k: COUNTS[k] for k in ("heads", "neurons", "queries")}) == {
        "heads": 2,
        "neurons": 2,
        "queries": 4,
    }
    assert row == LayerPlan(2, heads=[1, 3], neurons=[0, 7]) == replace(LayerPlan(2, (1, 3), ()), neurons=(0, 7))
    assert len({row, LayerPlan(2, (1, 3), (0, 7)), LayerPlan(2, (1, 3), (0, 7), (2, 6))}) == 2


def test_rows_without_heads_or_of_unknown_kinds_are_refused():
    for wrong in ({"heads": (0,)}, {"heads": (0,), "neurons": (0,), "horns": (1,)}):
        with pytest.raises(TypeError, match="LayerPlan takes units of heads, neurons, queries"):
            LayerPlan(0, **wrong)
    with pytest.raises(AttributeError):
        _ = LayerPlan(0, (0,), (0,)).horns


def test_a_second_plan_counts_in_what_the_first_left_and_counting_back_gives_the_second():
    first = ModelPlan([LayerPlan(0, (0, 2, 3), (1, 4, 6)), LayerPlan(3, (1, 2), (0, 5), (3, 4))], hidden=(1, 5, 9))
    second = ModelPlan([LayerPlan(0, (1, 2), (0, 2), (3, 4)), LayerPlan(1, (1,), ())], hidden=(0, 2))
    both = compose(first, second, lambda layer: COUNTS)
    # Heads 0, 2, 3 have queries 0, 1, 4, 5, 6, 7, of which 3 and 4 are 5 and 6; of layer 3 query 4 is head 2's.
    assert both == ModelPlan([LayerPlan(0, (2, 3), (1, 6), (5, 6)), LayerPlan(3, (2,), (), (4,))], hidden=(1, 9))
    for place, row in enumerate(both.layers):
        own = {**COUNTS, **first.layers[place].counts(COUNTS)}
        back = row.counted_in(first.layers[place], place, COUNTS)
        assert [back.indices(k, own) for k in LAYER_UNITS] == [
            tuple(second.layers[place].indices(k, own)) for k in LAYER_UNITS
        ]
    with pytest.raises(ValueError, match="neurons"):
        LayerPlan(0, (0,), (2,)).counted_in(first.layers[0], 0, COUNTS)


def test_new_kinds_are_kept_in_files_and_configs_and_composed(more_kinds, tmp_path):
    counts = {**COUNTS, "cross_heads": 12}
    first = PruningPlan("llama", [LayerPlan(1, (0, 1), (2, 3), experts=(0, 2, 5))], 0.5, vocabulary=(3, 4, 8))
    first.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == first and first.vocabulary == (3, 4, 8)
    assert first.layers[0].indices("cross_heads", counts) == (0, 1, 4, 5, 10, 11)
    second = ModelPlan([LayerPlan(0, (1,), (0,), experts=(1, 2), cross_heads=(3, 4))], vocabulary=(0, 2))
    both = compose(first, second, lambda layer: counts)
    assert both.layers[0] == LayerPlan(1, (1,), (2,), experts=(2, 5), cross_heads=(5, 10)) and both.vocabulary == (3, 8)
    config = PreTrainedConfig()
    config.pruning = packed(both, {})
    assert config.pruning["layers"][0]["experts"] == "2,5" and config.pruning["vocabulary"] == "3,8"
    assert lineage_of(SimpleNamespace(config=config)) == both
    found = kept_channels("e x", both.layers[0], counts, head_size=2)
    assert found.tolist() == [2, 5, *(6 + c for c in (10, 11, 20, 21))]
