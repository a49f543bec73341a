"""What the command line's options hold beyond plain values, and faults of a recipe under the options' names."""

from collections.abc import Iterator
from contextlib import contextmanager

from distill_llm.common.errors import InputError, InputErrors, faults_in, one_of
from distill_llm.recipe.sections import ColumnsSection

OPTIONS = {
    "teacher.model": "MODEL",
    "data.path": "--data",
    "output_dir": "--output-dir",
    "evaluation.metric": "--metric",
    "evaluation.max_new_tokens": "--max-new-tokens",
    "student_dir": "DIR",
    "repo_id": "REPO_ID",
}
"""Options that are not called as their field is."""

AS_NAMED = {
    *(f"data.{name}" for name in ("task", "columns", "max_length")),
    *(
        f"pruning.{name}"
        for name in ("keep", "units", "criterion", "cost", "scope", "round_to", "uniform", "compensate")
    ),
    "pruning.calibration_examples",
}
"""Fields with an option of their name; others are given by `--set`."""


@contextmanager
def as_options(model: str = "MODEL") -> Iterator[None]:
    """Names the fields of faults as the command line does: `--keep` for `pruning.keep`.

    Args:
        model: the option that a fault of a model's weights is named after.
    """
    try:
        yield
    except InputError as error:
        raise InputErrors(fault.renamed(_option_name(fault.field, model)) for fault in faults_in(error)) from None


def _option_name(field: str, model: str) -> str:
    if field == "model":
        return model
    name = ".".join(field.split(".")[:2])  # data.columns.text: --columns
    return OPTIONS.get(name, "--" + name.partition(".")[2].replace("_", "-") if name in AS_NAMED else field)


def read_columns(text: str | None) -> dict[str, str] | None:
    """The mapping in `text=review,label=mood`; None for None.

    Raises:
        InputError: for a name that no column has, or a part that is no `NAME=COLUMN`.
    """
    if text is None:
        return None
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, _, column = (word.strip() for word in part.partition("="))
        if name not in ColumnsSection.model_fields:
            raise InputError("--columns", name, one_of(ColumnsSection.model_fields, name) + ", as NAME=COLUMN")
        if not column or name in columns:
            raise InputError("--columns", part.strip(), "NAME=COLUMN, each name once, such as text=review,label=mood")
        columns[name] = column
    return columns
