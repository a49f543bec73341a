"""What a model costs on this device: parameters, FLOPs, memory and latency, for one model or two side by side.

Everything is measured on one forward pass of a batch of full-length token ids (no padding), in eval mode, in the
model's own dtype and on the device it is on. A pruned model needs nothing special: what is not executed is not counted.
"""

import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.clocks import WARM_UP, in_turns, seconds
from distill_llm.measuring.counting import (
    at_least_one,
    count_flops,
    count_params,
    full_length_inputs,
    peak_memory,
    weights_memory,
)
from distill_llm.measuring.images import image_tokens
from distill_llm.models.exported import ExportedNetwork
from distill_llm.models.masks import SHOWN, sparsity_of

MEGABYTE = 10**6


@dataclass(frozen=True)
class Profile:
    """The costs of one model on one device. What an exported model does not tell is None.

    Attributes:
        params: number of parameters, each shared tensor once.
        layer_params: number of parameters inside the transformer layers (embeddings, pooler and task head left out).
        flops: floating point operations of one forward pass of the whole batch (see `count_flops`).
        weights_mb: parameters and buffers, in MB (10^6 bytes).
        peak_memory_mb: the most memory held at once by weights and activations during the forward pass, in MB.
        latency_ms: median time of one forward pass of the batch, in milliseconds.
        latency_spread_ms: 10th and 90th percentile of the same times, in milliseconds.
        batch_size: B, sequences in the batch.
        sequence_length: T, tokens in each sequence.
        device: name of the processor, with the number of threads where it is a CPU.
        dtype: dtype of the weights, e.g. `float32`; of an exported model that of most, and the program that ran it.
        sparsity: the share of the weights of the layers' linears that are zero.
    """

    params: int | None
    layer_params: int | None
    flops: int | None
    weights_mb: float
    peak_memory_mb: float | None
    latency_ms: float
    latency_spread_ms: tuple[float, float]
    batch_size: int
    sequence_length: int
    device: str
    dtype: str
    sparsity: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models measured in turn in one run.

    Attributes:
        model: the model in question, e.g. the student.
        other: what it is held against, e.g. the teacher.
        speedup: median over the pairs of (latency of `other` / latency of `model`); above 1 `model` is the faster one.
        speedup_min: the smallest of these ratios.
        speedup_max: the largest of these ratios.
    """

    model: Profile
    other: Profile
    speedup: float
    speedup_min: float
    speedup_max: float


def profile(model: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64, *, repeats: int = 20) -> Profile:
    """Measure a model where it is.

    Args:
        model: any transformers text model; its mode and weights are left as they were.
        batch_size: B, sequences in the batch.
        sequence_length: T, tokens in each sequence.
        repeats: timed forward passes, after three that are not timed.

    Raises:
        InputError: a size below 1, or more tokens than the model has positions for.
    """
    inputs = full_length_inputs(model, batch_size, sequence_length)
    at_least_one("repeats", repeats)
    timer = _timer(model, inputs)
    with evaluating(model):
        times = [timer() for _ in range(WARM_UP + repeats)][WARM_UP:]
    return _profile(model, inputs, times)


def compare(
    model: PreTrainedModel,
    other: PreTrainedModel,
    batch_size: int = 32,
    sequence_length: int = 64,
    *,
    repeats: int = 20,
) -> Comparison:
    """Measure two models in one run, taking turns, so that a slow moment of the machine hits both.

    Each repeat times both models, the one to go first changing every time, and gives one ratio; the speed-up is the
    median of these paired ratios. See `profile` for the arguments and errors.
    """
    inputs = [full_length_inputs(each, batch_size, sequence_length) for each in (model, other)]
    at_least_one("repeats", repeats)
    timers = _timer(model, inputs[0]), _timer(other, inputs[1])
    with evaluating(model), evaluating(other):
        in_turns(*timers, WARM_UP)
        pairs = in_turns(*timers, repeats)
    ratios = [theirs / ours for ours, theirs in pairs]
    return Comparison(
        model=_profile(model, inputs[0], [ours for ours, _ in pairs]),
        other=_profile(other, inputs[1], [theirs for _, theirs in pairs]),
        speedup=statistics.median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
    )


def device_name(device: torch.device | str) -> str:
    """The processor's own name, e.g. `NVIDIA H100 80GB HBM3`, or `AMD EPYC 7B13, 2 threads` for a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type.upper()} ({_processor()})"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def profile_table(result: Profile | Comparison, names: tuple[str, str] = ("model", "other")) -> Table:
    """A table for the terminal: one column for a `Profile`; two for a `Comparison`, with ratios `model` / `other`.

    Args:
        result: what `profile` or `compare` returned.
        names: headings of the columns, in the order of the fields of `Comparison`.
    """
    model, other = (result.model, result.other) if isinstance(result, Comparison) else (result, None)
    title = f"{model.device}, batch {model.batch_size} x {model.sequence_length} tokens"
    if other is not None and other.device != model.device:
        title += f" (against {other.device})"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names if other else names[:1]:
        table.add_column(name, justify="right")
    if other:
        table.add_column("ratio", justify="right")
    table.add_row("dtype of the weights", model.dtype, *([other.dtype, ""] if other else []))
    mine, theirs = _cells(model), _cells(other) if other else {}
    for row, (value, text) in mine.items():
        whole, shown = theirs.get(row, (None, ""))
        ratio = f"{value / whole:.3f}" if value is not None and whole else "–"
        table.add_row(row, text, *([shown, ratio] if other else []))
    zeros = [each.sparsity or 0.0 for each in (model, other) if each is not None]
    if max(zeros) >= SHOWN:
        table.add_row("zero weights of the linears", *(f"{share:.1%}" for share in zeros), *([""] if other else []))
    if isinstance(result, Comparison):
        spread = f"({result.speedup_min:.2f}–{result.speedup_max:.2f})"
        table.add_row("speed-up, paired", f"{result.speedup:.2f}x {spread}", "1.00x", "")
    return table


