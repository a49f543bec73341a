"""A Trainer that reads its rows as training must: in the same global batches for any number of processes, and no row that a
model cannot read."""

import inspect
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput, has_length

from distill_llm.data.epochs import Epoch
from distill_llm.models.limits import InputLimits
from distill_llm.teachers.base import Teacher
from distill_llm.training.batches import TrainingCollator
from distill_llm.training.checked_trainer import CheckedTrainer
from distill_llm.training.order import GlobalBatchSampler, lengths_of
from distill_llm.training.refusals import check_batch, check_datasets


class ReadingTrainer(CheckedTrainer):
    """Checks rows against the models that read them, and keeps every column that one of them takes.

    Attributes:
        teacher: of the student; None where it has none. A subclass sets it, and the others here.
        epoch: that is running.
    """

    teacher: Teacher | None
    epoch: Epoch
    _limits: list[InputLimits]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, once the models can read rows that the trainer was not made with."""
        if not isinstance(eval_dataset, str):  # the name of one that it was made with
            self._check({"eval_dataset": eval_dataset})
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As `Trainer.predict`, once the models can read the rows."""
        self._check({"test_dataset": test_dataset})
        return super().predict(test_dataset, *args, **kwargs)

    def _check(self, rows: dict[str, Any]) -> set[str]:
        """As `check_datasets` for the trainer's own models."""
        return check_datasets(rows, self._limits, self.processing_class, self.data_collator)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As `Trainer._prepare_inputs`, once the models have positions for the batch."""
        check_batch(inputs, self._limits)
        return super()._prepare_inputs(inputs)

    @property
    def _readers(self) -> tuple[PreTrainedModel, ...]:
        """The teacher's models that read batches."""
        return () if self.teacher is None else self.teacher.readers

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`, of the batches that a TrainingCollator makes."""
        plain, terms = self.data_collator, self.terms
        self.data_collator = TrainingCollator(plain, self.epoch, self.teacher, terms.kind, terms.needs_unlabelled)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

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
            lengths=lengths_of(data, self.args.length_column_name) if strategy == "group_by_length" else None,
            drop_last=self.args.dataloader_drop_last,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            known: list[str] = self._signature_columns or []
            read = [name for reader in self._readers for name in inspect.signature(reader.forward).parameters]
            read += (*getattr(self.data_collator, "columns", ()), *(self.teacher.columns if self.teacher else ()))
            self._signature_columns = list(dict.fromkeys([*known, *read]))  # type: ignore
