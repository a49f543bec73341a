"""Scales of units: the gradient by differences in float64, what is folded, what is held out, several processes."""

import copy

import pytest
import torch
from builders.families import family_batch, family_model, outputs_of, uneven_plan
from builders.grids import slow
from builders.processes import fork

from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.learning import scales as learning
from distill_llm.pruning.learning.scales import described_scales, fold_scales, learn_scales, scale_units, scaled
from distill_llm.pruning.learning.scaling import Scaling
from distill_llm.pruning.statistics.settings import CalibrationSettings

NAMES = ["llama", *slow("bert", "gpt2", "phi", "granite", "falcon", "olmo2", "llama-many-heads")]


def pair(name):
    model = family_model(name).double()
    return model, prune(model, uneven_plan(model))


def batches_of(model, count=3):
    return [family_batch(model, seed=seed) for seed in range(count)]


def divergence(model, student, batch):
    """The mean over outputs of KL(model || student), from whole forward passes."""
    found = []
    for each in (model, student):
        logits = outputs_of(each, batch).view(-1, each.config.vocab_size if causal(each) else each.config.num_labels)
        found.append(logits.double().log_softmax(-1))
    items = (found[0].exp() * (found[0] - found[1])).sum(-1)
    if causal(model):  # the last output of a row predicts nothing
        ends = batch["attention_mask"].sum(-1).cumsum(-1) - 1
        kept = torch.ones(len(items), dtype=torch.bool)
        kept[ends] = False
        items = items[kept]
    return items.mean().item()


def causal(model):
    return type(model).__name__.endswith(("CausalLM", "LMHeadModel"))


@pytest.mark.parametrize("name", NAMES)
def test_folded_scales_give_what_multiplied_units_give_and_ones_change_nothing(name):
    model, student = pair(name)
    batch = family_batch(model)
    plain = outputs_of(student, batch)
    scales = learn_scales(student, model, batches_of(model), Scaling(steps=4, learning_rate=0.3))
    assert torch.equal(outputs_of(student, batch), plain), "learning leaves the student as it was"
    assert (scales != 1).any()
    with scaled(student, scales):
        wanted = outputs_of(student, batch)
    fold_scales(student, torch.ones_like(scales))
    torch.testing.assert_close(outputs_of(student, batch), plain, rtol=0, atol=0)
    fold_scales(student, scales)
    torch.testing.assert_close(outputs_of(student, batch), wanted, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(wanted, plain, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", *slow("gpt2", "bert")])
def test_the_first_step_goes_against_the_gradient_found_by_differences(name):
    """Adam's first step is the rate, against the sign of the gradient."""
    model, student = pair(name)
    batch = family_batch(model)
    scales = learn_scales(student, model, [batch], Scaling(steps=1, learning_rate=0.01))
    torch.testing.assert_close((scales - 1).abs(), torch.full_like(scales, 0.01), rtol=1e-3, atol=1e-5)
    for unit in range(0, len(scales), 9):
        values = []
        for step in (1e-4, -1e-4):
            changed, factors = copy.deepcopy(student), torch.ones_like(scales, dtype=torch.float64)
            factors[unit] += step
            fold_scales(changed, factors)
            values.append(divergence(model, changed, batch))
        slope = values[0] - values[1]
        assert (scales[unit] < 1) == (slope > 0), unit


def test_what_was_multiplied_away_comes_back():
    model = family_model("llama").double()
    student, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    true = 1 + 0.3 * torch.randn(len(learn_scales(student, model, batches_of(model), Scaling(1))), generator=draw)
    fold_scales(student, 1 / true.double())
    batches = batches_of(model, 8)
    found = scale_units(student, model, batches[:6], batches[6:], Scaling(steps=60, learning_rate=0.05))
    assert found.folded and found.rows == 6
    assert found.after < 0.1 * found.before
    assert found.after == pytest.approx(
        torch.tensor([row_divergence(model, student, batch) for batch in batches[6:]]).mean().item(), rel=1e-3
    )


def row_divergence(model, student, batch):
    """The mean over rows of a batch."""
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(batch["input_ids"]))]
    return sum(divergence(model, student, row) for row in rows) / len(rows)


