"""Bypasses of what is removed whole, against least squares by hand on what a model's residual stream says."""

import numpy as np
import pytest
import torch
from builders.families import (
    DECODERS,
    ENCODERS,
    EVERY,
    HIDDEN,
    LAYERS,
    NEURONS,
    aligned,
    family_batch,
    family_model,
    outputs_of,
)
from builders.pruning import inputs_of, layers_in
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.compensation import bypass
from distill_llm.pruning.compensation.bypass import fit_bypasses, outputs_taken_over
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan, keep_layers
from distill_llm.pruning.statistics import calibration_pass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings

DOWN = {"llama": "mlp.down_proj", "granite": "mlp.down_proj", "phi": "mlp.fc2", "gpt2": "mlp.c_proj", "opt": "fc2"}


def blocks(model):
    """The model's layers."""
    base = model.base_model
    return base.h if model.config.model_type == "gpt2" else getattr(base, "decoder", base).layers


def linear_of(model, layer):
    """The FFN-down linear of a layer."""
    return blocks(model)[layer].get_submodule(DOWN[model.config.model_type])


def matrix(module):
    """A linear's weight as (outputs, inputs)."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def batches_of(model, count=12):
    return [family_batch(model, seed=seed) for seed in range(count)]


def stream(model, batches, layer):
    """At valid tokens the residual stream before every layer and after the last, and the input of a layer's FFN-down linear."""
    states, entering = [[] for _ in range(LAYERS + 1)], []
    hooks = [linear_of(model, layer).register_forward_pre_hook(lambda m, args: entering.append(args[0]))]
    for place, block in enumerate(blocks(model)):
        see = lambda m, args, kwargs, place=place: states[place].append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        hooks.append(block.register_forward_pre_hook(see, with_kwargs=True))
    leave = lambda m, args, output: states[-1].append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    hooks.append(blocks(model)[-1].register_forward_hook(leave))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool().flatten() for batch in batches]
    valid = lambda parts: torch.cat([p.reshape(len(m), -1)[m] for p, m in zip(parts, masks, strict=True)])  # noqa: E731
    return [valid(parts) for parts in states], valid(entering)


def least_squares(module, z, added, kept):
    """The weight and the change of the bias by which the kept neurons say best what all said, and `added`."""
    weight, z = matrix(module).double().numpy(), z.double().numpy()
    kept = list(kept)
    gone = [j for j in range(z.shape[1]) if j not in kept]
    target = z[:, gone] @ weight[:, gone].T + added.double().numpy()
    intercept = int(module.bias is not None)
    inputs = np.hstack([z[:, kept], np.ones((len(z), intercept))]) / np.sqrt(len(z))
    ridge = np.sqrt(0.1 * np.mean(z**2)) * np.eye(len(kept), inputs.shape[1])
    rows = np.vstack([target / np.sqrt(len(z)), np.zeros((len(kept), len(weight)))])
    found = np.linalg.lstsq(np.vstack([inputs, ridge]), rows, rcond=None)[0].T
    return weight[:, kept] + found[:, : len(kept)], found[:, len(kept) :].sum(1)


def assert_solves(made, old, z, added, kept):
    """The student's linear is the solution."""
    weight, shift = least_squares(old, z, added, kept)
    np.testing.assert_allclose(matrix(made), weight, atol=2e-3)
    if old.bias is not None:
        np.testing.assert_allclose((made.bias - old.bias).detach(), shift, atol=2e-3)


@pytest.mark.parametrize("neurons", [range(NEURONS), range(5, 40)], ids=["every neuron", "fewer neurons"])
@pytest.mark.parametrize("name", DOWN)
def test_the_ffn_before_removed_layers_takes_over_what_they_added_to_the_stream(name, neurons):
    """Llama: no bias; Granite: a factor on all that is added; Phi: attention beside the FFN; GPT-2: Conv1D; OPT: flat tokens."""
    model = family_model(name)
    batches, kept = batches_of(model), keep_layers(model, [0, 1, 4])
    rows = [kept.layers[0], LayerPlan(1, kept.layers[1].heads, tuple(neurons)), kept.layers[2]]
    plan = PruningPlan(kept.model_type, tuple(rows))
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches))
    states, z = stream(model, batches, 1)
    added = (states[4] - states[2]) / getattr(model.config, "residual_multiplier", 1.0)
    assert_solves(linear_of(student, 1), linear_of(model, 1), z, added, neurons)
    for mine, its in ((0, 0), (2, 4)):
        assert torch.equal(matrix(linear_of(student, mine)), matrix(linear_of(model, its)))


