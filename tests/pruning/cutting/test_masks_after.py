"""The masks of a sparse model after a cut."""

import pytest
import torch
from builders.pruning import plan_of
from builders.trainers import causal_model

from distill_llm.common.errors import InputError
from distill_llm.models.masks import Masks, linears_of
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.cutting.zeros import masks_after
from distill_llm.pruning.plan import full_plan


@pytest.fixture(scope="module")
def sparse():
    model, draw = causal_model(), torch.Generator().manual_seed(0)
    kept = {name: torch.rand(each.weight.shape, generator=draw) < 0.5 for name, each in linears_of(model).items()}
    masks = Masks(kept, "2:4", "wanda")
    masks.apply(model)
    return model, masks


def test_masks_follow_the_rows_and_columns_that_stay(sparse):
    model, masks = sparse
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Two groups of two queries each; the first layer goes.
    found = masks_after(model, masks, plan_of(model, [(1, [1], [0, 5, 9])]))
    size = model.config.hidden_size // model.config.num_attention_heads
    groups = model.config.num_key_value_heads
    queries = model.config.num_attention_heads // groups * size
    whole = {
        path: masks.kept[f"model.layers.1.{path}"] for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    }
    out, down = (masks.kept[f"model.layers.1.{path}"] for path in ("self_attn.o_proj", "mlp.down_proj"))
    expected = {
        "self_attn.q_proj": whole["self_attn.q_proj"][queries : 2 * queries],
        "self_attn.k_proj": whole["self_attn.k_proj"][size : 2 * size],
        "mlp.up_proj": whole["mlp.up_proj"][[0, 5, 9]],
        "self_attn.o_proj": out[:, queries : 2 * queries],
        "mlp.down_proj": down[:, [0, 5, 9]],
    }
    for path, mask in expected.items():
        assert torch.equal(found.kept[f"model.layers.0.{path}"], mask), path
    assert len(found.kept) == 7 and (found.pattern, found.criterion) == ("unstructured", "wanda")
    found.check(prune(model, plan_of(model, [(1, [1], [0, 5, 9])])))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_where_all_units_stay_the_masks_do(sparse):
    model, masks = sparse
    found = masks_after(model, masks, full_plan(model))
    assert (found.pattern, found.criterion) == ("2:4", "wanda") and found.kept.keys() == masks.kept.keys()
    assert all(torch.equal(found.kept[name], mask) for name, mask in masks.kept.items())


def test_linears_without_a_mask_stay_whole_and_masks_of_another_model_are_refused(sparse):
    model, masks = sparse
    (name, mask), *_ = masks.kept.items()
    found = masks_after(model, Masks({name: mask}), full_plan(model))
    assert torch.equal(found.kept[name], mask) and found.zeros == int((~mask).sum())
    with pytest.raises(InputError, match="masks of this model"):
        masks_after(model, Masks({name: mask[:-1]}), full_plan(model))
