"""Statistics against a plain autograd reference: one example at a time, without padding, one loop per sum."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import UNEVEN, collect, inputs_of, layers_in, linears_in, plan_of, processor_with_bf16
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation.bypass import fit_bypasses
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.statistics.record import Statistics, UnitStatistics

HEAD_SIZE = 8


def rows_of(batch):
    """The examples of a batch, one by one, padding cut off."""
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        yield {
            k: v[row : row + 1, :length] if v.dim() == 2 else v[row : row + 1]
            for k, v in batch.items()
            if k != "attention_mask"
        }


def labels_loss(outputs, example):
    logits, labels = outputs.logits[0], example["labels"][0]
    if logits.shape[-1] == 1:
        return (logits[0] - labels) ** 2
    return -sum(
        F.log_softmax(row, -1)[c] for row, c in zip(logits.view(-1, logits.shape[-1]), labels.view(-1), strict=True)
    )


def reference(model, batch, loss=labels_loss):
    """Sums by unit, written out: {(kind, layer): {statistic: values}}, and means of x x^T by squared gradient."""
    found, second, similarity = {}, {}, np.zeros(len(layers_in(model)))
    taps = [
        (kind, i, pair[k])
        for i, pair in enumerate(linears_in(model))
        for k, kind in enumerate(("heads", "neurons"))
        if pair[k].in_features
    ]
    for example in rows_of(batch):
        with inputs_of([m for *_, m in taps]) as seen, inputs_of(list(layers_in(model))) as entered:
            left = {}
            handles = [
                layer.register_forward_hook(
                    lambda m, a, o, i=i, left=left: left.update({i: o[0] if isinstance(o, tuple) else o})
                )
                for i, layer in enumerate(layers_in(model))
            ]
            outputs = model(**{k: v for k, v in example.items() if k != "labels"})
            for tensor in (*seen.values(), *left.values()):
                tensor.retain_grad()
            loss(outputs, example).backward()
            for handle in handles:
                handle.remove()
        for place, (kind, i, _) in enumerate(taps):
            a, g = seen[place].detach()[0], seen[place].grad[0]
            size = HEAD_SIZE if kind == "heads" else 1
            for unit in range(a.shape[1] // size):
                columns = slice(unit * size, (unit + 1) * size)
                _add(found, kind, i, unit, a.shape[1] // size, a[:, columns], g[:, columns])
            weights, rows = g.double().square().sum(-1).numpy(), a.double().numpy()
            weights = weights / weights.mean()
            total, product = second.get((kind, i), (0, 0))
            second[kind, i] = (
                total + weights.sum(),
                product + sum(w * np.outer(x, x) for w, x in zip(weights, rows, strict=True)),
            )
        for i in left:
            before, after = entered[i].detach()[0], left[i].detach()[0]
            _add(found, "layers", i, 0, 1, after - before, left[i].grad[0])
            similarity[i] += sum(float(b @ c / (b.norm() * c.norm())) for b, c in zip(before, after, strict=True))
    model.zero_grad()
    return found, {key: product / total for key, (total, product) in second.items()}, similarity


def _add(found, kind, layer, unit, units, a, g):
    sums = found.setdefault((kind, layer), {name: np.zeros(units) for name in ("taylor", "fisher", "activation")})
    effect = float((a * g).sum())
    sums["taylor"][unit] += abs(effect)
    sums["fisher"][unit] += effect**2
    sums["activation"][unit] += float((a**2).sum())


def assert_near(actual, expected, tolerance=2e-4):
    """Equal but for rounding, relative to the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same(one: Statistics, other: Statistics, tolerance=2e-4):
    """The same statistics but for rounding."""
    assert (one.examples, one.tokens, one.has_gradients) == (other.examples, other.tokens, other.has_gradients)
    for mine, its in zip(
        (*one.heads, *one.neurons, one.layers), (*other.heads, *other.neurons, other.layers), strict=True
    ):
        for field in fields(UnitStatistics):
            assert_near(getattr(mine, field.name), getattr(its, field.name), tolerance)
    assert_near(one.similarity, other.similarity, tolerance)
    for mine, its in zip(one.moments, other.moments, strict=True):
        for left, right in zip(mine, its, strict=True):
            assert_near(left.mean, right.mean, tolerance)
            assert_near(left.second, right.second, tolerance)


