"""`DistillationTrainer`: a transformers Trainer whose loss compares a student with a teacher."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from distill_llm.capture import Recorder, Signals, item_logits, packed
from distill_llm.errors import InputError
from distill_llm.losses.labels import IGNORED, label_loss
from distill_llm.losses.objective import Objective, parse_objective
from distill_llm.losses.terms import UNITS, Term, Terms, per_token
from distill_llm.sampling import GlobalBatchSampler
from distill_llm.teachers.compatibility import shared_classes
from distill_llm.teachers.online import OnlineTeacher, accepted_inputs

PROJECTIONS_NAME = "projections.safetensors"


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments and the objective.

    Args:
        losses: term name -> settings, e.g. `{"labels": {"weight": 0.5}, "logits": {"temperature": 2.0}}`; the terms and
            settings are those of `distill_llm.losses.Objective`.
        logging_nan_inf_filter: off, since looking at every loss makes the device wait at every micro-batch.

    Raises:
        InputError: names the field of the objective that is wrong.
    """

    losses: dict[str, Any] = field(
        default_factory=lambda: {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}},
        metadata={"help": "The objective: term name -> settings."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log (synchronises)."}
    )

    def __post_init__(self) -> None:
        self.losses = parse_objective(self.losses).model_dump(mode="json", exclude_none=True)
        super().__post_init__()


