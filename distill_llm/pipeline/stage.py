"""What a stage of a run is: its inputs, its outputs, what makes it stale, and its work."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distill_llm.common.errors import InputError
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.pipeline.context import Context

Result = Mapping[str, Any]
"""What state.json keeps of a finished stage: plain JSON, and the `seconds` that it took."""


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a run. A subclass says what it does; docs/development/add-a-stage.md shows one.

    Attributes:
        run: what all stages of the run share.
        earlier: the stages before this one, in order.
        round: the round that it belongs to, from 1; 0 for a stage outside the rounds.
    """

    run: "Context"
    earlier: tuple["Stage", ...] = ()
    round: int = 0

    together: ClassVar[bool] = False
    """Whether all processes do the work together, and process 0's result counts; otherwise process 0 works alone."""
    trained: ClassVar[bool] = False
    """Whether training made its model: where that is damaged, the user decides what is done."""
    sections: ClassVar[tuple[str, ...]] = ()
    """Sections of the recipe that this stage alone reads. They may change between two starts of a run."""

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Whether a recipe asks for this stage."""
        return True

    @property
    @abstractmethod
    def name(self) -> str:
        """Its key in state.json, and the first word of its line on the screen."""

    @property
    def inputs(self) -> tuple["Stage", ...]:
        """The earlier stages whose results or files it reads. When one of them is done anew, so is this stage."""
        return ()

    @property
    def reads(self) -> tuple["Stage", ...]:
        """The inputs whose files it reads; of the others it reads results alone. They are looked at before the work."""
        return self.inputs

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files and folders that it leaves in the run folder, each written whole."""
        return ()

    @property
    def model(self) -> Path | str | None:
        """The folder of the student after this stage (after the first one: the teacher's); None: it makes no student."""
        return None

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """The part of a resolved recipe that makes this stage stale when it changes between two starts.

        Only what may change then matters: the evaluation, and sections that some stage names as its own (`sections`). A run
        refuses every other change.
        """
        return None

    @abstractmethod
    def work(self, results: Mapping[str, Result]) -> dict[str, Any] | None:
        """Do the work and return the result, plain JSON.

        Args:
            results: of the finished stages, by name.
        """

    def tidy(self) -> None:  # noqa: B027 - most stages have nothing to remove
        """Called after the result is in state.json: remove what was needed only to go on after a stop."""

    def line(self, result: Result) -> list[str] | None:
        """What the user is told of the result; None: nothing."""
        return [result["summary"]] if "summary" in result else []

    def row(self, result: Result) -> dict[str, Any]:
        """Its part of the round's entry in metrics.json, without the seconds."""
        return {}

    @property
    def kind(self) -> str:
        """The name within a round: `prune` for `round-2/prune`."""
        return self.name.rpartition("/")[2]

    @property
    def teacher(self) -> "Stage":
        """The stage that leaves the teacher: the first with a model."""
        return next(self._models(self.earlier))

    @property
    def student(self) -> "Stage":
        """The stage that leaves the student as it is before this one: the last with a model."""
        return next(self._models(reversed(self.earlier)))

    @staticmethod
    def _models(stages: Any) -> Iterator["Stage"]:
        return (stage for stage in stages if stage.model is not None)


def stale(
    stages: Sequence[Stage], done: Collection[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> set[str]:
    """Names of finished stages that must be done anew: the recipe changed for them, or an input of theirs is not done.

    Args:
        stages: of the recipe as it is now.
        done: names of finished stages, also of those that this recipe no longer has.
        before, now: the resolved recipes.

    Raises:
        InputError: the identity of a stage reads a field that recipes do not have.
    """
    fresh: set[str] = set()
    for stage in stages:
        same = _identity(stage, before) == _identity(stage, now)
        if stage.name in done and same and all(each.name in fresh for each in stage.inputs):
            fresh.add(stage.name)
    gone = set(done) - {stage.name for stage in stages}
    found = set(done) - fresh - gone
    # Nothing tells what those that are gone were made from: a push to another repository was of the report before.
    return found | gone if found else found


def _identity(stage: Stage, recipe: Mapping[str, Any]) -> Any:
    try:
        return stage.identity(recipe)
    except (KeyError, TypeError) as error:
        fix = "let its identity read fields that every recipe has: this one does not have it"
        raise InputError(f"stage {stage.name}", str(error), fix=fix) from error
