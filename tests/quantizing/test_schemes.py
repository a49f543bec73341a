"""What a scheme refuses: itself, a model, and what pruning may leave."""

import pytest
import torch
from builders.families import family_model
from builders.models import tiny_model

from distill_llm.common.errors import InputError
from distill_llm.quantizing.refusals import cut_faults, model_faults
from distill_llm.quantizing.rounding import imitate, quantize
from distill_llm.quantizing.scheme import Scheme


@pytest.mark.parametrize(
    ("scheme", "line"),
    [
        (Scheme(3), "bits: got 3; accepted: 8 or 4"),
        (Scheme(8, group_size=1), "group_size: got 1; .*2 or more"),
        (Scheme(8, smooth=0.5), "smooth: got 0.5; remove it: SmoothQuant is for 8 bits with activations"),
        (Scheme(4, True, smooth=0.5), "smooth: got 0.5; remove it"),
        (Scheme(8, True, group_size=8, smooth=0.5), "smooth: got 0.5; remove it"),
        (Scheme(8, True, smooth=1.5), "smooth: got 1.5; .*from 0 to 1"),
    ],
)
def test_a_scheme_that_contradicts_itself_is_refused_in_one_line(scheme, line):
    with pytest.raises(InputError, match=f"^{line}") as error:
        quantize(None, scheme)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_without_torchao_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [fault] = Scheme(8).faults("quantize")
    assert str(fault) == "quantize.bits: got 8; install torchao (pip install 'distill_llm[quantize]'), or remove it"


@pytest.mark.parametrize("scheme", [Scheme(8, symmetric=False), Scheme(8, True, smooth=0.5)])
def test_what_cannot_be_imitated_cannot_be_learnt_under(scheme):
    with pytest.raises(InputError, match="^scheme: got .*; remove either: training imitates symmetric rounding"):
        imitate(tiny_model(), scheme)


@pytest.mark.slow
def test_a_group_must_divide_every_width_that_is_read():
    model = tiny_model(hidden=32, intermediate=72)
    assert model_faults(model, Scheme(4, group_size=8), "model", "it") == []
    [fault] = model_faults(model, Scheme(4, group_size=16), "model", "it")
    assert str(fault).startswith("group_size: got 16; take a size that divides 72, inputs of linear layers of it")
    with pytest.raises(InputError, match=r"^group_size: got 16"):
        quantize(model, Scheme(4, group_size=16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("units", "step", "lines"),
    [
        (("heads", "neurons"), 8, []),
        (("layers",), 1, []),
        (("neurons",), 12, ["pruning.round_to to a multiple"]),
        (("hidden",), 4, ["pruning.round_to to a multiple"]),
        (("heads",), 1, []),
    ],
)
def test_a_group_must_divide_whatever_pruning_may_leave(units, step, lines):
    found = cut_faults(tiny_model(), Scheme(4, group_size=8), units, step, "group_size")  # heads of 8 channels
    assert len(found) == len(lines) and all(line in str(fault) for line, fault in zip(lines, found, strict=True))
    assert cut_faults(tiny_model(), Scheme(4), units, step, "group_size") == []


@pytest.mark.slow
def test_a_group_wider_than_a_head_is_refused_where_heads_go():
    [fault] = cut_faults(tiny_model(), Scheme(4, group_size=16), ("heads",), 16, "group_size")
    assert "take a size that divides 8, the width of a head" in str(fault)


@pytest.mark.slow
def test_layers_that_are_not_of_linears_and_models_that_are_rounded_already_are_refused():
    with torch.device("meta"):
        gpt2 = family_model("gpt2")
    with pytest.raises(InputError, match=r"^model: got 'GPT2.*nn.Linear, which alone torchao rounds"):
        quantize(gpt2, Scheme(8))
    rounded = quantize(tiny_model(), Scheme(8))
    with pytest.raises(InputError, match=r"^model: .*it is quantized already"):
        quantize(rounded, Scheme(8))


@pytest.mark.slow
def test_smoothing_without_rows_is_refused():
    with pytest.raises(InputError, match="^batches: got 'none'; accepted: batches of inputs, which `smooth`"):
        quantize(tiny_model(), Scheme(8, True, smooth=0.5))
