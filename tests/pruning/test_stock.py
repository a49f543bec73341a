"""Uniform students that a stock config can say: plain classes, loaded by plain transformers; and those that none can say."""

import json

import pytest
import torch
from family_examples import (
    DECODERS,
    ENCODERS,
    HEADS,
    QUERIES,
    VARIANTS,
    aligned,
    family_batch,
    family_model,
    groups_of,
    outputs_of,
    uniform_plan,
)

from distill_llm.checkpoint import load_pretrained
from distill_llm.pruning.families import FAMILIES, lineage_of
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.structure import hidden_size, layer_shapes
from distill_llm.pruning.supported import UNITS, supported
from distill_llm.pruning.surgery import prune, stock_expressible

EVERY_UNIT = ("heads", "queries", "neurons", "layers", "hidden")
# Checked against the class and the outputs below.
STOCK = {
    **dict.fromkeys(("bert", "ernie", "roberta", "xlm-roberta", "camembert", "electra"), "neurons layers"),
    **dict.fromkeys(("distilbert", "mpnet", "deberta-v2", "modernbert"), "neurons layers"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "cohere"), "all"),
    **dict.fromkeys(("starcoder2", "phi", "phi3"), "all"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "heads queries neurons layers"),  # its width scales its embeddings
    **dict.fromkeys(("stablelm", "opt", "gpt2", "gpt_neox", "falcon"), "neurons layers"),  # they derive the head size
    "bloom": "layers",
}


def says(family: str, units: str) -> bool:
    return units in (EVERY_UNIT if STOCK[family] == "all" else STOCK[family].split())


def test_the_list_of_families_says_what_is_tested_here():
    assert set(STOCK) == set(FAMILIES) == set(ENCODERS) | set(DECODERS)
    rows = {row.family: row for row in supported()}
    assert set(rows) == set(STOCK) and set(UNITS) == {*EVERY_UNIT, "attention", "ffn"}
    for family, row in rows.items():
        model = family_model(family)
        grouped = groups_of(model) < QUERIES or family == "falcon"
        assert row.grouped == grouped, family
        assert row.units == tuple(unit for unit in UNITS if grouped or unit != "queries")
        assert row.stock == tuple(unit for unit in row.units if says(family, unit)), family


@pytest.mark.parametrize("units", EVERY_UNIT)
@pytest.mark.parametrize("name", [*STOCK, "falcon-grouped", "llama-many-heads", "llama-tied"])
def test_uniform_students_are_plain_models_where_the_familys_config_can_say_them(tmp_path, name, units):
    model = family_model(name)
    if units == "queries" and groups_of(model) == QUERIES:
        pytest.skip("every query has its own key")
    family = VARIANTS[name][0] if name in VARIANTS else name
    student = prune(model, uniform_plan(model, units))
    assert stock_expressible(student) == (type(student) is type(model)) == says(family, units)
    if not says(family, units):
        return
    student.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    auto = HEADS["causal-lm" if family in DECODERS else "sequence-classification"]
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = family_batch(model)
    assert torch.equal(outputs_of(aligned(loaded), batch), outputs_of(student, batch))
    assert layer_shapes(loaded) == layer_shapes(student) and hidden_size(loaded) == hidden_size(student)
    assert lineage_of(load_pretrained(tmp_path)) == lineage_of(student)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama", [c for c in range(32) if c % 3]),  # 21 channels do not divide by 8 heads
        ("gpt2-scaled", None),  # the scale of attention goes by the layer's place
        ("modernbert", None),  # the first layer has no norm of its own
    ],
)
def test_what_a_config_could_not_say_stays_a_pruned_class(name, kept):
    model = family_model(name)
    plan = keep_layers(model, [1, 2, 3])
    if kept is not None:
        rows = tuple(LayerPlan(i, tuple(range(4)), tuple(range(64))) for i in range(5))
        plan = PruningPlan("llama", rows, hidden=tuple(kept))
    student = prune(model, plan)
    assert not stock_expressible(student) and type(student).__name__ == f"Pruned{type(model).__name__}"


def test_uneven_students_are_never_stock():
    model = family_model("llama")
    everything = tuple(range(4))
    for rows in (
        [(everything, range(30 + i), None) for i in range(5)],
        [(everything[i % 2 :], range(64), None) for i in range(5)],
        [(everything, (), None)] * 5,
        [((), range(64), None)] * 5,
        [(everything, range(64), (0, 2, 4, 6) if i else None) for i in range(5)],
    ):
        plans = tuple(LayerPlan(i, h, tuple(n), q) for i, (h, n, q) in enumerate(rows))
        assert not stock_expressible(prune(model, PruningPlan("llama", plans)))
