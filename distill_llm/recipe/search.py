"""The section `pruning.search`: evolution over how much each layer keeps."""

from typing import TYPE_CHECKING

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.pruning.planning.rules import search_faults
from distill_llm.recipe.section import Section

if TYPE_CHECKING:
    from distill_llm.recipe.pruning import PruningSection


class SearchSection(Section):
    """Search for a better plan of the same cost, from the plain one on, by what the cut model does on calibration rows."""

    generations: int = Field(default=10, ge=1, description="how often new plans are made of the best ones")
    population: int = Field(
        default=16, ge=2, description="how many plans live at a time; each generation tries as many new ones"
    )
    tokens: int = Field(
        default=4096,
        ge=1,
        description="calibration tokens, padding left out, on which a plan's divergence from the dense model is measured",
    )


def searching_faults(section: "PruningSection") -> list[InputError]:
    """Faults of a search for plans that has nothing to search, or would break what the section asks for."""
    if section.layers is not None or section.keep == 1:
        fix = (
            "leave it out: no unit is chosen" if section.layers is None else "leave it out: `layers` says what to keep"
        )
        return [InputError("search", section.search.model_dump() if section.search else None, fix=fix)]
    return search_faults(section.rules)
