"""The gate every family passes: masked, pruned and zeroed by hand give the same outputs, with every head and with padding."""

import pytest
import torch
from helpers import FAMILIES, HEADS, random_batch, tiny_model
from pruning_examples import UNEVEN, layer_params, logits_of, plan_of, zeroed

from distill_llm.pruning.masking import masked
from distill_llm.pruning.modeling_pruned import FAMILIES as ROWS
from distill_llm.pruning.surgery import prune


def test_every_family_with_a_row_passes_through_the_gate():
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_masked_equals_pruned_equals_zeroed_by_hand(family, head):
    model = tiny_model(family, head, layers=5)
    plan, batch = plan_of(model), random_batch(model)
    if head == "base":
        del batch["labels"]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = prune(model, plan)
    valid = batch["attention_mask"].bool()

    def outputs(of):
        with torch.no_grad():
            result = of(**batch)
        found = logits_of(result)
        return found if found.dim() == 2 else found[valid]

    expected, whole = outputs(zeroed(model, plan)), outputs(model)
    with masked(model, plan):
        as_if = outputs(model)
    torch.testing.assert_close(as_if, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(pruned), expected, rtol=1e-5, atol=1e-5)
    assert (whole - expected).abs().max() > 0.05, "the plan changes the outputs"
    assert torch.equal(outputs(model), whole), "nothing of the mask stays behind"
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    sizes = [(len(heads), len(neurons)) for _, heads, neurons in UNEVEN]
    head_cost, neuron_cost = 4 * 8 * 32 + 3 * 8, 2 * 32 + 1
    assert layer_params(pruned) == sum(h * head_cost + n * neuron_cost + 6 * 32 for h, n in sizes), "weights are gone"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_models_run_and_learn_with_any_attention(family, attention):
    model = tiny_model(family, layers=5, attn_implementation=attention)
    student = prune(model, plan_of(model)).train()
    assert student.config._attn_implementation == attention
    student(**random_batch(model)).loss.backward()
    no_output = [n for n, p in student.named_parameters() if p.numel() and p.grad is None]
    # The pooler of a base model is not part of a classification head in some families; here every weight takes part.
    assert no_output == []
