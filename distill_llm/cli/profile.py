"""`distill-llm profile`: what models cost on this device."""

from inspect import signature
from typing import Annotated, Any

import typer

from distill_llm.cli.options import ModelName, TrustCode, as_options
from distill_llm.cli.output import load_model, say

EXAMPLE = "Example: distill-llm profile runs/quickstart/student --against runs/quickstart/teacher"


def profile(
    model: ModelName,
    against: Annotated[str | None, typer.Option(help="A second model to compare with; the two take turns.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples in the batch.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=1, help="Number of tokens in each example.")] = 64,
    trust_remote_code: TrustCode = False,
) -> None:
    """Show parameters, FLOPs, memory and latency on this device. Two models are shown side by side."""
    from distill_llm.checks.profile import open_profile
    from distill_llm.measuring import profiling

    names = {"model": model} | ({"against": against} if against is not None else {})
    with as_options(signature(profile).parameters, {"model": "MODEL"}):
        models = [load_model(each) for each in open_profile(names, sequence_length, trust_remote_code)]
        measure: Any = profiling.profile if against is None else profiling.compare
        result = measure(*models, batch_size, sequence_length)
    say(profiling.profile_table(result, (model, against or "")))
