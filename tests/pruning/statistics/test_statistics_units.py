"""Statistics of every kind of unit against gradients of masks, one example at a time (Michel et al. 2019, equation 2)."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from builders.families import HIDDEN, NEURONS, QUERIES, family_batch, family_model
from torch.nn import functional as F
from transformers import OlmoConfig, OlmoForCausalLM

from distill_llm.architectures.families import FAMILIES as ROWS
from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.settings import CalibrationSettings

HEAD_SIZE = HIDDEN // QUERIES
LLAMA = {
    "out": "self_attn.o_proj",
    "down": "mlp.down_proj",
    "readers": [*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"],
    "last": "model.norm",
    "layers": "model.layers",
}
GPT2 = {
    "out": "attn.c_proj",
    "down": "mlp.c_proj",
    "readers": ["attn.c_attn", "mlp.c_fc"],
    "last": "transformer.ln_f",
    "layers": "transformer.h",
}
FAMILIES = {
    "llama": LLAMA,
    "olmo2": LLAMA,
    "gpt2": GPT2,
}


@contextmanager
def masks(model, names):
    """Within the context, vectors of ones that multiply head channels and neurons of each layer, and channels as they are read.

    That is: by linears of layers, after the last norm, and of one answer by the classifier.
    """
    layers = model.get_submodule(names["layers"])
    heads = [torch.ones(HIDDEN, requires_grad=True) for _ in layers]
    neurons = [torch.ones(NEURONS, requires_grad=True) for _ in layers]
    channels = torch.ones(HIDDEN, requires_grad=True)
    readers = [layer.get_submodule(name) for layer in layers for name in names["readers"]]
    readers += [model.classifier] if hasattr(model, "classifier") else []
    with ExitStack() as stack:
        for layer, head, neuron in zip(layers, heads, neurons, strict=True):
            for path, mask in ((names["out"], head), (names["down"], neuron)):
                hook = layer.get_submodule(path).register_forward_pre_hook(lambda m, a, mask=mask: (a[0] * mask,))
                stack.callback(hook.remove)
        for reader in readers:
            stack.callback(reader.register_forward_pre_hook(lambda m, a: (a[0] * channels,)).remove)
        stack.callback(model.get_submodule(names["last"]).register_forward_hook(lambda m, a, o: o * channels).remove)
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
    statistics = collect_statistics(model, [batch], settings=CalibrationSettings(exact=True))
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
    full, part = (
        collect_statistics(model, [batch], settings=CalibrationSettings(exact=True, hidden=each))
        for each in (True, False)
    )
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


def test_wanda_of_a_channel_of_the_stream_counts_the_weights_of_all_that_read_it(case):
    model, batch, names, _ = case
    statistics, layers, seen = collect_statistics(model, [batch], loss=None), model.get_submodule(names["layers"]), []
    paths = ("attn.c_attn", "mlp.c_fc") if names is GPT2 else ("self_attn.q_proj", "mlp.gate_proj")  # each tensor once
    for reader in (layer.get_submodule(path) for layer in layers for path in paths):
        reader.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model.get_submodule(names["last"]).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    valid = batch["attention_mask"].bool()
    norm_of_channel = torch.cat([out[valid] for out in seen]).norm(dim=0)
    if names is GPT2:  # weights are (inputs, outputs); the head is tied to the embeddings
        weights = [w for layer in layers for w in (layer.attn.c_attn.weight.T, layer.mlp.c_fc.weight.T)]
    else:
        paths = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        weights = [layer.get_submodule(path).weight for layer in layers for path in paths] + [model.lm_head.weight]
    expected = norm_of_channel * torch.cat(weights).abs().sum(0)
    torch.testing.assert_close(statistics.hidden.wanda, expected, rtol=1e-4, atol=1e-4)
    scores = score(statistics, "wanda").hidden.argsort().tolist()
    assert scores != score(statistics, "activation").hidden.argsort().tolist()


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
    full, half = (
        collect_statistics(model, [batch], settings=CalibrationSettings(precision=p)) for p in (None, torch.bfloat16)
    )
    for kind in ("heads", "neurons"):
        mine, its = (torch.cat([row.fisher for row in getattr(each, kind)]) for each in (full, half))
        ranks = torch.stack([mine, its]).argsort(1).argsort(1).float()
        assert torch.corrcoef(ranks)[0, 1] > 0.98
    assert not torch.equal(full.neurons[0].fisher, half.neurons[0].fisher)


def test_under_autocast_sums_are_not_rounded_to_it(case):
    """The bf16 activations and gradients of the very pass, added up in fp64; a sum that was bf16 on its way is 2^-9 off."""
    model, batch, names, _ = case
    layer, seen = model.get_submodule(names["layers"])[4], {}
    statistics = collect_statistics(model, [batch], settings=CalibrationSettings(precision=torch.bfloat16))
    norm, down = model.get_submodule(names["last"]), layer.get_submodule(names["down"])

    def keep(name, tensor):
        tensor.retain_grad()
        seen[name] = tensor

    handles = [
        model.get_input_embeddings().register_forward_hook(lambda m, a, o: o.detach().requires_grad_()),
        down.register_forward_pre_hook(lambda m, a: keep("down", a[0])),
        norm.register_forward_hook(lambda m, a, o: keep("norm", o)),
    ]
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    valid = batch["attention_mask"][..., None]
    expected = (seen["down"].double() * seen["down"].grad.double() * valid).sum(1)
    assert seen["down"].dtype == torch.bfloat16
    torch.testing.assert_close(statistics.neurons[4].fisher, expected.square().sum(0).float(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(statistics.neurons[4].taylor, expected.abs().sum(0).float(), rtol=1e-4, atol=1e-7)


BERT = {
    "out": "attention.output.dense",
    "down": "output.dense",
    "readers": [*(f"attention.self.{x}" for x in ("query", "key", "value")), "intermediate.dense"],
    "last": "bert.encoder.layer.4.output.LayerNorm",
    "layers": "bert.encoder.layer",
}


def answer_loss(outputs, example, target):
    """Negative log-likelihood of start and end, or of the choice; the divergence from the outputs of a teacher."""
    if "start_logits" in outputs:
        pairs = [(outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions")]
        others = target and [target.start_logits, target.end_logits]
    else:
        pairs, others = [(outputs.logits, "labels")], target and [target.logits]
    if target is None:
        return -sum(logits[0].log_softmax(-1)[example[name]].squeeze() for logits, name in pairs)
    return sum(
        (other[0].softmax(-1) * (other[0].log_softmax(-1) - logits[0].log_softmax(-1))).sum()
        for (logits, _), other in zip(pairs, others, strict=True)
    )


@pytest.mark.parametrize("loss", ["labels", "kl"])
@pytest.mark.parametrize("head", ["question-answering", "multiple-choice"])
def test_heads_of_questions_have_the_gradients_of_masks(head, loss):
    model, teacher = (family_model("bert", head, seed=seed, num_labels=2) for seed in (0, 1))
    batch = family_batch(model)
    labels = {"start_positions": [3, 0, 2], "end_positions": [5, 1, 4]}
    labels = labels if head == "question-answering" else {"labels": [1, 0, 1]}
    labels = {name: torch.tensor(values) for name, values in labels.items()}
    found = {"heads": [], "neurons": [], "channels": []}
    total, second = 0.0, 0.0
    for row, mask in enumerate(batch["attention_mask"]):
        length, seen = int(mask.sum(-1).max()), []
        inputs = {name: value[row : row + 1, ..., :length] for name, value in batch.items()}
        with torch.no_grad():
            target = teacher(**inputs) if loss == "kl" else None
        with masks(model, BERT) as (heads, neurons, channels):
            down = model.bert.encoder.layer[1].output.dense
            handle = down.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]) or a[0].retain_grad())
            answer_loss(model(**inputs), {n: v[row : row + 1] for n, v in labels.items()}, target).backward()
            handle.remove()
        found["heads"].append(torch.stack([m.grad for m in heads]).unflatten(-1, (QUERIES, HEAD_SIZE)).sum(-1))
        found["neurons"].append(torch.stack([m.grad for m in neurons]))
        found["channels"].append(channels.grad)
        weights, x = seen[0].grad.flatten(0, 1).square().sum(-1), seen[0].detach().flatten(0, 1)
        total, second = total + len(x), second + (weights / weights.mean() * x.T) @ x
    model.zero_grad()
    given = batch if loss == "kl" else {**batch, **labels}
    statistics = collect_statistics(
        model,
        [given],
        loss,
        teacher if loss == "kl" else None,
        settings=CalibrationSettings(exact=True, moment_share=1.0),
    )
    heads, neurons, channels = (torch.stack(values) for values in found.values())
    for i in range(5):
        for values, row in ((heads, statistics.heads[i]), (neurons, statistics.neurons[i])):
            torch.testing.assert_close(row.fisher, values[:, i].square().sum(0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(row.taylor, values[:, i].abs().sum(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(statistics.hidden.fisher, channels.square().sum(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(statistics.moments[1][1].second, second / total, rtol=1e-3, atol=1e-4)
    assert (statistics.examples, statistics.tokens) == (3, int(batch["attention_mask"].sum()))
    assert leave_one_out(model, [given], statistics, loss).without.isfinite().all()


def test_without_a_teacher_and_without_labels_questions_are_answered_by_the_model_itself():
    model = family_model("bert", "question-answering", num_labels=2)
    batch = family_batch(model)
    assert (collect_statistics(model, [batch], "kl").neurons[0].fisher > 0).all()
    with pytest.raises(InputError, match="batches with start_positions and end_positions, or loss='kl'"):
        collect_statistics(model, [batch])


@pytest.mark.parametrize(
    "labels", [torch.ones(3, 3), torch.ones(3, 3, dtype=torch.long), torch.ones(3)], ids=["shares", "classes", "floats"]
)
def test_several_labels_of_an_example_are_refused_in_one_line(labels):
    model = family_model("bert", num_labels=3)
    batch = {**family_batch(model), "labels": labels}
    statistics = collect_statistics(model, [batch], loss=None)
    for measure in (lambda: collect_statistics(model, [batch]), lambda: leave_one_out(model, [batch], statistics)):
        with pytest.raises(
            InputError, match="labels: got .* accepted: one whole number for each, of 3 classes"
        ) as caught:
            measure()
        assert "\n" not in str(caught.value) and str(list(labels.shape)) in str(caught.value)
    with pytest.raises(InputError, match="accepted: one value for each"):
        collect_statistics(family_model("bert", num_labels=1), [{**batch, "labels": torch.ones(3, 3)}])


def test_a_family_whose_norms_have_no_weights_has_statistics_of_all_but_channels(monkeypatch):
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": QUERIES, "intermediate_size": NEURONS, "vocab_size": 100}
    model = OlmoForCausalLM(OlmoConfig(**sizes, num_hidden_layers=2, pad_token_id=0, eos_token_id=2)).eval()
    monkeypatch.setitem(ROWS, "olmo", ROWS["llama"])
    with pytest.raises(InputError, match=r"^model: got 'OlmoForCausalLM, whose norms .*CalibrationSettings\(hidden=F"):
        collect_statistics(model, [family_batch(model)], loss="kl")
    found = collect_statistics(model, [family_batch(model)], loss="kl", settings=CalibrationSettings(hidden=False))
    assert all(row.fisher.sum() > 0 for row in (*found.heads, *found.neurons))
