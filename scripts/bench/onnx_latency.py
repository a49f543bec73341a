"""Latency of teacher and students in PyTorch, in onnxruntime, and in onnxruntime with weights in eight bits, on one machine.

`--run RUN` takes `teacher/` and `student/` of a finished run of a classifier, and beside them an even student: the teacher pruned
to the same share with equal layers, not trained. `--model DIR ...` takes the folders alone; ratios are to the first. Without
either, MiniLM gets a new head and is pruned to half, uneven and even, on rows of `embedded`, without training.

All sides take turns on the same batch of random tokens without padding, with as many threads as PyTorch has. PyTorch runs in
float32. Where heads are trained (`--run`, `--model`), PyTorch and eight bits are scored on the same test rows of the task.

    python scripts/bench/onnx_latency.py --run runs/quickstart      # a few minutes on two cores
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import datasets
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from distill_llm import collect_statistics, load_pretrained, load_recipe, plan_pruning, prune, score
from distill_llm.checks.recipe import data_spec
from distill_llm.data import DataSpec, collator, encode, load_task
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation import evaluate_model
from distill_llm.export import export
from distill_llm.measuring.counting import count_params, full_length_inputs
from distill_llm.models.exported import load_export

PROGRAMS = ("PyTorch", "onnxruntime", "onnxruntime int8")
CALIBRATION_ROWS, SHORTEST = 512, 0.02
"""Rows that statistics are of; seconds of a measurement: short passes are repeated until they last as long."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One model in every program.

    Attributes:
        programs: of `PROGRAMS`, each called with keyword tensors.
        megabytes: of the weights, in PyTorch's float32 and in the int8 graph.
    """

    programs: dict[str, PreTrainedModel]
    megabytes: tuple[float, float]


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what was done and the seconds that it took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def layer_share(model: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Share of the layers' parameters that a student has."""
    return count_params(model)[1] / count_params(teacher)[1]


def pruned(teacher: PreTrainedModel, data: TaskData, tokenizer: Any, keep: float, uniform: bool) -> PreTrainedModel:
    """The teacher with a share of its layers' parameters, compensated and not trained."""
    rows, collate = list(data.train), collator(data.task, tokenizer)
    batches = [collate(rows[begin : begin + 32]) for begin in range(0, len(rows), 32)]
    found = collect_statistics(teacher, batches)
    return prune(teacher, plan_pruning(teacher, score(found, "fisher"), keep, uniform=uniform), found)


def make(into: Path, model: PreTrainedModel, tokenizer: Any) -> Path:
    """Save a model with its tokenizer."""
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


