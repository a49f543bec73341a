"""Stage `round-1/masks`: the student, with all of its units, learns which of them to keep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill_llm.losses.items import kind_of
from distill_llm.models.masks import masks_in
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.prune import masks_folder, pruning_of
from distill_llm.pipeline.stages.recover import Recover, without_exit_loss
from distill_llm.pipeline.teaching import WEIGHTS, learnt
from distill_llm.pipeline.train_model import Fields, Learned, More, train_model
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.learning.masks import LearnedMasks, MaskBudget, learned_masks
from distill_llm.pruning.plan import full_plan
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.recipe.masks import BLOCKS
from distill_llm.recipe.recipe import Recipe, budget_batch
from distill_llm.report.learned import masks_words


class LearnMasks(Recover):
    """Leaves `round-1/masks`: the trained weights with the masks folded in, the plan, and the scores of all units."""

    peers: list[Path] = []  # noqa: RUF012 - of students that are cut
    assistant = None
    fields: Fields = "masks"

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the pruning section asks for masks."""
        return recipe.pruning is not None and recipe.pruning.masks is not None

    @property
    def name(self) -> str:
        """`round-1/masks`."""
        return f"round-{self.round}/masks"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, and the learnt weights of several teachers."""
        return self.teacher, *(stage for stage in self.earlier if stage.name == WEIGHTS)

    @property
    def model(self) -> Path:
        """The student before it is cut."""
        return masks_folder(self.run)

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Train weights and masks, and make the plan."""
        run, section = self.run, pruning_of(self.run)
        assert section.masks is not None and run.recipe.distillation is not None
        losses = without_exit_loss(run.recipe.distillation.losses)
        student = self._whole()
        masks = self._masks(student)
        trained = train_model(
            run,
            student,
            self.source(learnt(run, results)) if losses.needs_teacher else None,
            self.model,
            self.fields,
            losses.model_dump(mode="json", exclude_none=True),
            More(masks=masks_in(self.teacher.model), learned=Learned(masks, section.masks.learning_rate)),
        )
        return {**trained, "masks": masks.told()}

    def line(self, result: Result) -> list[str]:
        """Of how many units masks were learnt, and where they came to."""
        return [masks_words(result["masks"])]

    def row(self, result: Result) -> dict[str, Any]:
        """What is known of the masks."""
        return {"masks": result["masks"]}

    def _whole(self) -> PreTrainedModel:
        """The teacher as a student that keeps everything, with the lineage that losses of layers follow."""
        path = self.teacher.model
        assert path is not None
        teacher = self.run.load(path).eval()
        return prune(teacher, full_plan(teacher))

    def _masks(self, student: PreTrainedModel) -> LearnedMasks:
        recipe, section = self.run.recipe, pruning_of(self.run)
        assert section.masks is not None and section.keep is not None
        costs = unit_costs(student, section.cost, *budget_batch(recipe, kind_of(student) == "next_token"))
        blocks = [unit for unit in section.units if unit in BLOCKS]
        budget = MaskBudget(section.keep, costs, section.rules, section.masks.warm_up, blocks)
        return learned_masks(student, section.masks.by, budget)