def test_what_is_removed_in_two_places_is_taken_over_by_two_ffns():
    model = family_model("llama")
    batches, plan = batches_of(model), keep_layers(model, [0, 2, 4])
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches))
    for layer, place in ((0, 0), (2, 1)):
        states, z = stream(model, batches, layer)
        added = states[layer + 2] - states[layer + 1]
        assert_solves(linear_of(student, place), linear_of(model, layer), z, added, range(NEURONS))


def test_an_attention_removed_alone_is_taken_over_but_for_its_bias_which_stays():
    model = family_model("gpt2")
    batches, rows = batches_of(model), list(keep_layers(model, range(LAYERS)).layers)
    rows[2] = LayerPlan(2, (), rows[2].neurons)
    plan = PruningPlan("gpt2", tuple(rows))
    statistics = collect_statistics(model, batches, loss=None)
    student = prune(model, plan, statistics, bypasses=fit_bypasses(model, plan, batches))
    seen = []
    hook = blocks(model)[2].attn.c_proj.register_forward_hook(lambda m, args, output: seen.append(output - m.bias))
    _, z = stream(model, batches, 1)
    hook.remove()
    added = torch.cat([s[b["attention_mask"].bool()] for s, b in zip(seen, batches, strict=True)]).detach()
    assert_solves(linear_of(student, 1), linear_of(model, 1), z, added, range(NEURONS))
    assert torch.equal(blocks(student)[2].attn.c_proj.bias, blocks(model)[2].attn.c_proj.bias)
    assert torch.equal(matrix(linear_of(student, 2)), matrix(linear_of(model, 2)))


def test_in_parallel_with_an_ffn_an_attention_removed_alone_is_taken_over_by_it():
    model = family_model("phi")
    batches, rows, seen = batches_of(model), list(keep_layers(model, range(LAYERS)).layers), []
    rows[2] = LayerPlan(2, (), rows[2].neurons)
    plan = PruningPlan("phi", tuple(rows))
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches))
    out = blocks(model)[2].self_attn.dense
    hook = out.register_forward_hook(lambda m, args, output: seen.append(output - m.bias))
    _, z = stream(model, batches, 2)
    hook.remove()
    added = torch.cat([s[b["attention_mask"].bool()] for s, b in zip(seen, batches, strict=True)]).detach()
    assert_solves(linear_of(student, 2), linear_of(model, 2), z, added, range(NEURONS))
    assert torch.equal(matrix(linear_of(student, 1)), matrix(linear_of(model, 1)))


PARALLEL = (
    *("phi", "cohere", "gpt_neox", "stablelm-parallel"),
    *("falcon", "falcon-grouped", "falcon-multi-query", "falcon-alibi"),
)
SWITCHED = {"stablelm-parallel": {"use_parallel_residual": True}, "falcon-in-series": {"parallel_attn": False}}


@pytest.mark.parametrize("name", [*EVERY, *SWITCHED])
def test_an_attention_belongs_to_the_last_ffn_that_does_not_read_what_it_adds(name):
    """Measured: whether what goes into the FFN-down linear of its own layer is another without it."""
    model = family_model(name.partition("-")[0] if name in SWITCHED else name, **SWITCHED.get(name, {}))
    family, layer, rows = family_of(model), layers_of(model)[2], list(full_plan(model).layers)
    out, seen = layer.get_submodule(family.attention_out), []
    layer.get_submodule(family.ffn_out).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    outputs_of(model, family_batch(model))
    out.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
    outputs_of(model, family_batch(model))
    rows[2] = LayerPlan(2, (), rows[2].neurons)
    plan = PruningPlan(model.config.model_type, tuple(rows))
    last = 2 if torch.equal(*seen) else 1
    assert outputs_taken_over(model, plan) == {last: [(2, family.attention_out)]}
    assert (last == 2) == (name in PARALLEL)


def test_what_is_linear_in_the_neurons_is_taken_over_without_loss():
    """Layer 2 adds another matrix of the very neurons of layer 1, and nothing else."""
    model = family_model("llama")
    first, second = model.model.layers[1], model.model.layers[2]
    with torch.no_grad():
        first.mlp.down_proj.weight.zero_()
        second.self_attn.o_proj.weight.zero_()
    for mine, its in ((second.mlp.up_proj, first.mlp.up_proj), (second.mlp.gate_proj, first.mlp.gate_proj)):
        mine.load_state_dict(its.state_dict())
    second.post_attention_layernorm.load_state_dict(first.post_attention_layernorm.state_dict())
    batches, plan = batches_of(model, 40), keep_layers(model, [0, 1, 3, 4])
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches), ridge=1e-8)
    for batch in (batches[0], family_batch(model, seed=99)):
        dense = outputs_of(model, batch)
        torch.testing.assert_close(outputs_of(student, batch), dense, rtol=0, atol=2e-2)
        assert float((outputs_of(prune(model, plan), batch) - dense).abs().max()) > 1