def folders_of(options: argparse.Namespace, data: TaskData, work: Path) -> dict[str, Path]:
    """The models' folders by name, the base of ratios first."""
    if options.model:
        return {name: Path(name) for name in options.model}
    whole = options.run / "teacher" if options.run else Path(common.minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
    encoded = encode(data, tokenizer, options.max_length)
    if options.run:
        teacher = load_pretrained(whole, dtype=torch.float32).eval()
        found = {"teacher": whole, "student": options.run / "student"}
        keep = layer_share(load_pretrained(found["student"]), teacher)
    else:
        labels = len(data.task.label_names or ())
        teacher = AutoModelForSequenceClassification.from_pretrained(whole, num_labels=labels).eval()
        found, keep = {"teacher": make(work / "teacher", teacher, tokenizer)}, 0.5
        found["student"] = make(work / "student", pruned(teacher, encoded, tokenizer, keep, False), tokenizer)
    even = pruned(teacher, encoded, tokenizer, keep, True)
    return found | {"even student, not trained": make(work / "even", even, tokenizer)}


def side_of(folder: Path, work: Path) -> Side:
    """A model in all programs."""
    model = load_pretrained(folder, dtype=torch.float32).eval()
    graphs = {kind: export(folder, "onnx", work / kind, quantize=kind).path for kind in ("f32", "int8")}
    size = sum(file.stat().st_size for file in graphs["int8"].glob("*.onnx*")) / 1e6
    loaded = (model, *(load_export(graphs[kind]) for kind in ("f32", "int8")))
    return Side(dict(zip(PROGRAMS, loaded, strict=True)), (4 * count_params(model)[0] / 1e6, size))


def clock(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
    """A measurement of one forward pass, in seconds."""

    def passes(count: int = 1) -> None:
        with torch.inference_mode():
            for _ in range(count):
                model(**inputs)

    passes()
    count = max(1, round(SHORTEST / common.seconds(passes)))
    return lambda: common.seconds(lambda: passes(count)) / count


def latencies(sides: dict[str, Side], grid: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """For each size of batch and each model: milliseconds of each program, ratios to its PyTorch, and to the first model's."""
    rows = []
    for batch, length in grid:
        clocks: dict[str, Callable[[], float]] = {}
        for name, side in sides.items():
            inputs = full_length_inputs(side.programs["PyTorch"], batch, length)
            clocks |= {f"{name}, {program}": clock(model, inputs) for program, model in side.programs.items()}
        with step(f"{batch} x {length} tokens"):
            times = common.alternate(clocks, rounds)
        base = times[f"{next(iter(sides))}, PyTorch"]
        for name in sides:
            own = {program: times[f"{name}, {program}"] for program in PROGRAMS}
            rows.append(
                {
                    "batch": batch,
                    "tokens": length,
                    "model": name,
                    "ms": {each: round(1000 * statistics.median(values), 2) for each, values in own.items()},
                    "to_own_pytorch": {each: common.ratio(own["PyTorch"], own[each]) for each in PROGRAMS[1:]},
                    "to_first_pytorch": {each: common.ratio(base, own[each]) for each in PROGRAMS},
                }
            )
    return rows


def scores(
    sides: dict[str, Side], folders: dict[str, Path], data: TaskData, length: int
) -> dict[str, dict[str, float]]:
    """The task's main metric of each model in PyTorch and in eight bits, where its head has the task's labels."""
    found: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        model = side.programs["PyTorch"]
        if (
            not type(model).__name__.endswith("SequenceClassification")
            or model.config.num_labels != data.task.num_labels
        ):
            continue
        tokenizer = AutoTokenizer.from_pretrained(folders[name], trust_remote_code=False)
        rows = encode(data, tokenizer, length).test
        collate = collator(data.task, tokenizer)
        with step(f"scores of {name}"):
            found[name] = {
                program: evaluate_model(side.programs[program], rows, data.task, collate, progress=False)["score"]
                for program in (PROGRAMS[0], PROGRAMS[2])
            }
    return found


def print_tables(
    rows: list[dict[str, Any]], found: dict[str, dict[str, float]], sides: dict[str, Side], base: str
) -> None:
    """Markdown: speed-ups are medians of the rounds' ratios, with the smallest and the largest."""
    print(
        f"\n| batch x tokens | model | PyTorch, ms | PyTorch, times {base} | onnxruntime | int8 | int8, times {base} |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        own, first = row["to_own_pytorch"], row["to_first_pytorch"]
        cells = (row["model"], f"{row['ms']['PyTorch']:.1f}", first["PyTorch"], own[PROGRAMS[1]], own[PROGRAMS[2]])
        print("|", " | ".join(map(str, (f"{row['batch']} x {row['tokens']}", *cells, first[PROGRAMS[2]]))), "|")
    print("\n| model | MB, float32 | MB, int8 | score, PyTorch | score, int8 |\n|---|---|---|---|---|")
    for name, side in sides.items():
        scored = [f"{value:.4f}" for value in found.get(name, {}).values()] or ["head not trained"] * 2
        print("|", " | ".join((name, *(f"{size:.1f}" for size in side.megabytes), *scored)), "|")


def main() -> None:
    """Export, time, score, and print two Markdown tables and one JSON line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, help="folder of a finished run, with teacher/ and student/")
    which.add_argument("--model", nargs="+", help="folders of classifiers, the one to compare with first")
    parser.add_argument("--task", default="embedded", help="without --run: the task to score on")
    parser.add_argument("--data", help="without --run: its folder or file")
    parser.add_argument("--grid", nargs="+", default=["1x16", "1x128", "8x64", "32x32"], help="batch x tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1000, help="test rows to score on")
    parser.add_argument("--max-length", type=int, default=64, help="without --run: tokens that rows are cut to")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.set_seed(0)
    grid = [(int(batch), int(length)) for batch, length in (size.split("x") for size in options.grid)]
    spec = DataSpec(options.task, options.data)
    if options.run:
        spec = data_spec(load_recipe(options.run / "recipe.yaml"))
        options.max_length = spec.max_length
    data = load_task(spec)
    counts = {"train": CALIBRATION_ROWS, "test": options.rows}
    few = {
        name: rows.select(range(min(count, len(rows))))
        for name, count in counts.items()
        if (rows := getattr(data, name))
    }
    data = dataclasses.replace(data, **few)
    with TemporaryDirectory() as folder:
        with step("models"):
            folders = folders_of(options, data, Path(folder))
        sides = {}
        for index, (name, path) in enumerate(folders.items()):
            with step(f"exports of {name}"):
                sides[name] = side_of(path, Path(folder) / f"graphs-{index}")
        rows = latencies(sides, grid, options.rounds)
        trained = options.run or options.model
        found = scores(sides, folders, data, options.max_length) if trained else {}
    print_tables(rows, found, sides, next(iter(sides)))
    shown = {**vars(options), "run": options.run and str(options.run), "teacher": options.run and "of the run"}
    results = {"threads": torch.get_num_threads(), "rows": [plain(row) for row in rows], "scores": found}
    common.print_json("onnx_latency", argparse.Namespace(**shown), f"{len(data.test)} rows of {spec.task}", results)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the JSON line."""
    ratios = ("to_own_pytorch", "to_first_pytorch")
    return row | {kind: {name: vars(each.rounded()) for name, each in row[kind].items()} for kind in ratios}


if __name__ == "__main__":
    main()
