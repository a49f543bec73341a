"""The progress of a training, in place of the Trainer's own bar and its lines of logs."""

from typing import Any

from transformers import TrainerCallback

from distill_llm.common.progress import progress_bar


class TrainingProgress(TrainerCallback):
    """Shows the steps that are done, the last loss, and the time that is left.

    Args:
        title: what is trained.
    """

    def __init__(self, title: str):
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that the training goes on from."""
        given = {"total": state.max_steps, "initial": state.global_step, "unit": " steps"}
        self.bar = progress_bar(desc=self.title, leave=False, shown=state.is_world_process_zero, **given)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the last loss."""
        if "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4g}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()
