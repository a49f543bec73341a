"""The chunked head with a teacher known at a few tokens: as the dense formula on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from builders.heads import chunked

from distill_llm.common.errors import InputError
from distill_llm.losses.head import Head
from distill_llm.losses.sparse import SparseTargets

ITEMS, WIDTH, VOCABULARY, HELD = 23, 8, 37, 5


def case(classes=VOCABULARY, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ITEMS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = 0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.stack([torch.randperm(classes, generator=generator)[:HELD] for _ in range(ITEMS)])
    masses = torch.rand(ITEMS, HELD + 1, generator=generator)
    masses[::3, HELD - 1] = 0  # padding
    masses[::4, HELD] = 0  # nothing outside
    masses /= masses.sum(-1, keepdim=True)
    labels = torch.randint(0, VOCABULARY, (ITEMS,), generator=generator)
    labels[::6] = -100
    nll = torch.rand(ITEMS, generator=generator)  # not what the masses have
    targets = SparseTargets(ids, masses[:, :HELD], masses[:, HELD], nll)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, labels


def dense(hidden, weight, targets, labels, classes, softcap):
    """0.4 * cross-entropy + 1.7 * (cross-entropy with the held tokens and the rest as one - nll), by the definitions."""
    logits = 0.7 * hidden @ weight.T
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    q, value = logits[:, :classes].softmax(-1), hidden.new_zeros(())
    for row, (ids, masses, rest, nll) in enumerate(zip(*targets, strict=True)):
        held = masses > 0
        p = torch.cat([masses[held], rest[None]]).double()
        own = q[row, ids[held]]
        own = torch.cat([own, 1 - own.sum(-1, keepdim=True)])
        value = value - torch.xlogy(p, own).sum() - nll
    label_loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return 0.4 * label_loss + 1.7 * value, label_loss, value


@pytest.mark.parametrize("classes, softcap", [(VOCABULARY, None), (31, None), (31, 3.0)])
@pytest.mark.parametrize("chunk", [None, 7])
def test_sparse_targets_give_the_values_and_gradients_of_the_dense_formula(classes, softcap, chunk):
    exact = case(classes)
    expected = dense(*exact, classes, softcap)
    expected[0].backward()
    hidden, weight, targets, labels = case(classes, torch.float32)
    options = {"label_weight": 0.4, "logits_weight": torch.tensor(1.7), "classes": classes, "chunk": chunk}
    found = chunked(Head(weight, None, 0.7, softcap), hidden, labels, targets=targets, **options)
    found.total.backward()
    for one, other in zip(found, expected, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"divergence": "reverse_kl"}, "divergence: .*reverse_kl"),
        ({"temperature": 2.0}, "divergence: .*2.0"),
        ({"settings": {"top_k": 3}}, "divergence: .*top_k"),
    ],
)
def test_what_sparse_targets_cannot_tell_is_refused_in_one_line(options, words):
    hidden, weight, targets, labels = case(dtype=torch.float32)
    with pytest.raises(InputError, match=words) as error:
        chunked(Head(weight), hidden, labels, targets=targets, **options)
    assert "\n" not in str(error.value)


def test_targets_of_another_number_of_items_are_refused():
    hidden, weight, targets, _ = case(dtype=torch.float32)
    with pytest.raises(InputError, match="targets: got '22 items'; accepted: the student's 23"):
        chunked(Head(weight), hidden, targets=targets.rows(slice(1, None)))
