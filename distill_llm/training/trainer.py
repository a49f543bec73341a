"""`DistillationTrainer`: a transformers Trainer whose loss compares a student with a teacher."""

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from distill_llm.architectures.modeling_exits import EXIT_CODE_NAMES
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import check_weights
from distill_llm.common.processes import draw_apart
from distill_llm.data.augmenting.collator import AugmentingCollator
from distill_llm.data.epochs import Epoch
from distill_llm.losses.items import count_items
from distill_llm.losses.objective import Objective, parse_objective
from distill_llm.losses.terms.term import Use
from distill_llm.losses.units import UNITS
from distill_llm.models.adapters import without_adapters
from distill_llm.models.limits import limits_of
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.wrapping import as_teacher
from distill_llm.training import teacher_state
from distill_llm.training.augmented import AugmentedRows, check_augmentation
from distill_llm.training.batches import EpochBegins
from distill_llm.training.companions import PROJECTIONS_NAME, Companion
from distill_llm.training.config import DistillationConfig
from distill_llm.training.evaluation_loss import EvaluationLoss
from distill_llm.training.loss import LossSettings, TrainingLoss
from distill_llm.training.memories import StepEnds
from distill_llm.training.on_policy import MARK, StudentResponses
from distill_llm.training.reading_trainer import ReadingTrainer
from distill_llm.training.refusals import (
    best_faults,
    check_arguments,
    check_model,
    check_prompts,
    check_teacher,
    dispatching,
    divided_faults,
)
from distill_llm.training.shards import sharding_of, whole
from distill_llm.training.step_sums import StepSums
from distill_llm.training.teacher_state import StepsDone


