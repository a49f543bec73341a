"""Prompts, answers and trainers for students that learn from their own answers."""

from pathlib import Path
from typing import Any

from builders.causal import data_of, word_tokenizer, words
from transformers import PreTrainedModel

from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.data.encoding import collator, encode
from distill_llm.data.kinds.prompts import prompts as prompts_task

TOKENIZER = word_tokenizer()
PROMPTS = [words(*range(i, i + 2 + i % 3)) for i in range(12)]
ANSWERS = [words(*range(40 + i, 42 + i)) for i in range(12)]


def prompt_rows(prompts=PROMPTS):
    """Twelve encoded prompts with answers."""
    return encode(data_of(prompts_task(), prompt=prompts, response=ANSWERS), TOKENIZER, 32)


def answering_trainer(
    folder: Path, student: PreTrainedModel, teacher: PreTrainedModel, rows: Any, losses: dict[str, Any], **args: Any
) -> DistillationTrainer:
    """A trainer on rows of prompts; `args` are training arguments, by default one step of four rows."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    config = DistillationConfig(output_dir=str(folder), losses=losses, **{"save_strategy": "no", **settings, **args})
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        args=config,
        train_dataset=rows.train,
        data_collator=collator(rows.task, TOKENIZER),
        processing_class=TOKENIZER,
    )
