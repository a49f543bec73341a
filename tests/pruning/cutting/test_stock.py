"""Uniform students that a stock config can say: plain classes, loaded by plain transformers; and those that none can say."""

import json

import pytest
import torch
from builders.families import (
    DECODERS,
    ENCODERS,
    HEADS,
    HIDDEN,
    IMAGES,
    QUERIES,
    VARIANTS,
    aligned,
    family_batch,
    family_model,
    groups_of,
    head_of,
    outputs_of,
    uniform_plan,
)

from distill_llm.architectures.families import FAMILIES
from distill_llm.architectures.lineage import lineage_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.stock import stock_accepts
from distill_llm.pruning.cutting.surgery import prune, stock_expressible, why_not_stock
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.supported import UNITS, supported
from distill_llm.pruning.units.sizes import counts_of, hidden_size

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
    "vit": "heads neurons layers",
}


def says(family: str, units: str) -> bool:
    return units in (EVERY_UNIT if STOCK[family] == "all" else STOCK[family].split())


def test_the_list_of_families_says_what_is_tested_here():
    assert set(STOCK) == set(FAMILIES) == set(ENCODERS) | set(DECODERS) | set(IMAGES)
    rows = {row.family: row for row in supported()}
    assert set(rows) == set(STOCK) and set(UNITS) == {*EVERY_UNIT, "attention", "ffn"}
    for family, row in rows.items():
        model = family_model(family)
        grouped = groups_of(model) < QUERIES or family == "falcon"
        assert row.grouped == grouped, family
        assert row.units == tuple(unit for unit in UNITS if grouped or unit != "queries")
        assert row.stock == tuple(unit for unit in row.units if says(family, unit)), family
        odd = stock_accepts(model.config, 7, 7, HIDDEN)  # seven heads, 32 channels
        assert row.dividing == ("heads" in row.stock and not odd), family


@pytest.mark.grid(1)
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
    auto = HEADS[head_of(family)]
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = family_batch(model)
    assert torch.equal(outputs_of(aligned(loaded), batch), outputs_of(student, batch))
    assert counts_of(loaded) == counts_of(student) and hidden_size(loaded) == hidden_size(student)
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


# Uniform plans: of the numbers that meet a budget, those that the family's own config takes.


@pytest.mark.grid(2)
@pytest.mark.parametrize("keep", [0.75, 0.6, 0.4])
@pytest.mark.parametrize(
    "units", [("heads", "neurons"), ("queries", "neurons"), ("heads", "neurons", "hidden")], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen2"])
def test_uniform_plans_are_such_that_plain_transformers_can_load_them(name, units, keep):
    """Eight query heads: three of four groups would be six, which do not divide 32 channels."""
    model = family_model(name, num_key_value_heads=2 if "queries" in units else 4, intermediate_size=256)
    plan = plan_pruning(model, random_importance(model), keep, units=units, uniform=True)
    student = prune(model, plan)
    assert plan.note is None and 0.99 * keep <= plan.kept <= keep
    assert stock_expressible(student) == ("hidden" not in units or says(name, "hidden"))
    assert (why_not_stock(student) is None) == stock_expressible(student)
    assert hidden_size(student) < 32 or "hidden" not in units


def random_importance(model) -> Importance:
    """Scores of every unit of a model."""
    generator, sizes = torch.Generator().manual_seed(0), counts_of(model)
    heads, neurons, queries = (
        tuple(torch.rand(size[kind], generator=generator) for size in sizes) for kind in ("heads", "neurons", "queries")
    )
    layers, hidden = torch.rand(len(sizes), generator=generator), torch.rand(hidden_size(model), generator=generator)
    return Importance("taylor", heads, neurons, layers, queries, hidden=hidden)


def test_a_config_that_takes_no_other_number_of_heads_does_not_keep_them_all(tmp_path):
    """Phi-3 with longrope takes the head size from the width: all heads or none. All stay where they are near the share."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32, **factors}
    model = family_model("phi3", rope_parameters=rope, hidden_size=64)
    near, far = (plan_pruning(model, random_importance(model), keep, uniform=True) for keep in (0.85, 0.5))
    assert {len(row.heads) for row in near.layers} == {4} and why_not_stock(prune(model, near)) is None
    assert {len(row.heads) for row in far.layers} == {2}
    student = prune(model, far)
    line = why_not_stock(student)
    assert line.startswith("Phi3Config refuses its sizes: ") and "short_factor" in line and "\n" not in line
    student.save_pretrained(tmp_path)
    assert why_not_stock(load_pretrained(tmp_path)) == line


@pytest.mark.parametrize(
    ("name", "units", "line"),
    [
        ("llama", "hidden 21", "LlamaConfig refuses its sizes: The hidden size (21) is not a multiple of"),
        ("llama", "heads 3", "LlamaConfig refuses its sizes: The hidden size (32) is not a multiple of"),
        (
            "bert",
            "heads 3",
            "BertForSequenceClassification refuses its sizes: The hidden size (32) is not a multiple of",
        ),
        (
            "bert",
            "heads 4",
            "BertConfig cannot say what it is: bert.encoder.layer.0.attention.self.attention_head_size",
        ),
        (
            "gemma2",
            "hidden 16",
            "Gemma2Config cannot say what it is: model.embed_tokens.scalar_embed_scale would be 4.0",
        ),
        ("llama", "uneven", "its layers keep different numbers of heads or neurons"),
        ("llama", "heads 0", "its layers have no attention or no FFN left"),
    ],
)
def test_why_a_student_is_not_stock_is_said_in_one_line(name, units, line):
    model = family_model(name)
    kind, _, count = units.partition(" ")
    heads = range(int(count)) if kind == "heads" else range(groups_of(model))
    rows = (LayerPlan(i, tuple(heads), tuple(range(64 - i * (kind == "uneven")))) for i in range(5))
    channels = tuple(range(int(count))) if kind == "hidden" else None
    found = why_not_stock(prune(model, PruningPlan(name, tuple(rows), hidden=channels)))
    assert found.startswith(line) and "\n" not in found and len(found) < 250
