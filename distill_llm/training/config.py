"""`DistillationConfig`: transformers' TrainingArguments and the objective."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from distill_llm.losses.objective import parse_objective

logger = logging.get_logger(__name__)


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments and the objective.

    Args:
        losses: term name -> settings, e.g. `{"labels": {"weight": 0.5}, "logits": {"temperature": 2.0}}`; the terms and
            settings are those of `distill_llm.losses.Objective`.
        teacher_dtype: float32, bfloat16 or float16, what the teacher's weights are held in; None: as the student is trained.
        logging_nan_inf_filter: off, since looking at every loss makes the device wait at every micro-batch.

    Raises:
        InputError: names the field of the objective that is wrong.
    """

    losses: dict[str, Any] = field(
        default_factory=lambda: {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}},
        metadata={"help": "The objective: term name -> settings."},
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "Precision of the teacher's weights."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log (synchronises)."}
    )

    def __post_init__(self) -> None:
        self.losses = parse_objective(self.losses).model_dump(mode="json", exclude_none=True)
        super().__post_init__()
        if self.n_gpu > 1:  # the Trainer's answer is DataParallel, which divides no sum of items rightly
            logger.warning_once(
                f"Training on one of {self.n_gpu} devices; `accelerate launch` in front of the command uses them all."
            )
            self._n_gpu = 1
