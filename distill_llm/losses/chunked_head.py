"""Label loss and divergence of a language-model head whose logits are never held whole."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.errors import InputError, one_of
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.objective import DIVERGENCES, NEED_LABELS
from distill_llm.losses.sparse import SparseTargets, entropy, value_and_grad

CHUNK_BYTES = 5 * 2**26  # of the student's logits in the products' dtype, and half as much of the teacher's
BLOCK_LOGITS = {"cpu": 2**19}  # held in fp32, in six buffers: on a CPU they should stay in its cache
BLOCK_LOGITS_ELSEWHERE = 2**24
SLICE = 2**23  # numbers of the weight's gradient that are made in low precision before they are summed in fp32


@dataclass(frozen=True)
class Head:
    """The linear map from hidden states to logits, and what is done to the logits after it.

    Logits are softcap * tanh(x / softcap) with x = scale * (hidden @ weight^T + bias).

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        scale: Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`; None: no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class HeadLosses(NamedTuple):
    """Sums over the items, 0-dim in fp32: `total` carries gradients, the unweighted parts do not."""

    total: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


def head_losses(
    student: Head,
    student_hidden: torch.Tensor,
    labels: torch.Tensor | None = None,
    teacher: Head | None = None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    targets: SparseTargets | None = None,
    label_weight: float | torch.Tensor = 1.0,
    logits_weight: float | torch.Tensor = 1.0,
    divergence: str = "forward_kl",
    settings: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    classes: int | None = None,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> HeadLosses:
    """label_weight * sum of cross-entropies + logits_weight * temperature^2 * sum of divergences, over N items.

    Loss and gradients are made together, a chunk of items at a time, so that at most chunk x V logits of either model
    exist; the backward pass only multiplies by the incoming gradient. Products run in the dtype of the hidden states (under
    autocast, in autocast's); softmax, sums and the weight's gradient over chunks are fp32.

    Args:
        student: gradients go to `weight`, `bias` where they require them.
        student_hidden: (N, H) inputs of the head, valid tokens only; N may be 0.
        labels: (N,) class ids, -100 for none; None: no label loss.
        teacher: its own width and padded vocabulary; None: no divergence. Never gets a gradient.
        teacher_hidden: (N, H of the teacher).
        targets: of the N items, from a teacher known at a few tokens of each, in place of its head: `forward_kl` at
            temperature 1, see `distill_llm.losses.sparse`.
        label_weight, logits_weight: numbers, or 0-dim tensors (which are not waited for) without gradient.
        divergence: a name of `distill_llm.losses.objective.DIVERGENCES`, between the distributions at the temperature.
        settings: of the divergence, as `distill_llm.losses.logits` has them (`beta`, `skew`, `alpha`, `top_k`).
        temperature: above 0.
        classes: the divergence compares the first `classes` logits only; None: as many as both vocabularies have. The label
            loss is over the student's whole vocabulary.
        smoothing: share of the label spread evenly over the student's classes.
        chunk: items at a time; None: as many as make 320 MiB of logits.

    Raises:
        InputError: unknown divergence or settings, shapes that do not fit, a divergence that needs labels without them, or
            sparse targets with another divergence than theirs.
    """
    if (teacher is None) != (teacher_hidden is None):
        raise InputError(
            "teacher_hidden",
            None if teacher_hidden is None else "a tensor",
            "both head and hidden states of the teacher, or neither",
        )
    vocabulary = len(student.weight)
    kernel = _kernel(divergence, settings or {}, labels is not None)
    if teacher is not None and teacher_hidden is not None:
        if len(teacher_hidden) != len(student_hidden):
            raise InputError("teacher_hidden", f"{len(teacher_hidden)} items", f"the student's {len(student_hidden)}")
        shared = min(vocabulary, len(teacher.weight))
        if classes is not None and not 0 < classes <= shared:
            raise InputError("classes", classes, f"1 to {shared}, the smaller vocabulary")
        teacher, teacher_hidden = _first(teacher, classes or shared), teacher_hidden.detach()
    if targets is not None:
        _check_sparse(targets, len(student_hidden), teacher, (divergence, settings or {}, temperature))
    if labels is not None and labels.shape != student_hidden.shape[:1]:
        raise InputError("labels", f"shape {list(labels.shape)}", f"[{len(student_hidden)}], one of each item")
    if not temperature > 0:
        raise InputError("temperature", temperature, "above 0")
    device = student_hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else student_hidden.dtype
    of_labels, of_logits = (
        torch.as_tensor(weight, dtype=torch.float32, device=device).detach() for weight in (label_weight, logits_weight)
    )
    unit = torch.ones((), device=device)
    if dtype == torch.float16:  # gradients of a mean would vanish in it
        unit = torch.maximum(of_labels.abs(), temperature * of_logits.abs()).clamp_min(torch.finfo(torch.float32).tiny)
    work = _Work(
        _first(student, vocabulary),
        labels,
        teacher,
        teacher_hidden,
        of_labels,
        of_logits,
        kernel,
        temperature,
        smoothing,
        chunk or max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize)),
        dtype,
        unit,
        targets,
        classes or vocabulary,
    )
    wanted = torch.is_grad_enabled()
    return HeadLosses(*_HeadLosses.apply(student_hidden, student.weight, student.bias, work, wanted))


def head_of(model: PreTrainedModel, transformed: bool = False) -> Head:
    """The head of a causal or masked language model, for inputs that are the base model's last hidden states.

    Args:
        transformed: the head's inputs will be taken after the layers between base model and output map (BERT's
            `cls.predictions.transform`), so these layers are no fault.

    Raises:
        InputError: the model has no linear map to its vocabulary, or layers before it, or does to its logits what a
            Head cannot say.
    """
    name, linear = type(model).__name__, model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError("model", name, "a causal or masked language model with a linear output map")
    between = [key for key, child in model.named_children() if child is not linear and key != model.base_model_prefix]
    if not transformed and any(True for key in between for _ in model.get_submodule(key).parameters()):
        accepted = "a model whose output map follows its base model at once, or inputs taken after those layers"
        raise InputError("model", f"{name} with {', '.join(between)} around its output map", accepted)
    config = model.config.get_text_config()
    scale, softcap = 1.0, None
    for field, power in LOGIT_FACTORS.items():
        if getattr(config, field, None) is not None:
            scale *= float(getattr(config, field)) ** FACTOR_EXCEPTIONS.get((config.model_type, field), power)
    for field in LOGIT_CAPS:
        if getattr(config, field, None) is not None:
            softcap = float(getattr(config, field))
    return Head(linear.weight, linear.bias, scale, softcap)


# Fields of a configuration that say what is done to logits: multiplied by this power of the field, or capped.
LOGIT_FACTORS = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# HyperCLOVA X multiplies by what Granite divides by; MPT has the field and does nothing with it.
FACTOR_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1, ("mpt", "logit_scale"): 0}


class _Block(NamedTuple):
    """A few items in fp32: logits over the temperature, and buffers for probabilities; kernels may overwrite all."""

    student: torch.Tensor
    teacher: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor
    labels: torch.Tensor | None

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """log q, log p, q and p of the student (q) and the teacher (p), in this block's four buffers."""
        for logits, out in ((self.student, self.q), (self.teacher, self.p)):
            logits.sub_(_softmax(logits, out))
        return self.student, self.teacher, self.q, self.p


# A kernel returns the divergence of each item (R,) and its gradient with respect to block.student (R, C).
_Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _forward_kl(block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) (Hinton et al., 2015)."""
    log_q, log_p, q, p = block.probabilities()
    value = torch.mul(p, log_p.sub_(log_q), out=log_p).sum(-1)
    return value, q.sub_(p)


def _reverse_kl(block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p) (Gu et al., 2024, MiniLLM)."""
    log_q, log_p, q, _ = block.probabilities()
    return _through_softmax(q, log_q.sub_(log_p), log_p)


def _jsd(block: _Block, *, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, GKD)."""
    log_q, log_p, q, p = block.probabilities()
    log_m = _log_mixture(log_p, log_q, beta)
    of_teacher = p.mul_(log_p.sub_(log_m)).sum(-1)
    of_student, gradient = _through_softmax(q, log_q.sub_(log_m), log_p)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def _skew_kl(block: _Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || m) with m = skew p + (1 - skew) q (Ko et al., 2024, DistiLLM)."""
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_p.sub_(_log_mixture(log_p, log_q, skew))
    value = torch.mul(p, log_ratio, out=p).sum(-1)
    return value, _through_softmax(q, log_ratio.exp_(), log_q)[1].mul_(skew - 1)


def _skew_reverse_kl(block: _Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || m) with m = (1 - skew) p + skew q (Ko et al., 2024, DistiLLM)."""
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_q.sub_(_log_mixture(log_q, log_p, skew))
    value = torch.mul(q, log_ratio, out=p).sum(-1)
    torch.exp(log_ratio, out=p)
    return value, _through_softmax(q, log_ratio.sub_(p, alpha=skew), log_p)[1]


def _tvd(block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation distance, sum |p - q| / 2 (Wen et al., 2023)."""
    difference, scratch, q, p = block.probabilities()
    torch.sub(q, p, out=difference)
    value = torch.abs(difference, out=scratch).sum(-1) / 2
    return value, _through_softmax(q, difference.sign_().div_(2), scratch)[1]


def _mse(block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared difference of the logits summed over classes; times temperature^2, it does not depend on it."""
    difference = block.student.sub_(block.teacher)
    return torch.square(difference, out=block.teacher).sum(-1), difference.mul_(2)


def _dkd(block: _Block, *, alpha: float = 1.0, beta: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha KL(target or not) + beta KL(among the others) (Zhao et al., 2022, DKD); 0 for items without a label."""
    assert block.labels is not None
    counted = ((block.labels >= 0) & (block.labels < block.student.shape[1])).unsqueeze(1)
    target = block.labels.unsqueeze(1).where(counted, 0)
    binary = []
    for logits in (block.student, block.teacher):
        at_target = logits.gather(1, target)
        logits.scatter_(1, target, -torch.inf)
        binary.append(at_target - logits.logsumexp(1, keepdim=True))  # log-odds of the target
    sigmoid, log_sigmoid = torch.sigmoid, nn.functional.logsigmoid
    odds_q, odds_p = binary
    of_target = sigmoid(odds_p) * (log_sigmoid(odds_p) - log_sigmoid(odds_q)) + sigmoid(-odds_p) * (
        log_sigmoid(-odds_p) - log_sigmoid(-odds_q)
    )
    log_q, log_p, q, p = block.probabilities()
    ratio = log_p.sub_(log_q).scatter_(1, target, 0.0)
    value = alpha * of_target + beta * torch.mul(p, ratio, out=ratio).sum(-1, keepdim=True)
    slope = alpha * (sigmoid(odds_q) - sigmoid(odds_p))
    gradient = p.mul_(-beta).add_(q.mul_(beta - slope)).scatter_(1, target, slope)
    return (value * counted).squeeze(1), gradient.mul_(counted)


KERNELS: dict[str, _Kernel] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "mse": _mse,
    "dkd": _dkd,
}


def _softmax(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Probabilities into `out`; returns the logarithm of the sum of exponentials (R, 1)."""
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1, keepdim=True).sub_(out.amax(-1, keepdim=True).log_())


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _through_softmax(q: torch.Tensor, slope: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `slope` under q, and the gradient in logits of what has the gradient `slope` in q (made in `slope`)."""
    mean = torch.mul(q, slope, out=scratch).sum(-1)
    return mean, slope.sub_(mean.unsqueeze(1)).mul_(q)


def _coarsened(block: _Block, *, kernel: _Kernel, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A divergence of k + 1 outcomes, as `distill_llm.losses.logits.coarsened` makes them."""
    if top_k >= block.teacher.shape[1]:
        return kernel(block)
    best = block.teacher.topk(top_k, dim=1).indices
    merged = []
    for logits, among_others in ((block.student, block.q), (block.teacher, block.p)):
        own = logits.gather(1, best)
        rest = _softmax(logits.scatter_(1, best, -torch.inf), among_others)
        merged.append(torch.cat([own, rest], 1))
    student, teacher = merged
    value, slope = kernel(_Block(student, teacher, torch.empty_like(student), torch.empty_like(teacher), None))
    return value, block.q.mul_(slope[:, top_k:]).scatter_(1, best, slope[:, :top_k])


def _kernel(divergence: str, settings: Mapping[str, Any], labelled: bool) -> _Kernel:
    """The kernel of that name with these settings."""
    if divergence not in DIVERGENCES:
        raise InputError("divergence", divergence, one_of(DIVERGENCES, divergence))
    known = DIVERGENCES[divergence]
    for name in settings:
        if name not in known:
            raise InputError(f"settings of {divergence}", name, one_of(known, name) if known else "none")
    if divergence in NEED_LABELS and not labelled:
        raise InputError("labels", None, f"labels with {divergence}, which treats the true class apart")
    own = {name: value for name, value in settings.items() if name != "top_k"}
    kernel = partial(KERNELS[divergence], **own)
    return partial(_coarsened, kernel=kernel, top_k=settings["top_k"]) if "top_k" in settings else kernel


def _check_sparse(targets: SparseTargets, items: int, teacher: Head | None, given: tuple[Any, ...]) -> None:
    if teacher is not None:
        raise InputError("targets", "beside a teacher's head", "one of the two")
    if len(targets.ids) != items:
        raise InputError("targets", f"{len(targets.ids)} items", f"the student's {items}")
    if given != ("forward_kl", {}, 1.0):
        accepted = "forward_kl without settings at temperature 1: all that sparse targets can tell"
        raise InputError("divergence", " ".join(map(str, given)), accepted)


@dataclass(frozen=True)
class _Work:
    """What `head_losses` was asked for; heads without gradient, the teacher's cut to the compared classes."""

    student: Head
    labels: torch.Tensor | None
    teacher: Head | None
    teacher_hidden: torch.Tensor | None
    label_weight: torch.Tensor
    logits_weight: torch.Tensor
    kernel: _Kernel
    temperature: float
    smoothing: float
    chunk: int
    dtype: torch.dtype
    unit: torch.Tensor
    targets: SparseTargets | None
    classes: int

    def block(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor | None,
        targets: SparseTargets | None,
        buffers: list[torch.Tensor],
    ) -> tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor]:
        """Label losses and divergences of a few items, and the gradient in the student's products, in units of `unit`.

        Args:
            student: (R, V) products of hidden states and weight.
            teacher: (R, C) the teacher's.
            labels: (R,).
            targets: of R items.
            buffers: two of (R, V) and four of (R, C), fp32.
        """
        logits, gradient = buffers[0], buffers[1].zero_()
        _finish(self.student, student, logits)
        label_loss: torch.Tensor | float = 0.0
        value: torch.Tensor | float = 0.0
        if labels is not None:
            label_loss = self._label_loss(logits, labels, gradient)
        if self.teacher is not None and teacher is not None:
            block = _Block(buffers[2], buffers[3], buffers[4], buffers[5], labels)
            classes = teacher.shape[1]
            _finish(self.teacher, teacher, block.teacher).div_(self.temperature)
            torch.div(logits[:, :classes], self.temperature, out=block.student)
            value, slope = self.kernel(block)
            value = value * self.temperature**2
            gradient[:, :classes].addcmul_(slope, self.logits_weight / self.unit, value=self.temperature)
        if targets is not None:
            cross_entropy, sparse_slope = value_and_grad(logits[:, : self.classes], targets)
            assert sparse_slope is not None
            value = cross_entropy - entropy(targets)
            gradient[:, : self.classes].addcmul_(sparse_slope, self.logits_weight / self.unit)
        if self.student.softcap is not None:
            gradient.mul_(logits.div_(self.student.softcap).square_().neg_().add_(1))
        if self.student.scale != 1:
            gradient.mul_(self.student.scale)
        return label_loss, value, gradient

    def _label_loss(self, logits: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each item (R,); its weighted gradient goes into `gradient`."""
        counted = (labels != IGNORED).unsqueeze(1)
        target = labels.unsqueeze(1).where(counted, 0)
        normaliser = _softmax(logits, gradient)
        value = normaliser - (1 - self.smoothing) * logits.gather(1, target)
        if self.smoothing:
            value -= self.smoothing * logits.mean(1, keepdim=True)
            gradient.sub_(self.smoothing / logits.shape[1])
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, self.smoothing - 1))
        gradient.mul_(counted * (self.label_weight / self.unit))
        return (value * counted).squeeze(1)


class _HeadLosses(torch.autograd.Function):
    """Losses and gradients in one pass over chunks of items."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work, wanted: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(total, labels, logits); `wanted`: whether any gradient is."""
        with torch.autocast(hidden.device.type, enabled=False):
            losses, gradients = _run(work, hidden, [wanted and needed for needed in ctx.needs_input_grad[:3]])
        ctx.save_for_backward(work.unit, *gradients)
        labels, logits = losses
        ctx.mark_non_differentiable(labels, logits)
        return work.label_weight * labels + work.logits_weight * logits, labels, logits

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the total."""
        unit, *gradients = ctx.saved_tensors
        factor = outputs[0] * unit
        return *(None if gradient is None else gradient * factor for gradient in gradients), None, None


def _run(
    work: _Work, hidden: torch.Tensor, wanted: list[bool]
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor | None]]:
    """Sums of the label loss and the divergence; gradients of hidden states, weight and bias where wanted."""
    items, vocabulary = len(hidden), len(work.student.weight)
    student, teacher = _in(work.student, work.dtype), None if work.teacher is None else _in(work.teacher, work.dtype)
    inputs = hidden.detach().to(work.dtype)
    label_losses, values = hidden.new_zeros(2, items, dtype=torch.float32)
    of_hidden = torch.empty_like(inputs) if wanted[0] else None
    of_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if wanted[2] else None
    chunks = -(-items // work.chunk)
    chunk = -(-items // max(1, chunks))  # all about as long
    rows = min(_block_rows(hidden.device.type, vocabulary), max(1, chunk))
    span = rows * -(-chunk // (2 * rows))  # items whose teacher's logits are made at once: half a chunk
    width = 0 if teacher is None else len(teacher.weight)
    products, targets = inputs.new_empty(chunk, vocabulary), inputs.new_empty(span, width)
    buffers = [hidden.new_empty(rows, size, dtype=torch.float32) for size in (vocabulary,) * 2 + (width,) * 4]
    of_weight = _WeightGradient(student.weight, work.student.weight.dtype, chunks) if wanted[1] else None
    for begin in range(0, items, max(1, chunk)):
        end = min(begin + chunk, items)
        here = products[: end - begin]
        _product(student, inputs[begin:end], here)
        for first in range(begin, end, rows):
            last, offset = min(first + rows, end), (first - begin) % span
            if teacher is not None and work.teacher_hidden is not None and not offset:
                stop = min(first + span, end)
                _product(teacher, work.teacher_hidden[first:stop].to(work.dtype), targets[: stop - first])
            part = here[first - begin : last - begin]
            label_losses[first:last], values[first:last], gradient = work.block(
                part,
                None if teacher is None else targets[offset : offset + last - first],
                None if work.labels is None else work.labels[first:last],
                None if work.targets is None else work.targets.rows(slice(first, last)),
                [buffer[: last - first] for buffer in buffers],
            )
            part.copy_(gradient)
            if of_bias is not None:
                of_bias += gradient.sum(0)
        if of_hidden is not None:
            torch.mm(here, student.weight, out=of_hidden[begin:end])
        if of_weight is not None:
            of_weight.add(here, inputs[begin:end])
    gradients = [
        None if of_hidden is None else of_hidden.to(hidden.dtype),
        None if of_weight is None else of_weight.result().to(work.student.weight.dtype),
        None if of_bias is None or work.student.bias is None else of_bias.to(work.student.bias.dtype),
    ]
    return (label_losses.sum(), values.sum()), gradients


def _block_rows(device: str, vocabulary: int) -> int:
    """Items at a time in fp32; on a CPU as many for one thread as for another, since softmax shares out whole rows."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    return threads * max(1, BLOCK_LOGITS.get(device, BLOCK_LOGITS_ELSEWHERE) // (vocabulary * threads))


class _WeightGradient:
    """The sum over chunks of gradient^T @ inputs.

    In fp32, except where the gradient ends in the products' low precision anyway and has three chunks at most: then the
    running sum is rounded less often than the chunks' products and their sum would be.
    """

    def __init__(self, weight: torch.Tensor, kept: torch.dtype, chunks: int):
        self.direct = chunks <= 1 or weight.dtype == torch.float32 or (kept == weight.dtype and chunks <= 3)
        self.total = torch.empty_like(weight, dtype=weight.dtype if self.direct else torch.float32)
        self.empty = True
        self.rows = max(1, SLICE // weight.shape[1])

    def add(self, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """One chunk: (items, V) and (items, H)."""
        if self.direct:
            torch.addmm(self.total, gradient.t(), inputs, beta=0 if self.empty else 1, out=self.total)
        else:
            for begin in range(0, len(self.total), self.rows):
                part = self.total[begin : begin + self.rows]
                product = gradient[:, begin : begin + self.rows].t() @ inputs
                part.copy_(product) if self.empty else part.add_(product)
        self.empty = False

    def result(self) -> torch.Tensor:
        """(V, H); zeros if there was no chunk."""
        return self.total.zero_() if self.empty else self.total


def _product(head: Head, hidden: torch.Tensor, out: torch.Tensor) -> None:
    """hidden @ weight^T + bias, in their dtype."""
    if head.bias is None:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)


def _finish(head: Head, products: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 from the head's products: scaled and capped."""
    out.copy_(products)
    if head.scale != 1:
        out.mul_(head.scale)
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def _in(head: Head, dtype: torch.dtype) -> Head:
    return replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def _first(head: Head, classes: int) -> Head:
    """The head of the first classes only, without gradient."""
    bias = None if head.bias is None else head.bias[:classes].detach()
    return replace(head, weight=head.weight[:classes].detach(), bias=bias)
