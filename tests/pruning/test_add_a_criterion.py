"""A criterion of a user's own, as docs/development/add-a-criterion.md adds it: one function, and nothing else changes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import linears_in
from builders.recipes import recipe_for
from torch.nn import functional as F

from distill_llm import collect_statistics, score
from distill_llm.common.errors import InputError
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pruning.criteria import CRITERIA, criterion
from distill_llm.recipe.recipe import parse_recipe

HEADS, SIZE = 4, 8


@pytest.fixture
def page():
    """The page's blocks of Python; what they register is forgotten after the test."""
    before = dict(CRITERIA)
    text = (Path(__file__).parents[2] / "docs" / "development" / "add-a-criterion.md").read_text()
    yield re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    CRITERIA.clear()
    CRITERIA.update(before)


def multiplied(modules, masks):
    """Hooks that multiply what enters linears by masks over their channels."""
    return [
        module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask, *args[1:]))
        for module, mask in zip(modules, masks, strict=True)
    ]


def by_hand(model, batch) -> torch.Tensor:
    """(layers, heads): root mean square over examples of the gradient of a mask on each head, one example at a time."""
    outputs = [attention for attention, _ in linears_in(model)]
    effects = []
    for row in range(len(batch["labels"])):
        example = {name: values[row : row + 1] for name, values in batch.items()}
        masks = [torch.ones(HEADS, requires_grad=True) for _ in outputs]
        hooks = multiplied(outputs, [mask.repeat_interleave(SIZE) for mask in masks])
        logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits
        F.cross_entropy(logits, example["labels"]).backward()
        for hook in hooks:
            hook.remove()
        effects.append(torch.stack([mask.grad for mask in masks]))
    model.zero_grad()
    return torch.stack(effects).square().mean(0).sqrt()


def test_the_page_adds_a_criterion_that_scores_plans_and_prunes(page, tmp_path):
    model = tiny_model(layers=3, intermediate=8)  # most of the cost is in heads
    batch = random_batch(model, batch=6)
    expected = by_hand(model, batch)
    names = {"model": model, "batches": [batch]}
    for block in page:
        exec(block, names)

    torch.testing.assert_close(torch.stack(names["scores"].heads), expected, rtol=1e-4, atol=1e-7)
    kept = [(row.source, head) for row in names["plan"].layers for head in row.heads]
    best = expected.flatten().topk(len(kept)).indices.tolist()
    assert kept == [divmod(place, HEADS) for place in sorted(best)] and 0 < len(kept) < 3 * HEADS

    masks = [torch.zeros(HEADS) for _ in expected]
    for layer, head in (divmod(place, HEADS) for place in best):
        masks[layer][head] = 1
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        pruned = names["student"](**inputs).logits
        hooks = multiplied([a for a, _ in linears_in(model)], [mask.repeat_interleave(SIZE) for mask in masks])
        torch.testing.assert_close(pruned, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()

    pruning = {"keep": 0.5, "units": ["heads"], "criterion": "rms_effect", "compensate": False}
    recipe = parse_recipe(recipe_for(tmp_path, pruning=pruning))
    cut = Cutter(recipe, lambda number: [batch]).cut(model, model, 0.5)
    assert cut.plan.layers == names["plan"].layers, "a recipe collects what the criterion needs"


def test_checks_and_messages_know_the_new_criterion(page, tmp_path):
    wrong = {"keep": 0.5, "criterion": "rms_efect"}
    with pytest.raises(InputError) as before:
        parse_recipe(recipe_for(tmp_path, pruning=wrong))
    assert "rms_effect" not in str(before.value)
    exec(page[0], {})
    with pytest.raises(InputError, match="pruning.criterion: got 'rms_efect'; accepted: 'rms_effect' .the nearest."):
        parse_recipe(recipe_for(tmp_path, pruning=wrong))
    statistics = collect_statistics(tiny_model(), [random_batch(tiny_model())], loss=None)
    with pytest.raises(InputError, match="criterion: got 'rms_effect'; accepted: statistics collected with a loss"):
        score(statistics, "rms_effect")
    with pytest.raises(InputError, match="criterion: got 'rms_effect'; set it to fisher or gisp if units has ffn"):
        parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "criterion": "rms_effect", "units": ["ffn", "heads"]}))


def test_a_criterion_of_layers_ranks_nothing_else(page, tmp_path):
    @criterion("last_first", layers_only=True)
    def last_first(statistics):
        return -torch.arange(len(statistics.layers.magnitude), dtype=torch.float32)

    model = tiny_model(layers=3)
    found = score(collect_statistics(model, [random_batch(model)], loss=None), "last_first")
    assert found.layers.tolist() == [0, -1, -2] and found.heads == ()
    with pytest.raises(InputError, match=r"pruning.units: got \['heads', 'neurons'\]; set them to \[layers\]"):
        parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "criterion": "last_first"}))


