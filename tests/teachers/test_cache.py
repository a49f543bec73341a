import zlib

import pytest
import torch
from builders.caches import VOCABULARY, causal_model, pad, sequences, write
from builders.models import tiny_model
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.losses.items import targets
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.sparse import SparseTargets, sparse_cross_entropy, sparse_forward_kl
from distill_llm.losses.terms.term import Use
from distill_llm.teachers.cache import CachedTeacher, SparseSignals
from distill_llm.teachers.cache_coding import ItemCoding
from distill_llm.teachers.online import OnlineTeacher


def dense(signals: SparseTargets, vocabulary=VOCABULARY):
    """The held probabilities, spread out over the vocabulary."""
    return torch.zeros(len(signals.ids), vocabulary).scatter_add_(1, signals.ids, signals.probabilities)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """(model, data, {method: folder}) of the same 20 sequences."""
    model, data, folder = causal_model(), sequences(), tmp_path_factory.mktemp("caches")
    for method in ("topk", "sampled"):
        write(folder / method, model, data, method=method)
    return model, data, folder


# What is stored is what the teacher says.


def test_top_k_gives_the_teachers_largest_probabilities_and_the_rest(caches):
    model, data, folder = caches
    batch = pad(list(data)[:6])
    positions, _ = targets(batch, "next_token")
    online = OnlineTeacher(model).signals(batch, positions=positions).logits.softmax(-1)
    signals = CachedTeacher(folder / "topk").signals(batch, positions=positions)
    assert isinstance(signals, SparseSignals) and signals.logits.shape == (len(positions), 0)
    expected, ids = online.topk(5)
    expected = torch.where(expected >= 2**-10, expected, 0)
    top = torch.zeros_like(online).scatter_(1, ids, expected)
    assert torch.equal(dense(signals.targets) > 0, top > 0)
    torch.testing.assert_close(signals.targets.rest, 1 - expected.sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(dense(signals.targets), top, atol=1e-4, rtol=0.1)


def test_the_draws_are_those_of_the_teachers_distribution(caches):
    model, data, folder = caches
    batch = pad(list(data)[:6])
    positions, _ = targets(batch, "next_token")
    online = OnlineTeacher(model).signals(batch, positions=positions).logits.softmax(-1)
    counts = dense(CachedTeacher(folder / "sampled").signals(batch, positions=positions).targets) * 5
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(-1), torch.full((len(positions),), 5.0))
    assert ((counts - 5 * online).abs() < 1).all()


@pytest.mark.parametrize("classes, k", [(1000, 50), (97, 5)])
def test_sampling_is_unbiased_in_probabilities_and_in_the_gradient(classes, k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, generator=generator).mul(4)
    student = torch.randn(1, classes, generator=generator).requires_grad_()
    seeds, coding = 4000, ItemCoding(classes, k, "sampled")
    uniforms = torch.rand(seeds, generator=generator, dtype=torch.float64).numpy()
    drawn = [coding.decode(coding.encode(logits.expand(250, -1), part)) for part in uniforms.reshape(-1, 250)]
    total = sum(dense(part._replace(ids=part.ids.long()), classes).sum(0) for part in drawn) / seeds
    p = logits.softmax(-1)[0]
    bound = 5 * (p * (1 - p) / k / seeds).sqrt() + 1e-6  # five standard errors of independent draws
    assert ((total - p).abs() <= bound.clamp(min=5 / k / seeds)).all()
    mean = SparseTargets(torch.arange(classes)[None], total[None], torch.zeros(1), torch.zeros(1))
    (gradient,) = torch.autograd.grad(sparse_cross_entropy(student, mean).sum(), student)
    torch.testing.assert_close(gradient[0], student.detach().softmax(-1)[0] - p, atol=float(bound.max()), rtol=0)


@pytest.mark.parametrize("classes", [60, 151_936])
def test_coding_a_top_k_costs_less_than_a_thousandth_of_a_nat(classes):
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 8, 40)[:, None]
    coding = ItemCoding(classes, 50, "topk")
    coded = coding.encode(logits, None)
    stored = coding.decode(coded)
    p = logits.double().softmax(-1).gather(1, stored.ids.long()) * (stored.probabilities > 0)
    pairs = (p, stored.probabilities), ((1 - p.sum(-1, keepdim=True)).clamp(min=0), stored.rest[:, None])
    kl = sum(torch.special.xlogy(exact, exact / kept.double().clamp(min=1e-5)).sum(-1) for exact, kept in pairs)
    assert kl.abs().max() < 1e-3
    torch.testing.assert_close(stored.probabilities.sum(-1) + stored.rest, torch.ones(40))


