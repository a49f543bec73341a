"""The criteria: what each reads of the statistics, and the score that it makes of them.

A criterion is a decorated function. The decorator registers it, and recipes, checks and messages know it by its name from then
on. docs/development/add-a-criterion.md shows how to add one. This file must not import torch: recipes are checked without it.

With a the input of the attention-output or FFN-down linear, g the loss's gradient there, and sums over a unit's channels, the
fields of `UnitStatistics` hold what the formulas below name. For layers, a is what the layer adds to its input and g the
gradient at its output; no weights of its own read it, so wanda is activation there. For channels of the residual stream, a is
what linears read of it, summed over these tensors within an example (see `channel_readers`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from distill_llm.common.errors import InputError, one_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from distill_llm.pruning.statistics.record import Statistics, UnitStatistics

Need = Literal["activations", "gradients", "weight_gradients", "refit", "leave_one_out"]
NEEDS: tuple[Need, ...] = get_args(Need)


@dataclass(frozen=True)
class Criterion:
    """A criterion and what is known of it before any model is loaded.

    Attributes:
        name: what `criterion` is set to.
        scores: the decorated function.
        needs: what the statistics must hold: activations (of calibration data), gradients (a loss), weight_gradients (with
            respect to the weights, too), refit (`refit_costs` has completed them), leave_one_out (`leave_one_out` has). Empty:
            the weights alone.
        comparable: whether scores of different kinds of units may be ranked together.
        by_cost: whether units that compete are ranked by score per cost; otherwise by the score itself.
        units: the kinds of units that it scores; empty: all.
        layers_only: whether it ranks whole layers and no other unit.
        paper: where it comes from.
    """

    name: str
    scores: Callable[..., "Tensor"]
    needs: frozenset[Need]
    comparable: bool = False
    by_cost: bool = True
    units: frozenset[str] = frozenset()
    layers_only: bool = False
    paper: str = ""

    @property
    def reads_loss(self) -> bool:
        """Whether it depends on the calibration loss."""
        return not self.needs.isdisjoint({"gradients", "leave_one_out"})


@dataclass(frozen=True)
class Seen:
    """The calibration data that statistics are sums over.

    Attributes:
        examples, tokens: how many there were, padding left out; 1 of none, so that a sum can be divided by them.
        generator: random numbers that follow the seed of `score`.
    """

    examples: int
    tokens: int
    generator: "Generator"


LEARNED = ("l0", "movement")
"""What names the scores of masks that were learnt (see `pruning.learning`): every kind of unit is ranked together."""
CRITERIA: dict[str, Criterion] = {}
"""Every criterion by its name, in the order in which they were registered."""

Function = TypeVar("Function", bound="Callable[..., Tensor]")


def criterion(
    name: str,
    *,
    needs: Collection[Need] = (),
    comparable: bool = False,
    by_cost: bool = True,
    units: Collection[str] = (),
    layers_only: bool = False,
    paper: str = "",
) -> Callable[[Function], Function]:
    """Register a criterion.

    A score says how much is lost when the unit is removed; the lowest go first. The function takes `(units, seen)`, a
    `UnitStatistics` of U units and a `Seen`, and returns their scores (U,). It is called once for every kind of unit and,
    where a kind has units in every layer, once for every layer. With `layers_only` it takes the `Statistics` and returns a
    score for each layer (L,).

    Args:
        name: what `criterion` will be set to.
        needs: see `Criterion`.
        comparable: say so where the scores of a head, a neuron and a channel are in the same unit and may be ranked together.
        by_cost: False where a score says already how dear the unit is for its size, such as a mean over its channels.
        units: the kinds of units that it scores, where these are not all.
        layers_only: for a criterion of whole layers.
        paper: author, year, section or equation.

    Raises:
        ValueError: a name that is taken, or needs that are unknown or no list.
    """
    if isinstance(needs, str):
        raise ValueError(f"criterion {name!r}: needs is a list: needs=[{needs!r}]")
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"criterion {name!r}: unknown needs {sorted(unknown)}; the needs are {', '.join(NEEDS)}")

    def register(function: Function) -> Function:
        if name in CRITERIA:
            raise ValueError(f"criterion {name!r} exists already: choose another name")
        kinds = frozenset(units)
        CRITERIA[name] = Criterion(name, function, frozenset(needs), comparable, by_cost, kinds, layers_only, paper)
        return function

    return register


def find_criterion(name: str, field: str = "criterion") -> Criterion:
    """The criterion of this name.

    Raises:
        InputError: there is none; the message suggests the nearest name.
    """
    if name not in CRITERIA:
        raise InputError(field, name, one_of(CRITERIA, name))
    return CRITERIA[name]


def is_comparable(name: str) -> bool:
    """Whether scores of different kinds of units may be ranked together; False for an unknown criterion."""
    return name in LEARNED or (name in CRITERIA and CRITERIA[name].comparable)


def ranks_layers_only(name: str) -> bool:
    """Whether a criterion ranks whole layers and no other unit; False for an unknown one."""
    return name in CRITERIA and CRITERIA[name].layers_only


@criterion("random")
def random(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Uniform in [0, 1), from the seed: what every other criterion must beat."""
    return units.magnitude.new_empty(len(units.magnitude)).uniform_(generator=seen.generator)