@pytest.mark.parametrize(
    ("family", "head", "config"),
    [
        ("bert", "sequence-classification", {}),
        ("bert", "sequence-classification", {"num_labels": 1}),
        ("bert", "token-classification", {"num_labels": 3}),
        ("roberta", "masked-lm", {}),
        ("distilbert", "sequence-classification", {"num_labels": 3}),
        ("electra", "sequence-classification", {}),
    ],
)
def test_statistics_equal_autograd_one_example_at_a_time_without_padding(family, head, config):
    model = tiny_model(family, head, **config)
    batch = random_batch(model)
    statistics = collect(model, [batch])
    found, second, similarity = reference(model, batch)
    for i in range(3):
        for name in ("taylor", "fisher", "activation"):
            assert_near(getattr(statistics.heads[i], name), found["heads", i][name])
            assert_near(getattr(statistics.neurons[i], name), found["neurons", i][name])
            assert_near(getattr(statistics.layers, name)[i], found["layers", i][name][0])
        for moments, kind in zip(statistics.moments[i], ("heads", "neurons"), strict=True):
            assert_near(moments.second, second[kind, i])
    assert_near(statistics.similarity, similarity)
    assert statistics.examples == 4
    assert statistics.tokens == int(batch["attention_mask"].sum())


def test_first_moments_are_means_over_tokens_that_are_not_padding():
    model = tiny_model()
    batch = random_batch(model)
    statistics = collect(model, [batch], loss=None)
    modules = [module for pair in linears_in(model) for module in pair]
    with inputs_of(modules) as seen, torch.no_grad():
        model(**batch)
    valid = batch["attention_mask"].bool()
    for place, moments in enumerate(m for pair in statistics.moments for m in pair):
        assert_near(moments.mean, seen[place][valid].mean(0))


def test_products_in_bf16_give_nearly_the_same_and_not_at_all_where_exactness_is_asked_for(monkeypatch):
    model = tiny_model()
    batches = [random_batch(model, batch=16, length=20, seed=seed) for seed in range(8)]
    expected = collect(model, batches)
    processor_with_bf16(monkeypatch, True)
    rounded, exact = collect(model, batches), collect(model, batches, exact=True)
    assert_same(rounded, expected, 0.02)
    for kind in ("heads", "neurons"):
        for mine, its, near in zip(getattr(exact, kind), getattr(expected, kind), getattr(rounded, kind), strict=True):
            assert torch.equal(mine.fisher, its.fisher)
            assert not torch.equal(near.fisher, its.fisher), "nothing was done in bf16: the test proves nothing"


def test_more_padding_changes_nothing():
    model = tiny_model()
    short = random_batch(model, length=10)
    long = {k: F.pad(v, (0, 10)) if v.dim() == 2 else v for k, v in short.items()}
    long["input_ids"][:, 10:] = 7  # what the padding is filled with must not matter either
    assert_same(collect(model, [long]), collect(model, [short]))


def test_a_loss_at_padding_does_not_count_for_the_units_that_made_it():
    model = tiny_model(head="base")
    batch = random_batch(model, labels=False)
    everywhere = collect(model, [batch], lambda outputs, given: outputs.last_hidden_state.pow(3).sum())

    def at_tokens(outputs, given):
        return (outputs.last_hidden_state.pow(3).sum(-1) * given["attention_mask"]).sum()

    expected = collect(model, [batch], at_tokens)
    # In the last layer neurons and the layer's own output touch the loss of their own token only.
    assert_near(everywhere.neurons[2].fisher, expected.neurons[2].fisher)
    assert_near(everywhere.neurons[2].taylor, expected.neurons[2].taylor)
    assert_near(everywhere.layers.fisher[2], expected.layers.fisher[2])


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification"])
def test_one_batch_gives_what_several_give(head):
    model = tiny_model(head=head)
    batch = random_batch(model, batch=6)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert_same(collect(model, parts), collect(model, [batch]))


def test_batches_without_a_mask_have_no_padding():
    model = tiny_model()
    batch = random_batch(model, padded=False)
    unmasked = {k: v for k, v in batch.items() if k != "attention_mask"}
    assert_same(collect(model, [unmasked]), collect(model, [batch]))


def test_train_mode_with_dropout_gives_what_eval_mode_gives():
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = random_batch(model)
    expected = collect(model, [batch])
    assert_same(collect(model.train(), [batch]), expected)


def test_the_model_is_as_it_was_afterwards():
    model = tiny_model().train()
    model.base_model.embeddings.eval()
    model.base_model.embeddings.word_embeddings.weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    state = copy.deepcopy(model.state_dict())
    modes, flags = {n: m.training for n, m in model.named_modules()}, [p.requires_grad for p in model.parameters()]
    batch = random_batch(model)
    collect(model, [batch])
    with pytest.raises(KeyError):
        collect(model, [batch, {"labels": batch["labels"]}])
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "classifier.weight")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_divergence_from_a_teacher_is_differentiated_as_written_by_hand():
    model, teacher = tiny_model(num_labels=3), tiny_model(num_labels=3, seed=1)
    batch = random_batch(model)

    def divergence(outputs, example):
        with torch.no_grad():
            target = teacher(example["input_ids"]).logits[0].softmax(-1)
        own = outputs.logits[0].log_softmax(-1)
        return sum(p * (p.log() - q) for p, q in zip(target, own, strict=True))

    statistics = collect(model, [batch], "kl", teacher)
    found, *_ = reference(model, batch, divergence)
    for i in range(3):
        assert_near(statistics.heads[i].fisher, found["heads", i]["fisher"])
        assert_near(statistics.neurons[i].taylor, found["neurons", i]["taylor"])


