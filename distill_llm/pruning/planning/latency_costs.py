"""What units cost in time on this device: single layers are timed at several sizes, and straight lines fitted to the times."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.lineage import Counts
from distill_llm.common.files import written_whole
from distill_llm.measuring.clocks import Clock, on_device
from distill_llm.measuring.profiling import device_name
from distill_llm.pruning.planning.budgets import inner_kinds
from distill_llm.pruning.planning.layer_times import largest_layer, layer_times, timed_kinds
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of, head_size_of, hidden_size


def latency_costs(
    model: PreTrainedModel,
    batch_size: int = 32,
    sequence_length: int = 64,
    *,
    clock: Clock | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Costs:
    """How many milliseconds a unit of each kind (query head, group, neuron) and the rest of a layer take on the model's device.

    The model's largest layer is timed alone, cut to several numbers of each kind of unit, at the full and at half the width of
    the residual stream, each in turn with the whole layer. Costs are straight lines fitted to these
    times (least squares, none below zero). Real times rise in steps: `plan_for_latency` corrects for that.

    The times are kept in a file in the user's cache folder. They are not taken again for the same device, threads, precision,
    layer, batch, and versions of torch and transformers.

    Args:
        model: unchanged.
        batch_size, sequence_length: of the batch (B, T).
        clock: takes the times, in place of the device's own clock.
        cache_dir: where the times are kept; None: `distill_llm/latency` in the user's cache folder.

    Raises:
        InputError: a size below 1, or more tokens than the model has positions for.
    """
    counts, hidden = counts_of(model), hidden_size(model)
    folder = Path(cache_dir) if cache_dir is not None else _cache_folder()
    key = _key(model, batch_size, sequence_length)
    file = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    rows = _read(file, key)
    if rows is None:
        rows = layer_times(model, batch_size, sequence_length, clock or on_device(model.device))
        _write(file, {"key": key, "columns": _columns(), "rows": rows})
    return fit_costs(rows, counts[largest_layer(model)], hidden)


def fit_costs(rows: Sequence[Sequence[float]], counts: Counts, hidden: int) -> Costs:
    """Fit costs to the times of single layers.

    A unit's cost may grow with the width of the residual stream, at most in proportion to it, and never shrinks with it:
    noise in the times must not make a unit cheaper in a wider stream, or cheaper than nothing in a narrow one.

    Args:
        rows: (hidden, units of each of `timed_kinds`, milliseconds) of each layer.
        counts: units of the whole layer.
        hidden: channels of the residual stream that costs are given for.
    """
    # Where a unit holds one of another kind only (a group its query), the two cannot be told apart: the outer has the whole cost.
    kinds, inner, found = timed_kinds(), inner_kinds(), {}
    apart = [float(kind not in inner or counts[kind] > counts[inner[kind]]) for kind in kinds]
    for width in sorted({int(row[0]) for row in rows}):
        table = np.array([row for row in rows if int(row[0]) == width], dtype=float)
        units, times = table[:, 1:-1] * apart, table[:, -1]
        found[width] = nnls(np.hstack([units, np.ones((len(table), 1))]), times)[0]
    narrow, wide = found[min(found)], found[max(found)]
    pairs = []
    for low, high in zip(narrow, wide, strict=True):
        slope = (high - low) / (max(found) - min(found)) if len(found) > 1 else 0.0
        slope = min(max(slope, 0.0), high / max(found))
        pairs.append((float(slope), float(high - slope * max(found))))
    return Costs("latency", hidden, dict(zip(kinds, pairs, strict=False)), rest=pairs[-1])


def costs_for(student: PreTrainedModel, costs: Costs) -> Costs:
    """What units of a student cost, given the costs of the model that it was pruned from."""
    return replace(costs, hidden=hidden_size(student))


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


def _columns() -> list[str]:
    """The names of the numbers in a row of times."""
    return ["hidden", *timed_kinds(), "milliseconds"]


def _read(file: Path, key: dict[str, Any]) -> list[list[float]] | None:
    try:
        record = json.loads(file.read_text())
        return record["rows"] if record["key"] == key and len(record["columns"]) == len(_columns()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, record: dict[str, Any]) -> None:
    """Keep the times if the folder can be written; otherwise the next run takes them again."""
    with suppress(OSError), written_whole(file) as path:
        path.write_text(json.dumps(record) + "\n")
