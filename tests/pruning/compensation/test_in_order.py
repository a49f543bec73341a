"""Compensation in order, against least squares by hand on what whole forward passes of both models say, in float64."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.families import (
    EVERY,
    IMAGES,
    NEURONS,
    aligned,
    family_batch,
    family_model,
    groups_of,
    outputs_of,
    uneven_plan,
)
from builders.grids import slow
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import FAMILIES, family_of, layers_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation import in_order, layer_runs, stations
from distill_llm.pruning.compensation.in_order import InOrder, refit_in_order
from distill_llm.pruning.compensation.layer_runs import adding_faults, residual_factor
from distill_llm.pruning.cutting.in_order import prune_in_order
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan, keep_layers
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings

ATTENTION, FFN = 0, 1
# No bias; a factor on all that is added; biases and Conv1D; attention beside the FFN; biases; flat alibi; one output in place.
NAMES = ["llama", "granite", "gpt2", "phi", "llama-many-heads", "bloom", "falcon", "opt"]
OTHERS = ["smollm3", "cohere", "stablelm", "stablelm-parallel", "starcoder2", "phi3", "gpt_neox", "gpt_neox-sequential"]
OTHERS += ["falcon-grouped", "falcon-multi-query", "falcon-alibi", "modernbert", "vit"]
HOW = [InOrder(0.1, 0.0), InOrder(0.01, 0.5), InOrder(1.0, 1.0)]


def double(name):
    return family_model(name).double()


def batches_of(model, count=8):
    return [family_batch(model, seed=seed) for seed in range(count)]


def linears(model, layer):
    """Attention-output and FFN-down linear of a layer."""
    family = family_of(model)
    return [layers_of(model)[layer].get_submodule(path) for path in (family.attention_out, family.ffn_out)]


def matrix(module):
    weight = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).numpy()


def seen(model, batches):
    """By layer, at valid tokens: the stream before it, and of both linears the inputs and outputs; then the last stream."""
    found = {}

    def note(key, value):
        value = value.detach().clone()
        found.setdefault(key, []).append(value.reshape(masks[-1].numel(), -1)[masks[-1]])

    hooks, masks = [], []
    for i, layer in enumerate(layers_of(model)):
        see = lambda m, args, kwargs, i=i: note((i, "stream"), args[0] if args else kwargs["hidden_states"])  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(see, with_kwargs=True))
        for j, module in enumerate(linears(model, i)):
            hooks.append(module.register_forward_pre_hook(lambda m, args, i=i, j=j: note((i, j, "in"), args[0])))
            hooks.append(module.register_forward_hook(lambda m, args, out, i=i, j=j: note((i, j, "out"), out)))
    leave = lambda m, args, out: note("stream", out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hooks.append(layers_of(model)[-1].register_forward_hook(leave))
    with torch.no_grad():
        for batch in batches:
            masks.append(batch["attention_mask"].bool().flatten())
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}


def assert_solves(made, plain, z, wanted, ridge):
    """The student's linear is the ridge regression of what was wanted, drawn to the plainly cut weights."""
    old, count, bias = matrix(plain), len(z), plain.bias
    missed = wanted - z @ old.T - (0 if bias is None else bias.detach().numpy())
    inputs = np.hstack([z, np.ones((count, int(bias is not None)))]) / np.sqrt(count)
    drawn = np.sqrt(ridge * np.mean(z**2)) * np.eye(z.shape[1], inputs.shape[1])
    rows = np.vstack([missed / np.sqrt(count), np.zeros((z.shape[1], missed.shape[1]))])
    change = np.linalg.lstsq(np.vstack([inputs, drawn]), rows, rcond=None)[0].T
    np.testing.assert_allclose(matrix(made), old + change[:, : z.shape[1]], atol=1e-7)
    if bias is not None:
        np.testing.assert_allclose(made.bias.detach().numpy(), bias.detach().numpy() + change[:, -1], atol=1e-7)


