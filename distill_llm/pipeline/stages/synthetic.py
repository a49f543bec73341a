"""Stage `synthetic`: the rows of a run without data, made from models."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel

from distill_llm.common.files import written_whole
from distill_llm.common.progress import progress_bar
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.synthetic_rows import FOLDER, GENERATOR, RECORD, adversary, row_maker, section_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.synthesis.generator import Adversary
from distill_llm.synthesis.rows import RowMaker

SPLITS = ("train", "test")


class Synthetic(Stage):
    """Leaves `synthetic/` with the rows to learn from and, where there are no real ones, rows to score on.

    Rows are made a part at a time, and a stopped run goes on with the next part. The generator of
    `data.synthetic.generator` learns here from the teacher alone; its rows are those to prune by, while a student's own are made
    as it learns.
    """

    name = "synthetic"

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is no data."""
        return recipe.data.synthetic is not None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The folder of the rows."""
        return (self.run.folder / FOLDER,)

    @property
    def _parts(self) -> Path:
        return self.run.folder / f"{FOLDER}-parts"

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Make the rows that are not there yet."""
        run, section = self.run, section_of(self.run.opened)
        teacher = run.load(run.teacher_path).eval()
        trained = self._generator(teacher) if section.generator is not None else None
        maker, size = row_maker(run, teacher, trained)
        counts = {"train": section.examples, "test": 0 if run.recipe.data.test is not None else section.test_examples}
        starts = {"train": 0, "test": section.examples}
        rows = {}
        for split in SPLITS:
            if counts[split]:
                numbers = range(starts[split], starts[split] + counts[split])
                rows[split] = self._made(maker, split, [numbers[at : at + size] for at in range(0, len(numbers), size)])
        record = {"method": section.method, "seed": run.recipe.seed, "rows": counts}
        names = run.opened.data.task.label_names
        if names:
            found = Counter(rows["train"]["labels"])
            record["classes"] = {name: int(found[number]) for number, name in enumerate(names)}
        with written_whole(self.outputs[0], folder=True) as folder:
            for split, each in rows.items():
                each.save_to_disk(str(folder / split))
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if trained is not None:
                torch.save(trained.state_dict(), folder / GENERATOR)
        return {"record": record, "summary": said(record)}

    def tidy(self) -> None:
        """Remove the parts."""
        if self.run.processes.is_main_process:
            shutil.rmtree(self._parts, ignore_errors=True)

    def _generator(self, teacher: PreTrainedModel) -> Adversary:
        """The generator after its warm-up."""
        section = section_of(self.run.opened).generator
        assert section is not None
        found = adversary(self.run.opened, teacher)
        for number in progress_bar(range(section.warmup_steps), desc="Warming up", leave=False):
            found.learn(teacher, None, -number - 1)
        return found

    def _made(self, maker: RowMaker, split: str, parts: Sequence[Sequence[int]]) -> Dataset:
        """The rows of these numbers; parts that a stopped run left are read."""
        made = []
        for number, rows in enumerate(progress_bar(parts, desc=f"Making {split} rows", leave=False)):
            path = self._parts / f"{split}-{number}"
            if not path.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(path, folder=True) as folder:
                    maker.rows(list(rows)).save_to_disk(str(folder))
            made.append(load_from_disk(str(path)).with_format(None))
        return concatenate_datasets(made)


def said(record: Mapping[str, Any]) -> str:
    """`2,000 rows (noise, seed 0): negative 700, neutral 600, positive 700`."""
    classes = ", ".join(f"{name} {count:,}" for name, count in record.get("classes", {}).items())
    rows = f"{record['rows']['train']:,} rows ({record['method']}, seed {record['seed']})"
    return f"{rows}: {classes}" if classes else rows
