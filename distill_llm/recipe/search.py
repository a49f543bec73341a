"""The section `pruning.search`: evolution over how much each layer keeps."""

from pydantic import Field

from distill_llm.recipe.section import Section


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
