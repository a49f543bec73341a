"""How a stage trains a model: from its last whole checkpoint to a saved folder."""

import shutil
from pathlib import Path
from typing import Any, Literal

from transformers import EvalPrediction, PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill_llm.common.files import full_disk_named, written_whole
from distill_llm.data.augmenting import AugmentingCollator
from distill_llm.evaluation.evaluate import compute_metrics
from distill_llm.models.adapters import merged
from distill_llm.pipeline.checkpoints import MarkComplete, last_complete_checkpoint
from distill_llm.pipeline.context import Context
from distill_llm.teachers.base import Teacher
from distill_llm.training.config import DistillationConfig
from distill_llm.training.progress import TrainingProgress
from distill_llm.training.trainer import DistillationTrainer

Fields = Literal["teacher", "recovery", "final"]
"""Which of the recipe's training fields hold (see `Recipe.training`)."""


def train_model(
    run: Context,
    model: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | None,
    target: Path,
    fields: Fields,
    losses: dict[str, Any],
) -> dict[str, int] | None:
    """Train a model, going on from the last whole checkpoint, and save it with its tokenizer to `target`.

    Returns:
        How much of the rows was changed (see `AugmentedRows.totals`); None where they are learnt as they are.
    """
    work = _checkpoints(target)
    args = DistillationConfig(
        output_dir=str(work),
        losses=losses,
        teacher_dtype=run.recipe.teacher.dtype,
        **run.recipe.training(fields),  # type: ignore[arg-type]
    )

    def metrics(given: EvalPrediction) -> dict[str, float]:
        """The task's metrics on held-out rows, for the Trainer's own evaluation."""
        task = run.data.task
        return compute_metrics(task, *task.kind.predictions(given.predictions, given.label_ids))

    rows, collator = (run.data.train, run.collator) if fields == "teacher" else run.lessons
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        args=args,
        train_dataset=rows,
        eval_dataset=run.data.validation,
        data_collator=collator,
        processing_class=run.tokenizer,
        compute_metrics=None if run.data.task.is_language_model else metrics,
        callbacks=[MarkComplete()],
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(TrainingProgress(f"Training {target.relative_to(run.folder)}"))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    with full_disk_named(work):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(work))
    trainer.check_weights()
    engine = trainer.model_wrapped  # DeepSpeed's, or the model of FSDP
    weights = trainer.accelerator.get_state_dict(engine) if sharded else None
    if run.processes.is_main_process:
        with written_whole(target, folder=True) as path:
            run.save(merged(trainer.accelerator.unwrap_model(trainer.model)), path, weights)
    trainer.accelerator.free_memory()  # ends DeepSpeed's engine, which nothing else does
    unset_hf_deepspeed_config()  # otherwise every model that is loaded later, by one process even, is divided by ZeRO-3
    return trainer.augmented.totals() if isinstance(collator, AugmentingCollator) else None


def remove_checkpoints(run: Context, target: Path) -> None:
    """Remove the Trainer's checkpoints of a stage that is recorded."""
    if run.processes.is_main_process:
        shutil.rmtree(_checkpoints(target), ignore_errors=True)


def _checkpoints(target: Path) -> Path:
    """Where the Trainer keeps its checkpoints while it trains the model of `target`."""
    return target.with_name(target.name + "-training")
