"""The chunked head against dense formulas: values, gradients, precision, memory and real models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from distill_llm.errors import InputError
from distill_llm.losses import chunked_head
from distill_llm.losses.chunked_head import KERNELS, Head, HeadLosses, head_losses, head_of
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.objective import DIVERGENCES as OBJECTIVE_DIVERGENCES

ITEMS, CLASSES, TEACHER_CLASSES = 23, 37, 41


def dense_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight, head.bias).to(torch.promote_types(hidden.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def dense_divergence(
    name: str, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, **p: float
) -> torch.Tensor:
    """(N,) by the definitions, on logits that are already over the temperature."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    q, p_ = log_q.exp(), log_p.exp()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if name == "forward_kl":
        return (p_ * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "jsd":
        beta = p.get("beta", 0.5)
        mixture = beta * p_ + (1 - beta) * q
        return beta * kl(p_, mixture) + (1 - beta) * kl(q, mixture)
    if name == "skew_kl":
        skew = p.get("skew", 0.1)
        return kl(p_, skew * p_ + (1 - skew) * q)
    if name == "skew_reverse_kl":
        skew = p.get("skew", 0.1)
        return kl(q, (1 - skew) * p_ + skew * q)
    if name == "tvd":
        return 0.5 * (p_ - q).abs().sum(-1)
    if name == "mse":
        return (s - t).square().sum(-1)
    values = []
    assert name == "dkd" and labels is not None
    for row, label in enumerate(labels.tolist()):
        if label < 0:
            values.append(s.new_zeros(()))
            continue
        others = torch.tensor([i for i in range(s.shape[1]) if i != label])
        binary_p = torch.stack([p_[row, label], p_[row, others].sum()])
        binary_q = torch.stack([q[row, label], q[row, others].sum()])
        rest_p, rest_q = p_[row, others] / binary_p[1], q[row, others] / binary_q[1]
        values.append(p.get("alpha", 1.0) * kl(binary_p, binary_q) + p.get("beta", 8.0) * kl(rest_p, rest_q))
    return torch.stack(values)


def dense(
    student: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    teacher: Head | None,
    teacher_hidden: torch.Tensor | None,
    *,
    label_weight: float = 1.0,
    logits_weight: float = 1.0,
    divergence: str = "forward_kl",
    settings: dict[str, float] | None = None,
    temperature: float = 1.0,
    classes: int | None = None,
    smoothing: float = 0.0,
) -> HeadLosses:
    logits = dense_logits(student, hidden)
    label_sum = value = logits.new_zeros(())
    if labels is not None:
        label_sum = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    if teacher is not None and teacher_hidden is not None:
        shared = classes or min(len(student.weight), len(teacher.weight))
        target = dense_logits(teacher, teacher_hidden)[:, :shared].detach()
        s, t = logits[:, :shared] / temperature, target / temperature
        value = temperature**2 * dense_divergence(divergence, s, t, labels, **(settings or {})).sum()
    return HeadLosses(label_weight * label_sum + logits_weight * value, label_sum, value)


def case(seed: int = 0, items: int = ITEMS, bias: bool = True, **post: Any) -> dict[str, Any]:
    """Student of width 8 and 37 classes, teacher of width 12 and 41; every fifth item without a label."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    labels = torch.randint(0, CLASSES, (items,), generator=generator)
    labels[::5] = -100
    teacher = Head(normal(TEACHER_CLASSES, 12) * 0.4, normal(TEACHER_CLASSES) if bias else None, **post)
    student = Head(normal(CLASSES, 8) * 0.4, normal(CLASSES) if bias else None, **post)
    return {
        "student": student,
        "hidden": normal(items, 8),
        "labels": labels,
        "teacher": teacher,
        "teacher_hidden": normal(items, 12),
    }


def leaves(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The case in `dtype`, with the student's tensors as leaves that want gradients."""

    def head(value: Head) -> Head:
        bias = None if value.bias is None else value.bias.to(dtype).requires_grad_()
        return Head(value.weight.to(dtype).requires_grad_(), bias, value.scale, value.softcap)

    return {
        "student": head(given["student"]),
        "hidden": given["hidden"].to(dtype).requires_grad_(),
        "labels": given["labels"],
        "teacher": None if given["teacher"] is None else head(given["teacher"]),
        "teacher_hidden": None if given["teacher"] is None else given["teacher_hidden"].to(dtype),
    }


def gradients(function: Any, given: dict[str, Any], **options: Any) -> tuple[HeadLosses, list[torch.Tensor]]:
    found = function(*given.values(), **options)
    wanted = [given["hidden"], given["student"].weight, given["student"].bias]
    return found, list(torch.autograd.grad(found.total, [tensor for tensor in wanted if tensor is not None]))


def agree(given: dict[str, Any], chunk: int = 7, **options: Any) -> None:
    """Chunked in fp32 equals dense in fp64: values to 1e-5 of their size, gradients to 1e-5 of their largest entry."""
    exact, expected = gradients(dense, leaves(given, torch.float64), **options)
    found, got = gradients(head_losses, leaves(given, torch.float32), chunk=chunk, **options)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).abs().max() < 1e-5 * max(1.0, other.abs().max().item())


