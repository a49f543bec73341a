"""The loss of one batch: the teacher's signals, the student's forward, and the terms that compare them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from distill_llm.architectures.modes import named_outputs
from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head_parts import LabelPart
from distill_llm.losses.items import aligned_labels, check_tokens_known, first_rows, targets, token_ids, valid_tokens
from distill_llm.losses.labels import label_loss
from distill_llm.losses.matching import MatchSettings
from distill_llm.losses.objective import Objective
from distill_llm.losses.signals import Batch, Exits, MixedLabels, Signals, TokenExits, check_outputs
from distill_llm.models.adapters import without_adapters
from distill_llm.models.capture import Recorder
from distill_llm.models.inputs import forward_inputs, packed_sequences
from distill_llm.models.item_logits import item_logits, packed
from distill_llm.models.language_exits import ExitReader, language_exits
from distill_llm.models.mixing import mixed_embeddings
from distill_llm.models.output_head import output_head
from distill_llm.teachers.base import Teacher
from distill_llm.training.head_terms import HeadTerms
from distill_llm.training.on_policy import ANSWERED, IMPORTANCE
from distill_llm.training.terms import Terms


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss that come from the training arguments.

    Attributes:
        teacher_dtype: dtype of the teacher's weights; None: `precision`.
        precision: dtype of the student's mixed precision, if any.
        smoothing: label smoothing.
        seed: seed of the initial weights of projections.
    """

    teacher_dtype: torch.dtype | None = None
    precision: torch.dtype | None = None
    smoothing: float = 0.0
    seed: int = 0