def test_scores_of_a_comparable_criterion_compete_over_all_kinds(page, tmp_path):
    @criterion("half_fisher", needs=["gradients"], comparable=True)
    def half_fisher(units, seen):
        return units.fisher / seen.examples / 2

    model = tiny_model()
    statistics = collect_statistics(model, [random_batch(model)])
    assert score(statistics, "half_fisher").comparable(["heads", "neurons"])
    for units in (["ffn", "heads"], ["heads", "neurons"]):
        parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "criterion": "half_fisher", "units": units}))
    with pytest.raises(InputError, match="set it to fisher, gisp or half_fisher if"):
        parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "criterion": "wanda", "units": ["ffn", "heads"]}))


def test_a_taken_name_and_an_unknown_need_are_refused(page):
    with pytest.raises(ValueError, match="criterion 'fisher' exists already: choose another name"):
        criterion("fisher")(lambda units, seen: units.fisher)
    with pytest.raises(
        ValueError, match="unknown needs .'gradient'.; the needs are activations, gradients, weight_gradients, refit,"
    ):
        criterion("mine", needs=["gradient"])
    with pytest.raises(ValueError, match=r"^criterion 'mine': needs is a list: needs=\['gradients'\]"):
        criterion("mine", needs="gradients")


def test_a_criterion_that_reads_what_it_did_not_declare_is_refused_even_where_the_statistics_have_it(page):
    model = tiny_model()
    statistics = collect_statistics(model, [random_batch(model)])

    @criterion("undeclared")
    def undeclared(units, seen):
        return units.fisher

    @criterion("by_activation", needs=["activations"])
    def by_activation(units, seen):
        return units.activation + units.magnitude * units.taylor

    @criterion("by_loss", needs=["gradients"])
    def by_loss(units, seen):
        return units.fisher * units.activation

    @criterion("of_layers", layers_only=True)
    def of_layers(statistics):
        return statistics.layers.fisher

    @criterion("of_kinds", layers_only=True)
    def of_kinds(statistics):
        return torch.stack([row.taylor.sum() for row in statistics.units["heads"]])

    @criterion("of_heads", needs=["gradients"], layers_only=True)
    def of_heads(statistics):
        return torch.stack([row.fisher.sum() + row.wanda.sum() for row in statistics.heads])

    with pytest.raises(InputError, match=r"^criterion: got 'undeclared'; declare needs=\['gradients'\] .*reads fisher"):
        score(statistics, "undeclared")
    with pytest.raises(InputError, match=r"^criterion: got 'by_activation'; declare needs=\['gradients'\] .*taylor"):
        score(statistics, "by_activation")
    with pytest.raises(InputError, match="^criterion: got 'of_layers'; declare .*reads fisher"):
        score(statistics, "of_layers")
    with pytest.raises(InputError, match="^criterion: got 'of_kinds'; declare .*reads taylor"):
        score(statistics, "of_kinds")
    expected = statistics.heads[0].fisher * statistics.heads[0].activation
    assert torch.equal(score(statistics, "by_loss").heads[0], expected)
    assert len(score(statistics, "of_heads").layers) == len(statistics.heads)


@pytest.mark.parametrize(
    "returned, words",
    [
        (lambda values: values * float("nan"), "it returned nan or infinity for 4 of them"),
        (lambda values: values / 0, "it returned nan or infinity for 4 of them"),
        (lambda values: values.mean(), r"it returned a tensor of shape \(\)"),
        (lambda values: values[1:], r"it returned a tensor of shape \(3,\)"),
        (lambda values: values.tolist(), "it returned a list"),
    ],
)
def test_scores_are_a_finite_number_for_each_unit(page, returned, words):
    criterion("mine")(lambda units, seen: returned(units.magnitude))
    criterion("of_layers", layers_only=True)(lambda statistics: returned(statistics.layers.magnitude))
    model = tiny_model(layers=4)
    statistics = collect_statistics(model, [random_batch(model)], loss=None)
    with pytest.raises(InputError, match=f"^criterion: got 'mine'; return .* 4 finite scores for the 4 heads: {words}"):
        score(statistics, "mine")
    with pytest.raises(InputError, match=f"^criterion: got 'of_layers'; return .* for the 4 layers: {words}"):
        score(statistics, "of_layers")


def test_what_recipes_read_of_criteria_needs_no_torch():
    code = "import sys, distill_llm.recipe.recipe, distill_llm.pruning.criteria; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
