"""Whether a long training grows: memory, tensors, file handles and threads of a process over 500 optimizer steps.

Usage: reliability_steps.py [STEPS [NUMBER ...]]   (default: 500, all of CASES); prints a JSON line and a row of Markdown
for each.

Each training evaluates and saves a checkpoint every 100 steps, and takes two micro-batches of uneven length a step. What is there
at a step is counted after a garbage collection. Growth is that from a fifth of the steps, when caches are full, to the end.
"""

import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    default_data_collator,
)

from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.teachers import CachedTeacher, OnlineTeacher
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 200}
HIDDEN = {"hidden": {"layers": "uniform"}, "attention": {"layers": "last"}, "relations": {"layers": "last"}}
LOGITS = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}
EVERY = 20


class Watch(TrainerCallback):
    """Counts what the process holds."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every few steps."""
        if state.global_step % EVERY:
            return
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.seen.append(
            {
                "step": state.global_step,
                "resident_mb": resident // 10**6,
                "tensors": len(tensors),
                "tensor_kb": sum(each.nbytes for each in tensors) // 1000,
                "handles": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
            }
        )


def rows(kind: type, count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows that are padded to two lengths in turn, a micro-batch each."""
    draw, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        length = 8 if number // 4 % 2 else 12
        ids = torch.randint(5, 200, (length,), generator=draw)
        labels = ids.clone() if kind is LlamaForCausalLM else ids[0] % 2
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def models(kind: type) -> list[Any]:
    """Teacher and student."""
    torch.manual_seed(0)
    config = LlamaConfig if kind is LlamaForCausalLM else BertConfig
    return [kind(config(num_hidden_layers=layers, **SIZES)) for layers in (4, 2)]


def cached(teacher: Any, data: list[dict[str, torch.Tensor]], folder: Path) -> CachedTeacher:
    """A teacher on disk."""
    dataset = Dataset.from_list([{name: tensor.tolist() for name, tensor in row.items()} for row in data])
    source = CacheSource(OnlineTeacher(teacher), dataset, default_data_collator, identity=teacher)
    write_cache(folder, source, CacheSettings(kind="next_token", k=20), Writing(batch_size=1, progress=False))
    return CachedTeacher(folder, teacher, dataset=dataset)


def training(kind: type, losses: dict[str, Any], steps: int, folder: Path, cache: bool = False) -> list[dict[str, int]]:
    """What a training held, every few steps."""
    teacher, student = models(kind)
    data = rows(kind)
    if cache:
        data = [{name: value[:8] if value.dim() else value for name, value in row.items()} for row in data]
    args = DistillationConfig(
        output_dir=str(folder / "training"),
        losses=losses,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="group_by_length" if not cache else "random",
        eval_strategy="steps",
        eval_steps=steps // 5,
        save_steps=steps // 5,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    watch = Watch()

    def collate(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in given)
        batch = {}
        for name in ("input_ids", "attention_mask", "labels"):
            filling = -100 if name == "labels" else 0
            parts = [torch.as_tensor(row[name]) for row in given]
            if parts[0].dim():
                parts = [torch.nn.functional.pad(part, (0, longest - len(part)), value=filling) for part in parts]
            batch[name] = torch.stack(parts)
        extra = [name for name in given[0] if name not in batch]
        return batch | {name: torch.as_tensor([row[name] for row in given]) for name in extra}

    trainer = DistillationTrainer(
        model=student,
        teacher=cached(teacher, data, folder / "cache") if cache else teacher,
        args=args,
        train_dataset=data,
        eval_dataset=data[:8],
        data_collator=default_data_collator if cache else collate,
        callbacks=[watch],
    )
    trainer.train()
    return watch.seen


CASES = {
    "encoder: logits, hidden states, attention": (BertForSequenceClassification, {**LOGITS, **HIDDEN}, False),
    "decoder: logits, chunked head": (LlamaForCausalLM, LOGITS, False),
    "decoder: logits, hidden states, relations": (LlamaForCausalLM, {**LOGITS, **HIDDEN}, False),
    "decoder: cached teacher": (LlamaForCausalLM, LOGITS, True),
}


def main(steps: int, chosen: list[int]) -> None:
    """The cases of these numbers."""
    lines = []
    for name in [list(CASES)[number] for number in chosen]:
        kind, losses, cache = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            seen = training(kind, losses, steps, Path(folder), cache)
        first, last = seen[len(seen) // 5 - 1], seen[-1]
        print(json.dumps({"training": name, "first": first, "last": last}), flush=True)
        cells = [
            f"{first[key]:,} -> {last[key]:,}" for key in ("resident_mb", "tensor_kb", "tensors", "handles", "threads")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    steps, *chosen = [int(word) for word in sys.argv[1:]] or [500]
    main(steps, chosen or list(range(len(CASES))))