class StepLoss(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        total: the sum of the terms times their factors.
        sums: by term, its sum.
        outputs: the student's.
        soundness: see `Signals.soundness`.
        learners: of each of the teacher's learners, its part of `total`.
    """

    total: torch.Tensor
    sums: dict[str, torch.Tensor]
    outputs: Any
    soundness: torch.Tensor
    learners: tuple[torch.Tensor, ...] = ()


class Counted(NamedTuple):
    """The terms whose weight is not 0 in a step, and what they need.

    Attributes:
        teacher: None where none of them compares with it, and nothing learns with the student: then it does not run.
        recorder: of the student's layers that they compare.
        head_terms: see `TrainingLoss`.
    """

    terms: Terms
    teacher: Teacher | None
    recorder: Recorder
    head_terms: HeadTerms | None


class TrainingLoss:
    """An objective for one student and one teacher.

    The logits of a language model whose head is a plain linear map are never held whole: the head runs inside the loss, a chunk
    of items at a time (see `HeadTerms`).

    Args:
        objective: the terms.
        model: the student, or a PeftModel around it.
        teacher: may be None if the objective needs none. A teacher that is not needed is not kept.
        tokenizer: the tokenizer of the data; it is needed for vocabularies of different sizes.
        device: where the student trains.
        settings: see `LossSettings`.

    Attributes:
        student: the student without its adapters.
        teacher: gives the signals; None if the objective needs none.
        terms: the terms of the objective for these two models.
        learners: the same for each of the teacher's learners.

    Raises:
        InputError: student, teacher and objective do not go together.
    """

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        teacher: Teacher | None,
        tokenizer: Any,
        device: torch.device,
        settings: LossSettings | None = None,
    ):
        settings = settings or LossSettings()
        self.objective = objective
        student: PreTrainedModel = without_adapters(model)
        self.student = student
        self.teacher = teacher = teacher if objective.needs_teacher else None
        classes = teacher.meet(student, tokenizer) if teacher else None
        shared = MatchSettings(settings.smoothing, classes, settings.seed, settings.precision)
        self.terms = Terms(objective, student, teacher.model if teacher else None, shared)
        if device.type != "cpu":  # they were made there; tensors without numbers cannot even be asked to stay
            self.terms.projections.to(device)
            self.terms.memories.to(device)
        if teacher is not None:
            teacher.place(device, settings.teacher_dtype or settings.precision, self.terms.wanted("teacher"))
        self.learners = [Terms(objective, learner, None, shared) for learner in (teacher.learners if teacher else ())]
        self.model, self.head, self.head_terms = model, output_head(student), None
        self.exits = ExitReader(student, self.head) if language_exits(student) else None
        fits = self.terms.needs_outputs and not self.terms.needs_logits
        if self.terms.needs_teacher_outputs:
            fits = fits and teacher is not None and teacher.compact
        if self.head is not None and fits:
            self.head_terms = HeadTerms(self.terms, model, self.head)
        self._counted: dict[tuple[str, ...], Counted] = {}
        self._watched = self.terms.wanted("teacher")

    def counted(self, names: tuple[str, ...]) -> Counted:
        """What a step needs in which these terms count, made once."""
        if names not in self._counted:
            terms, head = self.terms.only(names), None
            if self.head is not None and self.head_terms is not None and terms.needs_outputs:
                head = HeadTerms(terms, self.model, self.head)
            teacher = self.teacher if terms.objective.needs_teacher or self.learners else None
            self._counted[names] = Counted(terms, teacher, Recorder(self.student, terms.wanted("student")), head)
        return self._counted[names]

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], factors: Mapping[str, torch.Tensor], step: int, steps: int
    ) -> "StepLoss":
        """The loss of a batch in training.

        Args:
            model: the student in its wrappers (DDP, FSDP, adapters). It is called once.
            inputs: the batch, on the device.
            factors: for each term that counts, a 0-dim factor of its sum over items; the others are not computed.
            step, steps: optimizer steps done, and optimizer steps of the whole training.

        Returns:
            See `StepLoss`.
        """
        labels, positions, counted = inputs.get("labels"), None, self.counted(tuple(factors))
        if self.terms.kind != "example" and (counted.terms.needs_outputs or counted.terms.needs_exits):
            # The host waits for the device here, and nowhere else in a micro-batch: it must know how many tokens the head
            # gets. Without this wait the head would run on padding too. The data loader has already moved the batch.
            positions, labels = targets(inputs, self.terms.kind, unlabelled=self.terms.needs_unlabelled)
        elif self.terms.kind != "example":
            positions = inputs["input_ids"].new_empty(0)
        if any(self.terms.pairs.values()):
            check_tokens_known(inputs, "data_collator")
        # Before the teacher has anything to do: to know whether rows are packed, the host waits for the device.
        given, sequences = forward_inputs(self.student, inputs), packed_sequences(self.student, inputs)
        signals = self._signals(counted, inputs, step, positions)
        batch = Batch(signals, labels, valid_tokens(inputs), step, steps, sequences=sequences, tokens=token_ids(inputs))
        if "mixed_labels" in inputs:
            batch = replace(batch, mixed=MixedLabels(inputs["mixed_labels"].flatten(), inputs["mixed_share"]))
        if positions is not None and ANSWERED in inputs:
            batch = replace(batch, **_answered(inputs, positions))
        sums: dict[str, torch.Tensor] = {}
        with ExitStack() as forward:
            recording = forward.enter_context(counted.recorder.recording())
            if counted.head_terms is None or positions is None:
                forward.enter_context(packed(self.student, positions))
            else:
                sums = forward.enter_context(counted.head_terms.inside(batch, positions, factors))
            read = forward.enter_context(self._reading(counted, positions))
            forward.enter_context(named_outputs(self.student))
            forward.enter_context(mixed_embeddings(self.student, inputs))
            if counted.terms.objective.differentiates:  # the fast kernels of attention have no second derivative
                forward.enter_context(sdpa_kernel(SDPBackend.MATH))
            outputs = model(**given)
        own = recording.with_logits(item_logits(outputs.logits, positions))
        batch = replace(batch, student=replace(own, exits=read[0] if read else exits_of(outputs)))
        if counted.teacher is not None:
            compared = batch.own.logits if counted.terms.needs_teacher_outputs else None
            check_outputs(signals, compared, self.terms.match.classes)
        rest = counted.terms(batch, without=sums)
        parts = [factors[name] * value for name, value in {**sums, **rest}.items()] + unweighted(batch.own.exits)
        if counted.head_terms is not None:
            parts.append(
                outputs.loss - outputs.loss.detach()
            )  # adds only the gradient: FSDP2 rounds the value of outputs
        elif not counted.terms.needs_outputs:
            parts.append(0.0 * outputs.logits.float().sum())  # DDP waits for the gradients of all parameters
        learners = self._of_learners(batch, factors)
        soundness = outputs.logits.new_zeros(()) if signals is None else signals.soundness()
        return StepLoss(torch.stack([*parts, *learners]).sum(), {**sums, **rest}, outputs, soundness, learners)

    def _reading(self, counted: Counted, positions: torch.Tensor | None) -> AbstractContextManager[list[TokenExits]]:
        """Leaves what a language model's exits give in the forward inside, where a term counts that is about them."""
        if self.exits is None or positions is None or not counted.terms.needs_exits:
            return nullcontext([])
        return self.exits.reading(positions)

    def _of_learners(self, batch: Batch, factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The weighted objective of each of the teacher's learners for a batch; empty where it has none."""
        if self.teacher is None or not self.learners:
            return ()
        found = []
        for terms, (own, target) in zip(self.learners, self.teacher.exchange(batch.own), strict=True):
            sums = terms.only(factors)(replace(batch, student=own, teacher=target))
            connected = own.logits[:0].float().sum()  # also by a batch without an item
            found.append(connected + sum(factors[name] * value for name, value in sums.items()))
        return tuple(found)

    def _signals(
        self, counted: Counted, inputs: dict[str, Any], step: int, positions: torch.Tensor | None
    ) -> Signals | None:
        if counted.teacher is None:
            return None
        if (wanted := counted.terms.wanted("teacher")) != self._watched:
            counted.teacher.watch(wanted)
            self._watched = wanted
        if not counted.terms.needs_teacher_outputs and not self.learners:  # its head runs on no token
            return counted.teacher.signals(inputs, step, None if positions is None else positions[:0])
        return counted.teacher.signals(inputs, step, positions, compact=counted.head_terms is not None)

    def of_labels(self, model: nn.Module, inputs: dict[str, Any], rows: int) -> tuple[torch.Tensor, Any]:
        """The loss against the labels, without smoothing, summed over the first `rows` of a batch; and all outputs."""
        with named_outputs(self.student):
            outputs = model(**forward_inputs(self.student, inputs))
        labels = aligned_labels(inputs, self.terms.kind)[:rows].flatten()
        return label_loss(outputs.logits[:rows].flatten(0, -2), labels).sum(), outputs

    def of_labels_alone(self, model: nn.Module, inputs: dict[str, Any], rows: int) -> torch.Tensor:
        """The same sum without gradient, and without whole logits if the head allows it."""
        head, sums = self.head, []
        if head is None:
            return self.of_labels(model, inputs, rows)[0]
        positions, labels = targets(first_rows(inputs, rows), self.terms.kind)
        assert labels is not None

        def receive(hidden: torch.Tensor) -> None:
            sums.append(head_losses(head.head, hidden, [LabelPart(labels)]).sums[0])

        with torch.no_grad(), named_outputs(self.student), packed(self.student, positions), head.handing_on(receive):
            model(**forward_inputs(self.student, inputs))
        return sums[0]


def _answered(inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> dict[str, Any]:
    """What `Batch` has of a batch with answers of the student, at these flat positions."""
    own = inputs[ANSWERED][positions // inputs["input_ids"].shape[1]]
    weights = (
        inputs[IMPORTANCE].flatten()[positions + 1] if IMPORTANCE in inputs else None
    )  # of the token that is predicted
    return {"data_items": int((~own).sum()), "weights": weights}


def exits_of(outputs: Any) -> Exits | None:
    """What a student's exits gave in a forward; None: it has none."""
    logits = getattr(outputs, "exit_logits", None)
    return None if logits is None else Exits(logits, outputs.exit_states)


def unweighted(exits: Exits | TokenExits | None) -> list[torch.Tensor]:
    """A part of the loss that is 0, for exits whose term has no weight at this step: DDP waits for their gradients anyway."""
    return [] if not isinstance(exits, Exits) else [0.0 * (exits.logits.float().sum() + exits.states.float().sum())]
