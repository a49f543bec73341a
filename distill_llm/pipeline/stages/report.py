"""Stage `report`: the finished student with its card, metrics.json and the report, from the results of all stages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_llm.checks.evaluate import benchmarks_of
from distill_llm.common.files import written_whole
from distill_llm.evaluation.harness import run_benchmarks, side_by_side
from distill_llm.pipeline.result import collect_metrics
from distill_llm.pipeline.stage import Result, Stage


class Report(Stage):
    """Leaves `student/` in the dtype of the student's checkpoint, `metrics.json`, `report.md` and `figures/`."""

    name = "report"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """All stages before it."""
        return self.earlier

    @property
    def reads(self) -> tuple[Stage, ...]:
        """The teacher and the student as it is."""
        return self.teacher, self.student

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files of a finished run."""
        run = self.run
        figures = (run.folder / "figures",) if run.recipe.pruning is not None else ()
        return run.student_dir, run.metrics_file, run.report_file, *figures

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """How the student is scored and timed."""
        return recipe.get("evaluation")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Save the student, measure it beside its teacher, and write what is known of both."""
        from distill_llm.report import write_card, write_report
        from distill_llm.report.tables import percent

        run, teacher, path = self.run, self.teacher, self.student.model
        assert teacher.model is not None and path is not None
        student = run.load(path, run.student_dtype)
        with written_whole(run.student_dir, folder=True) as folder:
            run.save(student, folder)
        whole = run.load(teacher.model, run.teacher_dtype)
        metrics = collect_metrics(
            run.recipe,
            run.data.task,
            whole,
            student,
            results[teacher.name],
            self._rounds(results),
            sum(result["seconds"] for result in results.values()),
        )
        if (benchmarks := benchmarks_of(run.recipe)) is not None:
            scores = (
                run_benchmarks(model, run.tokenizer, benchmarks, run.recipe.evaluation.batch_size)
                for model in (whole, student)
            )
            metrics["harness"] = side_by_side(*scores)
        with written_whole(run.metrics_file) as file:
            file.write_text(json.dumps(metrics, indent=2) + "\n")
        write_report(run.folder, metrics)
        write_card(run.student_dir, metrics, run.recipe.to_yaml())
        kept = f"{percent(metrics['layer_params_kept'])} of the layers' parameters"
        speed = f"speed-up {metrics['speedup']:.2f}x on {metrics['device']}"
        return {"summary": f"retention {percent(metrics['retention'])}, {kept}, {speed}"}

    def _rounds(self, results: Mapping[str, Result]) -> list[dict[str, Any]]:
        """A row for every round: its number, the seconds of its stages, and what each of them says."""
        rows: dict[int, dict[str, Any]] = {}
        for stage in self.earlier:
            if stage.round:
                row = rows.setdefault(stage.round, {"round": stage.round, "seconds": {}})
                row |= stage.row(results[stage.name])
                row["seconds"][stage.kind] = results[stage.name]["seconds"]
        return list(rows.values())
