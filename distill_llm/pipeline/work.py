"""The work of a run's stages on one batch: a training step, a calibration batch, a forward pass. Counted, or timed.

With models of shapes alone (see `measuring.tracing`) nothing is computed, so a stage can be priced before it runs.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.evaluation.perplexity import causal_loss
from distill_llm.losses.items import is_language_model, kind_of
from distill_llm.losses.objective import Objective
from distill_llm.measuring.clocks import seconds_with_gradients
from distill_llm.measuring.tracing import Traced, shapes_alone, traced, without_numbers
from distill_llm.models.adapters import without_adapters
from distill_llm.models.inputs import forward_inputs
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.teachers.online import OnlineTeacher
from distill_llm.teachers.peers import Peers
from distill_llm.training.loss import LossSettings, TrainingLoss

LARGEST_TRIAL = 3 * 10**8
"""Weights of the models that are tried to measure a rate."""


@dataclass(frozen=True)
class Shape:
    """A batch of full-length rows.

    Attributes:
        rows, tokens: B and T.
        counted: the share of the tokens that has a label.
        gpu: whether dropout and attention run by the kernels of a GPU.
    """

    rows: int
    tokens: int
    counted: float = 1.0
    gpu: bool = False


@dataclass(frozen=True)
class Step:
    """The work of training on a micro-batch: the loss, and the student's forward and backward pass.

    Attributes:
        student: on the meta device, with its adapters where only those learn; not changed.
        teacher: the same; None where no teacher is in memory.
        peers: the same; further students, which learn from each other in the place of a teacher.
        objective: what is learnt.
        tokenizer: of both.
        precision: dtype of mixed precision; None: fp32.
        teacher_dtype: of the teacher's weights.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        accumulated: micro-batches of an update.
    """

    student: nn.Module
    teacher: PreTrainedModel | None
    objective: Objective
    tokenizer: PreTrainedTokenizerBase | None = None
    precision: torch.dtype | None = None
    teacher_dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    accumulated: int = 1
    peers: tuple[PreTrainedModel, ...] = ()

    @property
    def students(self) -> tuple[nn.Module, ...]:
        """All that learn."""
        return self.student, *self.peers

    def traced(self, shape: Shape) -> Traced:
        """What a step takes beside weights and optimizer."""
        student = copy.deepcopy(self.student).float()
        teacher = None if self.teacher is None else copy.deepcopy(self.teacher).to(self.teacher_dtype)  # type: ignore[arg-type]
        peers = [copy.deepcopy(peer).float() for peer in self.peers]
        models = [student, *peers, *([] if teacher is None else [teacher])]
        with shapes_alone(shape.gpu, shape.counted):
            for model in models:
                without_numbers(model)
            return traced(self.on(student, teacher, shape, torch.device("cpu"), peers), models)

    def on(
        self,
        student: nn.Module,
        teacher: PreTrainedModel | None,
        shape: Shape,
        device: torch.device,
        peers: Sequence[PreTrainedModel] = (),
    ) -> Callable[[], None]:
        """The step with these models, ready to be done."""
        own = without_adapters(student)
        student.train()
        if self.checkpointing:
            own.activation_checkpointing_enable()
            own.enable_input_require_grads()
        source = Peers(peers) if peers else None if teacher is None else OnlineTeacher(teacher)
        settings = LossSettings(self.teacher_dtype, self.precision)
        loss = TrainingLoss(self.objective, student, source, self.tokenizer, device, settings)
        batch = full_batch(own, shape, device)
        factors = {name: torch.tensor(1.0 / shape.rows, device=device) for name in loss.objective.terms()}

        def work() -> None:
            with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
                total = loss(student, batch, factors, 0, 1)[0]
            total.backward()

        return work


def calibration(model: PreTrainedModel, loss: str | None, settings: CalibrationSettings, shape: Shape) -> Traced:
    """What a calibration batch takes beside the model: activations, and the statistics themselves."""
    own = copy.deepcopy(model).float().eval()
    with shapes_alone(shape.gpu, shape.counted):
        without_numbers(own)
        batch = full_batch(own, shape, torch.device("cpu"))
        return traced(lambda: collect_statistics(own, [batch], loss, settings=settings), [own])


def scoring(model: PreTrainedModel, shape: Shape) -> Traced:
    """What the scoring of a batch takes beside the weights."""
    own = copy.deepcopy(model).eval()
    with shapes_alone(shape.gpu, shape.counted), torch.no_grad():
        without_numbers(own)
        batch = full_batch(own, shape, torch.device("cpu"))
        if kind_of(own) == "next_token":
            return traced(lambda: causal_loss(own, batch), [own])
        return traced(lambda: own(**forward_inputs(own, batch)), [own])


def forward_pass(model: PreTrainedModel, shape: Shape) -> Traced:
    """What a forward pass takes beside the weights, logits and all."""
    own = copy.deepcopy(model).eval()
    with shapes_alone(shape.gpu), torch.no_grad():
        without_numbers(own)
        batch = full_batch(own, shape, torch.device("cpu"))
        return traced(lambda: own(**forward_inputs(own, batch)), [own])


def measured_rate(
    step: Step, shape: Shape, device: torch.device, timer: Callable[..., float] = seconds_with_gradients
) -> float:
    """Floating point operations a second that a device reaches in training: those of the micro-batches of an update, in the
    time of these and of the update itself (clipping, AdamW), which moves much memory for few operations.

    Args:
        timer: the seconds that work takes on a device.

    Raises:
        InputError: models that are too large to try here.
    """
    models = [model for model in (step.student, step.teacher) if model is not None]
    if sum(each.numel() for model in models for each in model.parameters()) > LARGEST_TRIAL:
        fix = "set it to the TFLOP/s that a device reaches in training: these models are too large to try here"
        raise InputError("tflops", None, fix=fix)
    tried = [_with_numbers(model, device) for model in models]
    micro_batch = step.on(tried[0], tried[1] if len(tried) > 1 else None, shape, device)  # type: ignore[arg-type]
    learned = [each for each in tried[0].parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)

    def update() -> None:
        micro_batch()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def seconds(work: Callable[[], None]) -> float:
        return statistics.median([timer(work, device) for _ in range(4)][1:])

    more = step.accumulated - 1  # these add to gradients that are there
    taken = seconds(update) + (more * seconds(micro_batch) if more else 0.0)
    return step.accumulated * step.traced(shape).flops / taken


def _with_numbers(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on a device, with weights at random."""
    own = copy.deepcopy(model).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*own.parameters(), *own.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
            else:
                tensor.zero_()
    without_adapters(own).tie_weights()
    return own


def full_batch(model: PreTrainedModel, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Rows without padding, every token labelled where tokens are; ids and labels are 1."""
    ids = torch.ones(shape.rows, shape.tokens, dtype=torch.long, device=device)
    labels = ids.clone()
    if kind_of(model) == "example":
        labels = torch.zeros(
            shape.rows, dtype=torch.float if model.config.num_labels == 1 else torch.long, device=device
        )
    elif not is_language_model(model):
        labels = torch.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