@pytest.mark.parametrize("method", ["topk", "sampled"])
def test_fifty_of_151936_tokens_take_at_most_90_bytes(method):
    """Logits as a language model has them: Zipf's law, as tokenizers number tokens, and what the context says."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, 151_937).log()
    logits = 1.5 * torch.randn(128, 151_936, generator=generator) - 1.1 * ranks
    coding = ItemCoding(151_936, 50, method)
    tokens = coding.encode(logits, torch.rand(128, generator=generator, dtype=torch.float64).numpy())
    assert tokens.widths.mean() > 15
    assert len(zlib.compress(coding.join(tokens))) / 128 <= 90


@pytest.mark.parametrize("method", ["topk", "sampled"])
@pytest.mark.parametrize("classes", [2, 100, 65_537, 151_936, 262_144])
def test_the_highest_and_lowest_ids_come_back(method, classes):
    logits = torch.full((2, classes), -30.0)
    logits[0, 0] = logits[1, -1] = 0.0
    coding = ItemCoding(classes, 1, method)
    stored = coding.decode(coding.encode(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).numpy()))
    assert stored.ids.tolist() == [[0], [classes - 1]]
    torch.testing.assert_close(stored.probabilities[:, 0] + stored.rest, torch.ones(2))


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-1e4, 0.0, -1e4, 1.0, -1e4]])
    coding = ItemCoding(5, 4, "sampled")
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert set(coding.decode(coding.encode(logits, torch.tensor([uniform]).double().numpy())).ids[0].tolist()) == {
            1,
            3,
        }


# Looking it up.


def test_lookups_do_not_depend_on_order_padding_or_company(caches):
    _, data, folder = caches
    cached = CachedTeacher(folder / "sampled", dataset=data.shuffle(seed=3))
    rows = list(data)
    alone = []
    for row in rows:
        batch = pad([row])
        alone.append(dense(cached.signals(batch, positions=targets(batch, "next_token")[0]).targets))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    for left in (False, True):
        for start in range(0, len(rows), 7):
            chosen = order[start : start + 7]
            batch = pad([rows[at] for at in chosen], left, width=23)
            together = cached.signals(batch, positions=targets(batch, "next_token")[0]).targets
            assert torch.equal(dense(together), torch.cat([alone[at] for at in chosen]))


def test_any_choice_of_positions_in_any_order(caches):
    _, data, folder = caches
    cached, batch = CachedTeacher(folder / "topk"), pad(list(data)[:5], left=True)
    positions, _ = targets(batch, "next_token")
    everything = cached.signals(batch, positions=positions).targets
    chosen = torch.tensor([11, 3, 3, 20])
    some = cached.signals(batch, positions=positions[chosen]).targets
    for name in SparseTargets._fields:
        assert torch.equal(getattr(some, name), getattr(everything, name)[chosen])
    assert len(cached.signals(batch, positions=positions[:0]).targets.rest) == 0


def test_only_labelled_tokens_are_stored_and_others_are_refused(tmp_path):
    model, data = causal_model(), sequences(labels=True)
    write(tmp_path / "cache", model, data, method="topk")
    cached, batch = CachedTeacher(tmp_path / "cache"), pad(list(data)[:4], left=True)
    positions, _ = targets(batch, "next_token")
    online = OnlineTeacher(model).signals(batch, positions=positions).logits
    first = dense(cached.signals(batch, positions=positions).targets).argmax(-1)
    assert torch.equal(first, online.argmax(-1))
    everything, _ = targets(batch, "next_token", unlabelled=True)
    with pytest.raises(InputError, match="^positions: got 'example 0 of the batch, token"):
        cached.signals(batch, positions=everything)
    with pytest.raises(InputError, match="^positions: not given"):
        cached.signals(batch)


def test_an_example_that_was_not_cached_is_named(caches):
    _, _, folder = caches
    batch = pad([{"input_ids": [5, 6, 7]}])
    with pytest.raises(InputError, match=r"^input_ids: got '\[5, 6, 7\], 3 tokens'.*cut to the same length"):
        CachedTeacher(folder / "topk").signals(batch, positions=torch.tensor([0, 1]))


def test_up_to_k_classes_are_stored_as_logits(tmp_path):
    model = tiny_model(num_labels=3)
    data = sequences().map(lambda row, at: {"labels": at % 3}, with_indices=True)
    write(
        tmp_path / "cache", model, data, kind="example", collator=lambda rows: pad([{**r, "labels": [0]} for r in rows])
    )
    cached, batch = CachedTeacher(tmp_path / "cache"), pad(list(data.remove_columns("labels"))[3:9], left=False)
    signals = cached.signals(batch)
    assert cached.index.coding == "full" and not isinstance(signals, SparseSignals)
    torch.testing.assert_close(signals.logits, model(**batch).logits.detach(), atol=1e-5, rtol=1e-5)


def test_token_classification_is_stored_as_logits_per_token(tmp_path):
    model, data = tiny_model(head="token-classification", num_labels=4), sequences()
    write(tmp_path / "cache", model, data, kind="token")
    batch = pad(list(data)[2:7])
    positions, _ = targets(batch, "token")
    online = OnlineTeacher(model).signals(batch, positions=positions).logits
    torch.testing.assert_close(
        CachedTeacher(tmp_path / "cache").signals(batch, positions=positions).logits, online, atol=1e-5, rtol=1e-5
    )


def test_entries_beyond_the_shared_vocabulary_take_no_part(tmp_path):
    model, data = causal_model(), sequences(6)
    write(tmp_path / "cache", model, data, method="topk", classes=60)
    batch = pad(list(data))
    positions, _ = targets(batch, "next_token")
    expected = OnlineTeacher(model).signals(batch, positions=positions).logits[:, :60].softmax(-1).topk(5)
    signals = CachedTeacher(tmp_path / "cache").signals(batch, positions=positions)
    rest = 1 - torch.where(expected.values >= 2**-10, expected.values, 0).sum(-1)
    assert torch.equal(dense(signals.targets, 60).argmax(-1), expected.indices[:, 0])
    torch.testing.assert_close(signals.targets.rest, rest, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "losses, field",
    [
        ({"logits": {}, "hidden": {}}, "losses.hidden"),
        ({"logits": {"temperature": 2.0}}, "losses.logits.temperature"),
        ({"logits": {"divergence": "reverse_kl"}}, "losses.logits.divergence"),
        ({"logits": {"top_k": 3}}, "losses.logits.top_k"),
    ],
)
def test_objectives_that_need_more_than_the_cache_has_are_refused(caches, losses, field):
    cached = CachedTeacher(caches[2] / "topk")
    (fault,) = parse_objective(losses).faults(Use(teacher=cached.gives))
    assert fault.field == field
    assert not parse_objective({"labels": {}, "logits": {"weight": 2.0}}).faults(Use(teacher=cached.gives))


def test_a_student_on_the_cache_gets_the_gradient_of_the_online_teacher_within_its_noise(tmp_path):
    model, data, student = causal_model(), sequences(), causal_model(seed=5)
    write(tmp_path / "cache", model, data, k=50)
    batch = pad(list(data))
    positions, _ = targets(batch, "next_token")
    teacher = OnlineTeacher(model).signals(batch, positions=positions).logits
    p, none = teacher.softmax(-1), torch.zeros(len(teacher))
    whole = SparseTargets(torch.arange(VOCABULARY).expand_as(teacher), p, none, torch.special.entr(p).sum(-1))
    gradients = []
    for signal in (whole, CachedTeacher(tmp_path / "cache").signals(batch, positions=positions).targets):
        logits = student(**batch).logits.flatten(0, 1)[positions]
        loss = sparse_forward_kl(logits, signal).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_dataset_in_another_arrow_layout_has_the_same_examples(caches):
    _, data, folder = caches
    again = Dataset.from_dict(
        {
            "attention_mask": [[1] * len(r["input_ids"]) + [0, 0] for r in data],
            "input_ids": [r["input_ids"] + [0, 0] for r in data],
        }
    )
    shuffled = again.select(list(reversed(range(len(again)))))
    teacher = CachedTeacher(folder / "topk", dataset=shuffled)
    batch = pad([dict(data[index]) for index in range(3)])
    positions, _ = targets(batch, "next_token")
    assert len(teacher.signals(batch, positions=positions).targets.ids) == len(positions)
