"""Sizes, costs and module tables against parameters counted one by one."""

import pytest
from helpers import FAMILIES, tiny_model
from pruning_examples import UNEVEN, flops_of, layer_params, plan_of, without
from transformers import AutoConfig, AutoModel

from distill_llm.errors import InputError
from distill_llm.pruning.modeling_pruned import family_of, layers_of, pack_indices, unpack_indices
from distill_llm.pruning.structure import head_size_of, layer_shapes, unit_costs
from distill_llm.pruning.surgery import prune


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_costs_the_parameters_that_are_gone_without_it(family):
    model = tiny_model(family)
    costs, all_of_them = unit_costs(model), layer_params(model)
    for kind, cost in (("heads", costs.head), ("neurons", costs.neuron)):
        assert all_of_them - layer_params(prune(model, without(model, 1, kind, 2))) == cost
    assert layer_params(prune(model, plan_of(model, [(0, (), ())]))) == costs.rest
    assert costs.of(layer_shapes(model)) == all_of_them


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_costs_the_flops_that_are_gone_without_it(family):
    model = tiny_model(family, attn_implementation="eager")
    costs, tokens = unit_costs(model, "flops", sequence_length=12), 12
    whole = flops_of(model, tokens)
    assert whole == tokens * costs.of(layer_shapes(model))
    for kind, cost in (("heads", costs.head), ("neurons", costs.neuron)):
        assert whole - flops_of(prune(model, without(model, 1, kind, 2)), tokens) == tokens * cost


def test_sizes_of_a_pruned_model_are_its_own_and_the_head_size_stays():
    model = tiny_model(layers=5)
    pruned = prune(model, plan_of(model))
    assert layer_shapes(pruned) == [(len(heads), len(neurons)) for _, heads, neurons in UNEVEN]
    assert head_size_of(pruned) == head_size_of(model) == 8


def test_costs_do_not_depend_on_which_layer_has_lost_its_attention():
    model = tiny_model(layers=5)
    pruned = prune(model, plan_of(model, [(1, (), range(9)), *UNEVEN[2:]]))
    assert unit_costs(pruned) == unit_costs(model)


def test_an_unknown_cost_is_refused():
    with pytest.raises(InputError, match="cost: got 'flop'; accepted: 'flops'"):
        unit_costs(tiny_model(), "flop")


def test_a_family_without_a_row_gets_a_line_that_says_how_to_add_one():
    model = AutoModel.from_config(
        AutoConfig.for_model("mpnet", hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="mpnet.*FAMILIES in distill_llm/pruning/modeling_pruned.py") as caught:
        family_of(model)
    assert "\n" not in str(caught.value)
    assert len(layers_of(model)) == 2, "layers are found without a row"


def test_a_quantized_model_is_refused():
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(InputError, match="prune first, then quantize"):
        layer_shapes(model)


@pytest.mark.parametrize(
    ("indices", "text"), [((), ""), ((4,), "4"), ((0, 3, 4, 5), "0,3-5"), ((0, 1, 10, 11, 13), "0-1,10-11,13")]
)
def test_indices_are_written_as_ranges_and_read_back(indices, text):
    assert pack_indices(indices) == text
    assert unpack_indices(text) == indices
