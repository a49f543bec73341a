"""A searched plan beside the plain one, at equal time: what the search takes, the plain student trains longer.

Two students of one teacher for every share that is kept. Both are compensated, scored, and then learn from the teacher (logits)
for a while: the searched one for `--seconds`, the plain one for `--seconds` and the time of the search. One JSON line a share.

    python scripts/bench/search.py --teacher TEACHER --data GLUE/SST-2 --keep 0.5 0.3 --output lines.jsonl
    python scripts/bench/search.py --train TEACHER --data GLUE/SST-2      # makes the teacher of MiniLM, without a head
"""

import argparse
import json
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import arguments, minilm_folder, setting
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, TrainerCallback

from distill_llm import (
    DistillationConfig,
    DistillationTrainer,
    PruningPlan,
    Statistics,
    choose_strength,
    collect_statistics,
    plan_pruning,
    prune,
    score,
)
from distill_llm.evaluation import evaluate_model
from distill_llm.measuring.profiling import device_name
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.searching.evolution import SearchSettings, evolve
from distill_llm.pruning.searching.fitness import Divergence
from distill_llm.pruning.searching.shares import Space
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of


class Until(TrainerCallback):
    """Ends a training after so many seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        control.should_training_stop = time.monotonic() > self.end


class Trial:
    """A teacher with its rows, and what is done to each student."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.given = options, setting(options, options.examples)
        assert self.given.encoded is not None, "--data"
        self.teacher, self.encoded = self.given.teacher, self.given.encoded
        rows = self.given.batches(self.given.rows[: options.calibration], 32)
        self.fitted, self.held_out = rows[::2] + rows[3::4], rows[1::4]
        self.statistics: Statistics = collect_statistics(self.teacher, self.fitted)

    def score(self, model: PreTrainedModel) -> float:
        """Accuracy on the development set."""
        task = self.encoded.task
        return evaluate_model(model, self.encoded.test, task, self.given.collate, progress=False)["score"]

    def compensated(self, plan: PruningPlan) -> PreTrainedModel:
        """The student of a plan."""
        strength = choose_strength(self.teacher, plan, self.statistics, self.held_out)
        return prune(self.teacher, plan, self.statistics, ridge=strength.ridge)

    def trained(
        self, student: PreTrainedModel | Any, seconds: float, losses: dict[str, Any], teacher: Any = None
    ) -> int:
        """Train for so long; the number of steps."""
        args = DistillationConfig(
            output_dir="/tmp/search-bench",
            losses=losses,
            per_device_train_batch_size=32,
            learning_rate=self.options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            max_steps=100_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            seed=self.options.seed,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            args=args,
            train_dataset=self.encoded.train,
            data_collator=self.given.collate,
            callbacks=[Until(seconds)],
        )
        trainer.train()
        student.eval()
        return trainer.state.global_step

    def line(self, keep: float) -> dict[str, Any]:
        """Both students at a share."""
        options, scores = self.options, score(self.statistics, "fisher")
        costs = unit_costs(self.teacher)
        plain = plan_pruning(self.teacher, scores, keep)
        total = costs.of(counts_of(self.teacher))
        space = Space(self.teacher, scores, costs, (plain.kept or keep) * total * (1 + 1e-9), PlanningRules())
        fitness = Divergence(self.teacher, self.fitted, options.tokens)
        begin = time.monotonic()
        found = evolve(
            space, plain, keep, fitness, SearchSettings(options.generations, options.population, options.seed)
        )
        took = time.monotonic() - begin
        line: dict[str, Any] = {
            "keep": keep,
            "seed": options.seed,
            "tried": found.tried,
            "search_seconds": round(took, 1),
        }
        line |= {"fitness": [round(found.plain, 5), round(found.best, 5)], "train_seconds": options.seconds}
        for name, plan, more in (("plain", plain, took), ("searched", found.plan, 0.0)):
            cut = self.score(prune(self.teacher, plan))
            student = self.compensated(plan)
            repaired = self.score(student)
            steps = self.trained(student, options.seconds + more, {"logits": {}}, self.teacher)
            line[name] = {
                "kept": plan.kept,
                "cut": cut,
                "compensated": repaired,
                "recovered": self.score(student),
                "steps": steps,
            }
        return line


def train_teacher(options: argparse.Namespace) -> None:
    """MiniLM with a head, trained on labels for `--seconds`, saved to `--train`."""
    trial = Trial(options)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
    steps = trial.trained(model, options.seconds, {"labels": {}})
    model.save_pretrained(options.train)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(options.train)
    print(json.dumps({"teacher": trial.score(model), "steps": steps}))


def main() -> None:
    """Read the arguments, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--train", metavar="DIR", type=Path, help="train the teacher, and nothing else")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--examples", type=int, default=4000, help="training rows")
    parser.add_argument("--calibration", type=int, default=640, help="rows that statistics are of")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--population", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.train:
        train_teacher(options)
        return
    trial = Trial(options)
    about = {
        "teacher": trial.score(trial.teacher),
        "device": device_name(trial.teacher.device),
        "date": date.today().isoformat(),
    }
    about["versions"] = {name: version(name) for name in ("torch", "transformers")}
    for keep in options.keep:
        line = {**trial.line(keep), **about}
        print(json.dumps(line), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