def assert_all_solve(model, plan, batches, how, extra, skipped=()):
    """Every linear of the student that reads anything is fitted; `extra`: what it takes over, by its layer and place."""
    student, plain = prune_in_order(model, plan, batches, how), prune(model, plan)
    dense, cut = seen(model, batches), seen(student, batches)
    factor = getattr(model.config, "residual_multiplier", 1.0)
    for i, row in enumerate(plan.layers):
        for j, (made, old) in enumerate(zip(linears(student, i), linears(plain, i), strict=True)):
            if not matrix(old).shape[1] or (row.source, j) in skipped:
                np.testing.assert_array_equal(matrix(made), matrix(old))
                continue
            off = dense[row.source, "stream"] - cut[i, "stream"]
            if j == FFN and not (family_of(model).parallel and not row.heads):
                off = off + factor * (dense[row.source, ATTENTION, "out"] - cut[i, ATTENTION, "out"])
            wanted = dense[row.source, j, "out"] + how.share * off / factor
            for more in extra.get((row.source, j), ()):
                wanted = wanted + more(dense) / factor
            assert_solves(made, old, cut[i, j, "in"], wanted, how.ridge)
    return student


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.grid(1)
def test_every_linear_is_fitted_to_what_it_reads_in_the_cut_model(name, how):
    model = double(name)
    groups, neurons = range(groups_of(model)), range(linears(model, 0)[1].weight.numel() // model.config.hidden_size)
    some, few = (0, groups[-1]), tuple(neurons)[5:40]
    rows = [(groups, neurons), (some, neurons), (groups, few), (some, few), (groups, neurons)]
    plan = PruningPlan(
        model.config.model_type, tuple(LayerPlan(i, tuple(h), tuple(n)) for i, (h, n) in enumerate(rows))
    )
    assert_all_solve(model, plan, batches_of(model), how, {}, skipped=[(0, ATTENTION), (0, FFN)])


def bias_of(model, layer, place):
    bias = linears(model, layer)[place].bias
    return 0 if bias is None else bias.detach().numpy()


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.grid(1)
def test_the_linear_before_what_goes_whole_takes_over_what_it_added(name, how):
    """Layer 2 is gone, layer 1 has no attention, layer 3 no FFN; the biases of these two stay."""
    model = double(name)
    factor = getattr(model.config, "residual_multiplier", 1.0)
    before = (1, FFN) if family_of(model).parallel else (0, FFN)
    extra = {
        (3, ATTENTION): [lambda dense: factor * (dense[3, FFN, "out"] - bias_of(model, 3, FFN))],
        (1, FFN): [lambda dense: dense[3, "stream"] - dense[2, "stream"]],
    }
    extra.setdefault(before, []).append(
        lambda dense: factor * (dense[1, ATTENTION, "out"] - bias_of(model, 1, ATTENTION))
    )
    assert_all_solve(model, uneven_plan(model), batches_of(model), how, extra)


def test_of_layers_that_stay_whole_those_from_the_last_before_a_gap_are_fitted():
    model = double("llama")
    extra = {(1, FFN): [lambda dense: dense[4, "stream"] - dense[2, "stream"]]}
    skipped = [(0, ATTENTION), (0, FFN), (1, ATTENTION)]
    student = assert_all_solve(
        model, keep_layers(model, [0, 1, 4]), batches_of(model), InOrder(0.1, 0.5), extra, skipped
    )
    assert not np.allclose(matrix(linears(student, 2)[FFN]), matrix(linears(model, 4)[FFN]))


def test_what_goes_before_the_first_linear_is_made_up_for_by_those_after_it():
    """Layer 0 is gone: nothing takes it over, and all of it is what the stream is off by."""
    model = double("llama")
    rows = [LayerPlan(i, tuple(range(4)), tuple(range(NEURONS))) for i in (1, 2, 3, 4)]
    plan, batches = PruningPlan("llama", tuple(rows)), batches_of(model)
    assert_all_solve(model, plan, batches, InOrder(0.1, 1.0), {})
    found = {
        share: np.square(seen(prune_in_order(model, plan, batches, InOrder(0.1, share)), batches)["stream"]
        - seen(model, batches)["stream"]).sum()
        for share in (0.0, 1.0)
    }  # fmt: skip
    assert found[1.0] < 0.8 * found[0.0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neurons_that_follow_from_kept_ones_are_recovered_exactly(name):
    model = double(name)
    with torch.no_grad():
        for layer in layers_of(model):
            for path in family_of(model).ffn_in:
                module = layer.get_submodule(path)
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                weight[NEURONS // 2 :] = weight[: NEURONS // 2]
                if module.bias is not None:
                    module.bias[NEURONS // 2 :] = module.bias[: NEURONS // 2]
    rows = [LayerPlan(i, tuple(range(groups_of(model))), tuple(range(NEURONS // 2))) for i in range(5)]
    plan, batches = PruningPlan(name, tuple(rows)), batches_of(model)
    student, other = prune_in_order(model, plan, batches, InOrder(1e-10, 1.0)), family_batch(model, seed=99)
    expected = outputs_of(model, other)
    torch.testing.assert_close(outputs_of(student, other), expected, rtol=0, atol=1e-4)
    assert (outputs_of(prune(model, plan), other) - expected).abs().max() > 0.1


def test_correcting_the_stream_brings_its_error_down_in_one_layer():
    """The last fit then minimises the stream's own error; without it, what the attention missed stays missed."""
    model = family_model("llama", num_hidden_layers=1).double()
    plan = PruningPlan("llama", (LayerPlan(0, (1,), tuple(range(0, NEURONS, 2))),))
    batches = batches_of(model)
    dense = seen(model, batches)["stream"]
    error = {
        share: np.square(
            seen(prune_in_order(model, plan, batches, InOrder(1e-3, share)), batches)["stream"] - dense
        ).sum()
        for share in (0.0, 0.5, 1.0)
    }
    plain = np.square(seen(prune(model, plan), batches)["stream"] - dense).sum()
    assert error[1.0] < error[0.5] < error[0.0] < plain


def test_a_model_from_which_nothing_is_cut_keeps_its_weights():
    model = family_model("llama")
    student = prune_in_order(model, full_plan(model), batches_of(model, 2), InOrder(0.01, 1.0))
    for mine, its in zip(student.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_second_cut_of_a_cut_model_fits_what_it_then_reads():
    """The model that is cut has layers without attention or FFN itself, which nothing is removed from."""
    model = prune(double("gpt2"), uneven_plan(double("gpt2")))
    batches = batches_of(model)
    rows = list(full_plan(model).layers)
    own = stations.adding(model, ())
    assert stations.fitted_linears(own, own, full_plan(model))[0].whole
    rows[1] = replace(rows[1], neurons=rows[1].neurons[::2])
    plan = PruningPlan(model.config.model_type, tuple(rows))
    assert_all_solve(model, plan, batches, InOrder(0.1, 1.0), {}, skipped=[(0, ATTENTION), (0, FFN)])


def test_padding_and_the_number_of_rows_in_a_batch_do_not_count():
    model = double("llama")
    plan, batch = uneven_plan(model), family_batch(model, batch=3, seed=4)
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [{k: v[i : i + 1, :length] for k, v in batch.items()} for i, length in enumerate(lengths)]
    found, expected = (prune_in_order(model, plan, rows) for rows in ([batch], alone))
    for mine, its in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-8)


def test_passes_in_bf16_give_nearly_the_same_fit():
    model = family_model("llama")
    plan, batches = uneven_plan(model), batches_of(model)
    exact, rounded = (
        prune_in_order(model, plan, batches, settings=CalibrationSettings(precision=precision))
        for precision in (None, torch.bfloat16)
    )
    plain = prune(model, plan)
    for i, j in ((0, FFN), (3, FFN)):
        change = matrix(linears(exact, i)[j]) - matrix(linears(plain, i)[j])
        off = matrix(linears(rounded, i)[j]) - matrix(linears(exact, i)[j])
        assert 0 < np.linalg.norm(off) < 0.1 * np.linalg.norm(change)


def test_the_model_and_its_layers_stay_as_they_were():
    model = family_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_in_order(model, uneven_plan(model), batches_of(model, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers_of(model))


class _Waits(Exception):
    """For the other process's sums."""


def test_two_processes_fit_what_one_fits(monkeypatch):
    """Each sees every other batch; their sums are added up before each fit."""
    model = double("gpt2")
    plan, batches = uneven_plan(model), batches_of(model, 3)
    expected = prune_in_order(model, plan, batches)
    settings, parts = CalibrationSettings(sharded=True), {0: [], 1: []}
    totals: list = []

    def run(rank):
        """A process that gets the sums of both where they are known; an end where the other's are not."""
        calls = iter(range(1000))

        def both(sums):
            number = next(calls)
            if number == len(totals):
                parts[rank].append([each.clone() for each in sums])
                raise _Waits
            for own, total in zip(sums, totals[number], strict=True):
                own.copy_(total)

        monkeypatch.setattr(in_order, "process", lambda: (rank, 2))
        monkeypatch.setattr(in_order, "sum_over_processes", both)
        student = prune(model, plan)
        try:
            refit_in_order(student, model, plan, batches, settings=settings)
        except _Waits:
            return None
        return student

    students = [None, None]
    while students[0] is None:
        students = [run(rank) for rank in (0, 1)]
        if students[0] is None:
            totals.append([one + other for one, other in zip(parts[0][-1], parts[1][-1], strict=True)])
    assert len(totals) == 6, "a sum for each of the six linears that read anything"
    for student in students:
        for mine, its in zip(student.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*EVERY, *IMAGES])
def test_families_whose_layers_add_plainly_are_those_that_their_rows_say(name):
    model = family_model(name)
    faults = adding_faults(model, family_batch(model), DEFAULT_SETTINGS, "compensate")
    if family_of(model).normed_after:
        assert len(faults) == 1
        with pytest.raises(InputError, match="^compensate: got 'in_order'; set it to true: a norm comes after"):
            prune_in_order(model, uneven_plan(model), batches_of(model, 2))
        return
    assert not faults and residual_factor(model.config) == (0.5 if name == "granite" else 1.0)
    if name in IMAGES:
        plan, batches = uneven_plan(model), batches_of(model, 4)
        off = [
            sum(float((outputs_of(each, batch) - outputs_of(model, batch)).square().sum()) for batch in batches)
            for each in (prune_in_order(model, plan, batches, InOrder(0.1, 0.5)), prune(model, plan))
        ]
        assert off[0] < 0.9 * off[1]


def test_a_few_large_channels_of_a_bf16_stream_are_no_norm():
    """Massive activations: what a layer adds to such a channel is less than the step between its bf16 values."""
    model = family_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = 1013.0
        for module in (module for i in range(5) for module in linears(model, i)):
            module.weight.mul_(0.1)
    assert not adding_faults(model.bfloat16(), family_batch(model), DEFAULT_SETTINGS, "compensate")


@pytest.mark.parametrize("name", [*NAMES, *slow(*OTHERS)])
def test_nothing_in_a_layer_runs_twice_for_a_batch(name):
    """Not what makes queries and neurons, nor the linears that are fitted; and no layer of the dense model."""
    model = family_model(name)
    plan, batches = uneven_plan(model), batches_of(model, 2)
    student, family, calls = prune(model, plan), family_of(model), {}
    entering = (next(iter(family.attention_in)), next(iter(family.ffn_in)))

    def count(key, output):
        rows = output.shape[:-1].numel() / batches[0]["attention_mask"].shape[1]
        calls[key] = calls.get(key, 0) + (rows > 1)  # not that of the first row alone

    hooks = [
        layer.get_submodule(path).register_forward_hook(lambda m, args, out, key=(whose, i, path): count(key, out))
        for whose, each in (("student", student), ("model", model))
        for i, layer in enumerate(layers_of(each))
        for path in (*entering, family.attention_out, family.ffn_out)
        if path in dict(layer.named_modules())
    ]
    refit_in_order(student, model, plan, batches)
    for hook in hooks:
        hook.remove()
    bias = {("student", 1, family.attention_out)}  # of an attention without heads
    assert {number for key, number in calls.items() if key not in bias} == {len(batches)}
    assert len(calls) == 4 * (5 + 4) - 1


@pytest.mark.parametrize(("cut", "limit"), [("units", 5), *slow(("neurons", 4), ("layers", 4))])
def test_no_more_residual_streams_are_held_than_are_needed(cut, limit, monkeypatch):
    """Four, and the output of an attention where the FFN after it takes over the next attention."""
    model, width = family_model("llama"), 7
    every = tuple(range(groups_of(model)))
    neurons = PruningPlan("llama", tuple(LayerPlan(i, every, tuple(range(5, 40))) for i in range(5)))
    plan = {"units": uneven_plan(model), "neurons": neurons, "layers": keep_layers(model, [0, 4])}[cut]
    batches = [family_batch(model, batch=width, seed=seed) for seed in range(8)]
    one, most = sum(batch["input_ids"].numel() for batch in batches) * model.config.hidden_size, [0.0]

    @contextmanager
    def counted(self, index):
        with layer(self, index) as run:
            yield lambda number, stream: (most.append(held()), run(number, stream))[-1]

    def held() -> float:
        sizes = {
            each.untyped_storage().data_ptr(): each.numel()
            for each in gc.get_objects()
            if type(each) is torch.Tensor and each.dim() == 3 and each.shape[::2] == (width, model.config.hidden_size)
        }
        return sum(sizes.values()) / one

    layer = layer_runs.LayerRuns.layer
    monkeypatch.setattr(layer_runs.LayerRuns, "layer", counted)
    prune_in_order(model, plan, batches)
    assert 2 < max(most) <= limit + 0.5, "and what a batch takes"


def test_a_family_whose_row_is_wrong_is_refused_all_the_same(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["gemma2"], normed_after=False))
    model = family_model("gemma2")
    with pytest.raises(InputError, match="layer 0 of gemma2 does more than add what attention and FFN give"):
        prune_in_order(model, uneven_plan(model), batches_of(model, 2))


def test_values_that_are_not_finite_are_no_norm():
    model = family_model("llama")
    with torch.no_grad():
        linears(model, 3)[FFN].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="set it to true: layer 3 gives values that are not finite$"):
        prune_in_order(model, uneven_plan(model), batches_of(model, 2))


def test_what_cannot_be_fitted_in_order_is_refused(monkeypatch):
    model = family_model("llama")
    with pytest.raises(InputError, match="ridge: got 0; accepted: a number above 0"):
        InOrder(0)
    with pytest.raises(InputError, match="share: got 1.5; accepted: from 0 to 1"):
        InOrder(1.0, 1.5)
    with pytest.raises(InputError, match="dataloader: got \\[\\]; accepted: at least one batch"):
        prune_in_order(model, uneven_plan(model), [])
    with pytest.raises(InputError, match="compensate: got 'in_order'; set it to true, or leave hidden out"):
        prune_in_order(model, uneven_plan(model, hidden=True), batches_of(model, 1))
    plan = full_plan(model)
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], reads={"mlp.gate_proj": "n"}))
    with pytest.raises(InputError, match="mlp.gate_proj of llama would not be fitted"):
        prune_in_order(model, plan, batches_of(model, 1))


def test_layers_run_one_at_a_time_give_what_the_model_gives():
    """Masks and positions differ by layer in ModernBERT and SmolLM3; rows padded on the left keep theirs."""
    for name in ("modernbert", "smollm3", "gpt2", "bloom", "mistral"):
        model = aligned(family_model(name))
        batches = [family_batch(model, seed=seed, left=seed == 1) for seed in range(2)]
        with torch.no_grad():
            runs = layer_runs.LayerRuns(model, batches, DEFAULT_SETTINGS)
            streams = runs.first
            for index in range(len(runs.layers)):
                with runs.layer(index) as run:
                    streams = [run(number, stream) for number, stream in enumerate(streams)]
        found = [
            each.reshape(-1, each.shape[-1])[batch["attention_mask"].bool().flatten()]
            for each, batch in zip(streams, batches, strict=True)
        ]
        torch.testing.assert_close(torch.cat(found), torch.from_numpy(seen(model, batches)["stream"]))
