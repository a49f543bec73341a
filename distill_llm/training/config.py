"""`DistillationConfig`: transformers' TrainingArguments and the objective."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from distill_llm.common.errors import InputError, one_of
from distill_llm.common.finite import ON_NONFINITE
from distill_llm.losses.objective import parse_objective

logger = logging.get_logger(__name__)


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments and the objective.

    Args:
        losses: term name -> settings, e.g. `{"labels": {"weight": 0.5}, "logits": {"temperature": 2.0}}`. The terms and their
            settings are documented at `distill_llm.losses.Objective`.
        teacher_dtype: dtype of the teacher's weights (float32, bfloat16 or float16); None: as the student is trained.
        on_nonfinite: what to do with a step whose loss or gradient is nan or infinite: "stop" with one line, or "skip" it,
            weights and the optimizer's moments untouched, and count it in the log (`skipped_steps`).
        logging_nan_inf_filter: off by default, because a look at every loss makes the host wait at every micro-batch.

    Raises:
        InputError: a field of the objective is wrong; it is named.
    """

    losses: dict[str, Any] = field(
        default_factory=lambda: {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}},
        metadata={"help": "The objective: term name -> settings."},
    )
    teacher_dtype: str | None = field(default=None, metadata={"help": "Dtype of the teacher's weights."})
    on_nonfinite: str = field(
        default="stop", metadata={"help": "A step that is not finite: stop, or skip it.", "choices": ON_NONFINITE}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log (synchronises)."}
    )

    def __post_init__(self) -> None:
        self.losses = parse_objective(self.losses).model_dump(mode="json", exclude_none=True)
        if self.on_nonfinite not in ON_NONFINITE:
            raise InputError("on_nonfinite", self.on_nonfinite, one_of(ON_NONFINITE, str(self.on_nonfinite)))
        super().__post_init__()
        if self.n_gpu > 1:  # the Trainer would use DataParallel, which divides the sums by wrong numbers of items
            logger.warning_once(
                f"Training on one of {self.n_gpu} devices. To use them all, put `accelerate launch` in front of the command."
            )
            self._n_gpu = 1
