"""Evolution over plans: seeded, never worse than the plan that it starts from, and continued from a file after a stop."""

import hashlib
import json
import statistics
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from random import Random
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.progress import progress_bar
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.searching.shares import Genome, Space

Fitness = Callable[[PruningPlan], float]
"""What a plan costs in quality; less is better."""
TRIES = 20
"""How often a child that was tried already is made anew."""


@dataclass(frozen=True)
class SearchSettings:
    """How long evolution goes on.

    Attributes:
        generations: how often children are made.
        population: how many plans live at a time, and how many children a generation makes.
        seed: of every choice at random.

    Raises:
        InputError: no generation, or fewer than two plans.
    """

    generations: int = 10
    population: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise InputError("generations", self.generations, "at least 1")
        if self.population < 2:
            raise InputError("population", self.population, "at least 2")


@dataclass(frozen=True)
class Searched:
    """The result of a search.

    Attributes:
        plan: the best plan.
        plain: the fitness of the plan that the search began with.
        best: that of the best one, at most `plain`.
        history: of the first plans and of every generation, the best and the median fitness of those that live; the median of
            finite ones, where there are any.
        tried: how many plans were tried.
    """

    plan: PruningPlan
    plain: float
    best: float
    history: tuple[tuple[float, float], ...]
    tried: int

    def record(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
        plain, best = (_finite(each) for each in (self.plain, self.best))
        return {
            "plain": plain,
            "best": best,
            "history": [[*map(_finite, row)] for row in self.history],
            "tried": self.tried,
        }


class Known:
    """The fitness of every plan that was tried, kept in a file: with the seed, that is the whole state of a search.

    Plans are told apart by the units that stay, so that other scores or another budget change nothing of what is known.

    Args:
        file: where it is kept; None: in memory alone.
        identity: what else fitness depends on; the file of another one is begun anew.
    """

    def __init__(self, file: Path | None, identity: Mapping[str, Any]):
        self.file, self.identity = file, json.loads(json.dumps(identity))
        self.fitness: dict[str, float] = {}
        if file is not None and file.is_file():
            try:
                record = json.loads(file.read_text())
                if record["identity"] == self.identity:
                    self.fitness = {str(key): float(value) for key, value in record["fitness"].items()}
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                pass  # damaged: begun anew

    def of(self, genome: Genome, plan: PruningPlan, measure: Fitness) -> float:
        """The fitness of a plan with these numbers, measured if it is not known."""
        units = json.dumps([[row.source, dict(row.units)] for row in plan.layers], sort_keys=True)
        key = f"{json.dumps(genome)} {hashlib.blake2b(units.encode(), digest_size=8).hexdigest()}"
        if key not in self.fitness:
            found = measure(plan)
            self.fitness[key] = found if isfinite(found) else inf
            if self.file is not None:
                with written_whole(self.file) as path:
                    path.write_text(json.dumps({"identity": self.identity, "fitness": self.fitness}) + "\n")
        return self.fitness[key]


def evolve(
    space: Space,
    plain: PruningPlan,
    keep: float,
    fitness: Fitness,
    settings: SearchSettings | None = None,
    known: Known | None = None,
    progress: bool = False,
) -> Searched:
    """Search for the plan of the least fitness.

    The first plans are `plain` and random changes of it. In every generation each child is a change of one plan, or of a
    mixture of two; parents are the better ones of two that are drawn. Of parents and children the best live on.

    Args:
        space: what plans may be tried.
        plain: the plan to begin with, within the budget; it is tried as it is.
        keep: the share of the cost that was asked for, for the plan's note.
        fitness: what is minimised; a number that is not finite is worse than any other.
        settings: how long, and the seed.
        known: the fitness of plans that were tried before a stop; a search that goes on ends with the same plan.

    Raises:
        InputError: `plain` is above the budget.
    """
    settings, known = settings or SearchSettings(), known or Known(None, {})
    first = space.of_plan(plain)
    seen: dict[Genome, float] = {}
    if not space.fits(first):
        raise InputError(
            "plan", f"a cost of {space.cost(first):.6g}", f"a plan within the budget of {space.budget:.6g}"
        )

    def plan_of(genome: Genome) -> PruningPlan:
        return plain if genome == first else space.plan(genome, keep)

    def rated(genome: Genome) -> tuple[float, Genome]:
        if genome not in seen:
            seen[genome] = known.of(genome, plan_of(genome), fitness)
        return seen[genome], genome

    random = Random(f"{settings.seed}")
    living = [rated(first)]
    for _ in range(settings.population - 1):
        living.append(rated(_unseen(seen, lambda: space.mutated(first, random, random.randint(1, len(first))))))
    living = _best(living, settings.population)
    history = [_row(living)]
    for number in progress_bar(range(settings.generations), desc="Searching", leave=False, shown=progress):
        random = Random(f"{settings.seed} {number}")
        make = partial(_child, space, living, seen, random)
        living = _best(
            [*living, *(rated(_unseen(seen, make)) for _ in range(settings.population))], settings.population
        )
        history.append(_row(living))
    best, genome = living[0]
    plan = plan_of(genome) if best < seen[first] else plain
    return Searched(plan, seen[first], best, tuple(history), len(seen))


def _unseen(seen: Container[Genome], make: Callable[[], Genome]) -> Genome:
    """What `make` gives, asked again where that was tried already."""
    for _ in range(TRIES):
        if (genome := make()) not in seen:
            break
    return genome


def _child(space: Space, parents: list[tuple[float, Genome]], seen: Container[Genome], random: Random) -> Genome:
    """A change of one plan, or of a mixture of two; a mixture that is new may stay as it is."""
    one, other = (min(random.choices(parents, k=2), key=_order)[1] for _ in range(2))
    mixed = space.crossed(one, other, random) if random.random() < 0.5 else one
    whole = mixed not in seen and random.random() < 0.5
    return mixed if whole else space.mutated(mixed, random, random.randint(1, 3))


def _order(rated: tuple[float, Genome]) -> tuple[float, str]:
    return rated[0], json.dumps(rated[1])


def _best(rated: list[tuple[float, Genome]], count: int) -> list[tuple[float, Genome]]:
    """The best of them, each once."""
    return sorted(dict.fromkeys(rated), key=_order)[:count]


def _row(living: list[tuple[float, Genome]]) -> tuple[float, float]:
    finite = [fitness for fitness, _ in living if isfinite(fitness)]
    return living[0][0], statistics.median(finite) if finite else inf


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
