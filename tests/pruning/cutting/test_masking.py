"""What masks leave behind: nothing."""

import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import linears_in, plan_of, without

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.cutting.surgery import prune


def test_the_mask_goes_when_the_context_ends_even_by_an_error():
    model = tiny_model(layers=5)
    with pytest.raises(RuntimeError), masked(model, plan_of(model)):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_plan_that_does_not_fit_is_refused_before_any_mask():
    model = tiny_model(layers=5)
    rows = [(0, (0,), (0,)), (1, (9,), (0,))]
    with pytest.raises(InputError, match="source=1"), masked(model, plan_of(model, rows)):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_flow_to_what_is_kept_and_not_to_what_is_masked():
    model = tiny_model()
    with masked(model, without(model, 1, "neurons", 7)):
        model(**random_batch(model)).loss.backward()
    gradient = linears_in(model)[1][1].weight.grad
    assert torch.count_nonzero(gradient[:, 7]) == 0
    assert all(torch.count_nonzero(gradient[:, j]) for j in range(64) if j != 7)


def test_a_pruned_model_can_be_masked_again():
    dense = tiny_model(layers=5)
    model = prune(dense, plan_of(dense))
    plan, batch = plan_of(model, [(0, (1,), (3, 4)), (1, (), range(5)), (2, (0, 3), ())]), random_batch(dense)
    with torch.no_grad():
        expected = prune(model, plan)(**batch).logits
        with masked(model, plan):
            found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
