"""Budgets in measured latency: what units cost on this device, and plans that meet a share of the whole model's time.

Measured is one forward pass over a batch of full-length sequences, of decoders the reading of the prompt (prefill). Generating
token by token is bound by reading weights and the cache of keys and values, and feels a removed head or neuron differently:
for that, `cost="memory"` is the nearer measure.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.lineage import Counts
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.measuring.clocks import Clock, Measure, on_device, relative_latency
from distill_llm.measuring.profiling import device_name
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.planning.layer_times import largest_layer, layer_times
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of, head_size_of, hidden_size

TOLERANCE = 0.03


def latency_costs(
    model: PreTrainedModel,
    batch_size: int = 32,
    sequence_length: int = 64,
    *,
    clock: Clock | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Costs:
    """Milliseconds that a query head, a group, a neuron and the rest of a layer take on the model's device.

    The model's largest layer is timed alone, cut to several numbers of heads, of queries of a group and of neurons, at the whole
    and at half the width of the residual stream, each in turn with the whole layer. Costs are the straight lines through these
    times (least squares, none below zero). Real times go in steps: `plan_for_latency` makes up for the difference.

    The times are kept in a file of the user's cache folder and not taken again for the same device, threads, precision, layer,
    batch and versions of torch and transformers.

    Args:
        model: unchanged.
        batch_size, sequence_length: of the batch (B, T).
        clock: takes the times, in place of this device's clock.
        cache_dir: where the times are kept; default: `distill_llm/latency` in the user's cache folder.

    Raises:
        InputError: a size below 1, or more tokens than the model has positions for.
    """
    folder = Path(cache_dir) if cache_dir is not None else _cache_folder()
    key = _key(model, batch_size, sequence_length)
    file = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    rows = _read(file, key)
    if rows is None:
        rows = layer_times(model, batch_size, sequence_length, clock or on_device(model.device))
        _write(file, {"key": key, "columns": ["hidden", "queries", "groups", "neurons", "milliseconds"], "rows": rows})
    return fit_costs(rows, counts_of(model)[largest_layer(model)], hidden_size(model))


def fit_costs(rows: Sequence[Sequence[float]], counts: Counts, hidden: int) -> Costs:
    """The costs that are nearest to (hidden, queries, groups, neurons, milliseconds) of single layers.

    Args:
        counts: of the whole layer.
        hidden: channels of the residual stream that costs are given for.
    """
    shared = counts["queries"] // counts["heads"] if counts["heads"] else 1
    found = {}
    for width in sorted({int(row[0]) for row in rows}):
        table = np.array([row for row in rows if int(row[0]) == width], dtype=float)
        queries, groups, neurons, times = table[:, 1:].T
        # Without groups of several queries the two go together: the group has it all.
        columns = [queries * (shared > 1), groups, neurons, np.ones(len(table))]
        found[width] = nnls(np.stack(columns, 1), times)[0]
    narrow, wide = found[min(found)], found[max(found)]
    pairs = []
    for low, high in zip(narrow, wide, strict=True):
        slope = (high - low) / (max(found) - min(found)) if len(found) > 1 else 0.0
        slope = min(max(slope, 0.0), high / max(found))
        pairs.append((float(slope), float(high - slope * max(found))))
    query, group, neuron, rest = pairs
    return Costs("latency", hidden, shared, query, group, neuron, rest)


def costs_for(student: PreTrainedModel, costs: Costs) -> Costs:
    """The costs of a model, for one that was pruned from it."""
    shared = next((each["queries"] // each["heads"] for each in counts_of(student) if each["heads"]), costs.shared)
    return replace(costs, hidden=hidden_size(student), shared=shared)


def plan_for_latency(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    *,
    dense: PreTrainedModel | None = None,
    batch_size: int = 32,
    sequence_length: int = 64,
    costs: Costs | None = None,
    measure: Measure | None = None,
    tolerance: float = TOLERANCE,
    attempts: int = 10,
    **options: Any,
) -> PruningPlan:
    """Choose what stays so that `keep` of the whole model's measured latency remains, within `tolerance` of it.

    Plans with the costs of single layers, prunes, measures the pruned model in turn with the dense one, and corrects the budget
    of the layers (the line through the nearest measurements above and below) until the measured share is the one asked for.

    Args:
        model: what is pruned.
        scores: from `score(...)`, for this very model.
        keep: share of the latency of `dense`, embeddings and head with it, in (0, 1].
        dense: what the latency is a share of; default: `model` itself.
        batch_size, sequence_length: of the batch that is timed.
        costs: from `latency_costs`; measured where left out.
        measure: takes the place of `relative_latency`.
        tolerance: as a share of `keep`.
        attempts: most pruned models that are measured.
        options: of `plan_pruning`, all but `cost`.

    Returns:
        The plan; `kept` is the measured share, `note` says why it is not the one asked for.

    Raises:
        InputError: as `plan_pruning`, or a `keep` that these units cannot reach.
    """
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a share above 0 and at most 1")
    dense = model if dense is None else dense
    costs = latency_costs(dense, batch_size, sequence_length) if costs is None else costs
    costs = costs_for(model, costs)
    measure = measure or (lambda pruned, other: relative_latency(pruned, other, batch_size, sequence_length))
    first = _Tried(1.0, 1.0 if dense is model else measure(model, dense), full_plan(model))
    tried, above, below = [first], first, None
    share, low, reachable = keep, 0.0, True
    reason = "the model is faster already" if first.latency <= keep else f"not met in {attempts} measurements"
    while len(tried) <= attempts and first.latency > keep and not _met(tried, keep, tolerance):
        if above.share - low < 1e-3 * above.share:
            reason = "these units come in larger steps"
            break
        try:
            plan = plan_for_costs(model, scores, share, costs, **options)
        except InputError as error:
            if error.field != "keep":
                raise
            low, share, reachable = share, (share + above.share) / 2, False
            continue
        if below is not None and _same(plan, below.plan):
            low, share = share, (share + above.share) / 2
            continue
        latest = _Tried(plan.kept or share, measure(prune(model, plan), dense), plan)
        tried.append(latest)
        if latest.latency > keep:
            above = latest
        else:
            below, low = latest, latest.share
        share = _next(keep, first, above, below, low)
    best = min(tried, key=lambda each: abs(each.latency - keep))
    missed = not _met(tried, keep, tolerance)
    if missed and below is None and not reachable:
        accepted = f"at least {best.latency:.4f} of the latency, what these units can leave"
        raise InputError("keep", keep, accepted)
    note = f"kept {best.latency:.4f} of the latency where {keep} was asked for: {reason}" if missed else None
    return replace(best.plan, kept=best.latency, note=note)


@dataclass(frozen=True)
class _Tried:
    """The share of the layers' latency that a plan keeps by its costs, and the share of the whole that was measured."""

    share: float
    latency: float
    plan: PruningPlan


