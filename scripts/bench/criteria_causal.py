"""Criteria on a decoder without training: perplexity over the dense model's, with and without compensation.

One pass over the calibration rows serves all criteria of one cut; gisp has one of its own, with gradients of the weights. With
`gisp:8`, a cell is made in eight small cuts, with statistics of the same rows anew before each. Each cell is written to the
results as soon as it is there, and the same command again goes on with those that are missing.

    python scripts/bench/criteria_causal.py --model DIR --text FILE --results FILE.json   # DIR: made by scripts/data/smollm2.py
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from common import device_name
from recovery import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill_llm import CalibrationSettings, Statistics, collect_statistics, plan_pruning, prune, refit_costs, score
from distill_llm.common.precision import mixed_precision
from distill_llm.data.causal import CausalCollator
from distill_llm.evaluation.perplexity import causal_loss
from distill_llm.measuring.counting import count_params
from distill_llm.pruning.planning.small_cuts import cut_shares

CELLS = ("fisher", "flap", "gisp", "obs", "fisher_obs", "gisp:8")


class Trial:
    """A dense model, its rows, and the cells that are made of them."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.file = options, Path(options.results)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        with Path(options.text).open() as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, 1000)]
        self.precision = mixed_precision("auto", self.model.device)
        half, length = len(texts) // 2, options.length
        rows = rows_of(texts[:half], self.tokenizer, length, options.rows)
        self.unseen = self._batches(rows_of(texts[half:], self.tokenizer, length, options.evaluation_rows))
        self.batches = self._batches(rows)
        total, in_layers = count_params(self.model)
        self.keep = 1 - options.removed * total / in_layers
        self.result: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def _batches(self, rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        collate = CausalCollator(self.tokenizer)
        return [collate(rows[begin : begin + 4]) for begin in range(0, len(rows), 4)]

    def perplexity(self, model: PreTrainedModel) -> float:
        """Of the evaluation rows."""
        with torch.no_grad(), torch.autocast(model.device.type, self.precision, enabled=self.precision is not None):
            sums = torch.stack([torch.stack(causal_loss(model, batch)).sum(1) for batch in self.unseen]).sum(0)
        return float((sums[0] / sums[1]).exp())

    def statistics(self, model: PreTrainedModel, criterion: str) -> Statistics:
        """What a criterion needs; of the dense model once for all, kept beside the results."""
        with_weights = criterion == "gisp"
        kept = self.file.with_suffix(".gisp.safetensors" if with_weights else ".safetensors")
        if model is self.model and kept.exists():
            return Statistics.load(kept)
        settings = CalibrationSettings(
            hidden=False,
            moments=model is self.model and not with_weights,
            moment_share=1.0,
            weight_gradients=with_weights,
            precision=self.precision,
        )
        found = collect_statistics(model, self.batches, settings=settings)
        if model is self.model:
            found.save(kept)
        return found

    def completed(self, found: Statistics) -> Statistics:
        """Statistics with costs of removal after compensation; kept, too."""
        if not found.has_refit:
            found = refit_costs(self.model, found)
            found.save(self.file.with_suffix(".safetensors"))
        return found

    def cell(self, criterion: str, cuts: int, compensate: bool) -> dict[str, Any]:
        """A student's perplexity, and what it consists of."""
        student, left = self.model, 1.0
        for share in cut_shares(1.0, self.keep, cuts):
            found = self.statistics(student, criterion)
            found = self.completed(found) if "obs" in criterion else found
            plan = plan_pruning(student, score(found, criterion), share / left)
            student, left = prune(student, plan, self.statistics(self.model, "") if compensate else None), share
        value = self.perplexity(student)
        return {
            "perplexity": value,
            "over_dense": value / self.result["dense"],
            "params": count_params(student)[0],
            "heads": sum(len(row.heads) for row in plan.layers),
            "neurons": sum(len(row.neurons) for row in plan.layers),
        }

    def keep_result(self, name: str, value: Any) -> None:
        """Write the results with one more."""
        self.result[name] = value
        self.file.write_text(json.dumps(self.result, indent=1) + "\n")
        print(name, json.dumps(value), flush=True)

    def run(self) -> None:
        """Every cell that is not there yet."""
        if "dense" not in self.result:
            self.keep_result("machine", f"{device_name(self.model.device)}, torch {torch.__version__}")
            self.keep_result("dense", self.perplexity(self.model))
        for cell in self.options.cells:
            criterion, _, cuts = cell.partition(":")
            for compensate in (False, True) if not cuts else (False,):
                name = f"{cell}{', compensated' if compensate else ''}"
                if name not in self.result:
                    begin = time.monotonic()
                    found = self.cell(criterion, int(cuts or 1), compensate)
                    self.keep_result(name, {**found, "seconds": round(time.monotonic() - begin)})


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--results", required=True, help="JSON file that is written after each cell")
    parser.add_argument("--removed", type=float, default=0.2, help="share of all parameters")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--evaluation-rows", type=int, default=16)
    parser.add_argument("--cells", nargs="+", default=CELLS, help="criteria, with a number of cuts after a colon")
    transformers.logging.set_verbosity_error()
    Trial(parser.parse_args()).run()


if __name__ == "__main__":
    main()
