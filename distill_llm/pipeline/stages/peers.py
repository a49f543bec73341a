"""Stage `round-1/prune-peer-N`: a further student that is cut from the teacher; and what the recover stage knows of peers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from distill_llm.data.tasks import label_names
from distill_llm.measuring.counting import count_params
from distill_llm.models.checkpoint import load_for_task, load_pretrained
from distill_llm.models.configs import open_config
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.prune import Prune
from distill_llm.recipe.changing_teachers import PeersSection
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.origins import shown_name


def peers_of(recipe: Recipe) -> PeersSection | None:
    """The recipe's peers; None where it has none."""
    return recipe.teacher.peers


def folder_of(run: Context, place: int) -> Path:
    """The folder of the peer at a place of the recipe's list."""
    return run.folder / "round-1" / f"peer-{place + 1}"


class PrunePeer(Prune):
    """Leaves `round-1/peer-N/pruned`, with its plan. The teacher's statistics are those of `round-1/prune`."""

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where a peer is to be cut."""
        section = peers_of(recipe)
        return section is not None and bool(section.cut)

    @property
    def place(self) -> int:
        """Of the peer in the recipe's list."""
        section, before = peers_of(self.run.recipe), sum(isinstance(stage, PrunePeer) for stage in self.earlier)
        assert section is not None
        return section.cut[before]

    @property
    def name(self) -> str:
        """`round-1/prune-peer-1`."""
        return f"round-{self.round}/prune-peer-{self.place + 1}"

    @property
    def title(self) -> str:
        """`peer 1`."""
        return f"peer {self.place + 1}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, and the first cut, whose statistics it reads."""
        return tuple(stage for stage in self.earlier if stage is self.teacher or type(stage) is Prune)

    @property
    def model(self) -> Path | None:
        """None: it is not the run's student."""
        return None

    @property
    def folder(self) -> Path:
        """Of the peer."""
        return folder_of(self.run, self.place)

    @property
    def whole(self) -> Stage:
        """The teacher."""
        return self.teacher

    @property
    def target(self) -> float | None:
        """The peer's own share."""
        section = peers_of(self.run.recipe)
        assert section is not None
        return section.others[self.place].keep

    def row(self, result: Result) -> dict[str, Any]:
        """Nothing: the recovery has a row for each peer."""
        return {}


def untrained_peers(run: Context, teacher: Path | str, seed: int) -> list[PreTrainedModel]:
    """The peers as they begin to learn, in fp32, with heads for the task."""
    section, models = peers_of(run.recipe), []
    assert section is not None
    for place, opened in enumerate(run.opened.peers):
        if opened is None:
            models.append(load_pretrained(folder_of(run, place) / "pruned", dtype=torch.float32))
            continue
        set_seed(seed + place + 1)
        tuned = run.recipe.teacher.train is not None  # in this run, after the teacher was opened
        names = label_names(open_config(teacher) if tuned else run.opened.teacher.config)
        models.append(load_for_task(opened.path, run.data.task, names, of_task=True, config=opened.config))
    return models


def scored_peers(run: Context, student: Path, own: Mapping[str, Any], trained: list[Path]) -> dict[str, Any]:
    """What metrics.json says of students that learned together: a row for each, the run's own first, and the best.

    Args:
        student, own: the run's own, and its metrics.
        trained: the folders of the others.

    Returns:
        `students`; `best`, the number of one of them from 0, and `by`: None of both where no rows are held out.
    """
    section = peers_of(run.recipe)
    rows: list[dict[str, Any]] = []
    assert section is not None
    words = ["the student", *(shown_name(other.words) for other in section.others)]
    for name, path in zip(words, [student, *trained], strict=True):
        model = run.load(path, run.student_dtype)
        metrics = dict(own) if path == student else run.evaluate(model)
        rows.append({"name": name, "params": count_params(model)[0], "score": metrics["score"], "metrics": metrics})
        del model
    if "validation" not in own:
        return {"students": rows, "best": None, "by": None}
    scores = [row["metrics"]["validation"] for row in rows]
    best = scores.index((max if run.data.task.higher_is_better else min)(scores))
    return {"students": rows, "best": best, "by": "held-out rows"}