def test_divergence_without_a_teacher_gives_the_fisher_information_of_the_models_own_predictions():
    model = tiny_model(num_labels=3, layers=2)
    example = random_batch(model, batch=1, length=5, labels=False)
    expected = np.zeros(64)
    with torch.no_grad():
        probabilities = model(**example).logits[0].softmax(-1)
    for label, p in enumerate(probabilities.tolist()):
        found, *_ = reference(model, {**example, "labels": torch.tensor([label])})
        expected += p * found["neurons", 1]["fisher"]
    many = {k: v.expand(4000, -1) for k, v in example.items()}
    statistics = collect(model, [many], "kl", moments=False)
    assert_near(statistics.neurons[1].fisher / 4000, expected, tolerance=0.05)
    again = collect(model, [many], "kl", moments=False)
    assert torch.equal(again.neurons[1].fisher, statistics.neurons[1].fisher), "the same seed draws the same labels"


def test_a_callable_loss_gets_outputs_and_batch():
    model = tiny_model()
    batch = random_batch(model)
    own = collect(
        model, [batch], lambda outputs, given: F.cross_entropy(outputs.logits, given["labels"], reduction="sum")
    )
    assert_same(own, collect(model, [batch]))


def test_statistics_of_a_pruned_model_equal_the_reference_for_what_it_has_left():
    dense = tiny_model(layers=5)
    model = prune(dense, plan_of(dense, [(1, (), range(0, 64, 3)), *UNEVEN[2:]]))
    batch = random_batch(model)
    statistics = collect(model, [batch])
    found, second, _ = reference(model, batch)
    assert [len(row.fisher) for row in statistics.heads] == [0, 4, 1]
    assert [len(row.fisher) for row in statistics.neurons] == [22, 0, 3]
    assert_near(statistics.neurons[0].fisher, found["neurons", 0]["fisher"])
    assert_near(statistics.heads[1].fisher, found["heads", 1]["fisher"])
    assert_near(statistics.heads[2].taylor, found["heads", 2]["taylor"])
    assert_near(statistics.moments[2][1].second, second["neurons", 2])


@pytest.mark.parametrize("moments", [True, False])
def test_statistics_survive_a_file(tmp_path, moments):
    model = tiny_model(layers=12)  # more than ten: rows must not be read in the order of their names
    statistics = collect(model, [random_batch(model)], moments=moments)
    statistics.save(tmp_path / "statistics.safetensors")
    assert_same(Statistics.load(tmp_path / "statistics.safetensors"), statistics, tolerance=0)


def test_an_unknown_loss_and_missing_labels_are_refused():
    model = tiny_model()
    batch = random_batch(model, labels=False)
    with pytest.raises(InputError, match="loss: got 'label'"):
        collect(model, [batch], "label")
    with pytest.raises(InputError, match="dataloader.*batches with labels"):
        collect(model, [batch])


@pytest.mark.parametrize(
    "device, given", [("meta", r"not in memory \(offloaded\)"), ("cuda", "weights on cpu and cuda:0")]
)
def test_a_model_that_is_offloaded_or_spread_over_devices_is_refused_in_one_line(device, given):
    """Of a weight that only says it is on a device: none is needed."""
    model = tiny_model()
    batch, (_, down) = random_batch(model), linears_in(model)[1]
    with FakeTensorMode():
        down.weight = torch.nn.Parameter(torch.empty(down.weight.shape, device=device))
    plan = plan_of(model, [(i, range(4), range(64)) for i in (0, 2)])
    for use in (lambda: collect(model, [batch]), lambda: fit_bypasses(model, plan, [batch])):
        with pytest.raises(InputError, match=f"model: got .*{given}.*; accepted: .*whole on one device") as error:
            use()
        assert "\n" not in str(error.value)


def test_rows_longer_than_the_models_positions_are_refused_in_one_line():
    model = tiny_model(max_position_embeddings=12)
    batch = random_batch(model, batch=2, length=13)
    batch["attention_mask"][:, 12:] = 0
    short = {name: values[:, :12] if values.dim() == 2 else values for name, values in batch.items()}
    assert collect(model, [short]).examples == 2
    batch["attention_mask"][:] = 1
    line = "^dataloader: got 'a row of 13 tokens'; accepted: rows of at most 12 tokens, the longest input of Bert"
    with pytest.raises(InputError, match=line):
        collect(model, [short, batch])
