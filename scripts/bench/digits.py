"""Students that read images, taught in every way: the small digits of scikit-learn, 1,797 pictures of 8 by 8.

A small ViT is trained (the teacher), and students half as wide and deep learn from labels, from its outputs, from its states,
and from pictures that are made. Then half of the teacher's own layers' parameters go, and the rest recovers. A cell that is in
the file of results is not run again, so a stopped run goes on with the same command. Results of other
numbers of steps are kept apart; the page shows those of the usual ones.

    python scripts/bench/digits.py                  # digits.json, and the table of docs/guide/images_digits.md
    python scripts/bench/digits.py --page           # the table alone
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from distill_llm import (
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
from distill_llm.data.images import ImageCollator
from distill_llm.measuring.images import image_tokens
from distill_llm.measuring.profiling import device_name
from distill_llm.synthesis.ascent import Ascent, climb
from distill_llm.synthesis.generator import Adversary, GeneratorSettings
from distill_llm.synthesis.spaces import PixelSpace
from distill_llm.training.adversarial import AdversarialTrainer

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "digits.json", HERE.parents[1] / "docs" / "guide" / "images_digits.md"
BEGIN, END = "<!-- made by scripts/bench/digits.py -->", "<!-- end -->"
TEST, FEW = 500, 100
"""The last pictures are scored on; other people wrote them than the first. In one cell FEW pictures are learnt from."""
Rows = list[dict[str, Any]]
Steps = tuple[int, int]
STEPS: Steps = 600, 400
"""Of the teacher and of every other training, on the page."""

LABELS: dict[str, Any] = {"labels": {}}
LOGITS: dict[str, Any] = {"logits": {"temperature": 2.0}}
STATES: dict[str, Any] = {"hidden": {"layers": "uniform"}}
RECOVERY: dict[str, Any] = {**LOGITS, "hidden": {"layers": "lineage"}}
TEACHER, STUDENT = {"hidden_size": 64, "num_hidden_layers": 4}, {"hidden_size": 32, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        says: its first column.
        losses: what is learnt; None: nothing.
        units: cut off the teacher; None: a student of its own.
        rows: real pictures, FEW of them, or how they are made.
    """

    says: str
    losses: dict[str, Any] | None
    units: tuple[str, ...] | None = None
    rows: str = "real"


CELLS = {
    "teacher": Cell("teacher", None),
    "labels": Cell("student, from labels alone", LABELS),
    "few labels": Cell(f"student, from the labels of {FEW} pictures alone", LABELS, rows="few"),
    "logits": Cell("student, `logits` without labels", LOGITS),
    "states": Cell("student, labels and `hidden` of another width", {**LABELS, **STATES}),
    "both": Cell("student, `logits` and `hidden` without labels", {**LOGITS, **STATES}),
    "noise": Cell("student, no data: `logits` of noise", LOGITS, rows="noise"),
    "inversion": Cell("student, no data: `logits` of inverted pictures", LOGITS, rows="inversion"),
    "generator": Cell("student, no data: `logits` of a generator's pictures", LOGITS, rows="generator"),
    "units cut": Cell("teacher without half of its heads and neurons", None, ("heads", "neurons")),
    "units": Cell("the same, recovered by `logits` and `hidden`", RECOVERY, ("heads", "neurons")),
    "layers cut": Cell("teacher without half of its layers", None, ("layers",)),
    "layers": Cell("the same, recovered by `logits` and `hidden`", RECOVERY, ("layers",)),
}


def pictures() -> tuple[Rows, Rows]:
    """Rows to learn from and to score on, with values from -1 to 1."""
    found = load_digits()
    values = (torch.tensor(found.images, dtype=torch.float32) / 8 - 1).unsqueeze(1).numpy()
    rows = [{"pixel_values": value, "labels": int(label)} for value, label in zip(values, found.target, strict=True)]
    return rows[:-TEST], rows[-TEST:]


def vit(seed: int, hidden_size: int, num_hidden_layers: int) -> PreTrainedModel:
    """A new ViT with 16 patches of 2 by 2."""
    transformers.set_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 8,
        intermediate_size=2 * hidden_size,
    )
    return ViTForImageClassification(config)


def accuracy(model: PreTrainedModel, rows: Rows) -> float:
    """The share of pictures with their own digit."""
    batch = ImageCollator()(rows)
    with torch.no_grad():
        found = model.eval()(pixel_values=batch["pixel_values"].to(model.device)).logits.argmax(-1).cpu()
    return (found == batch["labels"]).float().mean().item()


def made(kind: str, teacher: PreTrainedModel, count: int, seed: int) -> Rows:
    """Pictures that no one drew."""
    draws, space = torch.Generator().manual_seed(seed), PixelSpace.of((1, 8, 8))
    values = torch.rand(count, *space.shape, generator=draws) * 2 - 1
    if kind == "inversion":
        groups = torch.randint(10, (count,), generator=draws).split(128)
        how = Ascent(60, 0.1, statistics=1.0)
        values = torch.cat([climb(teacher, space, group, how, draws) for group in groups])
    return [{"pixel_values": value} for value in values.numpy()]