@criterion("magnitude", paper="Li et al. 2017, section 3.1")
def magnitude(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """L2 norm of the weights that make and use the unit."""
    return units.magnitude.sqrt()


@criterion("magnitude_l1", paper="Li et al. 2017, section 3.1")
def magnitude_l1(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """L1 norm of the weights that make and use the unit."""
    return units.magnitude_l1


@criterion("taylor", needs=["gradients"], paper="Molchanov et al. 2019, equation 8")
def taylor(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Mean over examples of |sum over tokens of a g|: the gradient of a mask on the unit (Michel et al. 2019, equation 2)."""
    return units.taylor / seen.examples


@criterion("fisher", needs=["gradients"], comparable=True, paper="Kwon et al. 2022, section 4.1")
def fisher(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Mean over examples of (sum over tokens of a g)^2: of every kind of unit it is in the same unit, squared loss."""
    return units.fisher / seen.examples


@criterion("activation", needs=["activations"], paper="Muralidharan et al. 2024, section 2.2")
def activation(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Root mean square of a over tokens."""
    return (units.activation / seen.tokens).sqrt()


@criterion("wanda", needs=["activations"], paper="Sun et al. 2024, section 3, summed over the weights of the unit")
def wanda(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Root mean square of a channel of a times the L1 norm of the weights that read it."""
    return units.wanda / seen.tokens**0.5


@criterion(
    "flap",
    needs=["activations"],
    comparable=True,
    by_cost=False,
    units=["heads", "neurons"],
    paper="An et al. 2024 (FLAP): standardised over each layer's channels and averaged over a unit's",
)
def flap(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """How much a channel of a varies, times the squared norm of the weights that read it, against the layer's other channels."""
    return units.fluctuation


@criterion(
    "gisp",
    needs=["gradients", "weight_gradients"],
    comparable=True,
    paper="Wang et al. 2025: |weight x mean gradient|, summed over the weights of the unit",
)
def gisp(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Sum over a unit's weights of |w times the mean over examples of the loss's gradient|."""
    return units.weight_taylor / seen.examples


@criterion(
    "obs",
    needs=["refit"],
    units=["heads", "neurons", "queries"],
    paper="Hassibi and Stork 1993; for heads and FFN channels of LLMs SlimGPT, Ling et al. 2024",
)
def obs(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Squared error per token of what the layer adds once the other units have taken over what they can of the unit."""
    return units.refit


@criterion(
    "fisher_obs",
    needs=["gradients", "refit"],
    comparable=True,
    units=["heads", "neurons", "queries"],
    paper="fisher times the share of the unit that others cannot take over",
)
def fisher_obs(units: "UnitStatistics", seen: Seen) -> "Tensor":
    """Of fisher, the share that is left once the other units have taken over what they can: refit / removal."""
    tiny = 1e-30  # columns of zeros
    return units.fisher / seen.examples * (units.refit / units.removal.clamp(min=tiny))


@criterion("block_influence", needs=["activations"], layers_only=True, paper="Men et al. 2024, equation 1")
def block_influence(statistics: "Statistics") -> "Tensor":
    """1 - mean cosine of a layer's input and output."""
    return 1 - statistics.similarity / max(statistics.tokens, 1)


@criterion("leave_one_out", needs=["leave_one_out"], layers_only=True, paper="Kim et al. 2024, section 3.2")
def leave_one_out(statistics: "Statistics") -> "Tensor":
    """The loss without the layer less the loss with it (see `leave_one_out` of pruning/statistics)."""
    assert statistics.without is not None
    return statistics.without
