"""Rounded models: torchao's settings against the formula of a scheme, pruned students saved and loaded, what is imitated."""

import copy

import pytest
import torch
from builders.families import family_model
from builders.models import random_batch, tiny_model
from builders.pruning import plan_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distill_llm.architectures.families import layers_of
from distill_llm.measuring.counting import count_flops, count_params, weights_memory
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.quantizing.rounding import bytes_in, bytes_of, imitate, linears_of, quantize
from distill_llm.quantizing.scheme import Scheme

SCHEMES = [
    Scheme(8),
    Scheme(8, group_size=8),
    Scheme(8, symmetric=False),
    Scheme(8, activations=True),
    Scheme(8, activations=True, symmetric=False),
    Scheme(8, activations=True, group_size=8),
    Scheme(8, activations=True, smooth=0.5),
    Scheme(4),
    Scheme(4, group_size=8),
    Scheme(4, symmetric=False, group_size=8),
    Scheme(4, activations=True),
    Scheme(4, activations=True, symmetric=False, group_size=8),
]
UNEVEN = ((0, (1, 3), range(8, 40)), (1, (), range(0, 64, 2)), (3, range(4), ()), (4, (2,), range(16)))
"""Widths that 8 divides: layer 2 is gone, layer 1 has no attention, layer 3 no FFN."""


def uneven_student(family: str = "bert"):
    if family == "bert":
        teacher = tiny_model("bert", layers=5)
        return prune(teacher, plan_of(teacher, UNEVEN)), random_batch(teacher, labels=False)
    torch.manual_seed(0)
    teacher = family_model(family)
    groups = getattr(teacher.config, "num_key_value_heads", 4)
    rows = ((0, range(groups - 1), range(16)), (1, range(groups), range(24)))
    return prune(teacher, plan_of(teacher, rows)), random_batch(teacher, labels=False)


def assert_rounded(before: torch.Tensor, after: torch.Tensor, scheme: Scheme) -> None:
    """Every weight of a group is s (q - z) with the nearest whole q of b bits, s and z by the formula in plain arithmetic."""
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    groups = (-1, scheme.group_size or before.shape[1])
    rows, found = (each.double().unflatten(1, groups) for each in (before, after))
    least, most = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        scale, zero = torch.maximum(-least, most) / ((high - low) / 2), torch.tensor(0.0)
    else:
        scale = (most - least) / (high - low)
        zero = (low - (least / scale).round()).clamp(low, high)
    q = found / scale + zero
    torch.testing.assert_close(q, q.round(), rtol=0, atol=2e-3)
    assert q.min() > low - 0.01 and q.max() < high + 0.01 and len(q.round().unique()) > 0.5 * (high - low)
    inner = (q > low + 0.5) & (q < high - 0.5)
    off = (rows - found).abs() / scale
    assert off[inner].max() < 0.501 and off.max() < 1.001


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [each for each in SCHEMES if each.smooth is None], ids=lambda each: each.words)
def test_weights_are_rounded_by_the_formula_and_nothing_else_changes(scheme):
    model = tiny_model()
    rounded = quantize(model, scheme)
    names, before = linears_of(model), dict(model.named_parameters())
    assert len(names) == 3 * 6  # query, key, value, output, two of the FFN
    for name, after in rounded.named_parameters():
        if name.removesuffix(".weight") in names:
            assert_rounded(before[name].detach(), after.dequantize(), scheme)
        else:
            assert torch.equal(after, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda each: each.words)
def test_an_uneven_student_saved_in_fewer_bits_loads_bit_equal_here_and_in_transformers(scheme, tmp_path):
    student, batch = uneven_student()
    rounded = quantize(student, scheme, [batch])
    with torch.no_grad():
        whole, expected = student(**batch).logits, rounded(**batch).logits
    apart = (whole - expected).abs().max()
    assert 0 < apart < (0.05 if scheme.bits == 8 else 0.5) * whole.abs().max()
    rounded.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (ours, theirs):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**batch).logits, expected)
    assert count_params(ours) == count_params(student)
    assert count_flops(ours, 2, 8) == count_flops(student, 2, 8)
    inside = sum(student.get_submodule(name).weight.numel() for name in linears_of(student))
    scales = 5 * inside // (scheme.group_size or 1)  # four bytes of a scale, one of a zero point
    assert weights_memory(student) - weights_memory(ours) >= 3 * inside - scales - 64 * 4 * 50
    assert bytes_in(tmp_path) < bytes_of(student)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "roberta"])
