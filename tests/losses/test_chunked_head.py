"""The chunked head against dense formulas: values, gradients, precision and memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders.heads import (
    CLASSES,
    ITEMS,
    assert_equals_dense,
    case,
    chunked,
    dense,
    dense_divergence,
    dense_logits,
    gradients,
    leaves,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_llm.common.errors import InputError
from distill_llm.losses import chunked_head
from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.head import Head
from distill_llm.losses.head_kernels import BY_HAND, Block, _differentiated
from distill_llm.losses.head_parts import Comparison, DivergencePart, LabelPart, Part
from distill_llm.losses.logits import logits_divergence

SETTINGS = {
    "jsd": {"beta": 0.3},
    "skew_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "dkd": {"alpha": 2.0, "beta": 3.0},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"bias": False},
        {"scale": 0.3},
        {"softcap": 3.0},
        {"scale": 2.0, "softcap": 5.0},
    ],
    ids=str,
)
def test_value_and_gradients_equal_dense(divergence: str, temperature: float, variant: dict[str, Any]) -> None:
    weights = {"label_weight": 0.7, "logits_weight": 1.3}
    settings = SETTINGS.get(divergence, {})
    assert_equals_dense(
        case(**variant), divergence=divergence, temperature=temperature, settings=settings, smoothing=0.1, **weights
    )


@pytest.mark.parametrize("divergence", [name for name, row in DIVERGENCES.items() if "top_k" in row.settings])
@pytest.mark.parametrize("top_k", [1, 5, 36, 37])
def test_top_k_equals_the_dense_divergence_of_the_likeliest_classes_and_the_rest(divergence: str, top_k: int) -> None:
    given = leaves(case(), torch.float32)
    logits, target = (
        dense_logits(given["student"], given["hidden"]),
        dense_logits(given["teacher"], given["teacher_hidden"]),
    )
    settings = SETTINGS.get(divergence, {}) | {"top_k": top_k}
    expected = logits_divergence(logits, target[:, :CLASSES].detach(), divergence, 2.0, **settings).sum()
    gradient = torch.autograd.grad(expected, given["hidden"])[0]
    options = {"divergence": divergence, "settings": settings, "temperature": 2.0, "label_weight": 0.0, "chunk": 7}
    found = chunked(*given.values(), **options)
    torch.testing.assert_close(found.logits, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.total, given["hidden"])[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_equal_the_divergences_of_whole_logits(divergence: str) -> None:
    given = leaves(case(), torch.float32)
    logits, target = (
        dense_logits(given["student"], given["hidden"]),
        dense_logits(given["teacher"], given["teacher_hidden"]),
    )
    settings = SETTINGS.get(divergence, {})
    own = {**settings, "labels": given["labels"]} if divergence == "dkd" else settings
    expected = logits_divergence(logits, target[:, :CLASSES], divergence, 1.5, **own).sum()
    found = chunked(*given.values(), divergence=divergence, settings=settings, temperature=1.5, chunk=9)
    torch.testing.assert_close(found.logits, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", BY_HAND)
@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_a_kernel_made_by_hand_is_the_function_differentiated(divergence: str, distance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(6, 200, generator=generator)
    student = teacher + distance * torch.randn(6, 200, generator=generator)
    settings = SETTINGS.get(divergence, {})

    def block() -> Block:
        return Block(student.clone(), teacher.clone(), torch.empty(6, 200), torch.empty(6, 200), None)

    value, gradient = BY_HAND[divergence](block(), **settings)
    expected, slope = _differentiated(block(), divergence=divergence, settings=settings)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    assert (gradient - slope).norm() < 1e-3 * slope.norm()


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 22, 23, 100])
@pytest.mark.parametrize("block", [1, 80, 2**20])
def test_any_chunk_and_any_block_give_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    monkeypatch.setattr(chunked_head, "BLOCK_LOGITS", {"cpu": block})
    assert_equals_dense(case(), chunk=chunk, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [1, 20, 37])
def test_only_the_shared_classes_are_compared_and_labels_use_the_whole_vocabulary(
    divergence: str, classes: int
) -> None:
    given = case()
    if divergence == "dkd":  # its dense formula needs the labelled class and another among the compared
        classes = max(classes, 2)
        given["labels"] = given["labels"].where(given["labels"] < 0, given["labels"] % classes)
    assert_equals_dense(given, divergence=divergence, classes=classes, temperature=1.5)


def test_a_teacher_with_the_smaller_vocabulary_is_compared_over_its_own() -> None:
    given = case()
    given["teacher"] = Head(given["teacher"].weight[:30], given["teacher"].bias[:30])
    assert_equals_dense(given, temperature=2.0)


def test_padded_rows_of_an_identical_teacher_add_nothing() -> None:
    given = case()
    student = given["student"]
    padding = torch.randn(9, 8) * 5
    teacher = Head(torch.cat([student.weight, padding]), torch.cat([student.bias, torch.ones(9)]))
    found = chunked(student, given["hidden"], None, teacher, given["hidden"])
    assert found.logits.abs() < 1e-5


def test_label_loss_alone_and_divergence_alone() -> None:
    given = case()
    assert_equals_dense(given | {"teacher": None, "teacher_hidden": None}, smoothing=0.2)
    assert_equals_dense(given | {"labels": None})


def test_items_without_labels_give_no_label_loss_and_no_gradient() -> None:
    given = leaves(
        case() | {"labels": torch.full((ITEMS,), -100), "teacher": None, "teacher_hidden": None}, torch.float32
    )
    found, got = gradients(chunked, given, smoothing=0.1)
    assert found.total == 0 and all(not gradient.any() for gradient in got)


def test_no_item_gives_zero_and_a_connected_graph() -> None:
    given = leaves(case(items=0), torch.float32)
    found, got = gradients(chunked, given)
    assert found.total == 0 and found.total.requires_grad
    assert [tuple(gradient.shape) for gradient in got] == [(0, 8), (CLASSES, 8), (CLASSES,)]
    assert all(not gradient.any() for gradient in got)


def test_weights_may_be_tensors() -> None:
    given = leaves(case(), torch.float32)
    weights = {"label_weight": torch.tensor(0.3), "logits_weight": torch.tensor(0.9)}
    found, got = gradients(chunked, given, **weights)
    _, expected = gradients(chunked, given, label_weight=0.3, logits_weight=0.9)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(found.total.detach(), 0.3 * found.labels + 0.9 * found.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_hands_its_gradients_on_without_a_copy_times_the_incoming_one(dtype: torch.dtype) -> None:
    given = leaves(case(), dtype)
    _, once = gradients(chunked, given)
    total = chunked(*given.values()).total * -3
    with LargestTensor() as watched:
        total.backward(retain_graph=True)
    assert watched.made < given["student"].weight.nbytes
    for leaf, gradient in zip((given["hidden"], given["student"].weight, given["student"].bias), once, strict=True):
        torch.testing.assert_close(leaf.grad, -3 * gradient, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_frozen_weights_get_no_product_and_a_frozen_body_no_hidden_gradient() -> None:
    given = leaves(case(), torch.float32)
    _, (of_hidden, of_weight, _) = gradients(chunked, given)
    frozen = Head(given["student"].weight.detach(), given["student"].bias.detach())
    with CountProducts() as all_products:
        chunked(*given.values())
    with CountProducts() as products:
        total = chunked(**{**renamed(given), "student": frozen}).total
    assert products.count == all_products.count - 1
    total.backward()
    torch.testing.assert_close(given["hidden"].grad, of_hidden)
    body = {**renamed(given), "student_hidden": given["hidden"].detach()}
    torch.testing.assert_close(torch.autograd.grad(chunked(**body).total, given["student"].weight)[0], of_weight)


def test_without_gradients_only_the_logits_are_made() -> None:
    given = leaves(case(), torch.float32)
    with torch.no_grad(), CountProducts() as products:
        found = chunked(*given.values(), chunk=100)
    assert products.count == 2
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, chunked(*given.values()).total.detach())


def renamed(given: dict[str, Any]) -> dict[str, Any]:
    """The case by the names of `chunked`."""
    return {("student_hidden" if name == "hidden" else name): value for name, value in given.items()}


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mm.out", "aten::addmm.out", "aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """The most numbers in a tensor that an operation gives, and the bytes of all that it did not get."""

    largest, made = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(out) if torch.is_tensor(leaf)
        ]
        self.largest = max(self.largest, *sizes, 0)
        held = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        self.made += sum(x.nbytes for x in tree_leaves(out) if torch.is_tensor(x) and x.data_ptr() not in held)
        return out


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(divergence: str, dtype: torch.dtype) -> None:
    items, vocabulary, width, chunk = 256, 1000, 4, 16
    given = {
        "student": Head((torch.randn(vocabulary, width)).to(dtype).requires_grad_()),
        "hidden": torch.randn(items, width).to(dtype).requires_grad_(),
        "labels": torch.randint(0, vocabulary, (items,)),
        "teacher": Head(torch.randn(vocabulary, width).to(dtype)),
        "teacher_hidden": torch.randn(items, width).to(dtype),
    }
    with LargestTensor() as watched:
        chunked(*given.values(), divergence=divergence, chunk=chunk).total.backward()
    assert watched.largest <= chunk * vocabulary
    with LargestTensor() as watched:
        dense(*given.values(), divergence=divergence).total.backward()
    assert watched.largest >= items * vocabulary


def errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradients_are_as_near_to_fp64_as_those_of_whole_bf16_logits(divergence: str, autocast: bool) -> None:
    """Weights in bf16, or fp32 weights under autocast; twenty chunks. The dense side casts to fp32 once for both losses."""
    generator = torch.Generator().manual_seed(1)
    items, vocabulary, width = 320, 200, 32

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).bfloat16().float()

    given = {
        "student": Head(normal(vocabulary, width) * 0.25),
        "hidden": normal(items, width),
        "labels": torch.randint(0, vocabulary, (items,), generator=generator),
        "teacher": Head(normal(vocabulary, width) * 0.25),
        "teacher_hidden": normal(items, width),
    }
    options = {"divergence": divergence, "temperature": 2.0}
    _, exact = gradients(dense, leaves(given, torch.float64), **options)
    low = leaves(given, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, whole = gradients(dense, low, **options)
        _, low_gradients = gradients(chunked, low, chunk=16, **options)
    assert [gradient.dtype for gradient in low_gradients] == [gradient.dtype for gradient in whole]
    of_hidden, of_weight = (a / b for a, b in zip(errors(low_gradients, exact), errors(whole, exact), strict=True))
    assert of_hidden < 1.05
    # A gradient kept in bf16 is a rounded sum of rounded products of chunks, where the dense one is one rounded product.
    assert of_weight < (1.05 if autocast else 1.45)


def test_near_convergence_bf16_keeps_the_divergence_positive_and_exact() -> None:
    """Trap of softmax in low precision: a student a hair from its teacher."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(16, 32, generator=generator).bfloat16()
    weight = (torch.randn(500, 32, generator=generator) * 0.3).bfloat16()
    near = (weight.float() * 1.01).bfloat16()
    for name in DIVERGENCES:
        labels = torch.arange(16)
        found = chunked(Head(near), hidden, labels, Head(weight), hidden, divergence=name)
        s, t = (F.linear(hidden, w).double() for w in (near, weight))
        expected = dense_divergence(name, s, t, labels).sum()
        assert found.logits > 0
        torch.testing.assert_close(found.logits.double(), expected, rtol=2e-3, atol=0)