class DistillationTrainer(Trainer):
    """Trains a student on the objective of its `DistillationConfig`. Every other feature is the Trainer's own.

    Each term is a sum over its items (labelled examples or tokens, examples, or valid tokens) divided by the number of
    such items in the whole accumulated batch of all processes, so a step does not depend on how the batch was split.
    The log has the terms unweighted under `loss/<term>`. `eval_loss` is the loss against the labels alone.

    Args:
        model: the student.
        teacher: a model with the same outputs and tokenizer; may be None where the objective has `labels` only.
        args: with the objective; other arguments as of `transformers.Trainer`.

    Raises:
        InputError: one line, when student, teacher and objective do not fit together.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else DistillationConfig(output_dir="tmp_trainer")
        super().__init__(model=model, args=args, **kwargs)
        self.student = model
        self.objective: Objective = parse_objective(args.losses)
        objective = self.objective
        self.weights = {name: section.weight for name, section in objective.terms().items()}
        if not objective.needs_teacher:
            teacher = None
        self._check(model, teacher)
        classes = None if teacher is None else shared_classes(model, teacher, self.processing_class)
        self.terms = Terms(objective, model, teacher, args.label_smoothing_factor, classes, args.seed)
        self.terms.projections.to(args.device)
        self.recorder = Recorder(
            model, [pair.student for pair in self.terms.hidden], [pair.student for pair in self.terms.attention]
        )
        self.teacher: OnlineTeacher | None = None
        if teacher is not None:
            self.teacher = OnlineTeacher(
                teacher,
                args.device,
                torch.bfloat16 if args.bf16 else None,
                [pair.teacher for pair in self.terms.hidden],
                [pair.teacher for pair in self.terms.attention],
            )
        self._logged_terms = torch.zeros(len(self.weights), device=args.device)
        self._logged_steps = 0

    def _check(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        args, objective = self.args, self.objective
        if self._loss_shifts_labels:
            raise InputError(
                "model", type(model).__name__, "a classifier, a regression or a masked-LM model: labels are not shifted"
            )
        if objective.needs_teacher and teacher is None:
            terms = [name for name in objective.terms() if name != "labels"]
            raise InputError("teacher", None, f"a model, since the objective has {', '.join(terms)}")
        if (
            model.config.num_labels == 1
            and objective.logits
            and objective.logits.divergence != "mse"
            and not per_token(model)
        ):
            raise InputError(
                "losses.logits.divergence", objective.logits.divergence, "mse, for a student with a single output"
            )
        if args.n_gpu > 1:
            raise InputError("args", f"{args.n_gpu} devices in one process", "a process per device: accelerate launch")
        if objective.attention and (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise InputError("activation_checkpointing_kwargs.use_reentrant", True, "false with losses.attention")

    # One place where everything is reduced: sums of this batch over counts of the whole accumulated batch.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step and their item counts; see `Trainer.get_batch_samples`."""
        self._logged_steps += 1
        for parameter in self.terms.projections.parameters():
            parameter.grad = None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """(3,) numbers of label items, examples and valid tokens over micro-batches and processes, at least 1 each."""
        if not batch_samples:
            return None
        counts = torch.stack([_count_items(batch) for batch in batch_samples]).sum(0).to(device)
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
            total, outputs = self._label_total(model, inputs)
            loss = total * share[UNITS.index("labels")]
            return (loss, outputs) if return_outputs else loss
        terms, outputs = self._training_terms(model, inputs)
        values = {name: term.total * share[UNITS.index(term.unit)] for name, term in terms.items()}
        self._logged_terms += torch.stack([value.detach() for value in values.values()])
        loss = sum(self.weights[name] * value for name, value in values.items())
        if not {"labels", "logits"} & values.keys():
            loss = (
                loss + 0.0 * outputs.logits.float().sum()
            )  # DDP waits for a gradient of every parameter behind an output
        return (loss, outputs) if return_outputs else loss

    def _training_terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Term], Any]:
        valid, labels = _valid_tokens(inputs), inputs.get("labels")
        positions = None
        if self.terms.per_token:
            chosen = valid if "logits" in self.weights or labels is None else (labels != IGNORED) & valid
            positions = chosen.flatten().nonzero().squeeze(-1)
            labels = labels if labels is None else labels.flatten()[positions]
        teacher = self.teacher(inputs, positions) if self.teacher is not None else None
        with self.recorder.recording() as recording, packed(self.student, positions):
            outputs = model(**accepted_inputs(self.student, inputs))
        signals = Signals(recording.hidden, recording.attention, logits=item_logits(outputs.logits, positions))
        return self.terms(signals, teacher, labels, valid), outputs

    def _label_total(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        outputs = model(**accepted_inputs(self.student, inputs))
        labels = inputs["labels"]
        return label_loss(outputs.logits.flatten(0, labels.dim() - 1), labels.flatten()).sum(), outputs

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; averages the projections' gradients over processes, as DDP does the student's."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self.terms.projections.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the mean of each term since the last log over steps and processes."""
        if "loss" in logs and self._logged_steps:
            means = self._logged_terms / self._logged_steps
            if self.accelerator.num_processes > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            logs.update({f"loss/{name}": value for name, value in zip(self.weights, means.tolist(), strict=True)})
        if "loss" in logs or "train_loss" in logs:
            self._logged_terms.zero_()
            self._logged_steps = 0
        super().log(logs, start_time)

    # Data: the same global batches for any number of processes, and every column that student or teacher reads.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        data = self.train_dataset  # with its length column, which the dataset that is handed in may have lost
        strategy = self.args.train_sampling_strategy
        if data is None or not has_length(data) or strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        return GlobalBatchSampler(
            len(data),  # type: ignore[arg-type]
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
            lengths=_lengths(data, self.args.length_column_name) if strategy == "group_by_length" else None,
            drop_last=self.args.dataloader_drop_last,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            if self.teacher is not None:
                names = inspect.signature(self.teacher.model.forward).parameters
                known: list[str] = self._signature_columns or []
                self._signature_columns = [*known, *(name for name in names if name not in known)]  # type: ignore

    # Projections belong to the loss: optimised and checkpointed with the run, never part of the student.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with the projections as a parameter group of their own."""
        optimizer = super().create_optimizer(model)
        parameters = list(self.terms.projections.parameters())
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if parameters and id(parameters[0]) not in known:
            optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if len(self.terms.projections) and self.args.should_save:
            save_file(self.terms.projections.state_dict(), os.path.join(output_dir, PROJECTIONS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if len(self.terms.projections) and checkpoint is not None:
            self.terms.projections.load_state_dict(load_file(os.path.join(checkpoint, PROJECTIONS_NAME)))


def _valid_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """(B, T) of bool: not padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _count_items(batch: Mapping[str, Any]) -> torch.Tensor:
    """(3,) numbers of labelled items, examples and valid tokens, in the order of UNITS."""
    valid, labels = _valid_tokens(batch), batch.get("labels")
    examples = torch.tensor(len(valid), device=valid.device)
    if labels is None or labels.is_floating_point():
        labelled = examples
    else:
        labelled = ((labels != IGNORED) & valid).sum() if labels.dim() == 2 else (labels != IGNORED).sum()
    return torch.stack([labelled, examples, valid.sum()])


def _lengths(data: Any, column: str) -> list[int]:
    names = getattr(data, "column_names", None) or ()
    if column in names:
        return list(data[column])
    return [len(ids) for ids in data["input_ids"]] if names else [len(row["input_ids"]) for row in data]
