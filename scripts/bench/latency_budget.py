"""Budgets in measured latency: the share that `plan_for_latency` promises against a new measurement, and speed-ups against FLOPs.

For every target share: plan with the teacher's Fisher scores, prune, and time the student and the teacher again in turns; the
error is the measured share against the target. Then a student at half of the layers' parameters: its speed-up over the ratio of
FLOPs, whole models with embeddings and head. A time is one forward pass of a full-length batch.

    python scripts/bench/latency_budget.py --teacher TEACHER --data SST-2
"""

import time

import common
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from distill_llm import (
    CalibrationSettings,
    LatencySettings,
    collect_statistics,
    compare,
    latency_costs,
    plan_for_latency,
    plan_pruning,
    prune,
    score,
)

Row = dict[str, float | str | None]


def budget_row(
    teacher: PreTrainedModel, student: PreTrainedModel, target: float | None, batch: tuple[int, int], repeats: int
) -> Row:
    """A new measurement of a student against its teacher."""
    found = compare(student, teacher, *batch, repeats=repeats)
    share, flops = 1 / found.speedup, found.other.flops / found.model.flops
    return {
        "target": target,
        "share": round(share, 4),
        "share_min": round(1 / found.speedup_max, 4),
        "share_max": round(1 / found.speedup_min, 4),
        "error": None if target is None else round(share / target - 1, 4),
        "speedup": round(found.speedup, 3),
        "flops_ratio": round(flops, 3),
        "speedup_over_flops": round(found.speedup / flops, 3),
        "layer_params": found.model.layer_params / found.other.layer_params,
    }


def main() -> None:
    """Plan, measure, and print a table and one JSON line."""
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--examples", type=int, default=1024, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=41)
    options = parser.parse_args()
    setting = common.setting(options, options.examples)
    teacher, batch = setting.teacher, (options.batch_size, options.sequence_length)
    scores = score(
        collect_statistics(teacher, setting.batches(setting.rows, 32), settings=CalibrationSettings(moments=False)),
        "fisher",
    )
    start = time.perf_counter()
    costs = latency_costs(teacher, *batch)
    rows: dict[str, Row] = {}
    timing = {"latency_costs": round(time.perf_counter() - start, 1)}
    for target in options.targets:
        start = time.perf_counter()
        plan = plan_for_latency(teacher, scores, target, LatencySettings(*batch, costs=costs))
        timing[f"plan {target}"] = round(time.perf_counter() - start, 1)
        row = budget_row(teacher, prune(teacher, plan), target, batch, options.repeats)
        rows[f"latency {target}"] = {**row, "promised": round(plan.kept or 0.0, 4), "note": plan.note}
    for cost in ("params", "flops"):
        plan = plan_pruning(teacher, scores, 0.5, cost=cost)
        rows[f"{cost} 0.5"] = budget_row(teacher, prune(teacher, plan), None, batch, options.repeats)
    table = Table("budget", "promised", "measured share", "error", "speed-up", "FLOPs ratio", "speed-up / FLOPs ratio")
    for name, row in rows.items():
        share = f"{row['share']:.3f} ({row['share_min']:.3f} to {row['share_max']:.3f})"
        promised = f"{row['promised']:.3f}" if "promised" in row else ""
        error = "" if row["error"] is None else f"{row['error']:+.1%}"
        table.add_row(
            name, promised, share, error, f"{row['speedup']}x", str(row["flops_ratio"]), str(row["speedup_over_flops"])
        )
    print(f"\nbatch {batch[0]} x {batch[1]} tokens")
    Console(width=120).print(table)
    common.print_json("latency_budget", options, setting.text, {"rows": rows, "seconds": timing})


if __name__ == "__main__":
    main()
