"""Plain removal, compensation of one fixed strength, and of the strength that held-out calibration rows choose.

For every draw of calibration rows, scope and budget: one plan, three students, no training. The scores are of
rows that neither the teacher nor calibration has seen: those held out of the training data, and the test split. `error` is the
standard error of the difference between the chosen student and the plain one, by bootstrap over the scored rows.

    python scripts/bench/compensation.py --teacher TEACHER --task sst2 --data GLUE/SST-2 --train-examples 8000 --holdout 2000
"""

import argparse
import itertools
import json
import time
from datetime import date
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from distill_llm import (
    PruningPlan,
    Statistics,
    choose_strength,
    collect_statistics,
    load_pretrained,
    plan_pruning,
    prune,
    score,
)
from distill_llm.data import DataSpec, collator, encode, load_task
from distill_llm.data.padding import LENGTH
from distill_llm.evaluation import compute_metrics, predict
from distill_llm.measuring.profiling import device_name

PACKAGES = ("torch", "transformers", "distill_llm")
RESAMPLES, FIXED = 300, 0.1


class Subject:
    """A teacher, the rows that calibration draws from, and the rows that students are scored on."""

    def __init__(self, args: argparse.Namespace):
        self.model: PreTrainedModel = load_pretrained(args.teacher).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        spec = DataSpec(
            args.task, args.data, train_examples=args.train_examples, holdout_examples=args.holdout, max_length=128
        )
        data = encode(load_task(spec), tokenizer, spec.max_length)
        unseen = datasets.concatenate_datasets([split for split in (data.validation, data.test) if split])
        self.unseen = unseen.shuffle(seed=0).select(range(min(args.rows, len(unseen))))
        self.task, self.train, self.collate = data.task, data.train, collator(data.task, tokenizer)

    def batches(self, rows: datasets.Dataset) -> list[dict[str, Any]]:
        """Batches of 32 rows of like length."""
        found = rows.sort(LENGTH).to_list()
        return [self.collate(found[i : i + 32]) for i in range(0, len(found), 32)]

    def answers(self, model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
        """A model's predictions of the unseen rows, and the references."""
        return predict(model, self.unseen, self.task, self.collate, progress=False)

    def score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        """The task's main metric."""
        return compute_metrics(self.task, predictions, references)["score"]

    def compare(self, plan: PruningPlan, statistics: Statistics, chosen: float | None) -> dict[str, Any]:
        """The scores of plain removal, of the fixed strength and of the chosen one; and the error of the difference."""
        found = {}
        for ridge in {None, FIXED, chosen}:
            found[ridge], references = self.answers(prune(self.model, plan, statistics, ridge=ridge))
        scores = {ridge: self.score(answers, references) for ridge, answers in found.items()}
        record = {"plain": scores[None], "fixed": scores[FIXED], "chosen": scores[chosen]}
        return record | {"error": self.error(found[chosen], found[None], references), "scored_rows": len(references)}

    def error(self, one: np.ndarray, other: np.ndarray, references: np.ndarray) -> float:
        """The standard error of the difference between two models' scores."""
        draws = np.random.default_rng(0).integers(len(references), size=(RESAMPLES, len(references)))
        return float(np.std([self.score(one[i], references[i]) - self.score(other[i], references[i]) for i in draws]))


def main() -> None:
    """A JSON line for each draw and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a model fine-tuned on the task")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", help="folder or Hub id of the task's data")
    parser.add_argument("--train-examples", type=int, help="how many training rows the teacher had")
    parser.add_argument("--holdout", type=int, default=0, help="how many training rows it was not given")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--scope", nargs="+", choices=("global", "local"), default=["global"])
    parser.add_argument("--calibration", type=int, default=1024, help="rows; a quarter as many more are held out")
    parser.add_argument("--rows", type=int, default=3000, help="rows to score, at most")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    datasets.disable_progress_bars()
    given = Subject(args)
    model = given.model
    dense = given.score(*given.answers(model))
    for draw in args.draws:
        rows = given.train.shuffle(seed=draw)
        size = min(args.calibration, len(rows) * 4 // 5)
        fitted, held_out = rows.select(range(size)), rows.select(range(size, size + size // 4))
        statistics = collect_statistics(model, given.batches(fitted))
        for scope, keep in itertools.product(args.scope, args.keep):
            plan = plan_pruning(model, score(statistics, "fisher"), keep, scope=scope)
            start = time.perf_counter()
            strength = choose_strength(model, plan, statistics, given.batches(held_out))
            seconds = round(time.perf_counter() - start, 1)
            record = {"benchmark": "compensation", "task": args.task, "draw": draw, "scope": scope, "keep": keep}
            record |= {"dense": dense, **given.compare(plan, statistics, strength.ridge), **strength.record()}
            record |= {"fitted_rows": size, "choice_seconds": seconds, "date": date.today().isoformat()}
            record |= {"device": device_name("cpu"), "versions": {name: version(name) for name in PACKAGES}}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