def _cells(profile: Profile) -> dict[str, tuple[float | None, str]]:
    low, high = profile.latency_spread_ms
    giga = None if profile.flops is None else profile.flops / 1e9
    cells: dict[str, tuple[float | None, str]] = {
        "parameters": (profile.params, "{:,}"),
        "in the layers": (profile.layer_params, "{:,}"),
        "FLOPs of a forward": (giga, "{:,.3f} G"),
        "memory of the weights": (profile.weights_mb, "{:,.1f} MB"),
        "peak memory": (profile.peak_memory_mb, "{:,.1f} MB"),
        "latency, median (p10–p90)": (profile.latency_ms, f"{{:,.2f}} ms ({low:,.2f}–{high:,.2f})"),
    }
    return {row: (value, "not known" if value is None else text.format(value)) for row, (value, text) in cells.items()}


def _profile(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], times: list[float]) -> Profile:
    low, high = np.percentile(times, (10, 90))
    if "pixel_values" in inputs:
        batch_size, sequence_length = len(inputs["pixel_values"]), image_tokens(model) or 1
    else:
        batch_size, *_, sequence_length = inputs["input_ids"].shape  # multiple choice has choices between
    if isinstance(model, ExportedNetwork):
        graph, params, layer_params, flops, peak = model.weights, None, None, None, None
        weights, dtype, zeros = graph.total(), f"{graph.most_common(1)[0][0]}, in onnxruntime", None
    else:
        params, layer_params = count_params(model)
        flops, peak = (measure(model, batch_size, sequence_length) for measure in (count_flops, peak_memory))
        weights, dtype, zeros = weights_memory(model), str(model.dtype).removeprefix("torch."), sparsity_of(model)
    return Profile(
        params=params,
        layer_params=layer_params,
        flops=flops,
        weights_mb=weights / MEGABYTE,
        peak_memory_mb=None if peak is None else peak / MEGABYTE,
        latency_ms=1e3 * statistics.median(times),
        latency_spread_ms=(1e3 * float(low), 1e3 * float(high)),
        batch_size=batch_size,
        sequence_length=sequence_length,
        device=device_name(model.device),
        dtype=dtype,
        sparsity=zeros,
    )


def _timer(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Callable[[], float]:
    """Times one forward pass."""
    return lambda: seconds(lambda: model(**inputs), model.device)


def _processor() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
