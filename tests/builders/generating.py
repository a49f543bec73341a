"""A tiny teacher and student with a generator of embeddings between them."""

import os
from pathlib import Path
from typing import Any

import torch
from builders.models import tiny_model
from builders.recipes import WORDS
from builders.trainers import NO_DROPOUT
from transformers import BertTokenizer, PreTrainedModel

from distill_llm import DistillationConfig
from distill_llm.data.embeddings import EmbeddingCollator, embedding_rows
from distill_llm.data.padding import PaddingCollator
from distill_llm.synthesis.generator import Adversary, GeneratorSettings
from distill_llm.synthesis.spaces import EmbeddingSpace
from distill_llm.training.adversarial import AdversarialTrainer


def tokenizer_of_words() -> BertTokenizer:
    """Of WORDS."""
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def teacher_and_student() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two random classifiers of three classes."""
    sizes = {"vocab": len(WORDS), "num_labels": 3, **NO_DROPOUT}
    return tiny_model(layers=2, seed=0, **sizes), tiny_model(layers=1, seed=1, **sizes)


def adversary_of(teacher: PreTrainedModel, length: int = 6, **settings: Any) -> Adversary:
    """A small generator."""
    space = EmbeddingSpace.of(teacher, tokenizer_of_words(), length)
    return Adversary(space, GeneratorSettings(**{"noise": 8, "width": 16, "rows": 4, "every": 2, **settings}))


def trained(folder: Path, resume: Path | None = None, **changes: Any) -> tuple[dict, dict, list[dict[str, float]]]:
    """Six steps of a student beside its generator: weights of the student and of the generator, and the log."""
    teacher, student = teacher_and_student()
    adversary = adversary_of(teacher)
    rows = embedding_rows(torch.zeros(16, 6, 32), adversary.space.ids, [0] * 16)
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = DistillationConfig(
        output_dir=str(folder),
        **{
            "losses": {"logits": {"divergence": "mse"}, "hidden": {"layers": "last"}},
            "per_device_train_batch_size": 8 // world,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "optim": "sgd",  # Adam makes steps of gradients that are 0 but for rounding
            "use_cpu": True,
            "report_to": "none",
            **changes,
        },
    )
    trainer = AdversarialTrainer(
        student,
        teacher,
        args,
        adversary=adversary,
        train_dataset=rows,
        data_collator=EmbeddingCollator(PaddingCollator(tokenizer_of_words())),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    student_weights = {name: each.detach().clone() for name, each in student.state_dict().items()}
    return student_weights, dict(adversary.network.state_dict()), trainer.state.log_history
