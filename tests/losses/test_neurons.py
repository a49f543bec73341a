"""Which FFN neurons fire: a hinge against loops over neurons, matched by lineage."""

import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.trainers import causal_model, pruned_student, rows, student_of_rows, trainer_of

from distill_llm.architectures.lineage import LayerPlan
from distill_llm.common.errors import InputError
from distill_llm.losses.mapping import LayerPair
from distill_llm.losses.matching import Match, MatchSettings
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Wanted
from distill_llm.models.capture import Recorder

MARGIN = 0.7


def inputs_of(model, batch, path):
    """What the linears at `path` of each layer read in a forward."""
    seen = []
    layers = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    handles = [
        each.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((m, args[0])))
        for each in layers
    ]
    with torch.no_grad():
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    for handle in handles:
        handle.remove()
    return [(states.double() @ m.weight.double().T + (0 if m.bias is None else m.bias.double())) for m, states in seen]


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_neurons_hinge_on_the_side_of_the_one_that_they_were_copied_from(tmp_path, family):
    if family == "bert":
        teacher = tiny_model(layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        student, path = pruned_student(teacher), "intermediate.dense"
    else:
        teacher = causal_model(layers=4)
        kept = [LayerPlan(1, (0, 1), tuple(range(40))), LayerPlan(3, (1,), tuple(range(9, 64)))]
        student, path = student_of_rows(teacher, kept), "mlp.gate_proj"
    data = rows(teacher)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    own, source = inputs_of(student, batch, path), inputs_of(teacher, batch, path)
    expected, valid = 0.0, batch["attention_mask"].bool()
    for layer, (original, first) in enumerate(((1, 0), (3, 9))):
        s, t = own[layer][valid], source[original][valid]
        for token in range(len(s)):
            hinges = []
            for neuron in range(s.shape[1]):
                sign = 1 if t[token, neuron + first] > 0 else -1
                hinges.append(max(0.0, MARGIN - sign * float(s[token, neuron])) ** 2)
            expected += sum(hinges) / len(hinges) / 2 / len(s)
    settings = {"neurons": {"margin": MARGIN}}
    trainer = trainer_of(tmp_path, student, teacher, data, settings, learning_rate=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss/neurons"] == pytest.approx(expected, rel=1e-4)


def test_of_a_fused_layer_the_first_half_is_the_gate():
    model = tiny_model("modernbert", layers=1, num_hidden_layers=1, intermediate=24, vocab=100)
    batch = random_batch(model, labels=False)
    with torch.no_grad(), Recorder(model, Wanted(neurons=(0,))).recording() as found:
        model(**batch)
    ffn = model.model.layers[0].mlp
    seen = []
    ffn.act.register_forward_hook(lambda module, args, out: seen.append(args[0]))  # what is activated
    with torch.no_grad():
        model(**batch)
    torch.testing.assert_close(found.neurons[0], seen[0])


def test_neurons_of_other_students_are_compared_one_by_one_where_there_are_as_many():
    term = parse_objective({"neurons": {"layers": "uniform"}}).terms()["neurons"]
    match = Match(tiny_model(layers=2), tiny_model(layers=4), MatchSettings())
    assert term.layer_pairs(match) == [LayerPair(0, 1), LayerPair(1, 3)] and match.neurons(LayerPair(0, 1)) is None
    with pytest.raises(InputError, match="losses.neurons.layers: got '48 and 64 neurons'; compare layers of one width"):
        term.layer_pairs(Match(tiny_model(layers=2, intermediate=48), tiny_model(layers=4), MatchSettings()))


def test_layers_without_an_ffn_are_left_out():
    teacher = tiny_model(layers=3)
    student = student_of_rows(teacher, [LayerPlan(0, (0,), ()), LayerPlan(2, (0,), (1, 2))])
    term = parse_objective({"neurons": {}}).terms()["neurons"]
    match = Match(student, teacher, MatchSettings())
    assert term.layer_pairs(match) == [LayerPair(1, 2)] and match.neurons(LayerPair(1, 2)) == (1, 2)
