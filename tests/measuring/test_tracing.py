"""Steps without numbers hold what real steps hold, as torch's own profiler counts it."""

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import TERMS, causal_model
from torch.profiler import ProfilerActivity, profile

from distill_llm.losses.objective import parse_objective
from distill_llm.measuring.live import LiveStorages
from distill_llm.measuring.tracing import Traced
from distill_llm.pipeline.work import Shape, Step

SIZES = {"hidden": 64, "intermediate": 256, "vocab": 1000}


def models(head, dropout=0.0):
    """A teacher of four layers and a student of two."""
    if head == "causal-lm":
        sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 1000}
        return [causal_model(layers=layers, seed=layers, **sizes) for layers in (4, 2)]
    shares = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return [tiny_model(head=head, layers=layers, seed=layers, **SIZES, **shares) for layers in (4, 2)]


def profiled_peak(work):
    """The most bytes that torch's allocator of the CPU held at once beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("head", "terms", "settings"),
    [
        ("sequence-classification", "all", {"dropout": 0.1}),
        pytest.param("masked-lm", "labels", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("causal-lm", "all", {}, marks=pytest.mark.slow),
        ("causal-lm", "logits", {"precision": torch.bfloat16, "teacher_dtype": torch.bfloat16}),
    ],
)
def test_a_traced_step_holds_what_a_real_one_holds(head, terms, settings):
    settings = dict(settings)
    teacher, student = models(head, settings.pop("dropout", 0.0))
    shape, objective = Shape(rows=16, tokens=48), parse_objective(TERMS[terms])
    on_paper = Step(student.to("meta"), teacher.to("meta"), objective, **settings).traced(shape)
    teacher, student = models(head, 0.1 if student.config.to_dict().get("hidden_dropout_prob") else 0.0)
    step = Step(student, teacher, objective, **settings)
    work = step.on(student, teacher.to(settings.get("teacher_dtype")), shape, torch.device("cpu"))
    found = profiled_peak(work)
    assert on_paper.peak == pytest.approx(found, rel=0.1)
    held = sum(each.grad.nbytes for each in student.parameters() if each.grad is not None)
    assert on_paper.gradients == held
    assert held / 2 < on_paper.peak - on_paper.ungraded + held and on_paper.activations <= on_paper.ungraded


def test_a_traced_step_counts_what_a_formula_counts():
    teacher, student = (model.to("meta") for model in models("causal-lm"))
    shape = Shape(rows=2, tokens=32)
    on_paper = Step(student, teacher, parse_objective(TERMS["logits"])).traced(shape)
    tokens, predicted = 2 * 32, 2 * 31

    def layers(model):  # weights of linears, a multiply and an add each; both products of attention
        weights = sum(each.weight.numel() for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear))
        return len(model.model.layers) * 2 * 2 * 2 * 4 * 32 * 32 * 8, 2 * weights * tokens

    head = 2 * 1000 * 64
    (their_attention, their_linears), (attention, linears) = layers(teacher), layers(student)
    expected = their_attention + their_linears + 3 * linears + 3.5 * attention + (1 + 3) * head * predicted
    assert on_paper.flops == pytest.approx(expected, rel=0.05)


def test_a_model_of_any_size_is_traced_without_its_memory():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128000, "head_dim": 128}
    with torch.device("meta"):
        config = causal_model(layers=2).config
    config.update({**sizes, "num_attention_heads": 32, "num_key_value_heads": 8})
    with torch.device("meta"):
        model = type(causal_model(layers=1))._from_config(config)
    found = Step(model, None, parse_objective({"labels": {}})).traced(Shape(1, 64))
    assert isinstance(found, Traced)
    assert found.gradients == 4 * sum(each.numel() for each in model.parameters())
    assert found.peak > found.gradients > 5e9


def test_a_peak_can_be_told_without_some_of_the_storages():
    with LiveStorages([]) as live:
        first = torch.ones(100)
        second = torch.ones(50)
        number = live.number(first)
        del first
        third = torch.ones(25)
    assert live.peak == 600 and live.now == 300
    assert live.peak_without({number}) == second.nbytes + third.nbytes
