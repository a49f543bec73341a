"""Pruning alone, no training: the score of a fine-tuned teacher after removing heads and neurons.

One pass over the calibration rows serves the whole table: every criterion, scope and budget, with and without compensation.
`--split validation` scores on held-out training rows, which choices are made on; the default is the reported split.

    python scripts/bench/pruning.py --teacher runs/bench/sst2-0-half/teacher --task sst2 --data GLUE/SST-2
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from accuracy import TASKS
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from distill_llm import collect_statistics, load_pretrained, plan_pruning, prune, score
from distill_llm.data import DataSpec, collator, encode, load_task
from distill_llm.data.padding import LENGTH
from distill_llm.evaluation import evaluate_model
from distill_llm.measuring.counting import count_params
from distill_llm.measuring.profiling import device_name

CASES = [
    ("fisher", "global"),
    ("fisher", "local"),
    ("taylor", "global"),
    ("taylor", "local"),
    ("wanda", "global"),
    ("activation", "global"),
    ("magnitude", "global"),
    ("magnitude_l1", "global"),
    ("random", "global"),
]


@dataclass(frozen=True)
class Subject:
    """A teacher, the rows it is calibrated on, and how its students are scored.

    Attributes:
        model: fine-tuned, in evaluation mode.
        batches: of 32 calibration rows each, of like length.
        dev: a model's main score on the split that was asked for.
    """

    model: PreTrainedModel
    batches: list[dict[str, torch.Tensor]]
    dev: Callable[[Any], float]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options of the benchmarks that score pruned teachers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a model fine-tuned on the task")
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--data", required=True, help="folder with train.tsv and dev.tsv, or a Hub id")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--calibration", type=int, default=1024, help="training rows")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    return parser


def subject(args: argparse.Namespace) -> Subject:
    """The teacher and rows that the options name. The same rows are held out as in accuracy.py."""
    model, tokenizer = load_pretrained(args.teacher).eval(), AutoTokenizer.from_pretrained(args.teacher)
    task = load_task(DataSpec(args.task, args.data, holdout_examples=TASKS[args.task]["holdout_examples"]))
    data = encode(task, tokenizer, 128)
    pad, split = collator(data.task, tokenizer), getattr(data, args.split)
    rows = data.train.shuffle(seed=0).select(range(args.calibration)).sort(LENGTH).to_list()
    batches = [pad(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    return Subject(model, batches, lambda of: evaluate_model(of, split, data.task, pad, progress=False)["score"])


def print_record(benchmark: str, args: argparse.Namespace, **results: Any) -> None:
    """Print the JSON line, for machines."""
    record = {"benchmark": benchmark, "task": args.task, "split": args.split, "calibration_examples": args.calibration}
    packages = ("torch", "transformers", "distill_llm")
    versions = {"versions": {name: version(name) for name in packages}}
    print(json.dumps({**record, **results, "date": date.today().isoformat(), "device": device_name("cpu"), **versions}))


def main() -> None:
    """Print the table and one JSON line."""
    args = arguments(__doc__).parse_args()
    given = subject(args)
    start = time.perf_counter()
    stats = collect_statistics(given.model, given.batches)
    seconds = round(time.perf_counter() - start, 2)
    dense = given.dev(given.model)
    table = Table(
        "criterion", "scope", *(f"{keep:.0%} kept" for keep in args.keep), title=f"{args.task}, dense {dense:.4f}"
    )
    result: dict[str, Any] = {}
    for criterion, scope in CASES:
        importance, cells = score(stats, criterion), []
        for keep in args.keep:
            plan = plan_pruning(given.model, importance, keep, scope=scope)
            student = prune(given.model, plan)
            plain, folded = given.dev(student), given.dev(prune(given.model, plan, compensate=stats))
            cells.append(f"{plain:.4f} -> {folded:.4f} ({plain / dense:.1%} -> {folded / dense:.1%})")
            found = {"plain": plain, "compensated": folded, "layer_params": count_params(student)[1]}
            result[f"{criterion}/{scope}/{keep}"] = found
        table.add_row(criterion, scope, *cells)
    Console(width=160).print(table)
    print_record("pruning", args, dense=dense, statistics_seconds=seconds, result=result)


if __name__ == "__main__":
    main()
