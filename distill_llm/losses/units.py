"""What an output of a model is about, and what losses are averaged over."""

from typing import Literal

Kind = Literal["example", "token", "next_token"]
Unit = Literal["labels", "examples", "tokens"]
UNITS: tuple[Unit, ...] = ("labels", "examples", "tokens")

OUTPUT_UNITS: dict[Kind, Unit] = {"example": "examples", "token": "tokens", "next_token": "labels"}
"""By what an output is about: what the outputs that two models are compared at are counted in."""
