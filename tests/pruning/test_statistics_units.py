"""Statistics of every kind of unit against gradients of masks, one example at a time (Michel et al. 2019, equation 2)."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from family_examples import HIDDEN, NEURONS, QUERIES, family_batch, family_model
from torch.nn import functional as F

from distill_llm.errors import InputError
from distill_llm.pruning.collecting import collect_statistics
from distill_llm.pruning.criteria import score
from distill_llm.pruning.leave_one_out import leave_one_out
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.surgery import prune

HEAD_SIZE = HIDDEN // QUERIES
LLAMA = {
    "out": "self_attn.o_proj",
    "down": "mlp.down_proj",
    "norms": ["input_layernorm", "post_attention_layernorm"],
    "last": "model.norm",
    "layers": "model.layers",
}
GPT2 = {
    "out": "attn.c_proj",
    "down": "mlp.c_proj",
    "norms": ["ln_1", "ln_2"],
    "last": "transformer.ln_f",
    "layers": "transformer.h",
}
FAMILIES = {
    "llama": LLAMA,
    "olmo2": {**LLAMA, "norms": ["post_attention_layernorm", "post_feedforward_layernorm"]},
    "gpt2": GPT2,
}


@contextmanager
def masks(model, names):
    """Within the context, vectors of ones that multiply head channels and neurons of each layer, and norm outputs."""
    layers = model.get_submodule(names["layers"])
    heads = [torch.ones(HIDDEN, requires_grad=True) for _ in layers]
    neurons = [torch.ones(NEURONS, requires_grad=True) for _ in layers]
    channels = torch.ones(HIDDEN, requires_grad=True)
    norms = [layer.get_submodule(name) for layer in layers for name in names["norms"]]
    with ExitStack() as stack:
        for layer, head, neuron in zip(layers, heads, neurons, strict=True):
            for path, mask in ((names["out"], head), (names["down"], neuron)):
                hook = layer.get_submodule(path).register_forward_pre_hook(lambda m, a, mask=mask: (a[0] * mask,))
                stack.callback(hook.remove)
        for norm in (*norms, model.get_submodule(names["last"])):
            stack.callback(norm.register_forward_hook(lambda m, a, o: o * channels).remove)
        yield heads, neurons, channels


def effects(model, names, batch):
    """Per example, the gradient of its loss in every mask: {kind: (examples, ...)}."""
    found = {"heads": [], "neurons": [], "channels": []}
    for ids, length in zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True):
        with masks(model, names) as (heads, neurons, channels):
            ids = ids[:length]
            logits = model(input_ids=ids[None]).logits[0]
            F.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        found["heads"].append(torch.stack([m.grad for m in heads]))
        found["neurons"].append(torch.stack([m.grad for m in neurons]))
        found["channels"].append(channels.grad)
    return {kind: torch.stack(values) for kind, values in found.items()}


@pytest.fixture(params=FAMILIES)
def case(request):
    model = family_model(request.param)
    batch = family_batch(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model, batch, FAMILIES[request.param], 4 if request.param != "gpt2" else QUERIES


def test_every_kind_of_unit_has_the_gradient_of_its_mask(case):
    model, batch, names, groups = case
    expected = effects(model, names, batch)
    statistics = collect_statistics(model, [batch], exact=True)
    by_query = expected["heads"].unflatten(-1, (QUERIES, HEAD_SIZE)).sum(-1)
    by_group = by_query.unflatten(-1, (groups, -1)).sum(-1)
    for kind, values in (("queries", by_query), ("heads", by_group), ("neurons", expected["neurons"])):
        for i, row in enumerate(getattr(statistics, kind)):
            torch.testing.assert_close(row.taylor, values[:, i].abs().sum(0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(row.fisher, values[:, i].square().sum(0), rtol=1e-3, atol=1e-4)
    for kind, values in (("attention", by_query), ("ffn", expected["neurons"])):
        torch.testing.assert_close(
            getattr(statistics, kind).fisher, values.sum(-1).square().sum(0), rtol=1e-3, atol=1e-4
        )
    torch.testing.assert_close(statistics.hidden.fisher, expected["channels"].square().sum(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(statistics.hidden.taylor, expected["channels"].abs().sum(0), rtol=1e-3, atol=1e-4)


def test_without_channels_the_rest_is_the_same(case):
    model, batch, _, _ = case
    full, part = (collect_statistics(model, [batch], exact=True, hidden=each) for each in (True, False))
    for mine, its in zip((*full.heads, *full.neurons), (*part.heads, *part.neurons), strict=True):
        torch.testing.assert_close(mine.fisher, its.fisher)
    assert len(part.hidden.fisher) == 0
    with pytest.raises(InputError, match="statistics collected with hidden"):
        score(part).require(["hidden"])


def test_wanda_is_the_norm_of_a_channel_times_the_weights_that_read_it(case):
    model, batch, names, groups = case
    statistics = collect_statistics(model, [batch], loss=None)
    layer = model.get_submodule(names["layers"])[1]
    seen = {}
    for path in (names["out"], names["down"]):
        layer.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: seen.update({path: a[0]}))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    valid = batch["attention_mask"].bool()
    for path, kind, units in ((names["out"], "heads", groups), (names["down"], "neurons", NEURONS)):
        weight = layer.get_submodule(path).weight
        weight = weight.T if type(layer.get_submodule(path)).__name__ == "Conv1D" else weight
        per_weight = weight.abs() * seen[path][valid].norm(dim=0)  # Sun et al. 2024, equation 1
        expected = per_weight.sum(0).view(units, -1).sum(1)
        torch.testing.assert_close(getattr(statistics, kind)[1].wanda, expected, rtol=1e-4, atol=1e-4)


def test_leave_one_out_is_the_loss_of_the_model_that_was_pruned_of_the_layer(case):
    model, batch, _names, groups = case
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    keep = batch["attention_mask"][:, 1:].bool()

    def logits(of):
        with torch.no_grad():
            return of(**inputs).logits[:, :-1][keep]

    targets, dense = batch["input_ids"][:, 1:][keep], logits(model)
    statistics = collect_statistics(model, [batch], loss=None)
    by_labels, by_kl = (leave_one_out(model, [batch], statistics, loss).without for loss in ("labels", "kl"))
    for removed in (0, 3):
        rows = [LayerPlan(i, tuple(range(groups)), tuple(range(NEURONS))) for i in range(5) if i != removed]
        without = logits(prune(model, PruningPlan(model.config.model_type, tuple(rows))))
        gain = F.cross_entropy(without, targets) - F.cross_entropy(dense, targets)
        torch.testing.assert_close(by_labels[removed], gain, rtol=1e-4, atol=1e-5)
        kl = F.kl_div(without.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1).mean()
        torch.testing.assert_close(by_kl[removed], kl, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_ranks_stay(case):
    model, batch, _, _ = case
    full, half = (collect_statistics(model, [batch], precision=p) for p in (None, torch.bfloat16))
    for kind in ("heads", "neurons"):
        mine, its = (torch.cat([row.fisher for row in getattr(each, kind)]) for each in (full, half))
        assert its.dtype == torch.float32
        ranks = torch.stack([mine, its]).argsort(1).argsort(1).float()
        assert torch.corrcoef(ranks)[0, 1] > 0.98
    assert not torch.equal(full.neurons[0].fisher, half.neurons[0].fisher)
