"""Pruning alone, no training: the development score of a fine-tuned teacher after removing heads and neurons.

One pass over the calibration rows serves the whole table: every criterion, scope and budget, with and without compensation.
`--split validation` scores on held-out training rows, on which choices were made; the default is the reported split.

    python scripts/bench/pruning.py --teacher runs/bench/sst2-0-half/teacher --task sst2 --data ../shared/data/glue/SST-2
"""

import argparse
import json
import time
from datetime import date
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from distill_llm import collect_statistics, load_pretrained, plan_pruning, prune, score
from distill_llm.data import collator, encode, load_task
from distill_llm.data.encoding import LENGTH
from distill_llm.evaluation import evaluate_model
from distill_llm.profiling import device_name

CASES = [
    ("fisher", "global"),
    ("fisher", "local"),
    ("taylor", "global"),
    ("taylor", "local"),
    ("activation", "global"),
    ("magnitude", "global"),
    ("random", "global"),
]


def main() -> None:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a model fine-tuned on the task")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--holdout", type=int, default=2000)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    args = parser.parse_args()

    model, tokenizer = load_pretrained(args.teacher).eval(), AutoTokenizer.from_pretrained(args.teacher)
    data = encode(load_task(args.task, args.data, holdout_examples=args.holdout), tokenizer, 128)
    pad, split = collator(data.task, tokenizer), getattr(data, args.split)

    def dev(of: Any) -> float:
        return evaluate_model(of, split, data.task, pad, progress=False)["score"]

    rows = data.train.shuffle(seed=0).select(range(args.calibration)).sort(LENGTH).to_list()
    batches = [pad(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    start = time.perf_counter()
    stats = collect_statistics(model, batches)
    seconds = time.perf_counter() - start
    dense = dev(model)
    table = Table(
        "criterion", "scope", *(f"{keep:.0%} kept" for keep in args.keep), title=f"{args.task}, dense {dense:.4f}"
    )
    result: dict[str, Any] = {}
    for criterion, scope in CASES:
        importance, cells = score(stats, criterion), []
        for keep in args.keep:
            plan = plan_pruning(model, importance, keep, scope=scope)
            plain, folded = dev(prune(model, plan)), dev(prune(model, plan, compensate=stats))
            cells.append(f"{plain:.4f} -> {folded:.4f} ({plain / dense:.1%} -> {folded / dense:.1%})")
            result[f"{criterion}/{scope}/{keep}"] = {"plain": plain, "compensated": folded, "kept": plan.kept}
        table.add_row(criterion, scope, *cells)
    Console(width=160).print(table)
    print(
        json.dumps(
            {
                "benchmark": "pruning",
                "task": args.task,
                "split": args.split,
                "dense": dense,
                "calibration_examples": args.calibration,
                "statistics_seconds": round(seconds, 2),
                "result": result,
                "date": date.today().isoformat(),
                "device": device_name("cpu"),
                "versions": {name: version(name) for name in ("torch", "transformers", "distill_llm")},
            }
        )
    )


if __name__ == "__main__":
    main()