def train(
    student: PreTrainedModel, teacher: PreTrainedModel | None, cell: Cell, rows: Rows, steps: int, seed: int
) -> float:
    """Train in place; seconds per step."""
    transformers.set_seed(seed)
    kind: type[DistillationTrainer] = DistillationTrainer
    more: dict[str, Any] = {}
    if cell.rows == "generator":
        kind = AdversarialTrainer
        more["adversary"] = Adversary(PixelSpace.of((1, 8, 8)), GeneratorSettings(seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            output_dir=folder,
            losses=cell.losses,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=4e-3 if student.config.hidden_size == STUDENT["hidden_size"] else 2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=steps,
            seed=seed,
        )
        collate = ImageCollator(image_tokens(student))
        trainer = kind(student, teacher, args, train_dataset=rows, data_collator=collate, **more)
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(callback)
        begin = time.perf_counter()
        trainer.train()
        return (time.perf_counter() - begin) / steps


def cut(teacher: PreTrainedModel, units: tuple[str, ...], rows: Rows) -> PreTrainedModel:
    """The teacher with half of its layers' parameters."""
    collate = ImageCollator(image_tokens(teacher))
    batches = [collate(rows[begin : begin + 64]) for begin in range(0, 512, 64)]
    found = collect_statistics(teacher, batches)
    return prune(teacher, plan_pruning(teacher, score(found, "fisher"), 0.5, units=units), found)


def run(
    name: str, teacher: PreTrainedModel, data: tuple[Rows, Rows], options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """One cell with one seed."""
    cell, seconds = CELLS[name], None
    if name == "teacher":
        student = teacher
    else:
        student = vit(seed + 100, **STUDENT) if cell.units is None else cut(teacher, cell.units, data[0])
    if cell.losses is not None:
        rows = data[0][:FEW] if cell.rows == "few" else data[0]
        if cell.rows in ("noise", "inversion"):
            rows = made(cell.rows, teacher, len(rows), seed)
        seconds = train(student, None if cell.losses == LABELS else teacher, cell, rows, options.steps, seed)
    figures: dict[str, Any] = {
        "accuracy": accuracy(student, data[1]),
        "params": sum(each.numel() for each in student.parameters()),
    }
    figures["layer_params"] = profile(student).layer_params
    if seconds is not None:
        figures |= {"seconds_per_step": round(seconds, 4), "losses": cell.losses}
    return figures


def teacher_of(data: tuple[Rows, Rows], options: argparse.Namespace, seed: int) -> PreTrainedModel:
    """The teacher of a seed, trained once."""
    folder = options.folder / f"teacher-{seed}-{options.teacher_steps}"
    if not folder.is_dir():
        model = vit(seed, **TEACHER)
        train(model, None, Cell("", LABELS), data[0], options.teacher_steps, seed)
        model.save_pretrained(folder)
    return load_pretrained(folder).eval()


def key_of(name: str, seed: int, steps: Steps) -> str:
    """A result's key: results of other numbers of steps are kept beside it."""
    return f"{name}/{seed}/{steps[0]}+{steps[1]}"


def read() -> dict[str, dict[str, Any]]:
    """The results so far, by `key_of`."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def fill(options: argparse.Namespace) -> None:
    """Run every cell that has no result."""
    data = pictures()
    setting = {
        "date": date.today().isoformat(),
        "device": device_name("cpu"),
        "steps": options.steps,
        "teacher_steps": options.teacher_steps,
        "rows": len(data[0]),
        "test_rows": len(data[1]),
    }
    for seed in range(options.seeds):
        teacher = teacher_of(data, options, seed)
        for name in CELLS:
            own = key_of(name, seed, (options.teacher_steps, options.steps))
            if own in read():
                continue
            figures = run(name, teacher, data, options, seed)
            results = {**read(), own: {**figures, **setting}}
            lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
            with written_whole(RESULTS) as path:
                path.write_text("{\n" + lines + "\n}\n")
            print(own, figures, flush=True)


def table(results: dict[str, dict[str, Any]], steps: Steps = STEPS) -> str:
    """Mean and range over seeds, in percent, of the cells that have results with these numbers of steps."""
    ending = key_of("", 0, steps).removeprefix("/0")
    results = {key: figures for key, figures in results.items() if key.endswith(ending)}
    if not results:
        return "Not measured yet.\n"
    one = results.get(key_of("teacher", 0, steps), next(iter(results.values())))
    lines = [
        f"{one['rows']:,} pictures to learn from, {one['test_rows']} others to score on; {one['teacher_steps']} steps of 64"
        f" rows for the teacher, {one['steps']} for all others. {one['device']}, {one['date']}.",
        "",
        "| model | parameters | seeds | accuracy, mean | lowest to highest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, cell in CELLS.items():
        found = [figures for key, figures in results.items() if key.startswith(f"{name}/")]
        if not found:
            continue
        scores = [100 * each["accuracy"] for each in found]
        sizes = sorted({each["params"] for each in found})
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        span = f"{min(scores):.1f} to {max(scores):.1f}"
        lines.append(f"| {cell.says} | {size} | {len(found)} | {statistics.mean(scores):.1f} | {span} |")
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """The table of STEPS between its marks; the rest of the page is written by hand."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{table(read())}\n{END}{rest.partition(END)[2]}"
    with written_whole(PAGE) as path:
        path.write_text(text)


def main() -> None:
    """Run the cells that have no result, print the table and write it on the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS[1])
    parser.add_argument("--teacher-steps", type=int, default=STEPS[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"))
    parser.add_argument("--page", action="store_true", help="write the page's table, run nothing")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not options.page:
        fill(options)
    print(table(read(), (options.teacher_steps, options.steps)))
    write_page()


if __name__ == "__main__":
    main()
