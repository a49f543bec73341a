"""What training from a cached teacher costs: bytes per token, time beside plain fine-tuning, loss beside an online teacher.

A causal LM teaches its own first layers on rows of text:

- fine-tuning: transformers' Trainer on the student, cross-entropy. The floor.
- cached, sampled and top-k: `DistillationTrainer` with labels and forward KL from a cache of k entries a token.
- online: the same from the teacher itself.

The time of an epoch runs from the end of its first optimizer step to the end of its last; the sides take turns. All train a
copy of one student on the same rows in the same order. So the last lines compare the logged losses of the same epoch, and the
perplexity of unseen rows after it.

    python scripts/bench/cached.py --model DIR --text FILE      # DIR: made by scripts/data/smollm2.py; FILE: JSON lines
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import recovery
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from distill_llm import DistillationConfig, DistillationTrainer, keep_layers, prune
from distill_llm.data.causal import CausalCollator
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.online import OnlineTeacher

FLOOR = "fine-tuning"
SKIP = 1


class Bench:
    """Models, rows and caches, and the training of each side."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher.to(self.device)
        self.student = prune(self.teacher, keep_layers(self.teacher, list(range(options.layers))))
        texts = [json.loads(line)["text"] for line in options.text.read_text().splitlines()]
        held = texts[-len(texts) // 5 :]
        rows = recovery.rows_of(texts[: -len(held)], self.tokenizer, options.length, options.rows)
        self.unseen = recovery.rows_of(held, self.tokenizer, options.length, options.evaluation_rows)
        self.rows, self.collate = Dataset.from_list(rows), CausalCollator(self.tokenizer)
        self.steps = options.rows // options.batch_size
        self.sources: dict[str, Any] = {"online": self.teacher}
        self.cost: dict[str, dict[str, float]] = {}
        for method in ("sampled", "topk"):
            self.sources[f"cached, {method}"] = self.cache(folder / method, method)

    def cache(self, folder: Path, method: str) -> CachedTeacher:
        """A cache of the rows; notes its size and what coding it took over the teacher's forward."""
        tokens = self.options.rows * (self.options.length - 1)
        batches = [self.collate(list(self.rows.select(range(i, i + 2)))) for i in range(0, self.options.rows, 2)]
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                self.teacher(**{name: value.to(self.device) for name, value in batch.items() if name != "labels"})
        forward = time.perf_counter() - begin
        settings = CacheSettings(k=self.options.k, method=method, kind="next_token", seed=self.options.seed)  # type: ignore[arg-type]
        begin = time.perf_counter()
        source = CacheSource(OnlineTeacher(self.teacher), self.rows, self.collate, identity=self.teacher)
        write_cache(folder, source, settings, Writing(batch_size=2, device=self.device, progress=False))
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.cost[method] = {
            "bytes_per_token": round(size / tokens, 2),
            "writing_over_forward": round(seconds / forward, 3),
        }
        print(method, self.cost[method], flush=True)
        return CachedTeacher(folder, self.teacher, dataset=self.rows)

    def trainer(self, side: str, student: PreTrainedModel, folder: str) -> Trainer:
        """Of one epoch, logged as a whole."""
        arguments = {**recovery.training(self.options, folder), "logging_steps": self.steps}
        data: dict[str, Any] = {"train_dataset": self.rows, "data_collator": self.collate}
        if side == FLOOR:
            return Trainer(student, TrainingArguments(**arguments), **data)
        config = DistillationConfig(losses=recovery.LOSSES["ours"], **arguments)
        return DistillationTrainer(student, self.sources[side], config, processing_class=self.tokenizer, **data)

    def measure(self, side: str) -> Callable[[], float]:
        """A measurement: seconds of an epoch."""

        def seconds() -> float:
            with tempfile.TemporaryDirectory() as folder:
                trainer = self.trainer(side, copy.deepcopy(self.student), folder)
                return common.seconds_per_step(trainer.train, self.steps, SKIP) * self.steps

        return seconds

    def learned(self, side: str) -> dict[str, float]:
        """The losses logged of an epoch, and perplexity of unseen rows after it."""
        student = copy.deepcopy(self.student)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(side, student, folder)
            trainer.train()
        (logged,) = (log for log in trainer.state.log_history if "loss" in log)
        losses = {name: value for name, value in logged.items() if name.startswith("loss")}
        return {**losses, "perplexity": recovery.perplexity(student, self.unseen, self.collate)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--text", required=True, type=Path, help="JSON lines with a field text")
    parser.add_argument("--layers", type=int, default=20, help="layers of the student: the first ones of the teacher")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--evaluation-rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.steps = options.rows // options.batch_size
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        sides = [FLOOR, *bench.sources]
        times = common.alternate({side: bench.measure(side) for side in sides}, options.rounds)
        common.print_table(f"An epoch of {options.rows} x {options.length} tokens", times, FLOOR)
        learned = {side: bench.learned(side) for side in bench.sources}
    for side, found in learned.items():
        print(f"{side}: losses logged of the epoch, and perplexity of unseen text after it: {found}")
    results = {
        "over_fine_tuning": common.ratios(times, FLOOR),
        "seconds": {side: round(statistics.median(values), 1) for side, values in times.items()},
        "cache": bench.cost,
        "learned": learned,
    }
    options.teacher, options.text = None, options.text.name
    common.print_json("cached", options, f"{options.rows * options.length} tokens of text", results)


if __name__ == "__main__":
    main()
