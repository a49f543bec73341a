"""Stage `ensemble`: the weights of several teachers, learnt on held-out rows."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.teaching import WEIGHTS, HeldOutRows, learn, loader, record, trusted
from distill_llm.recipe.recipe import Recipe


class EnsembleWeights(Stage):
    """Leaves the weights in state.json, where every start of the run finds them."""

    name = WEIGHTS

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the recipe asks for weights that are learnt, and no cache has them."""
        section = recipe.teacher.ensemble
        return section is not None and section.learn_weights and recipe.teacher.cache is None

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher."""
        return (self.teacher,)

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Read the held-out rows with every teacher."""
        run, path = self.run, self.teacher.model
        section = run.recipe.teacher
        assert section.ensemble is not None and path is not None
        paths = [(path, section.trust_remote_code), *trusted(run.opened.others)]
        size, device = run.recipe.evaluation.batch_size, run.processes.device
        names = run.data.task.label_names
        held = HeldOutRows(run.data.validation, run.collator, size, device, run.tokenizer, names)
        return record(learn(section.ensemble, paths, loader(run, "recovery"), held, self._waiting))

    @property
    def _waiting(self) -> Path:
        """Where weights wait that are not in memory."""
        return self.run.folder / f"{self.name}-teachers"

    def tidy(self) -> None:
        """Remove what is left of weights that waited."""
        if self.run.processes.is_main_process:
            shutil.rmtree(self._waiting, ignore_errors=True)

    def line(self, result: Result) -> list[str]:
        """The weights, and the loss that they have."""
        weights = ", ".join(f"{weight:.4f}" for weight in result["weights"])
        alone = ", ".join(f"{loss:.4f}" for loss in result["alone"])
        return [f"weights {weights}: loss {result['loss']:.4f} on {result['items']:,} held-out labels; alone {alone}"]