def _met(tried: Sequence[_Tried], keep: float, tolerance: float) -> bool:
    return any(abs(each.latency - keep) <= tolerance * keep for each in tried)


def _same(plan: PruningPlan, other: PruningPlan) -> bool:
    return (plan.layers, plan.whole) == (other.layers, other.whole)


def _next(keep: float, first: _Tried, above: _Tried, below: _Tried | None, low: float) -> float:
    """Where the line through two measurements meets `keep`, well inside of what is known."""
    other = below or (first if above is not first else None)
    slope = (above.latency - other.latency) / (above.share - other.share) if other else 0.0
    if slope <= 0:  # nothing to draw a line through, or the clock's scatter
        return (low + above.share) / 2
    inside = 0.1 * (above.share - low)
    return min(max(above.share - (above.latency - keep) / slope, low + inside), above.share - inside)


# The file of times.


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill_llm" / "latency"


def _key(model: PreTrainedModel, batch_size: int, sequence_length: int) -> dict[str, Any]:
    """What the times depend on."""
    layer = layers_of(model)[largest_layer(model)]
    return {
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "model_type": model.config.model_type,
        "head_size": head_size_of(model),
        "layer": {name: list(parameter.shape) for name, parameter in layer.named_parameters()},
        "batch": [batch_size, sequence_length],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _read(file: Path, key: dict[str, Any]) -> list[list[float]] | None:
    try:
        record = json.loads(file.read_text())
        return record["rows"] if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, record: dict[str, Any]) -> None:
    """Whole or not at all; a folder that cannot be written costs the next run its time."""
    with suppress(OSError), written_whole(file) as path:
        path.write_text(json.dumps(record) + "\n")
