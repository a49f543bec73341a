"""Stage `round-N/recover`: distil the teacher into the pruned student, or into the one that was given."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from distill_llm.checks.cached import check_cached_weights
from distill_llm.data.aligning import Aligner
from distill_llm.data.alignment import ROWS, alignment_of, alignment_words
from distill_llm.data.tasks import label_names
from distill_llm.losses.objective import Objective
from distill_llm.models.checkpoint import load_for_task, load_pretrained
from distill_llm.models.configs import open_config
from distill_llm.models.exits import with_exits
from distill_llm.models.masks import masks_in
from distill_llm.models.quantized import load_teacher
from distill_llm.pipeline.prices import precision_of
from distill_llm.pipeline.result import taught_by
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.peers import PrunePeer, folder_of, scored_peers, untrained_peers
from distill_llm.pipeline.stages.teacher import Teacher as TeacherStage
from distill_llm.pipeline.teaching import WEIGHTS, learnt, loader, served_teacher, several, trusted
from distill_llm.pipeline.train_model import Fields, More, remove_checkpoints, train_model
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.report import taught_words
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.checkpoints import StagedTeacher
from distill_llm.teachers.cross_tokenizer import CrossTokenizerTeacher
from distill_llm.teachers.ensemble import Ensemble
from distill_llm.teachers.moving_average import MovingAverage
from distill_llm.teachers.peers import Peers
from distill_llm.training.augmented import shown


class Recover(Stage):
    """Leaves `round-N/student`, in fp32; one that was quantized, in the precision of the training.

    The last round trains with the fields of `final`.
    """

    together = True
    trained = True

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is a distillation section."""
        return recipe.distillation is not None

    @property
    def name(self) -> str:
        """`round-1/recover`."""
        return f"round-{self.round}/recover"

    @property
    def start(self) -> Stage:
        """The stage that left the student that it begins with."""
        return self.student

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, the student as it is, and what others teach with: peers, the round before, learnt weights."""
        peers = [stage for stage in self.earlier if isinstance(stage, PrunePeer)]
        before = [stage for stage in self.earlier if self.assistant is not None and stage.model == self.assistant]
        return self.teacher, self.start, *peers, *before, *(stage for stage in self.earlier if stage.name == WEIGHTS)

    @property
    def peers(self) -> list[Path]:
        """The folders of students that learn together with this one."""
        section = self.run.recipe.teacher.peers
        return [folder_of(self.run, place) / "student" for place in range(len(section.others) if section else 0)]

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.run.recipe.seed

    @property
    def fields(self) -> Fields:
        """Which of the recipe's training fields hold."""
        rounds = self.run.recipe.pruning.rounds if self.run.recipe.pruning else 1
        return "final" if self.round == rounds else "recovery"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The recovered student, and its peers."""
        return self.model, *self.peers

    @property
    def model(self) -> Path:
        """The recovered student."""
        return self.run.folder / f"round-{self.round}" / "student"

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Train and score."""
        run, teacher = self.run, self.teacher.model
        section = run.recipe.distillation
        assert section is not None and teacher is not None
        losses = section.losses if self.fields == "final" else without_exit_loss(section.losses)
        trained = train_model(  # no name here holds the models, so that they go when it returns
            run,
            self._with_heads(self._student(teacher)),
            self.source(learnt(run, results)) if losses.needs_teacher else None,
            self.model,
            self.fields,
            losses.model_dump(mode="json", exclude_none=True),
            More(self.seed, self.peers, masks=masks_in(self._student_folder)),
        )
        taught = {"taught_by": taught_by(run.recipe, learnt(run, results))}
        result = {**run.scored(self.model, run.student_dtype), **trained, **taught}
        if run.recipe.teacher.tokenizer is not None:
            aligner = Aligner(run.tokenizer, run.opened.teacher.tokenizer)
            result["aligned"] = asdict(alignment_of(aligner, run.data.train[:ROWS]["input_ids"]))
        if self.peers and run.processes.is_main_process:
            result["peers"] = scored_peers(run, self.model, result["metrics"], self.peers)
        return result

    def _with_heads(self, student: PreTrainedModel) -> Any:
        """The student as it trains: in the last round with the exits that the recipe asks for, or with adapters."""
        exits = self.run.recipe.exits
        if exits is None or self.fields != "final":
            return with_adapters(self.run.recipe, student, self.seed)
        set_seed(self.seed)
        return with_exits(student, exits.after)

    def tidy(self) -> None:
        """Remove the checkpoints of the training."""
        remove_checkpoints(self.run, self.model)

    def line(self, result: Result) -> list[str]:
        """Its score, its teachers where there are several, and how much of the rows was changed."""
        changed = [shown(result["augmented"])] if "augmented" in result else []
        changed += [alignment_words(result["aligned"])] if "aligned" in result else []
        rows = (result.get("peers") or {"students": [None]})["students"][1:]
        peers = [f"{row['name']}: {self.run.named(row['metrics'])}" for row in rows]
        words = filter(None, [taught_words(result.get("taught_by") or taught_by(self.run.recipe))])
        return [self.run.named(result["metrics"]), *words, *peers, *changed]

    def row(self, result: Result) -> dict[str, Any]:
        """The metrics after recovery, and how much of the rows was changed."""
        changed = {name: result[name] for name in ("augmented", "peers", "aligned") if name in result}
        return {"score_recovered": result["score"], "recovered": result["metrics"], **changed}

    @property
    def _student_folder(self) -> Path | str | None:
        """Where the weights of the student are before it learns."""
        given = self.run.opened.student
        return given.path if given is not None else self.start.model

    def _student(self, teacher: Path | str) -> PreTrainedModel:
        """The pruned student of a folder, or the one that was given, with a head for the task."""
        recipe, opened, path = self.run.recipe, self.run.opened, self.start.model
        if recipe.student is not None and recipe.student.quantization is not None:
            base = opened.student.path if opened.student else path
            assert base is not None
            dtype = precision_of(recipe.training(self.fields)) or torch.float32
            return load_teacher(base, recipe.student.quantization, dtype, self.run.processes.device)
        if recipe.pruning is not None:
            assert path is not None
            return load_pretrained(path, dtype=torch.float32)
        assert opened.student is not None
        set_seed(self.seed)
        tuned = recipe.teacher.train is not None  # in this run, after the teacher was opened
        names = label_names(open_config(teacher, recipe.teacher.trust_remote_code) if tuned else opened.teacher.config)
        return load_for_task(opened.student.path, self.run.data.task, names, of_task=True, config=opened.student.config)

    def source(self, weights: Sequence[float] | None = None) -> PreTrainedModel | Teacher:
        """What the student learns from: the teacher, its cached outputs, several teachers, or another in its place.

        Args:
            weights: of several, where they were learnt.
        """
        run, path = self.run, self.teacher.model
        section = run.recipe.teacher
        if (average := section.moving_average) is not None:
            return MovingAverage(average.decay, average.warm_up)
        assert path is not None
        if section.peers is not None:
            return Peers(untrained_peers(run, path, self.seed), section.peers.average)
        if section.cache is not None:
            cache = check_cached_weights(run.opened)
            assert cache is not None
            return cache
        if section.server is not None:
            return served_teacher(run)
        if section.ensemble is not None and self.assistant is None:
            paths = [(path, section.trust_remote_code), *trusted(run.opened.others)]
            waiting = self.model.with_name(f"{self.model.name}-training")
            return several(section.ensemble, paths, self.in_memory, weights, waiting)
        if self.assistant is not None and section.assistant is not None and section.assistant.share == 1:
            return self.in_memory(self.assistant, False)
        first = self.in_memory(path, section.trust_remote_code)
        if section.tokenizer is not None:
            return CrossTokenizerTeacher(first, run.opened.teacher.tokenizer)
        if section.checkpoints is not None:
            return StagedTeacher(first, self._stages(path), section.trust_remote_code)
        return self._with_others(first)

    def _stages(self, path: Path | str) -> dict[int | float, Path | str]:
        """The folders of the teacher's checkpoints by when they begin to teach."""
        given = self.run.recipe.teacher.checkpoints
        if isinstance(given, dict):
            return dict(zip(given, (opened.path for opened in self.run.opened.stages), strict=True))
        assert isinstance(self.teacher, TeacherStage)
        folders = [*self.teacher.stages, path]
        return {number / len(folders): folder for number, folder in enumerate(folders)}

    def _with_others(self, first: PreTrainedModel) -> PreTrainedModel | Teacher:
        """The teacher, alone or together with others: those of the recipe, and the student of the round before."""
        section, before = self.run.recipe.teacher, self.assistant
        ensemble, asked = section.ensemble, section.assistant
        models = [first, *(self.in_memory(other.path, False) for other in self.run.opened.others)]
        weights = ensemble.weights if ensemble else [1.0]
        average = ensemble.average if ensemble else asked.average if asked else "probabilities"
        if before is not None and asked is not None:
            models.append(self.in_memory(before, False))
            weights = [(1 - asked.share) * weight / sum(weights) for weight in weights] + [asked.share]
        if len(models) == 1:
            return first
        return Ensemble(models, weights, average, ensemble is not None and ensemble.confidence)

    @property
    def assistant(self) -> Path | None:
        """The student of the round before, where it teaches too."""
        if self.run.recipe.teacher.assistant is None:
            return None
        found = [stage.model for stage in self.earlier if isinstance(stage, Recover) and stage.round == self.round - 1]
        return found[-1] if found else None

    def in_memory(self, path: Path | str, trusted: bool) -> PreTrainedModel:
        """A model that teaches, in the teacher's dtype or with quantized weights."""
        return loader(self.run, self.fields)(path, trusted)


def without_exit_loss(losses: Objective) -> Objective:
    """The objective of a round before the last: its student has no exits yet."""
    return losses.only([name for name in losses.terms() if name != "exits"])


def with_adapters(recipe: Recipe, student: PreTrainedModel, seed: int) -> Any:
    """The student, with adapters around it where the recipe trains only those."""
    fields = recipe.student.peft if recipe.student else None
    if fields is None:
        return student
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
    return get_peft_model(student, LoraConfig(**fields))
