"""The stages of a run, one to a file: a new one is a file here and a row below (docs/development/add-a-stage.md)."""

from distill_llm.common.errors import InputError
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.stage import Stage
from distill_llm.pipeline.stages.benchmarks import TeacherBenchmarks
from distill_llm.pipeline.stages.ensemble import EnsembleWeights
from distill_llm.pipeline.stages.exits import Exits
from distill_llm.pipeline.stages.export import Export
from distill_llm.pipeline.stages.generations import Generation, Generations
from distill_llm.pipeline.stages.masks import LearnMasks
from distill_llm.pipeline.stages.peers import PrunePeer
from distill_llm.pipeline.stages.prune import Prune
from distill_llm.pipeline.stages.push import Push
from distill_llm.pipeline.stages.quantize import Quantize, QuantizeTraining
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.pipeline.stages.report import Report
from distill_llm.pipeline.stages.synthetic import Synthetic
from distill_llm.pipeline.stages.teacher import Teacher

FIRST: list[type[Stage]] = [Synthetic, Teacher, TeacherBenchmarks, EnsembleWeights]
EACH_ROUND: list[type[Stage]] = [LearnMasks, Prune, PrunePeer, Recover]
LAST: list[type[Stage]] = [QuantizeTraining, Quantize, Exits, Report, Export, Push]


def stages_of(run: Context) -> list[Stage]:
    """The stages that a run's recipe asks for, in order.

    Raises:
        InputError: two of them have one name, which `state.json` keeps results under.
    """
    rounds = run.recipe.pruning.rounds if run.recipe.pruning else 1
    section = run.recipe.distillation.generations if run.recipe.distillation else None
    again: list[type[Stage]] = [] if section is None else [*[Generation] * (section.count - 1), Generations]
    rows = [(kind, 0) for kind in FIRST]
    peers = len(run.recipe.teacher.peers.cut) if run.recipe.teacher.peers else 0
    times: dict[type[Stage], int] = {PrunePeer: peers}
    rows += [(kind, n) for n in range(1, rounds + 1) for kind in EACH_ROUND for _ in range(times.get(kind, 1))]
    rows += [(kind, rounds) for kind in again]
    rows += [(kind, 0) for kind in LAST]
    stages: list[Stage] = []
    for kind, number in rows:
        if kind.wanted(run.recipe):
            stage = kind(run, tuple(stages), number)
            if stage.name in [each.name for each in stages]:
                fix = "give each stage a name of its own: state.json keeps results by name"
                raise InputError("stage", stage.name, fix=fix)
            stages.append(stage)
    return stages


def own_sections() -> list[str]:
    """Sections of a recipe that a stage alone reads, so that they may change once a run has begun."""
    return list(dict.fromkeys(section for kind in (*FIRST, *EACH_ROUND, *LAST) for section in kind.sections))