def test_cut_decoders_and_encoders_of_other_families_load_bit_equal(family, tmp_path):
    student, batch = uneven_student(family)
    for number, scheme in enumerate((Scheme(8, activations=True), Scheme(4, group_size=4))):
        rounded = quantize(student, scheme)
        rounded.save_pretrained(tmp_path / str(number))
        ours = load_pretrained(tmp_path / str(number))
        with torch.no_grad():
            expected = rounded(**batch)[0]
            assert torch.equal(ours(**batch)[0], expected)
            if family == "llama" and hasattr(rounded, "lm_head"):
                theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), trust_remote_code=True)
                assert torch.equal(theirs(**batch)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [each for each in SCHEMES if not each.learning_faults("")], ids=lambda each: each.words
)
def test_what_is_imitated_in_training_is_what_rounding_gives_and_gradients_pass(scheme):
    student, batch = uneven_student()
    learner = imitate(copy.deepcopy(student), scheme)
    assert learner.state_dict().keys() == student.state_dict().keys()
    logits = learner(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, quantize(student, scheme)(**batch).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, student(**batch).logits, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    for name in linears_of(learner):
        gradient = learner.get_submodule(name).weight.grad
        assert gradient is not None and (gradient.abs().sum() > 0 or ".key" in name or ".query" in name), name
    # What was learnt is in floating point still, and rounds to the same as if it had never been imitated.
    plain = copy.deepcopy(student)
    plain.load_state_dict(learner.state_dict())
    with torch.no_grad():
        assert torch.equal(quantize(plain, scheme)(**batch).logits, quantize(student, scheme)(**batch).logits)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_only_the_rounding_to_learn_and_learns_it():
    """In floating point its loss and gradient are 0; under rounding they are not, and what rounding costs goes down."""
    teacher, scheme = tiny_model().eval(), Scheme(4)
    with torch.no_grad():
        for name in linears_of(teacher):
            teacher.get_submodule(name).weight.mul_(3)  # so that a step of 4 bits counts
    batch = random_batch(teacher, labels=False)
    with torch.no_grad():
        theirs = teacher(**batch).logits

    def apart(model) -> torch.Tensor:
        return (model(**batch).logits - theirs).square().mean()

    def rounded(model) -> float:
        with torch.no_grad():
            return apart(quantize(model, scheme)).item()

    student = imitate(copy.deepcopy(teacher), scheme)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(40):
        optimizer.zero_grad()
        apart(student).backward()
        optimizer.step()
    learnt = copy.deepcopy(teacher)
    learnt.load_state_dict(student.state_dict())
    assert apart(teacher) == 0 < rounded(teacher)
    assert rounded(learnt) < 0.25 * rounded(teacher)


@pytest.mark.slow
def test_smoothing_moves_the_range_of_each_channel_by_the_formula_of_its_paper():
    model, alpha = tiny_model(), 0.3
    batches = [random_batch(model, labels=False, padded=False, seed=seed) for seed in range(3)]
    name, seen = linears_of(model)[4], []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    weight = quantize(model, Scheme(8, activations=True, smooth=alpha), batches).get_submodule(name).weight
    most = torch.cat([each.flatten(0, 1) for each in seen]).abs().amax(0)
    before = model.get_submodule(name).weight.detach()
    factor = most**alpha / before.abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(1 / weight.act_pre_scale, factor, rtol=1e-4, atol=1e-6)
    assert_rounded(before * factor, weight.dequantize(), Scheme(8))


@pytest.mark.slow
def test_layers_that_have_lost_everything_stay_as_they_are():
    student, _ = uneven_student()
    empty = {name for name, each in student.named_modules() if type(each).__name__ == "EmptyLinear"}
    assert empty and not empty & set(linears_of(student))
    rounded = quantize(student, Scheme(4, group_size=8))
    assert type(layers_of(rounded)[0].intermediate.dense.weight).__name__ == "IntxUnpackedToInt8Tensor"
    for name in empty:
        assert type(rounded.get_submodule(name).weight) is torch.nn.Parameter
