"""Stage `round-N/prune`: statistics, plan, the pruned and compensated student, and its scores."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from distill_llm.common.files import written_whole
from distill_llm.data.embeddings import EMBEDDINGS
from distill_llm.data.padding import LENGTH
from distill_llm.metrics.errors import shown_score
from distill_llm.models.masks import MASKS, masks_in
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.rounds import Cut, Cutter, kept_after
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pruning.cutting.strength import described
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.learning.masks import PLAN
from distill_llm.pruning.learning.scales import described_scales
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.recipe.calibration import HELD_OUT, with_held_out
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import Recipe

# The largest calibration batch: its activations and a language model's logits are in memory at once.
CALIBRATION_BATCH, CALIBRATION_TOKENS = 32, 2048


class Prune(Stage):
    """Leaves `round-N/plan.json`, `plan.png`, `statistics.safetensors`, and the pruned student in `round-N/pruned`, in fp32.

    All processes collect the statistics; process 0 plans, writes and scores.
    """

    together = True

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is a pruning section."""
        return recipe.pruning is not None

    @property
    def name(self) -> str:
        """`round-1/prune`."""
        return f"round-{self.round}/prune"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, and the student as it is."""
        return self.teacher, self.student

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The plan with its picture, and the pruned student."""
        return self.folder / "plan.json", self.folder / "plan.png", self.pruned

    @property
    def model(self) -> Path | None:
        """The pruned and compensated student."""
        return self.pruned

    @property
    def pruned(self) -> Path:
        """The folder of what it cut."""
        return self.folder / "pruned"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.run.folder / f"round-{self.round}"

    @property
    def whole(self) -> Stage:
        """The stage that left the model which is cut."""
        return self.student

    @property
    def target(self) -> float | None:
        """The share of the teacher that stays; None: the layers that the section names."""
        section = pruning_of(self.run)
        return None if section.keep is None else kept_after(section.keep, self.round, section.rounds, section.schedule)

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Prune the student, save it, and score it with and without compensation."""
        run, number = self.run, self.round
        section, target = pruning_of(run), self.target
        own = section.statistics.expanduser() if section.statistics is not None and number == 1 else None
        teacher, student = models_to_cut(run, self.teacher.model, self.whole.model)
        kept = run.folder / f"round-{number}" / "statistics.safetensors"
        cut = cut_model(run, student, teacher, target, own or kept, number, self.folder)
        if not run.processes.is_main_process:
            return {}
        run.say(show(cut.plan, student, self.folder, self.title))
        with written_whole(self.pruned, folder=True) as path:
            save_cut(run, cut, cut.model, path)
        plan, compensated, masks = cut.plan, cut.compensated, cut.masks
        result = {
            "keep": cut.kept if target is None else target,
            "kept": cut.kept,
            "layer_params_kept": share_of(cut.model, teacher, "params"),
            "note": f"{self.title} {plan.note}" if plan.note else None,
            "compensation": [strength.record() for strength in cut.strengths],
            **({"sparsity": masks.sparsity} if masks is not None else {}),
            **({"scales": cut.scaled.record()} if cut.scaled is not None else {}),
            **({"search": [found.record() for found in cut.searches]} if cut.searches else {}),
        }
        model = run.as_written(cut.model)
        del teacher, cut  # two models at a time
        scores = run.evaluate(model)
        if not compensated:
            return {**result, **_both(scores, None)}
        del model
        plain = prune(student, plan)
        if masks is not None:
            masks.apply(plain)
        return {**result, **_both(run.evaluate(run.as_written(plain)), scores)}

    @property
    def title(self) -> str:
        """What its plan is called."""
        return f"round {self.round}"

    def line(self, result: Result) -> list[str]:
        """What is kept, and the scores before and after compensation."""
        parts = [f"{result['layer_params_kept']:.1%} of the layers' parameters kept"]
        for found in result.get("search") or []:
            plain, best = ("not finite" if found[k] is None else f"{found[k]:.4g}" for k in ("plain", "best"))
            parts.append(f"searched {found['tried']} plans: divergence {plain} -> {best}")
        if "sparsity" in result:
            parts.append(f"{result['sparsity']:.1%} of the linears' weights are zero")
        parts.append(f"{self.run.named(result['pruned'])} pruned")
        if result["score_compensated"] is not None:
            parts.append(f"{shown_score(result['compensated'])} compensated")
        parts += [described(record) for record in result.get("compensation") or []]
        if "scales" in result:
            parts.append(described_scales(result["scales"]))
        return parts + ([result["note"]] if result.get("note") else [])

    def row(self, result: Result) -> dict[str, Any]:
        """All of the result."""
        return {name: value for name, value in result.items() if name != "seconds"}


def pruning_of(run: Context) -> PruningSection:
    """The pruning section of a recipe that has one."""
    assert run.recipe.pruning is not None
    return run.recipe.pruning


def masks_folder(run: Context) -> Path:
    """Where a student with learnt masks waits to be cut, with its plan."""
    return run.folder / "round-1" / "masks"


def models_to_cut(
    run: Context, teacher: Path | str | None, student: Path | str | None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student in fp32, where the section has them pruned; one model where the student is still the teacher."""
    assert teacher is not None and student is not None
    where = torch.device("cpu") if pruning_of(run).offload else run.processes.device
    first = run.load(student, device=where).eval()
    return (first if student == teacher else run.load(teacher, device=where).eval()), first


