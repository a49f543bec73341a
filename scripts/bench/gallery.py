"""Run the small variant of recipes and keep what it gave in recipes/results.json, for the gallery.

    python scripts/bench/gallery.py tinybert shortgpt

A variant is a recipe with the settings of its `gallery.here`; its run folder is runs/NAME-small. The page that is made of the
results (docs/guide/gallery.md) says what must be there first. With --read, finished runs are only read.
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from typing import Any

import torch

from distill_llm.common.files import written_whole
from distill_llm.recipe.gallery import RESULTS, small_run
from distill_llm.recipe.recipe import Recipe, load_recipe, recipe_folder

SIDE = ("dtype", "score", "standard_error", "rows", "layer_params", "latency_ms", "peak_memory_mb")
KEPT = (
    "task", "metric", "higher_is_better", "device", "teacher_model", "learned_from", "baselines", "warnings", "retention",
    "params_kept", "layer_params_kept", "speedup", "speedup_min", "speedup_max", "latency", "versions", "seconds",
)  # fmt: skip
STAGES = ("score_pruned", "score_compensated", "score_recovered", "pruned", "compensated", "recovered")


def kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that the gallery's tables are made of."""
    sides = {side: {name: metrics[side].get(name) for name in SIDE} for side in ("teacher", "student")}
    last = [{name: row[name] for name in STAGES if name in row} for row in metrics["rounds"][-1:]]
    return {name: metrics[name] for name in KEPT} | sides | {"rounds": last}


def trained_on(recipe: Recipe) -> str:
    """What the student saw, in words."""
    if recipe.distillation is None:
        assert recipe.pruning is not None
        return f"No training; {recipe.pruning.calibration_examples:,} rows of calibration."
    fields = recipe.training("final")
    rows = fields["per_device_train_batch_size"] * fields.get("gradient_accumulation_steps", 1)
    steps, longest = fields.get("max_steps", -1), recipe.data.max_length
    if steps > 0:
        return f"{steps} steps of {rows} rows of up to {longest} tokens."
    count = "All" if recipe.data.train_examples is None else f"{recipe.data.train_examples:,}"
    rounds = recipe.pruning.rounds - 1 if recipe.pruning else 0
    before = f" after {recipe.training('recovery')['num_train_epochs']:g} in each earlier round" if rounds else ""
    return f"{count} training rows, {fields['num_train_epochs']:g} epochs{before}, batches of {rows}."


def main() -> int:
    """Run and record; the number of recipes that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--read", action="store_true", help="run nothing")
    options = parser.parse_args()
    failed = 0
    for name in options.names:
        recipe = load_recipe(name)
        assert recipe.gallery is not None
        commands, folder = small_run(name, recipe.gallery)
        if not options.read:
            for command in commands:
                print(f"$ {command}", flush=True)
                script = [sys.executable, "-m", "distill_llm", *shlex.split(command)[1:]]
                if subprocess.run(script, check=False).returncode:
                    failed += 1
                    break
            else:
                print(f"{name}: done", flush=True)
        if not (folder / "metrics.json").is_file():
            print(f"{name}: no result", flush=True)
            continue
        resolved = load_recipe(folder / "recipe.yaml")
        row = {
            "date": datetime.date.fromtimestamp((folder / "metrics.json").stat().st_mtime).isoformat(),
            "threads": torch.get_num_threads(),
            "data": f"{trained_on(resolved)} One seed ({resolved.seed}).",
            "metrics": kept(json.loads((folder / "metrics.json").read_text())),
        }
        file = recipe_folder() / RESULTS
        results = json.loads(file.read_text()) | {name: row}
        with written_whole(file) as path:
            path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
