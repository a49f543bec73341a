"""What a recipe asks to export, checked before the student is made."""

from distill_llm.common.errors import InputError, raise_all
from distill_llm.export import find_format
from distill_llm.models.finding import OpenModel
from distill_llm.recipe.recipe import Recipe


def check_export(recipe: Recipe, model: OpenModel) -> None:
    """Check that the formats exist, are installed, and can say the model that the student is made from.

    Raises:
        InputError: one line per fault.
    """
    faults, seen = [], set()
    for index, section in enumerate(recipe.export):
        field = f"export.{index}"
        try:
            kind, chosen = find_format(section.format, section.quantize)
            kind.check(model.config, model.tokenizer)
        except InputError as error:
            named = field if error.field in ("model_dir", "tokenizer") else f"{field}.{error.field}"
            faults.append(error.renamed(named))
            continue
        if (section.format, chosen) in seen:
            faults.append(InputError(field, f"{section.format}, {chosen}", fix="remove it: it is there twice"))
        seen.add((section.format, chosen))
    raise_all(faults)
