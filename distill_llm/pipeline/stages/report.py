"""Stage `report`: the finished student with its card, metrics.json and the report, from the results of all stages."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill_llm.checks.evaluate import benchmarks_of
from distill_llm.common.files import written_whole
from distill_llm.evaluation.disagreements import find_disagreements
from distill_llm.evaluation.harness import BenchmarkScore, run_benchmarks, side_by_side
from distill_llm.models.masks import MASKS, masks_in
from distill_llm.pipeline.result import collect_metrics, sparsity_record, stage_records, taught_by
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.benchmarks import TeacherBenchmarks
from distill_llm.pipeline.stages.exits import Exits
from distill_llm.pipeline.stages.quantize import Quantize, copied
from distill_llm.pipeline.teaching import learnt

LONGEST_TEXT = 400
"""Characters of a row that are kept to be shown."""


class Report(Stage):
    """Leaves `student/` in the dtype of the student's checkpoint, `metrics.json`, and the report in three forms.

    These are `report.html`, and `report.md` with `figures/`. Rows of the data that are shown are in `disagreements.json`, not in
    `metrics.json`: that one is pushed with the student.
    """

    name = "report"
    sections = ("report",)

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
        figures = (run.folder / "figures",) if run.recipe.pruning is not None or run.recipe.exits is not None else ()
        return run.student_dir, run.metrics_file, run.report_file, run.page_file, run.disagreements_file, *figures

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """How the student is rounded, scored and timed, and what is shown."""
        return recipe.get("quantize"), recipe.get("evaluation"), recipe.get("report")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Save the student, measure it beside its teacher, and write what is known of both."""
        from distill_llm.report import write_card, write_page, write_report
        from distill_llm.report.tables import percent

        run, path = self.run, self.student.model
        assert self.teacher.model is not None and path is not None
        student = run.load(path, run.student_dtype)
        quantized = results.get(Quantize.name) if run.recipe.quantize is not None else None
        exits = results[Exits.name]["exits"] if run.recipe.exits is not None else None
        if exits is not None:
            chosen = "draft" if "draft" in exits else "threshold"
            student.config.exits = {**student.config.exits, chosen: exits[chosen]}
            if exits.get("draft") is not None:
                student.generation_config.cache_implementation = None  # drafts are refused with a static cache
        with written_whole(run.student_dir, folder=True) as folder:
            copied(Path(path), folder) if quantized else run.save(student, folder)
            if (masks := masks_in(path)) is not None:
                masks.save(folder / MASKS)
        teacher = run.load(self.teacher.model, run.teacher_dtype)
        rounds = self._rounds(results)
        metrics = collect_metrics(
            run.recipe, run.data.task, teacher, student, results[self.teacher.name], rounds, quantized
        )
        metrics |= {**taught_by(run.recipe, learnt(run, results)), **stage_records(results)}
        metrics |= {} if exits is None else {"exits": exits}
        if "synthetic" in results:
            metrics["synthetic"] = {**results["synthetic"]["record"], "real_test": run.recipe.data.test is not None}
        if masks is not None:
            metrics["sparsity"] = sparsity_record(masks, teacher, student)
        if (benchmarks := benchmarks_of(run.recipe)) is not None:
            own = run_benchmarks(student, run.tokenizer, benchmarks, run.recipe.evaluation.batch_size)
            theirs = results[TeacherBenchmarks.name]["scores"]
            metrics["harness"] = side_by_side([BenchmarkScore(**each) for each in theirs], own)
        shown = self._disagreements(teacher, student)
        for file, content in ((run.metrics_file, metrics), (run.disagreements_file, shown)):
            with written_whole(file) as target:
                target.write_text(json.dumps(content, indent=2) + "\n")
        write_report(run.folder, metrics)
        write_page(run.folder, metrics, shown, run.recipe.to_yaml())
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

    def _disagreements(self, teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, Any]:
        """The rows on which the student is farthest from its teacher, with their texts; empty where none are to be shown."""
        run, count = self.run, self.run.recipe.report.examples
        if not count or run.recipe.teacher.tokenizer is not None:  # rows of different tokens have no common numbers
            return {}
        data, size = run.data, run.recipe.evaluation.batch_size
        found = find_disagreements(teacher, student, data.test, data.task, run.collator, count=count, batch_size=size)
        return {
            **asdict(found),
            "examples": [{"text": self._text(each.row), **asdict(each)} for each in found.examples],
        }

    def _text(self, row: int) -> str:
        """A test row as the data have it; where rows were joined, cut, left out or made, as the models read it."""
        made = self.run.recipe.data.synthetic if self.run.recipe.data.test is None else None
        if made is not None and made.embeds:
            return f"a row of embeddings (number {row})"
        raw, encoded, columns = self.run.opened.data.test, self.run.data.test, self.run.data.task.text_columns
        texts = [raw[row][name] for name in columns] if len(raw) == len(encoded) else [None]
        if (
            made is not None
            or self.run.data.task.kind.joins_documents
            or not all(isinstance(text, str) for text in texts)
        ):
            texts = [self.run.tokenizer.decode(encoded[row]["input_ids"], skip_special_tokens=True)]
        text = "\n".join(map(str, texts))
        return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