SETTINGS = {
    "jsd": {"beta": 0.3},
    "skew_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "dkd": {"alpha": 2.0, "beta": 3.0},
}


@pytest.mark.parametrize("divergence", KERNELS)
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
    agree(case(**variant), divergence=divergence, temperature=temperature, settings=settings, smoothing=0.1, **weights)


@pytest.mark.parametrize("divergence", [name for name in KERNELS if "top_k" in OBJECTIVE_DIVERGENCES[name]])
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
    found = head_losses(*given.values(), **options)
    torch.testing.assert_close(found.logits, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.total, given["hidden"])[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", KERNELS)
def test_values_equal_the_divergences_of_whole_logits(divergence: str) -> None:
    given = leaves(case(), torch.float32)
    logits, target = (
        dense_logits(given["student"], given["hidden"]),
        dense_logits(given["teacher"], given["teacher_hidden"]),
    )
    settings = SETTINGS.get(divergence, {})
    own = {**settings, "labels": given["labels"]} if divergence == "dkd" else settings
    expected = logits_divergence(logits, target[:, :CLASSES], divergence, 1.5, **own).sum()
    found = head_losses(*given.values(), divergence=divergence, settings=settings, temperature=1.5, chunk=9)
    torch.testing.assert_close(found.logits, expected.detach(), rtol=1e-5, atol=1e-5)


def test_every_divergence_of_the_objective_has_a_kernel() -> None:
    assert set(KERNELS) == set(OBJECTIVE_DIVERGENCES)


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 22, 23, 100])
@pytest.mark.parametrize("block", [1, 80, 2**20])
def test_any_chunk_and_any_block_give_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    monkeypatch.setattr(chunked_head, "BLOCK_LOGITS", {"cpu": block})
    agree(case(), chunk=chunk, temperature=2.0)


@pytest.mark.parametrize("divergence", KERNELS)
@pytest.mark.parametrize("classes", [1, 20, 37])
def test_only_the_shared_classes_are_compared_and_labels_use_the_whole_vocabulary(
    divergence: str, classes: int
) -> None:
    given = case()
    if divergence == "dkd":  # its dense formula needs the labelled class and another among the compared
        classes = max(classes, 2)
        given["labels"] = given["labels"].where(given["labels"] < 0, given["labels"] % classes)
    agree(given, divergence=divergence, classes=classes, temperature=1.5)


def test_a_teacher_with_the_smaller_vocabulary_is_compared_over_its_own() -> None:
    given = case()
    given["teacher"] = Head(given["teacher"].weight[:30], given["teacher"].bias[:30])
    agree(given, temperature=2.0)


