"""Stage `teacher`: fine-tune the teacher where the recipe says so, and score it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from distill_llm.evaluation.baselines import baselines, no_better
from distill_llm.models.checkpoint import load_for_task
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.train_model import More, remove_checkpoints, train_model


class Teacher(Stage):
    """Leaves `teacher/`, or takes the teacher as it is."""

    together = True
    trained = True
    name = "teacher"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The folder `teacher/`, where the teacher is fine-tuned here."""
        return () if self.run.recipe.teacher.train is None else (self.run.folder / "teacher", *self.stages)

    @property
    def stages(self) -> tuple[Path, ...]:
        """The folders of the teacher at stages of its training, where students learn from these; the last one is the teacher."""
        number = self.run.recipe.teacher.checkpoints
        if not isinstance(number, int):
            return ()
        return tuple(self.run.folder / "teacher-stages" / str(stage) for stage in range(1, number))

    @property
    def model(self) -> Path:
        """The fine-tuned teacher, else the given one (a folder or a Hub id)."""
        return self.outputs[0] if self.outputs else Path(self.run.teacher_path)

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Fine-tune and score."""
        run = self.run
        trained: dict[str, Any] = {}
        if self.outputs:
            set_seed(run.recipe.seed)
            config = run.opened.teacher.config
            trained = train_model(
                run,
                load_for_task(
                    run.teacher_path,
                    run.data.task,
                    config=config,
                    trust_remote_code=run.recipe.teacher.trust_remote_code,
                ),
                None,
                self.model,
                "teacher",
                {"labels": {}},
                More(stages=self.stages),
            )
        result = run.scored(self.model if self.outputs else run.teacher_path, run.teacher_dtype, of_teacher=True)
        if not result:
            return {}
        task, raw = run.data.task, run.opened.data
        made = run.recipe.data.synthetic is not None  # there is nothing that a naive answer could have been learnt from
        naive = baselines(task, None, run.data.test) if made else baselines(task, raw.train, raw.test)
        warning = no_better(task, result["metrics"], naive)
        return {**result, "baselines": naive, "warning": warning, **trained}

    def tidy(self) -> None:
        """Remove the checkpoints of the training."""
        remove_checkpoints(self.run, self.run.folder / "teacher")

    def line(self, result: Result) -> list[str]:
        """Its score, the number of rows, and what is wrong with it."""
        warning = result.get("warning")
        shown = f"{self.run.named(result['metrics'])} on {result['metrics']['rows']} rows"
        return [shown, *([] if warning is None else [f"WARNING: {warning}"])]