def test_what_comes_before_every_ffn_that_stays_has_none_to_take_it_over():
    model = family_model("llama")
    batches, plan = batches_of(model, 2), keep_layers(model, [2, 3, 4])
    found = fit_bypasses(model, plan, batches)
    assert not found
    same = prune(model, plan, bypasses=found).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in prune(model, plan).state_dict().items())
    rows = list(keep_layers(model, range(LAYERS)).layers)
    rows[0], rows[1] = LayerPlan(0, rows[0].heads, ()), LayerPlan(1, (), ())
    assert not fit_bypasses(model, PruningPlan("llama", tuple(rows)), batches)


def test_a_plan_that_removes_no_whole_reads_no_data():
    model = family_model("llama")
    rows = [LayerPlan(i, (0, 2), tuple(range(30))) for i in range(LAYERS)]
    assert not fit_bypasses(model, PruningPlan("llama", tuple(rows)), (1 / 0 for _ in range(1)))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_family_has_a_bypass_but_those_whose_ffns_output_has_a_norm_of_its_own(name):
    model = family_model(name)
    found = fit_bypasses(model, keep_layers(model, [0, 1, 4]), batches_of(model, 1))
    assert bool(found) == (name not in ("gemma2", "gemma3_text", "olmo2"))
    closed = name in ENCODERS and name != "modernbert"
    assert bool(found.norms) == closed and bool(found.outputs) == (bool(found) and not closed)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_norm_of_the_ffns_output_is_seen_whatever_the_size_of_that_output(size):
    model = family_model("gemma2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.zero_()  # a factor of 1 for every channel
            layer.mlp.down_proj.weight.mul_(size)
    assert not fit_bypasses(model, keep_layers(model, [0, 1, 4]), batches_of(model, 1))


# Closing norm, FFN-down linear.
CLOSED = {
    "bert": ("output.LayerNorm", "output.dense"),
    "distilbert": ("output_layer_norm", "ffn.lin2"),
    "opt": ("final_layer_norm", "fc2"),
}


def closed_model(name):
    """A model with a norm at the end of every layer, and its layers."""
    model = family_model(name, **({"do_layer_norm_before": False} if name == "opt" else {}))
    return model, blocks(model) if name == "opt" else layers_in(model)


@pytest.mark.parametrize("neurons", [range(NEURONS), range(5, 40)], ids=["every neuron", "fewer neurons"])
@pytest.mark.parametrize("name", CLOSED)
def test_with_norms_at_the_end_an_ffn_takes_over_the_sum_before_the_last_one_and_that_norm(name, neurons):
    norm, down = CLOSED[name]
    model, layers = closed_model(name)
    batches, kept = batches_of(model), keep_layers(model, [0, 1, 4])
    rows = (kept.layers[0], LayerPlan(1, kept.layers[1].heads, tuple(neurons)), kept.layers[2])
    plan = PruningPlan(kept.model_type, rows)
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches))
    watched = [layers[1].get_submodule(down), layers[1].get_submodule(norm), layers[3].get_submodule(norm)]
    found = [[], [], []]
    for batch in batches:
        with inputs_of(watched) as seen, torch.no_grad():
            model(**batch)
        for place, parts in enumerate(found):
            parts.append(
                seen[place].reshape(batch["attention_mask"].numel(), -1)[batch["attention_mask"].bool().flatten()]
            )
    z, own, last = map(torch.cat, found)
    made = (blocks(student) if name == "opt" else layers_in(student))[1]
    assert_solves(made.get_submodule(down), watched[0], z, last - own, neurons)
    for mine, its in zip(made.get_submodule(norm).parameters(), watched[2].parameters(), strict=True):
        assert torch.equal(mine, its) and mine is not its


def test_with_norms_at_the_end_only_layers_have_a_bypass_and_only_with_all_channels():
    model = family_model("bert")
    batches, rows = batches_of(model, 1), list(keep_layers(model, range(LAYERS)).layers)
    rows[2] = LayerPlan(2, (), rows[2].neurons)
    assert not fit_bypasses(model, PruningPlan("bert", tuple(rows)), batches)
    whole = PruningPlan("bert", (*rows[:2], *rows[3:]))
    assert set(fit_bypasses(model, whole, batches).norms.items()) == {(1, (2, "output.LayerNorm"))}
    assert not fit_bypasses(model, PruningPlan("bert", whole.layers, hidden=tuple(range(9))), batches)