def test_scales_that_do_harm_on_held_out_rows_are_left_out():
    model, student = pair("llama")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    batches = batches_of(model, 3)
    found = scale_units(student, model, batches[:1], batches[1:], Scaling(steps=30, learning_rate=3.0))
    assert not found.folded and found.after > found.before
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_two_processes_learn_what_one_does(tmp_path):
    model, student = pair("llama")
    batches = [family_batch(model, batch=size, seed=size) for size in (3, 1)]  # one process has no row of the second
    how = Scaling(steps=4, learning_rate=0.05)
    alone = learn_scales(student, model, batches, how)

    def work(rank):
        torch.distributed.init_process_group("gloo")
        sharded = CalibrationSettings(sharded=True)
        torch.save(learn_scales(student, model, batches, how, settings=sharded), tmp_path / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    fork(work)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*both)
    torch.testing.assert_close(both[0], alone, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_not_finite_stop_it():
    model, student = pair("llama")
    with torch.no_grad():
        layers_of(student)[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="at step 1"):
        learn_scales(student, model, batches_of(model), Scaling(2))


@pytest.mark.parametrize("given", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}])
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(InputError, match=next(iter(given))):
        Scaling(**given)


def test_there_must_be_rows():
    model, student = pair("llama")
    with pytest.raises(InputError, match="dataloader"):
        learn_scales(student, model, [])


@pytest.mark.parametrize("name", ["llama", *slow("bert", "gpt2")])
def test_a_layers_activations_at_a_time_give_the_same_scales(name):
    model, student = pair(name)
    batches, how = batches_of(model), Scaling(steps=4, learning_rate=0.05)
    counted, found = [], []
    reader = next(module for module in layers_of(student)[0].modules() if not list(module.children()))
    reader.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    for checkpointing in (False, True):
        counted.clear()
        settings = CalibrationSettings(checkpointing=checkpointing)
        found.append(learn_scales(student, model, batches, how, settings=settings))
        assert counted == ([False, True] if checkpointing else [True]) * 4
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_factor_near_one_is_not_lost_in_16_bits():
    """In bf16 the number next to 1 is 1.0078: factors of 1.003 are 1 there, but move the weights on the mean."""
    model = family_model("llama").bfloat16()
    scales = torch.full_like(learn_scales(copy.deepcopy(model), model, batches_of(model, 1), Scaling(1)), 1.003)
    reader, read = layers_of(model)[0].mlp.down_proj, []
    reader.register_forward_hook(lambda module, args, output: read.append(args[0].double().abs().sum().item()))
    before = reader.weight.double().abs().sum().item()
    outputs_of(model, family_batch(model))
    with scaled(model, scales):
        outputs_of(model, family_batch(model))
    fold_scales(model, scales)
    assert reader.weight.dtype == torch.bfloat16
    assert reader.weight.double().abs().sum().item() / before == pytest.approx(1.003, abs=1e-3)
    assert read[1] / read[0] == pytest.approx(1.003, abs=1e-3)


@pytest.mark.parametrize(
    "means, folded, words",
    [
        ((0.5, float("nan")), False, "learnt and left out: divergence on 4 held-out rows 0.5 without, not finite with"),
        ((float("inf"), 0.25), True, "learnt: divergence on 4 held-out rows not finite without, 0.25 with them"),
    ],
)
def test_divergences_that_are_not_finite_are_null_and_never_better(monkeypatch, means, folded, words):
    model, student = pair("llama")
    rows = iter([torch.full((4,), mean) for mean in means])
    monkeypatch.setattr(learning, "row_divergences", lambda *_: next(rows))
    batches = batches_of(model, 2)
    record = scale_units(student, model, batches[:1], batches[1:], Scaling(1)).record()
    wanted = [mean if abs(mean) < 1 else None for mean in means]
    assert record == {"before": wanted[0], "after": wanted[1], "rows": 4, "folded": folded}
    assert words in described_scales(record)


def test_factors_that_are_not_finite_stop_it(monkeypatch):
    model, student = pair("llama")
    monkeypatch.setattr(learning, "_gradient", lambda s, m, batch, factors, _: (torch.ones(()), factors.detach() / 0))
    with pytest.raises(NotFinite, match="a scale of a unit is nan or infinite"):
        learn_scales(student, model, batches_of(model), Scaling(1))
