"""How a stage trains a model: from its last whole checkpoint to a saved folder."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import EvalPrediction, PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill_llm.common.files import full_disk_named, written_whole
from distill_llm.data.augmenting import AugmentingCollator
from distill_llm.evaluation.evaluate import compute_metrics
from distill_llm.models.adapters import merged
from distill_llm.models.masks import MASKS, Masks
from distill_llm.pipeline.checkpoints import MarkComplete, last_complete_checkpoint
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.synthetic_rows import learner
from distill_llm.pruning.learning.masks import LearnedMasks
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.moving_average import MovingAverage
from distill_llm.training.adversarial import AdversarialTrainer
from distill_llm.training.config import DistillationConfig
from distill_llm.training.mask_trainer import MaskTrainer
from distill_llm.training.progress import TrainingProgress
from distill_llm.training.trainer import DistillationTrainer
from distill_llm.training.zeros import KeepZeros

Fields = Literal["teacher", "masks", "recovery", "final", "quantized"]
"""Which of the recipe's training fields hold (see `Recipe.training`)."""
MOST_LOGS = 200
"""Steps whose losses are kept of a training, however often it was logged."""


@dataclass(frozen=True)
class Learned:
    """Masks that learn with a model. At the end they are folded into it, and plan and scores are saved with it.

    Attributes:
        learning_rate: of the masks; None: the usual one.
    """

    masks: LearnedMasks
    learning_rate: float | None = None


@dataclass(frozen=True)
class More:
    """What a training is asked for besides.

    Attributes:
        seed: of the order of rows and all else that is drawn; None: the recipe's.
        beside: where the models are saved that learn with this one (see `Teacher.learners`).
        stages: where the model is saved at equal stages of its training, but for the end.
        masks: of a sparse model; its zeros stay, and the masks are saved with it.
        learned: masks that learn with the model.
    """

    seed: int | None = None
    beside: Sequence[Path] = ()
    stages: Sequence[Path] = ()
    masks: Masks | None = None
    learned: Learned | None = None

    def callbacks(self, run: Context) -> list[TrainerCallback]:
        """What the trainer tells of its steps."""
        stages = [KeepStages(run, self.stages)] if self.stages else []
        return [MarkComplete(), *stages, *([] if self.masks is None else [KeepZeros(self.masks)])]


class KeepStages(TrainerCallback):
    """Saves the model at equal stages of its training.

    Args:
        run: whose model it is.
        folders: one for each stage but the last.
    """

    def __init__(self, run: Context, folders: Sequence[Path]):
        self.run, self.folders = run, folders

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step."""
        if not self.run.processes.is_main_process:
            return
        for number, folder in enumerate(self.folders, 1):
            if state.global_step == max(1, round(number * state.max_steps / (len(self.folders) + 1))):
                with written_whole(folder, folder=True) as path:
                    self.run.save(model, path)


def train_model(
    run: Context,
    model: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | None,
    target: Path,
    fields: Fields,
    losses: dict[str, Any],
    more: "More | None" = None,
) -> dict[str, Any]:
    """Train a model, going on from the last whole checkpoint, and save it with its tokenizer to `target`.

    Args:
        more: see `More`.

    Returns:
        For the stage's result: the `history` of the losses (see `loss_history`), and, where rows were changed while they were
        learnt, how much (`augmented`, see `AugmentedRows.totals`).
    """
    work, more = _checkpoints(target), more or More()
    given = run.recipe.training(fields)
    args = DistillationConfig(
        output_dir=str(work),
        losses=losses,
        teacher_dtype=run.recipe.teacher.dtype,
        **(given if more.seed is None else {**given, "seed": more.seed}),  # type: ignore[arg-type]
    )

    def metrics(given: EvalPrediction) -> dict[str, float]:
        """The task's metrics on held-out rows, for the Trainer's own evaluation."""
        task = run.data.task
        return compute_metrics(task, *task.kind.predictions(given.predictions, given.label_ids))

    rows, collator = (run.data.train, run.collator) if fields == "teacher" else run.lessons
    trainer = _trainer_class(run, fields, more.learned)(
        model=model,
        teacher=teacher,
        args=args,
        train_dataset=rows,
        eval_dataset=run.data.validation,
        data_collator=collator,
        processing_class=run.tokenizer,
        compute_metrics=None if run.data.task.is_language_model else metrics,
        callbacks=more.callbacks(run),
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(TrainingProgress(f"Training {target.relative_to(run.folder)}"))
    with full_disk_named(work):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(work))
    if more.learned is not None:
        more.learned.masks.harden(trainer.accelerator.unwrap_model(trainer.model))
    _save(run, trainer, target, more)
    trainer.accelerator.free_memory()  # ends DeepSpeed's engine, which nothing else does
    unset_hf_deepspeed_config()  # otherwise every model that is loaded later, by one process even, is divided by ZeRO-3
    history = {"history": loss_history(trainer.state.log_history)}
    return history | ({"augmented": trainer.augmented.totals()} if isinstance(collator, AugmentingCollator) else {})


def _trainer_class(run: Context, fields: Fields, learned: Learned | None) -> Callable[..., DistillationTrainer]:
    """What makes the trainer: where a generator makes the rows, or masks learn, one beside it."""
    if learned is not None:
        return partial(MaskTrainer, masks=learned.masks, mask_learning_rate=learned.learning_rate)
    made = run.recipe.data.synthetic
    if fields == "teacher" or made is None or made.generator is None:
        return DistillationTrainer
    return partial(AdversarialTrainer, adversary=learner(run))


def _save(run: Context, trainer: DistillationTrainer, target: Path, more: More) -> None:
    """Save what a trainer has trained: its model, or the average of that, and those that learned with it."""
    if isinstance(trainer.teacher, MovingAverage) and run.recipe.teacher.saves_average:
        trainer.teacher.hand_over()
    trainer.check_weights()
    engine = trainer.model_wrapped  # DeepSpeed's, or the model of FSDP
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(engine) if sharded else None
    learners = trainer.teacher.learners if trainer.teacher is not None else ()
    if run.processes.is_main_process:
        for folder, learner in zip(more.beside, learners, strict=True):
            with written_whole(folder, folder=True) as path:
                run.save(learner, path)
        with written_whole(target, folder=True) as path:
            run.save(merged(trainer.accelerator.unwrap_model(trainer.model)), path, weights)
            if more.masks is not None:
                more.masks.save(path / MASKS)
            if more.learned is not None:
                more.learned.masks.save(path)


def loss_history(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The losses of a Trainer's log, for the report.

    Args:
        log: `log_history` of a Trainer's state, which its checkpoints keep too.

    Returns:
        `steps`, at most MOST_LOGS of them, evenly spread; and by name `losses`, with a number for each of these steps: the `loss`
        that was minimised, and each term unweighted, as `loss/logits`. None where a term did not count.
    """
    rows = [row for row in log if "loss" in row]
    rows = rows[:: -(-len(rows) // MOST_LOGS) or 1]
    names = dict.fromkeys(name for row in rows for name in row if name == "loss" or name.startswith("loss/"))
    return {"steps": [row["step"] for row in rows], "losses": {name: [row.get(name) for row in rows] for name in names}}


def remove_checkpoints(run: Context, target: Path) -> None:
    """Remove the Trainer's checkpoints of a stage that is recorded."""
    if run.processes.is_main_process:
        shutil.rmtree(_checkpoints(target), ignore_errors=True)


def _checkpoints(target: Path) -> Path:
    """Where the Trainer keeps its checkpoints while it trains the model of `target`."""
    return target.with_name(target.name + "-training")
