"""Names of models and data as others may see them, and what a model's own card says: licence, base model, data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from distill_llm.common.errors import InputError
from distill_llm.data.sources import resolve_path

CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of a model's card that also hold for a student made of it."""


@dataclass(frozen=True)
class Origin:
    """What is known of a student's first weights: their model on the Hub, its data there, and fields to carry over."""

    base_model: str | list[str] | None = None
    datasets: tuple[str, ...] = ()
    carried: Mapping[str, Any] = field(default_factory=dict)


def origin_of(model: str) -> Origin:
    """What a model's card says, in its folder or on the Hub; as much as can be had without an error.

    A model on the Hub is the base model itself. Of a model in a folder it is the one that its card names, if it does.
    """
    there = on_the_hub(model)
    said = _card_of(model, there)
    named = said.get("base_model")
    known = [name for name in ([named] if isinstance(named, str) else named or []) if on_the_hub(str(name))]
    datasets = said.get("datasets") or ()
    return Origin(
        base_model=model if there else (known[0] if len(known) == 1 else known or None),
        datasets=tuple(name for name in ([datasets] if isinstance(datasets, str) else datasets) if on_the_hub(name)),
        carried={name: said[name] for name in CARRIED if said.get(name)}
        | _link(model, there, said.get("license_link")),
    )


def _link(model: str, on_hub: bool, link: str | None) -> dict[str, str | None]:
    """The link to a licence. One to a file beside the model is made whole, or left out: the student has no such file."""
    if not link or "://" in link:
        return {}
    return {"license_link": hf_hub_url(model, link) if on_hub else None}


def _card_of(model: str, on_hub: bool) -> dict[str, Any]:
    """The metadata of a model's card; empty without one."""
    try:
        path = Path(resolve_path(model)) / "README.md"
        if not on_hub and not path.is_file():
            return {}
        return ModelCard.load(model if on_hub else path, ignore_metadata_errors=True).data.to_dict()
    except InputError:
        return {}
    except (
        Exception
    ):  # a missing card, no network, a card that nobody can read: no reason to end a run that has trained
        return {}


def on_the_hub(model: str) -> bool:
    """Whether a name is one of the Hub, by its form; no question is asked."""
    if "://" in model or model.startswith(("/", ".", "~")) or Path(model).exists():
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def shown_name(name: str) -> str:
    """The name of a model or data set. Of a local path only the last part: the rest means nothing on other machines."""
    known = "://" in name or on_the_hub(name.partition(":")[0])  # after a colon comes the data set's configuration
    return name if known else name.rstrip("/").rsplit("/", 1)[-1]
