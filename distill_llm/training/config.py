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
        losses: term name -> settings, e.g. `{"labels": {"weight": 0.5}, "logits": {"temperature": 2.0}}`. The terms and their
            settings are documented at `distill_llm.losses.Objective`.
        teacher_dtype: dtype of the teacher's weights (float32, bfloat16 or float16); None: as the student is trained.
        logging_nan_inf_filter: off by default, because a look at every loss makes the host wait at every micro-batch.

    Raises:
        InputError: a field of the objective is wrong; it is named.
    """

    losses: dict[str, Any] = field(
        default_factory=lambda: {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}},
        metadata={"help": "The objective: term name -> settings."},
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "Dtype of the teacher's weights."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log (synchronises)."}
    )

    def __post_init__(self) -> None:
        self.losses = parse_objective(self.losses).model_dump(mode="json", exclude_none=True)
        super().__post_init__()
        if self.n_gpu > 1:  # the Trainer would use DataParallel, which divides the sums by wrong numbers of items
            logger.warning_once(
                f"Training on one of {self.n_gpu} devices. To use them all, put `accelerate launch` in front of the command."
            )
            self._n_gpu = 1