def test_padded_rows_of_an_identical_teacher_add_nothing() -> None:
    given = case()
    student = given["student"]
    padding = torch.randn(9, 8) * 5
    teacher = Head(torch.cat([student.weight, padding]), torch.cat([student.bias, torch.ones(9)]))
    found = head_losses(student, given["hidden"], None, teacher, given["hidden"])
    assert found.logits.abs() < 1e-5


def test_label_loss_alone_and_divergence_alone() -> None:
    given = case()
    agree(given | {"teacher": None, "teacher_hidden": None}, smoothing=0.2)
    agree(given | {"labels": None})


def test_items_without_labels_give_no_label_loss_and_no_gradient() -> None:
    given = leaves(
        case() | {"labels": torch.full((ITEMS,), -100), "teacher": None, "teacher_hidden": None}, torch.float32
    )
    found, got = gradients(head_losses, given, smoothing=0.1)
    assert found.total == 0 and all(not gradient.any() for gradient in got)


def test_no_item_gives_zero_and_a_connected_graph() -> None:
    given = leaves(case(items=0), torch.float32)
    found, got = gradients(head_losses, given)
    assert found.total == 0 and found.total.requires_grad
    assert [tuple(gradient.shape) for gradient in got] == [(0, 8), (CLASSES, 8), (CLASSES,)]
    assert all(not gradient.any() for gradient in got)


def test_weights_may_be_tensors() -> None:
    given = leaves(case(), torch.float32)
    weights = {"label_weight": torch.tensor(0.3), "logits_weight": torch.tensor(0.9)}
    found, got = gradients(head_losses, given, **weights)
    _, expected = gradients(head_losses, given, label_weight=0.3, logits_weight=0.9)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(found.total.detach(), 0.3 * found.labels + 0.9 * found.logits)


def test_backward_twice_gives_the_same_and_scales_by_the_incoming_gradient() -> None:
    given = leaves(case(), torch.float32)
    total = head_losses(*given.values()).total
    weight = given["student"].weight
    total.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad.mul_(0)  # as an optimizer or clipping may do
    total.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, first, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(-3 * total, weight)[0], -3 * first)


def test_frozen_weights_get_no_product_and_a_frozen_body_no_hidden_gradient() -> None:
    given = leaves(case(), torch.float32)
    _, (of_hidden, of_weight, _) = gradients(head_losses, given)
    frozen = Head(given["student"].weight.detach(), given["student"].bias.detach())
    with CountProducts() as all_products:
        head_losses(*given.values())
    with CountProducts() as products:
        total = head_losses(**{**renamed(given), "student": frozen}).total
    assert products.count == all_products.count - 1
    total.backward()
    torch.testing.assert_close(given["hidden"].grad, of_hidden)
    body = {**renamed(given), "student_hidden": given["hidden"].detach()}
    torch.testing.assert_close(torch.autograd.grad(head_losses(**body).total, given["student"].weight)[0], of_weight)


def test_without_gradients_only_the_logits_are_made() -> None:
    given = leaves(case(), torch.float32)
    with torch.no_grad(), CountProducts() as products:
        found = head_losses(*given.values(), chunk=100)
    assert products.count == 2
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, head_losses(*given.values()).total.detach())


def renamed(given: dict[str, Any]) -> dict[str, Any]:
    """The case by the names of `head_losses`."""
    return {("student_hidden" if name == "hidden" else name): value for name, value in given.items()}


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::mm.out", "aten::addmm.out", "aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes, but for gradients of the weight."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(out) if torch.is_tensor(leaf)
        ]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("divergence", KERNELS)
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
        head_losses(*given.values(), divergence=divergence, chunk=chunk).total.backward()
    assert watched.largest <= chunk * vocabulary
    with LargestTensor() as watched:
        dense(*given.values(), divergence=divergence).total.backward()
    assert watched.largest >= items * vocabulary


def errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("divergence", KERNELS)
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
        _, chunked = gradients(head_losses, low, chunk=16, **options)
    assert [gradient.dtype for gradient in chunked] == [gradient.dtype for gradient in whole]
    of_hidden, of_weight = (a / b for a, b in zip(errors(chunked, exact), errors(whole, exact), strict=True))
    assert of_hidden < 1.05
    # A gradient kept in bf16 is a rounded sum of rounded products of chunks, where the dense one is one rounded product.
    assert of_weight < (1.05 if autocast else 1.45)