@pytest.mark.parametrize("left", [False, True])
def test_padding_counts_in_nothing(left):
    model = family_model("llama")
    plan, batch = keep_layers(model, [0, 1, 4]), family_batch(model, left=left)
    lengths = batch["attention_mask"].bool()
    alone = [
        {"input_ids": row[mask][None], "attention_mask": mask[mask][None].long()}
        for row, mask in zip(batch["input_ids"], lengths, strict=True)
    ]
    together, apart = fit_bypasses(model, plan, [batch]).moments[1], fit_bypasses(model, plan, alone).moments[1]
    for mine, its in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4 * float(its.abs().max()))


def test_the_sums_of_two_processes_are_those_of_one(monkeypatch):
    model, parts = family_model("llama"), []
    plan, batches = keep_layers(model, [0, 1, 4]), batches_of(model, 5)
    whole = fit_bypasses(model, plan, batches).moments[1]
    for rank in (0, 1):
        monkeypatch.setattr(calibration_pass, "process", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(bypass, "sum_over_processes", lambda sums: parts.append([s.clone() for s in sums]))
        fit_bypasses(model, plan, batches, settings=CalibrationSettings(sharded=True))
    weight, mean, *blocks = (a + b for a, b in zip(*parts, strict=True))  # blocks of rows, from the diagonal on
    assert float(weight) == sum(int(batch["attention_mask"].sum()) for batch in batches), "each batch counts once"
    torch.testing.assert_close(mean / weight, whole.mean.to(weight), rtol=1e-4, atol=1e-4, check_dtype=False)
    start = 0
    for block in blocks:
        expected = whole.second[start : start + len(block), start:]
        scale = float(whole.second.abs().max())
        torch.testing.assert_close((block / weight).float(), expected, rtol=1e-4, atol=1e-4 * scale)
        start += len(block)
    assert start == len(whole.second)


@pytest.mark.parametrize("neurons", [NEURONS, 40])
@pytest.mark.parametrize("name, auto", [("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)])
def test_a_saved_student_is_reloaded_bit_equal(tmp_path, name, auto, neurons):
    model = family_model(name)
    kept = keep_layers(model, [0, 1, 4])
    rows = (*kept.layers[:2], LayerPlan(4, kept.layers[2].heads, tuple(range(neurons))))
    plan, batch = PruningPlan(name, rows), family_batch(model)
    student = prune(model, plan, bypasses=fit_bypasses(model, plan, batches_of(model)))
    student.save_pretrained(tmp_path)
    expected = outputs_of(student, batch)
    for again in (load_pretrained(tmp_path), auto.from_pretrained(tmp_path, trust_remote_code=True)):
        assert torch.equal(outputs_of(aligned(again).eval(), batch), expected)


def test_channels_of_the_stream_that_go_as_well_are_left_out_of_what_is_taken_over():
    model = family_model("llama")
    batches, whole = batches_of(model), keep_layers(model, [0, 1, 4])
    channels = tuple(c for c in range(HIDDEN) if c % 4)
    plan = PruningPlan("llama", whole.layers, hidden=channels)
    found = fit_bypasses(model, plan, batches)
    weights = [matrix(linear_of(prune(model, p, bypasses=found), 1)) for p in (whole, plan)]
    assert torch.equal(weights[1], weights[0][list(channels)])


def test_bypasses_of_another_plan_or_model_are_refused():
    model = family_model("llama")
    plans = [keep_layers(model, layers) for layers in ([0, 1, 4], [0, 1, 3, 4])]
    with pytest.raises(InputError, match="bypasses: got 'bypasses of another plan'"):
        prune(model, plans[0], bypasses=fit_bypasses(model, plans[1], batches_of(model, 1)))
    encoder = family_model("bert")
    plan = keep_layers(encoder, [0, 1, 4])
    narrow = PruningPlan("bert", plan.layers, hidden=tuple(range(HIDDEN // 2)))
    with pytest.raises(InputError, match="bypasses: got 'bypasses of another plan'"):
        prune(encoder, narrow, bypasses=fit_bypasses(encoder, plan, batches_of(encoder, 1)))
    other = family_model("llama", intermediate_size=NEURONS + 8)
    short = [LayerPlan(row.source, row.heads, row.neurons[:9]) for row in plans[0].layers]
    plan = PruningPlan("llama", tuple(short))
    with pytest.raises(InputError, match="the result of fit_bypasses for this model"):
        prune(other, plan, bypasses=fit_bypasses(model, plan, batches_of(model, 1)))
