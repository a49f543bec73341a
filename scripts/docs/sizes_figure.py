"""Draw docs/images/sizes.png: the score of a fine-tuned classifier after pruning to several sizes, without any training.

    python scripts/docs/sizes_figure.py --teacher TEACHER --task sst2 --data SST-2

The numbers are kept beside the picture, in sizes.json; `--draw` draws them again.
"""

import argparse
import json
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import AutoTokenizer

from distill_llm import collect_statistics, compare, load_pretrained, plan_pruning, prune, score
from distill_llm.data import DataSpec, collator, encode, load_task
from distill_llm.evaluation import evaluate_model

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHARES = (0.7, 0.5, 0.35, 0.25)
LINES = {
    "Fisher, compensated (the default)": ("fisher", True, "#1f7a8c", "o-"),
    "Fisher": ("fisher", False, "#e0a030", "D--"),
    "magnitude of the weights": ("magnitude", False, "#c8553d", "v--"),
}


def measure(teacher_name: str, spec: DataSpec, rows: int) -> dict[str, Any]:
    """The scores of all lines at all shares, and how much faster the compensated students are."""
    teacher, tokenizer = load_pretrained(teacher_name).eval(), AutoTokenizer.from_pretrained(teacher_name)
    data = encode(load_task(spec), tokenizer, max_length=128)
    pad = collator(data.task, tokenizer)
    dev = partial(evaluate_model, dataset=data.test, task=data.task, collator=pad, progress=False)
    chosen = data.train.select(range(rows))
    statistics = collect_statistics(
        teacher, [pad([chosen[i] for i in range(at, at + 32)]) for at in range(0, rows, 32)]
    )
    whole, found, speed = dev(teacher), {}, {}
    for name, (criterion, compensated, *_) in LINES.items():
        found[name] = {}
        for share in SHARES:
            plan = plan_pruning(teacher, score(statistics, criterion), keep=share)
            student = prune(teacher, plan, compensate=statistics if compensated else None)
            found[name][share] = dev(student)["score"]
            if compensated:
                result = compare(student, teacher, repeats=8)
                speed[share], device = result.speedup, result.model.device
            print(name, share, found[name][share], flush=True)
    return {
        "task": data.task.name,
        "metric": data.task.main_metric,
        "teacher": {name: whole[name] for name in ("score", "standard_error", "rows")},
        "scores": found,
        "speedup": speed,
        "calibration_rows": rows,
        "device": device,
        "date": str(date.today()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Score over the share of the layers' parameters that stays, the largest on the left."""
    teacher = record["teacher"]
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.subplots()
    low, high = (teacher["score"] + sign * teacher["standard_error"] for sign in (-1, 1))
    axes.axhspan(low, high, color="#2b2d33", alpha=0.08, linewidth=0)
    axes.axhline(teacher["score"], color="#2b2d33", linewidth=1, linestyle=(0, (5, 3)), label="whole model")
    for name, (*_, colour, style) in LINES.items():
        points = {float(share): value for share, value in record["scores"][name].items()}
        axes.plot(list(points), list(points.values()), style, color=colour, label=name, linewidth=1.8)
    shares = {float(share): value for share, value in record["speedup"].items()}
    axes.set_xticks([1.0, *shares], ["100%\n1.0x", *(f"{share:.0%}\n{value:.1f}x" for share, value in shares.items())])
    axes.set_xlim(1.02, min(shares) - 0.03)
    axes.set_xlabel("parameters of the layers that stay, and measured speed-up")
    axes.set_ylabel(f"{record['task']} {record['metric']}")
    axes.grid(axis="y", color="#e4e6ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--draw", action="store_true", help="draw sizes.json again")
    given = parser.parse_args()
    file = IMAGES / "sizes.json"
    if not given.draw:
        record = measure(given.teacher, DataSpec(given.task, given.data, train_examples=given.rows), given.rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")
    draw(json.loads(file.read_text()), IMAGES / "sizes.png")


if __name__ == "__main__":
    main()
