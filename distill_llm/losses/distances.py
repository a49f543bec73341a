"""Distances that objectives can name: of hidden states, and of attention maps.

`@state_distance(name)` registers a function of (B, T, H) states of student and teacher that returns (B, T) in fp32,
`@map_distance(name)` one of (B, N, T, K) log-probabilities of student and teacher that returns (B, N, T).

torch is not imported here, since objectives are checked without it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BeforeValidator

from distill_llm.losses.registry import NameIn, refuse_taken

if TYPE_CHECKING:
    from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., "Tensor"])

STATE_DISTANCES: dict[str, Callable[["Tensor", "Tensor"], "Tensor"]] = {}
MAP_DISTANCES: dict[str, Callable[["Tensor", "Tensor"], "Tensor"]] = {}

StateDistance = Annotated[str, BeforeValidator(NameIn(STATE_DISTANCES))]
MapDistance = Annotated[str, BeforeValidator(NameIn(MAP_DISTANCES))]


def state_distance(name: str) -> Callable[[Function], Function]:
    """A decorator: the function becomes the distance of hidden states of this name.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Function) -> Function:
        refuse_taken(STATE_DISTANCES.get(name), function, f"state distance {name!r}")
        STATE_DISTANCES[name] = function
        return function

    return register


def map_distance(name: str) -> Callable[[Function], Function]:
    """A decorator: the function becomes the distance of attention maps of this name.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Function) -> Function:
        refuse_taken(MAP_DISTANCES.get(name), function, f"map distance {name!r}")
        MAP_DISTANCES[name] = function
        return function

    return register


@state_distance("mse")
def mse(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Mean over H of the squared difference (TinyBERT, Jiao et al., 2020, section 3.1)."""
    from distill_llm.losses.mean_square import mean_square

    return mean_square(student, teacher)


@state_distance("cosine")
def cosine(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """One minus the cosine of the angle (DistilBERT, Sanh et al., 2019, section 2)."""
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(student.float(), teacher.float(), dim=-1)


@state_distance("normalized_mse")
def normalized_mse(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Squared difference over the teacher's squared length: 1 is no better than zeros.

    Unlike `mse` it gives layers and tokens of any scale the same weight. Unlike `cosine`, and the distance of both states at
    unit length (PKD, Sun et al., 2019, section 3.2), it also asks for the teacher's length.
    """
    smallest = 2.0**-126  # the smallest normal number of fp32
    return mse(student, teacher) / teacher.float().square().mean(-1).clamp(min=smallest)


@map_distance("kl")
def kl_of_maps(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(teacher || student) over the keys (MiniLM, Wang et al., 2020, section 3.1)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@map_distance("mse")
def mse_of_maps(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Squared difference of the probabilities, summed over the keys."""
    return (teacher.exp() - student.exp()).square().sum(-1)