def test_near_convergence_bf16_keeps_the_divergence_positive_and_exact() -> None:
    """Trap of softmax in low precision: a student a hair from its teacher."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(16, 32, generator=generator).bfloat16()
    weight = (torch.randn(500, 32, generator=generator) * 0.3).bfloat16()
    near = (weight.float() * 1.01).bfloat16()
    for name in KERNELS:
        labels = torch.arange(16)
        found = head_losses(Head(near), hidden, labels, Head(weight), hidden, divergence=name)
        s, t = (F.linear(hidden, w).double() for w in (near, weight))
        expected = dense_divergence(name, s, t, labels).sum()
        assert found.logits > 0
        torch.testing.assert_close(found.logits.double(), expected, rtol=2e-3, atol=0)


def test_fp16_keeps_gradients_of_small_weights() -> None:
    """A mean over many tokens would vanish in fp16 if its gradient were made before the loss is scaled."""
    given = case(bias=False)
    options = {"label_weight": 1e-6, "logits_weight": 1e-6}
    _, exact = gradients(dense, leaves(given, torch.float64), **options)
    total = head_losses(*leaves(given, torch.float16).values(), **options).total
    assert torch.isfinite(total)
    low = leaves(given, torch.float16)
    scaled = head_losses(*low.values(), **options).total * 2.0**16
    got = torch.autograd.grad(scaled, low["student"].weight)[0].double() / 2.0**16
    assert ((got - exact[1]).norm() / exact[1].norm()) < 5e-3


def causal(config: Any) -> Any:
    """A tiny causal model with its own seed, with large enough weights that the logits differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        (
            "minicpm3",
            {
                "dim_model_base": 8,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
            },
        ),
        ("nanochat", {"final_logit_softcapping": 2.0}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3}),
        ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
        ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 1, "logit_scale": 0.25}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}),
    ],
    ids=str,
)
def test_head_of_a_model_makes_that_models_logits(family: str, fields: dict[str, Any]) -> None:
    model = causal(AutoConfig.for_model(family, **{**SIZES, **fields}))
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(
            dense_logits(head_of(model), hidden), model(ids).logits.float(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "roberta"])
def test_a_head_with_layers_before_its_output_map_is_refused_or_taken_after_them(family: str) -> None:
    model = tiny_model(family, "masked-lm")
    with pytest.raises(InputError, match="around its output map"):
        head_of(model)
    inputs = []
    linear = model.get_output_embeddings()
    linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
        torch.testing.assert_close(dense_logits(head_of(model, transformed=True), inputs[0]), logits)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="linear output map"):
        head_of(tiny_model("bert"))


@pytest.mark.parametrize("autocast", [False, True])
def test_tied_embeddings_of_a_real_model_get_both_gradients(autocast: bool) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    model = causal(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    teacher = causal(AutoConfig.for_model("llama", **{**SIZES, "hidden_size": 48, "vocab_size": 64}))
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].flatten()
    with torch.no_grad():
        targets = teacher.model(ids).last_hidden_state[:, :-1].flatten(0, 1)

    def student(chunked: bool) -> tuple[HeadLosses, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
            function, more = (head_losses, {"chunk": 5}) if chunked else (dense, {})
            options = {"label_weight": 0.1, "logits_weight": 0.05, "temperature": 2.0, **more}
            found = function(head_of(model), hidden, labels, head_of(teacher), targets, **options)
        found.total.backward()
        return found, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (found, got), (expected, whole) = student(True), student(False)
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found.total, expected.total, rtol=tolerance, atol=tolerance)
    for name, gradient in whole.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


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
        ({"teacher_hidden": None}, "teacher_hidden"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as raised:
        head_losses(**{**renamed(case()), **change})
    assert raised.value.field == field
