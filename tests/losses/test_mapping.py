"""Which layer learns from which."""

import pytest

from distill_llm.architectures.lineage import LayerPlan
from distill_llm.common.errors import InputError
from distill_llm.losses.mapping import LayerPair, attention_pairs, hidden_pairs, relative_lineage

LINEAGE = (LayerPlan(1, (0, 2), (5, 6)), LayerPlan(2, (), (1,)), LayerPlan(4, (3,), ()))


def test_lineage_compares_a_hidden_state_with_the_input_of_the_layer_the_next_one_came_from():
    assert hidden_pairs("lineage", 3, 6, LINEAGE) == [(0, 1, None), (1, 3, None), (2, 5, None)]


def test_lineage_compares_attention_with_the_copied_heads_and_leaves_out_layers_without_heads():
    assert attention_pairs("lineage", 3, 6, LINEAGE) == [(0, 1, (0, 2)), (2, 4, (3,))]


def test_uniform_mapping_is_that_of_tinybert():
    assert hidden_pairs("uniform", 4, 12, None) == [(0, 2, None), (1, 5, None), (2, 8, None), (3, 11, None)]
    assert attention_pairs("uniform", 5, 12, None) == [LayerPair(i, t) for i, t in enumerate([2, 4, 7, 9, 11])]


def test_last_and_explicit_pairs():
    assert hidden_pairs("last", 3, 6, LINEAGE) == [(2, 5, None)]
    assert attention_pairs([(0, 5), (1, 2)], 3, 6, LINEAGE) == [(0, 5, None), (1, 2, None)]


def test_lineage_in_a_pruned_teacher_is_counted_in_its_own_layers_and_heads():
    teacher = (LayerPlan(1, (0, 2, 3), (4, 5, 6)), LayerPlan(4, (1, 3), (0,)))
    student = (LayerPlan(1, (2, 3), (6,)), LayerPlan(4, (3,), ()))
    assert relative_lineage(student, teacher) == (
        LayerPlan(0, (1, 2), (2,), (1, 2)),
        LayerPlan(1, (1,), (), (1,)),
    )
    with pytest.raises(InputError, match="teacher"):
        relative_lineage((LayerPlan(2, (), ()),), teacher)


def test_groups_of_a_grouped_query_model_are_all_of_their_query_heads_or_those_that_are_left():
    rows = (LayerPlan(1, (0, 2), (5,)), LayerPlan(2, (1,), (5,), (3,)))
    assert attention_pairs("lineage", 2, 6, rows, group_size=2) == [(0, 1, (0, 1, 4, 5)), (1, 2, (3,))]
    teacher = (LayerPlan(1, (0, 1, 2), (5,), (0, 1, 3, 4, 5)), LayerPlan(2, (1, 2), (5,)))
    found = relative_lineage(rows, teacher, group_size=2)
    assert found == (LayerPlan(0, (0, 2), (0,), (0, 1, 3, 4)), LayerPlan(1, (0,), (0,), (1,)))
    with pytest.raises(InputError, match="teacher"):
        relative_lineage((LayerPlan(1, (1,), (5,)),), teacher, group_size=2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: hidden_pairs("lineage", 2, 6, None), "losses.hidden.layers.*uniform"),
        (lambda: attention_pairs([(0, 6)], 2, 6, None), "losses.attention.layers.*teacher layers 0 to 5"),
        (lambda: attention_pairs("lineage", 3, 3, LINEAGE), "teacher"),
    ],
)
def test_a_mapping_that_cannot_be_is_one_clear_line(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