def test_fp16_keeps_gradients_of_small_weights() -> None:
    """A mean over many tokens would vanish in fp16 if its gradient were made before the loss is scaled."""
    given = case(bias=False)
    options = {"label_weight": 1e-6, "logits_weight": 1e-6}
    _, exact = gradients(dense, leaves(given, torch.float64), **options)
    total = chunked(*leaves(given, torch.float16).values(), **options).total
    assert torch.isfinite(total)
    low = leaves(given, torch.float16)
    scaled = chunked(*low.values(), **options).total * 2.0**16
    got = torch.autograd.grad(scaled, low["student"].weight)[0].double() / 2.0**16
    assert ((got - exact[1]).norm() / exact[1].norm()) < 5e-3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"divergence": "forward_lk"}, "divergence"),
        ({"settings": {"beta": 0.5}}, "settings of forward_kl"),
        ({"temperature": 0.0}, "temperature"),
        ({"classes": 38}, "classes"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels"),
        ({"labels": None, "divergence": "dkd"}, "labels"),
        ({"teacher_hidden": torch.zeros(3, 12)}, "teacher_hidden"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as raised:
        chunked(**{**renamed(case()), **change})
    assert raised.value.field == field


def test_parts_in_any_order_and_of_any_function_add_up() -> None:
    given = leaves(case(), torch.float32)
    student, hidden, labels, teacher, teacher_hidden = given.values()

    def apart(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s - t).abs().mean(-1)

    def parts() -> list[Part]:
        return [
            DivergencePart(Comparison(apart, temperature=2.0), teacher, teacher_hidden, factor=0.3),
            LabelPart(labels, 0.1, 0.7),
            DivergencePart(Comparison("reverse_kl", classes=30), teacher, teacher_hidden, factor=0.2),
        ]

    logits, target = dense_logits(student, hidden), dense_logits(teacher, teacher_hidden).detach()
    expected = [
        2 * apart(logits, target[:, :CLASSES]).sum(),  # of the squared temperature the function takes one factor
        F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=0.1),
        dense_divergence("reverse_kl", logits[:, :30], target[:, :30], None).sum(),
    ]
    wanted = [hidden, student.weight, student.bias]
    slopes = torch.autograd.grad(0.3 * expected[0] + 0.7 * expected[1] + 0.2 * expected[2], wanted)
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        made = parts()
        found = head_losses(student, hidden, [made[i] for i in order], chunk=7)
        for place, number in enumerate(order):
            torch.testing.assert_close(found.sums[place], expected[number].detach(), rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad(found.total, wanted), slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    nothing = head_losses(student, hidden, [])
    assert nothing.total == 0 and nothing.sums == ()