def cut_model(
    run: Context,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    keep: float | None,
    file: Path | None,
    number: int = 1,
    folder: Path | None = None,
) -> Cut:
    """Cut a student as the recipe's pruning section says. All processes call it together.

    Args:
        keep: the share of the teacher that stays; None: the layers that the section names.
        file: where the student's statistics are, or are to be kept.
        number: the round, from 1.
        folder: of the round, where a search for plans keeps what it tried.
    """
    section = pruning_of(run)
    device = run.processes.device if section.offload else None
    cutter = Cutter(run.recipe, partial(calibration, run, section.calibration_examples), device, folder)
    if section.masks is not None:
        learnt = masks_folder(run)
        cut = cutter.cut_by(student, teacher, PruningPlan.load(learnt / PLAN), masks_in(learnt))
    else:
        cut = cutter.cut_layers(student) if keep is None else cutter.cut(student, teacher, keep, file)
    return cutter.without_weights(cut, number)


def save_cut(run: Context, cut: Cut, model: PreTrainedModel, folder: Path) -> None:
    """Save the model of a cut, in any dtype, with the masks of its zeros beside it."""
    run.save(model, folder)
    if cut.masks is not None:
        cut.masks.save(folder / MASKS)


def calibration(run: Context, examples: int, cut: int = 0) -> DataLoader:
    """Calibration batches, of rows of similar length.

    They are of the sources that the recipe names, or of the shuffled training data: then all rows where there are fewer.

    Args:
        examples: the number of rows that statistics are of. As many more come with them as `Calibration` holds out.
        cut: 0 for the first rows; each later cut takes those after the one before.
    """
    if run.opened.calibration is not None:
        rows = run.opened.calibration.of_cut(cut).shuffle(seed=run.recipe.seed)
    else:
        train = run.data.train.shuffle(seed=run.recipe.seed)
        most = min(with_held_out(examples), len(train))
        rows = train.select([(cut * most + i) % len(train) for i in range(most)])
    size = len(rows)
    rows = rows.select(np.argsort(rows[LENGTH], kind="stable"))
    most = min(CALIBRATION_BATCH, CALIBRATION_TOKENS // max(rows[LENGTH]), size // HELD_OUT)
    batch_size = max(1, most)
    known = {*run.tokenizer.model_input_names, "position_ids", "labels", EMBEDDINGS}
    rows = rows.remove_columns([name for name in rows.column_names if name not in known])
    return DataLoader(rows, batch_size=batch_size, collate_fn=run.collator)  # type: ignore[arg-type]


def show(plan: PruningPlan, model: PreTrainedModel, folder: Path, title: str) -> Table:
    """Save a plan and its picture in a folder, and return its table."""
    from distill_llm.report.plans import plan_figure, plan_table

    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    plan_figure(plan, model, folder / "plan.png")
    return plan_table(plan, model, title)


def _both(pruned: dict[str, float], compensated: dict[str, float] | None) -> dict[str, Any]:
    """The part of a result with the metrics before and after compensation; None: nothing was compensated."""
    return {
        "score_pruned": pruned["score"],
        "score_compensated": compensated["score"] if compensated else None,
        "pruned": pruned,
        "compensated": compensated,
    }
