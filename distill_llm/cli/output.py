"""Printing, and loading models to this machine's device."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from distill_llm.cli.group import is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill_llm.models.finding import OpenModel


def say(what: Any) -> None:
    """Print a line or a table, from the first process."""
    if is_main_process():
        Console(soft_wrap=isinstance(what, str)).print(what, markup=False)


def say_loading(student: Path) -> None:
    """Print how a finished student is loaded."""
    from distill_llm.report.usage import loading

    if is_main_process():
        say(f"loads as {loading(student)}")


def quiet_weights() -> None:
    """Hide the progress bars of loading and saving weights; training keeps its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_model(opened: "OpenModel") -> "PreTrainedModel":
    """A model with its weights on the accelerator, or on the CPU if there is none; an exported one in onnxruntime.

    Raises:
        InputError: naming the field that the model was given by.
    """
    import torch

    from distill_llm.common.errors import InputError
    from distill_llm.models.checkpoint import load_pretrained
    from distill_llm.models.exported import load_export

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator is not None else "cpu"
    try:
        if opened.exported:
            return load_export(opened.path)
        return load_pretrained(opened.path, opened.trust_remote_code).to(device)  # type: ignore[arg-type]
    except InputError as error:
        raise error.renamed(opened.field) from None
