"""Perplexity of a pruned SmolLM2 after a short recovery: ours, cross-entropy alone and TRL's GKD, on the same rows.

A share of all parameters is removed in small cuts (compensated, with new statistics after each). Then every side trains a copy
of that student for the same steps with the same optimizer, schedule and precision:

- ours: `DistillationTrainer`, half label loss, half forward KL, chunked head.
- labels: the same trainer with the label loss alone. No teacher.
- trl: TRL's `GKDTrainer` off-policy (lmbda 0) at its own defaults (JSD with beta 0.5, temperature 0.9).

Perplexity is measured on the documents that follow those for training; `--text` holds JSON lines with a field `text`. Seconds
are the time of `train()`. The sides run one after the other, so compare seconds only on an otherwise idle machine.

    python scripts/bench/recovery.py --model DIR --text FILE      # DIR: made by scripts/data/smollm2.py
"""

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_llm import (
    CalibrationSettings,
    DistillationConfig,
    DistillationTrainer,
    collect_statistics,
    plan_pruning,
    profile,
    prune,
    score,
)
from distill_llm.data.causal import CausalCollator, document_packer
from distill_llm.evaluation.perplexity import causal_loss

LOSSES: dict[str, dict[str, Any]] = {
    "ours": {"labels": {"weight": 0.5}, "logits": {"weight": 0.5, "divergence": "forward_kl"}},
    "labels": {"labels": {"weight": 1.0}},
}


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[dict[str, Any]]:
    """Full rows of `length` tokens."""
    packed = document_packer("text", tokenizer, length)({"text": texts})
    rows = [ids for ids in packed["input_ids"] if len(ids) == length][:count]
    if len(rows) < count:
        raise SystemExit(f"--text: {len(rows)} rows of {length} tokens where {count} are needed")
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": ids} for ids in rows]


def perplexity(model: PreTrainedModel, rows: list[dict[str, Any]], collate: CausalCollator) -> float:
    """Of rows, under bf16 autocast."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        for begin in range(0, len(rows), 4):
            batch = {name: values.to(model.device) for name, values in collate(rows[begin : begin + 4]).items()}
            loss, tokens = causal_loss(model, batch)
            total, count = total + loss.sum().item(), count + int(tokens.sum())
    return math.exp(total / count)


def pruned(
    teacher: PreTrainedModel, removed: float, rows: list[dict[str, Any]], collate: CausalCollator, cuts: int
) -> PreTrainedModel:
    """The teacher without a share of all its parameters, in cuts of equal size with other rows for each."""
    whole = profile(teacher)
    keep, each = 1 - removed * whole.params / whole.layer_params, len(rows) // cuts
    model, left = teacher, 1.0
    for number in range(1, cuts + 1):
        share = 1 - (1 - keep) * number / cuts
        part = rows[(number - 1) * each : number * each]
        batches = [collate(part[begin : begin + 4]) for begin in range(0, each, 4)]
        batches = [{name: values.to(teacher.device) for name, values in batch.items()} for batch in batches]
        statistics = collect_statistics(
            model, batches, settings=CalibrationSettings(hidden=False, precision=torch.bfloat16)
        )
        model = prune(model, plan_pruning(model, score(statistics, "fisher"), share / left), statistics)
        left = share
        print(f"cut {number} of {cuts}: {share:.3f} of the layers' parameters kept", flush=True)
    return model


def training(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """TrainingArguments that every side has."""
    return {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": True,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": max(1, options.steps // 5),
        "seed": options.seed,
    }


def train(
    side: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> None:
    """The recovery of a side, in place."""
    data, collate = Dataset.from_list(rows), CausalCollator(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if side == "trl":
            trainer = gkd(student, teacher, training(options, folder), data, collate, tokenizer)
        else:
            config = DistillationConfig(losses=LOSSES[side], **training(options, folder))
            source = teacher if side == "ours" else None
            trainer = DistillationTrainer(
                student, source, config, train_dataset=data, data_collator=collate, processing_class=tokenizer
            )
        trainer.train()


def gkd(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    arguments: dict[str, Any],
    data: Dataset,
    collate: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """TRL's trainer on rows that are encoded already."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(lmbda=0.0, seq_kd=False, disable_dropout=False, **arguments)
    copied = copy.deepcopy(teacher).to(torch.bfloat16)  # as ours holds it
    return GKDTrainer(student, copied, config, data_collator=collate, train_dataset=data, processing_class=tokenizer)


def main() -> None:
    """Prune, recover every way, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--text", required=True, type=Path, help="JSON lines with a field text")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.4], help="shares of all parameters")
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument(
        "--calibration-rows", type=int, default=320, help="calibration rows of 256 tokens, for all cuts together"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--evaluation-rows", type=int, default=32)
    parser.add_argument("--sides", nargs="+", default=["ours", "labels", "trl"], choices=[*LOSSES, "trl"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = [json.loads(line)["text"] for line in options.text.read_text().splitlines()]
    held, collate = texts[-len(texts) // 5 :], CausalCollator(tokenizer)
    seen = texts[: len(texts) - len(held)]
    training_rows = rows_of(seen, tokenizer, options.length, options.steps * options.batch_size)
    calibration = rows_of(seen, tokenizer, 256, options.calibration_rows)
    unseen = rows_of(held, tokenizer, options.length, options.evaluation_rows)
    dense = perplexity(teacher, unseen, collate)
    print(f"dense: {dense:.2f}", flush=True)
    results = []
    for removed in options.removed:
        student = pruned(teacher, removed, calibration, collate, options.cuts)
        found = {
            "removed": removed,
            "side": "pruned",
            "perplexity": perplexity(student, unseen, collate),
            "seconds": 0.0,
        }
        results.append(found)
        print(json.dumps(found), flush=True)
        for side in options.sides:
            own = copy.deepcopy(student)
            transformers.set_seed(options.seed)
            begin = time.perf_counter()
            train(side, own, teacher, training_rows, tokenizer, options)
            seconds = time.perf_counter() - begin
            found = {
                "removed": removed,
                "side": side,
                "perplexity": perplexity(own, unseen, collate),
                "seconds": round(seconds, 1),
            }
            results.append(found)
            print(json.dumps(found), flush=True)
    tokens = options.steps * options.batch_size * options.length
    table = Table("removed", "recovery", "perplexity", "/ dense", "seconds")
    for row in results:
        ratio = f"{row['perplexity'] / dense:.3f}"
        table.add_row(f"{row['removed']:.0%}", row["side"], f"{row['perplexity']:.2f}", ratio, f"{row['seconds']:.0f}")
    Console().print(table)
    options.teacher, options.data, options.text = None, None, options.text.name
    common.print_json("recovery", options, f"{tokens} tokens", {"dense": dense, "results": results})


if __name__ == "__main__":
    main()
