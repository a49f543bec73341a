"""What is to be done about files of finished stages that are gone or damaged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_llm.pipeline.stage import Stage

_WORDS = {"gone": "gone", "changed": "damaged"}


@dataclass(frozen=True)
class Lost:
    """What became of the files of finished stages.

    Attributes:
        again: names of stages to be done again, since their files are gone or damaged and something needs them.
        faults: (file, what to do) where the user must decide.
        notes: a line for each file that is damaged, but that nothing needs, and for each stage that is done again.
    """

    again: frozenset[str] = frozenset()
    faults: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def lost(stages: Sequence[Stage], done: Collection[str], broken: Callable[[Stage], Mapping[str, str]]) -> Lost:
    """What must be made again of the files that finished stages left.

    A model is needed where a stage that is to be done reads it; other files always are. What is gone is made again, and so is
    what is damaged and took no training. A damaged model that was trained is the user's to decide about.

    Args:
        stages: of the recipe.
        done: names of finished stages.
        broken: the files of a finished stage that are `gone` or `changed`, by their names in the run folder.
    """
    todo = {stage.name for stage in stages if stage.name not in done}
    again: set[str] = set()
    faults: list[tuple[str, str]] = []
    notes: list[str] = []
    for stage in reversed(stages):
        if stage.name in todo or not (files := broken(stage)):
            continue
        name = next(iter(files))
        readers = [each.name for each in stages if each.name in todo and stage.name in [one.name for one in each.reads]]
        if stage.model is not None and not readers:
            notes += [
                f"note: {name} is damaged; this run does not need it" for name in files if files[name] == "changed"
            ]
        elif stage.trained and any(path.exists() for path in stage.outputs):
            folder = f"remove {Path(name).parent}/ of the run to have it trained again"
            faults.append((name, f"put it back, or {folder}: it is {_WORDS[files[name]]}, and {readers[0]} needs it"))
        else:
            again.add(stage.name)
            todo.add(stage.name)
            notes.append(f"{stage.name}: done again, since {name} is {_WORDS[files[name]]}")
    return Lost(frozenset(again), tuple(faults), tuple(reversed(notes)))