class DistillationTrainer(ReadingTrainer):
    """Trains a student on the objective of its `DistillationConfig`. Every other feature is the Trainer's own.

    Each term is a sum over its items (labelled examples or tokens, examples, or valid tokens) divided by the number of
    such items in the whole accumulated batch of all processes, so a step does not depend on how the batch was split.
    The log has the terms unweighted under `loss/<term>`. `eval_loss` is the loss against the labels alone, a
    mean over all labels of the data.

    Args:
        model: the student, with a head for sequence or token classification, for regression with one value, for
            masked LM or for causal LM; or a PeftModel around it, whose adapters alone are trained and saved (see
            `distill_llm.models.adapters.merged`).
        teacher: a model with the same outputs and tokenizer, quantised or not; or any `distill_llm.teachers.Teacher`, such as
            a CachedTeacher; may be None where the objective has `labels` only.
        args: with the objective; other arguments as of `transformers.Trainer`, but for `model_init` and
            `compute_loss_func`.

    Raises:
        InputError: one line, when student, teacher and objective do not fit together.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        teacher: PreTrainedModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else DistillationConfig(output_dir="tmp_trainer")
        if not isinstance(args, DistillationConfig):
            raise InputError("args", type(args).__name__, "a DistillationConfig: TrainingArguments with the losses")
        self.objective: Objective = parse_objective(args.losses)
        objective = self.objective
        check_arguments(args, objective, kwargs)
        check_model(model)
        source = as_teacher(teacher)
        check_teacher(source, without_adapters(model), objective)
        check_weights(model, "give a student with finite weights: rows of unused tokens may be set to 0")
        super().__init__(model=model, args=args, **kwargs)
        self.loss = TrainingLoss(
            objective,
            model,
            source,
            self.processing_class,
            args.device,
            LossSettings(
                teacher_dtype=getattr(torch, args.teacher_dtype) if args.teacher_dtype else None,
                precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
                smoothing=args.label_smoothing_factor,
                seed=args.seed,
            ),
        )
        self.terms, self.teacher = self.loss.terms, self.loss.teacher
        self.companions = self._companions()
        self._limits = [limits_of(without_adapters(model).config, "the student")]
        self._limits += [limits_of(reader.config, "the teacher") for reader in self._readers]
        rows = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        packed = "train_dataset" if "train_dataset" in self._check(rows) else None
        self.epoch = Epoch()
        self.add_callback(EpochBegins(self.epoch))
        if self.teacher is not None:
            self.add_callback(StepsDone(self.teacher))
        self._check_scheduler()
        use = Use(kind=self.terms.kind, widths=self.terms.match.widths, sharding=sharding_of(self), packed=packed)
        raise_all(objective.faults(use))
        raise_all(divided_faults(self.teacher is not None and self.teacher.whole_student, use.sharding, "teacher"))
        raise_all(best_faults(self.teacher, args))
        raise_all(dispatching(self.teacher is not None and self.teacher.prefetches, args, self.train_dataset))
        self.responses: StudentResponses | None = None
        if objective.responses is not None:
            check_prompts(self.train_dataset, self._limits, objective.responses.max_new_tokens)
            self.responses = StudentResponses(objective.responses, self.data_collator, args.seed, self.teacher)
        self._evaluated = EvaluationLoss(self.accelerator, self.terms.kind)
        self.sums = StepSums([*objective.terms(), *self._peers], self.accelerator)
        if len(self.terms.memories):
            self.add_callback(StepEnds(self.terms.memories, self.sums))
        check_augmentation(self.data_collator, self.teacher, objective)
        self.augmented = AugmentedRows(self.accelerator)
        if isinstance(self.data_collator, AugmentingCollator):
            self.add_callback(self.augmented)
        draw_apart(args.seed)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; at its end, whatever ends it, the teacher is closed."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.teacher is not None:
                self.teacher.close()

    def _companions(self) -> list[Companion]:
        """The projections, and the teacher's learners."""
        found = [Companion(PROJECTIONS_NAME, self.terms.projections)]
        for name, model in self._peers.items():
            model.train()
            if self.args.activation_checkpointing:
                model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
            decayed = self.get_decay_parameter_names(model)
            names = frozenset(name for name, _ in model.named_parameters()) - frozenset(decayed)
            found.append(Companion(f"{name}.pt", model, names, alone=True, what="peers"))
        return [each for each in found if each.parameters]

    @property
    def _peers(self) -> dict[str, PreTrainedModel]:
        """The teacher's learners by their names in logs and checkpoints."""
        learners = () if self.teacher is None else self.teacher.learners
        return {f"peer_{number}": model for number, model in enumerate(learners, 1)}

    # One place where everything is reduced: sums of this batch over counts of the whole accumulated batch.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step and their item counts; see `Trainer.get_batch_samples`."""
        self._without_gradients()
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.augmented.add(batches)
        step = self.state.global_step
        answered = self.responses is not None and self.responses.chosen(step)
        self.sums.begin([*self._counted(answered), *self._peers])
        if self.responses is None or not answered:
            return batches, counts
        student = self.accelerator.unwrap_model(self.model)
        # Mixed precision begins and ends around all tokens: within it a weight is converted once, not for each of them.
        with self.accelerator.autocast(), whole(student):
            batches = [
                self.responses(student, batch, step, self._place(number)) for number, batch in enumerate(batches)
            ]
        return batches, self._get_num_items_in_batch(batches, device)  # counted anew: the labels are others now

    def _counted(self, answered: bool) -> list[str]:
        """The terms that count in the running step: of some weight, and of the student's own answers not those of the data."""
        weights, terms = self.objective.weights(self.state.global_step, self.state.max_steps), self.terms.terms
        return [name for name, weight in weights.items() if weight and not (answered and terms[name].of_data)]

    def _place(self, number: int) -> int:
        """The place in the global batch of the first row of a micro-batch of this process: processes take turns."""
        turn = number * self.accelerator.num_processes + self.accelerator.process_index
        return turn * self._train_batch_size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """(3,) numbers of label items, examples and valid tokens over micro-batches and processes, at least 1 each."""
        if not batch_samples:
            return None
        counts = torch.stack([count_items(batch, self.terms.kind) for batch in batch_samples]).sum(0).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The weighted objective of a micro-batch in training, the loss against the labels in evaluation."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        share = self.accelerator.num_processes / num_items_in_batch
        if not model.training:
            total, outputs = self.loss.of_labels(model, inputs, self._evaluated.rows(inputs))
            self._evaluated.add(total, inputs)
            loss = total * share[UNITS.index("labels")]
            return (loss, outputs) if return_outputs else loss
        answered = inputs.pop(MARK, None) is not None
        shares = {name: share[UNITS.index(self.terms.unit(name))] for name in self.objective.terms()}
        step, steps = self.state.global_step, self.state.max_steps
        weights = self.objective.weights(step, steps)
        factors = {name: weights[name] * shares[name] for name in self._counted(answered)}
        loss, sums, outputs, soundness, learners = self.loss(model, inputs, factors, step, steps)
        nothing = torch.zeros_like(loss.detach())
        terms = [sums[name] * shares[name] if name in sums else nothing for name in shares]
        self.sums.add([*terms, *learners], loss, soundness)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the mean loss over labels in the place of that over batches."""
        self._evaluated = EvaluationLoss(self.accelerator, self.terms.kind)
        output, name = super().evaluation_loop(*args, **kwargs), f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if output.metrics is not None and name in output.metrics:
            output.metrics[name] = self._evaluated.mean()
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As `Trainer.prediction_step`; where the loss alone is wanted, a language model's logits are not held."""
        if not prediction_loss_only or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total = self.loss.of_labels_alone(model, inputs, self._evaluated.rows(inputs))
        return total / self._evaluated.add(total, inputs).clamp(min=1), None, None

    # What a checkpoint has besides.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.teacher is not None and self.args.should_save:
            teacher_state.save(self.teacher, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            teacher_state.load(self.teacher, checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        for name in EXIT_CODE_NAMES:
            code = os.path.join(checkpoint_folder, name)
            if os.path.isfile(code) and self.is_world_process_zero():
                shutil.copy(code, str(self.args.output_dir))  # the Trainer's own list of files to push has no code
        super()._push_from_checkpoint(checkpoint_folder)
