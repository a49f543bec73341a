"""How small or fast a student shall be, as the fields of a pruning section."""

import re
from dataclasses import dataclass
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.drafting.model import ModelFacts
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
LEAST = 0.02
"""The smallest share that a target may come to: below it no layers are left."""


@dataclass(frozen=True)
class Target:
    """One of these, or none.

    Attributes:
        keep: share of the layers' parameters.
        speedup: how many times as fast, on this device.
        memory: as `8GB`: of all weights and, of a decoder, its KV cache for the timed batch.
    """

    keep: float | None = None
    speedup: float | None = None
    memory: str | None = None


def cut_for(target: Target, model: ModelFacts, length: int) -> tuple[dict[str, Any], str]:
    """`keep`, with `cost` where it is not that of parameters; and a line that says so.

    Args:
        length: tokens of a row of the timed batch.

    Raises:
        InputError: several targets, or one that cannot be reached.
    """
    given = {name: value for name, value in vars(target).items() if value is not None}
    if len(given) > 1:
        names = " and ".join(f"--{name}" for name in given)
        raise InputError(next(iter(given)), next(iter(given.values())), fix=f"give only one of {names}")
    if target.speedup is not None:
        if not 1 < target.speedup <= 1 / LEAST:
            raise InputError(
                "speedup", target.speedup, f"a number above 1 and at most {1 / LEAST:.0f}: 2 is twice as fast"
            )
        keep = round(1 / target.speedup, 4)
        return {
            "keep": keep,
            "cost": "latency",
        }, f"{target.speedup:g} times as fast on this device: {keep:.0%} of the time"
    if target.memory is not None:
        return _within(target.memory, model, length)
    keep = target.keep if target.keep is not None else 0.75 if model.writes else 0.5
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a number above 0 and at most 1: 0.5 keeps half")
    chosen = "" if target.keep is not None else ", the usual first try; --speedup, --memory or --keep say otherwise"
    return {"keep": keep}, f"{keep:.0%} of the layers' parameters stay{chosen}"


def _within(text: str, model: ModelFacts, length: int) -> tuple[dict[str, Any], str]:
    """The share of the layers' memory that is left when all else of the model has its own."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise InputError("memory", text, "a number with MB or GB, for example 8GB")
    wanted = float(found[1]) * UNITS[found[2].upper()]
    bare = model.bare.to(model.opened.config.dtype) if model.opened.config.dtype else model.bare  # type: ignore[arg-type]
    counts, batch = counts_of(bare), (timed_batch(model, length)[0] if model.writes else 0, length)
    layers = unit_costs(bare, "memory", *batch).of(counts)
    weights = sum(each.numel() * each.element_size() for each in bare.parameters())
    rest = weights - unit_costs(bare, "params").of(counts) * bare.dtype.itemsize
    whole = rest + layers
    keep = (wanted - rest) / layers
    if keep >= 1:
        raise InputError("memory", text, fix=f"ask for less: the model takes {whole / 1e9:.3g} GB as it is")
    if keep <= LEAST:
        fix = f"ask for more than {(rest + LEAST * layers) / 1e9:.3g} GB: what is outside the layers takes {rest / 1e9:.3g}"
        raise InputError("memory", text, fix=fix)
    keep = int(keep * 1000) / 1000
    said = f"{text} of the {whole / 1e9:.3g} GB of weights{' and KV cache' if model.writes else ''}"
    return {"keep": keep, "cost": "memory"}, f"{said}: {keep:.1%} of the layers' memory stays"


def timed_batch(model: ModelFacts, length: int) -> tuple[int, int]:
    """Rows and tokens of the batch that is timed: a writer answers one user, a classifier works on many rows."""
    return (1, min(length, 512)) if model.writes else (32, min(length, 128))
