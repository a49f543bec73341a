"""Size, score and latency of a student under each scheme of `quantize`, beside the student itself.

    python scripts/bench/quantization.py runs/quickstart/student --task embedded --max-length 64 --test-examples 500

Prints a line of JSON for each scheme, then the table of docs/methods/quantization.md.
"""

import argparse
import json
import tempfile
from pathlib import Path

from distill_llm.checks.quantize import open_quantizing
from distill_llm.data.spec import DataSpec
from distill_llm.pipeline.quantizing import Batch, quantize_model
from distill_llm.quantizing.scheme import Scheme
from distill_llm.report.tables import markdown_table


def schemes(group: int) -> list[Scheme]:
    """What is compared."""
    return [
        Scheme(8),
        Scheme(8, group_size=group),
        Scheme(8, symmetric=False),
        Scheme(8, activations=True),
        Scheme(8, activations=True, smooth=0.5),
        Scheme(4),
        Scheme(4, group_size=group),
        Scheme(4, symmetric=False, group_size=group),
        Scheme(4, activations=True, group_size=group),
    ]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--test-examples", type=int)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs=2, default=(32, 32), metavar=("EXAMPLES", "TOKENS"))
    given = parser.parse_args()
    spec = DataSpec(given.task, given.data, max_length=given.max_length, test_examples=given.test_examples)
    rows: list[list[str]] = []
    for scheme in schemes(given.group_size):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "quantized"
            opened = open_quantizing(str(given.student), scheme, spec, output)
            done = quantize_model(opened, scheme, output, batch=Batch(*given.batch))
        assert done.scores is not None
        before, after = done.costs.other, done.costs.model
        found = {
            "scheme": scheme.words,
            "score": [each["score"] for each in done.scores],
            "megabytes": done.megabytes,
            "weights_mb": [before.weights_mb, after.weights_mb],
            "latency_ms": [before.latency_ms, after.latency_ms],
            "speedup": [done.costs.speedup, done.costs.speedup_min, done.costs.speedup_max],
            "device": after.device,
        }
        print(json.dumps(found), flush=True)
        low, high = done.costs.speedup_min, done.costs.speedup_max
        sizes = [f"{done.megabytes[1]:.1f} MB", f"{after.weights_mb:.1f} MB"]
        speed = f"{done.costs.speedup:.2f} ({low:.2f}–{high:.2f})"
        if not rows:
            rows.append(
                [
                    "not rounded",
                    f"{found['score'][0]:.4f}",
                    f"{done.megabytes[0]:.1f} MB",
                    f"{before.weights_mb:.1f} MB",
                    "1",
                ]
            )
        rows.append([scheme.words, f"{found['score'][1]:.4f}", *sizes, speed])
    print(markdown_table(["", "score", "on disk", "in memory", "times as fast"], rows))


if __name__ == "__main__":
    main()
