"""Gradients of both models compared: values and their slopes against finite differences in float64."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows, step_gradient, student_of_rows, trainer_of, with_lora

from distill_llm.architectures.lineage import LayerPlan
from distill_llm.common.errors import InputError
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms.term import Use


def models(**settings):
    fixed = {"num_labels": 5, **NO_DROPOUT, **settings}
    return tiny_model(layers=2, **fixed), tiny_model(layers=3, seed=1, **fixed)


def value_of(student, teacher, batch, of, layer, channels=slice(None)):
    """The mean over examples, in float64, by a backward pass of each model alone; in some channels of the teacher."""
    found = []
    with torch.no_grad():
        best = teacher(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.argmax(-1)
    for model in (student, teacher):
        kept = []

        def keep(module, args, output=None, kept=kept):
            states = (args[0] if output is None else output).detach().requires_grad_()
            kept.append(states)
            return (states, *args[1:]) if output is None else states

        layers = model.bert.encoder.layer
        if layer is None:
            handle = layers[0].register_forward_pre_hook(keep)
        else:
            handle = layers[layer[model is teacher]].register_forward_hook(keep)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        handle.remove()
        if of == "loss":
            value = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        else:
            value = sum(row[place] for row, place in zip(logits, best, strict=True))
        (gradient,) = torch.autograd.grad(value, kept)
        chosen = channels if model is teacher else slice(None)
        found.append([row[mask.bool()][:, chosen] for row, mask in zip(gradient, batch["attention_mask"], strict=True)])
    total = 0.0
    for own, source in zip(*found, strict=True):
        if of == "loss":
            total += ((own - source) ** 2).sum() / 2
        else:
            total += ((own / own.norm() - source / source.norm()) ** 2).sum()
    return float(total) / len(found[0])


@pytest.mark.parametrize(
    "of, layers",
    [
        ("jacobian", "embeddings"),
        ("loss", [[0, 1]]),
        pytest.param("loss", "embeddings", marks=pytest.mark.slow),
    ],
)
def test_value_and_slope_are_those_of_finite_differences(tmp_path, of, layers):
    student, teacher = models()
    data = rows(student)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert (
        student(**inputs).logits.argmax(-1) != teacher(**inputs).logits.argmax(-1)
    ).any()  # whose class it is matters
    losses = {"gradients": {"of": of, "layers": layers}}
    gradients, log = step_gradient(tmp_path, student, teacher, data, losses)
    layer = None if layers == "embeddings" else layers[0]
    twin, source = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    assert log["loss/gradients"] == pytest.approx(value_of(twin, source, batch, of, layer), rel=1e-4)
    names = ["classifier.weight", "bert.encoder.layer.1.attention.self.query.weight"]
    names += (
        [] if layer else ["bert.encoder.layer.0.intermediate.dense.weight", "bert.embeddings.word_embeddings.weight"]
    )
    for name in names:
        weight, slope = twin.get_parameter(name), gradients[name]
        place = divmod(int(slope.abs().argmax()), slope.shape[1])
        both = []
        with torch.no_grad():
            before = weight[place].clone()
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] = before + step
            both.append(value_of(twin, source, batch, of, layer))
        with torch.no_grad():
            weight[place] = before
        expected = (both[0] - both[1]) / 2e-5
        assert float(slope[place]) == pytest.approx(expected, rel=2e-3, abs=1e-6), name


def test_pairs_of_layers_are_averaged_in_the_channels_that_a_cut_student_kept(tmp_path):
    _, teacher = models()
    kept = (*range(3, 11), *range(16, 32))
    student = student_of_rows(teacher, [LayerPlan(layer, (0, 1, 2, 3), tuple(range(64))) for layer in (0, 2)], kept)
    data = rows(student)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    pairs = [[0, 1], [1, 2]]
    _, log = step_gradient(tmp_path, student, teacher, data, {"gradients": {"layers": pairs}})
    twins = [copy.deepcopy(each).double() for each in (student, teacher)]
    values = [value_of(*twins, batch, "loss", pair, list(kept)) for pair in pairs]
    assert log["loss/gradients"] == pytest.approx(sum(values) / 2, rel=1e-4)


def test_the_teacher_gets_no_gradient_and_other_terms_are_as_without(tmp_path):
    student, teacher = models()
    data = rows(student)
    other = {"logits": {}, "hidden": {"layers": "uniform"}}
    alone, log = step_gradient(tmp_path, student, teacher, data, other)
    both, log_both = step_gradient(tmp_path, student, teacher, data, {**other, "gradients": {"weight": 1e-12}})
    for name, gradient in alone.items():
        torch.testing.assert_close(both[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert log["loss/hidden"] == pytest.approx(log_both["loss/hidden"], rel=1e-5)
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "lora"])
def test_language_models_and_adapters_learn_from_gradients(tmp_path, kind):
    if kind == "causal":
        student, teacher = causal_model(layers=2), causal_model(layers=3, seed=1)
    else:
        student, teacher = models()
        student = with_lora(student)
    trainer = trainer_of(
        tmp_path, student, teacher, rows(teacher), {"gradients": {"of": "jacobian"}}, max_steps=20, learning_rate=3e-3
    )
    trainer.train()
    losses = [log["loss/gradients"] for log in trainer.state.log_history if "loss/gradients" in log]
    assert losses[-1] < 0.9 * losses[0]


def test_what_gradients_do_not_go_with_is_said(tmp_path):
    student, teacher = models()
    narrow = tiny_model(layers=1, hidden=16, num_labels=5)
    with pytest.raises(InputError, match="losses.gradients: got 'states of 16 and 32 channels'"):
        trainer_of(tmp_path, narrow, teacher, rows(narrow), {"gradients": {}})
    with pytest.raises(InputError, match="activation_checkpointing: got True; set it to false"):
        trainer_of(tmp_path, student, teacher, rows(student), {"gradients": {}}, activation_checkpointing=True)
    (fault,) = parse_objective({"gradients": {}}).faults(Use(mixed="data.augment.mixup"))
    assert "jacobian, where examples have two labels" in str(fault)
    (fault,) = parse_objective({"gradients": {}}).faults(Use(sharding="FSDP2"))
    assert fault.accepted == "DDP, or one process"
