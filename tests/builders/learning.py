"""What students learn from the same global batches, in one process or in several that run this together."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from builders.answers import PROMPTS, answering_trainer, prompt_rows
from builders.causal import causal_model as talker
from builders.models import tiny_model
from builders.retokenized import TERM, TEXTS, model_for, rows_of
from builders.texts import make_tokenizer
from builders.tokenizers import bytes_tokenizer, llama_tokenizer
from builders.trainers import TERMS, cached, model_of, rows, trainer_of, with_lora
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm import DistillationTrainer, KeepZeros, SparsityRules, sparsify, with_exits
from distill_llm.data.augmenting import Augment, AugmentingCollator, Mixup, Spans
from distill_llm.data.causal import CausalCollator
from distill_llm.data.padding import PaddingCollator
from distill_llm.losses.signals import Signals
from distill_llm.teachers import CrossTokenizerTeacher, MovingAverage, OnlineTeacher, Peers

LOSSES = TERMS | {"both": {"labels": {}, "logits": {}}, "exits": {"labels": {}, "logits": {}, "exits": {"hints": 0.5}}}
TEACHERS = {"averaged": lambda teacher: MovingAverage(0.9), "peers": lambda teacher: Peers([teacher])}
"""What stands in for the teacher, by a word in the name."""
Learned = tuple[dict[str, torch.Tensor], list[dict[str, float]], list[int]]
Cases = list[tuple[str, int, list[str]]]
"""Head, width of the student and names: terms of TERMS, or `both`, and settings.

Of the heads `answers` (see `of_answers`) and `augmented` the names are shares, of `sparse` shares of zeros, of `dropout` its
probabilities, of `skips` the row that the teacher spoils. `retokenized` has one name, its term's.
"""


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def learned(folder: Path, cases: Cases) -> dict[str, Learned]:
    """By head and name: weights, logged losses, and the number of labels in each batch that this process saw."""
    found = {}
    for head, width, names in cases:
        for name in names:
            shares = {"augmented": of_augmented, "dropout": of_dropout, "skips": of_skips, "sparse": of_sparse}
            named = {"answers": of_answers, "retokenized": of_retokenized}
            if head in shares:
                own = shares[head](folder, float(name))
            else:
                own = named[head](folder, name) if head in named else of_rows(folder, head, width, name)
            found[f"{head} {name}"] = own
    return found


def trained(trainer: DistillationTrainer) -> Learned:
    """Train; what `learned` says."""
    seen: list[int] = []
    loss: Any = trainer.loss

    def counting(model, batch, *rest):
        seen.append(int((batch["labels"] >= 0).sum()))
        return loss(model, batch, *rest)

    trainer.loss = counting
    trainer.train()
    trainer.loss = loss
    history = [log for log in trainer.state.log_history if "loss" in log]
    logs = [{name: value for name, value in log.items() if name.startswith("loss")} for log in history]
    projections = trainer.terms.projections.state_dict(prefix="projection.")
    memories = trainer.terms.memories.state_dict(prefix="memory.")
    learners = trainer.teacher.learners if trainer.teacher is not None else ()
    peers = {f"peer.{name}": each for model in learners for name, each in model.state_dict().items()}
    return {**trainer.model.state_dict(), **projections, **memories, **peers}, logs, seen


def of_rows(folder: Path, head: str, width: int, name: str) -> Learned:
    """Four steps on labelled rows, and the loss of evaluation afterwards."""
    teacher = model_of(head, layers=4)
    tied = {"tie_word_embeddings": True} if "tied" in name else {}
    student = model_of(head, layers=2, seed=1, hidden=width, **tied)
    if "exits" in name:
        torch.manual_seed(2)
        student = with_exits(student, [1])
    if "lora" in name:
        student = with_lora(student)
    own = next((made for word, made in TEACHERS.items() if word in name.split()), None)
    data = rows(teacher, count=32 if "one rank" in name else 20)
    trainer = trainer_of(
        folder,
        student,
        cached(folder / "cache", teacher, data, k=20) if "cached" in name else own(teacher) if own else teacher,
        data,
        LOSSES[name.split()[0]],
        ddp_find_unused_parameters=False if "strict" in name else None,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        per_device_eval_batch_size=8
        if processes() == 1
        else 3,  # of two, the last process only repeats rows at the end
        per_device_train_batch_size=8 // processes(),
        train_sampling_strategy="group_by_length",
        logging_steps=2,
    )
    if "one rank" in name:  # of each global batch the first four rows are rank 0's, the others rank 1's
        order = list(trainer._get_train_sampler())
        for start in range(4, 32, 8):
            for index in order[start : start + 4]:
                data[index]["labels"].fill_(-100)
    whole = head == "sequence-classification" or name == "hidden" or "peers" in name
    assert (trainer.loss.head_terms is None) == whole
    weights, logs, seen = trained(trainer)
    logs[-1]["eval_loss"] = trainer.evaluate()["eval_loss"]
    return weights, logs, seen


def of_answers(folder: Path, name: str) -> Learned:
    """Four steps on the student's own answers, which are of uneven length; each prompt comes three times.

    `name`: the share of the batches, perhaps who writes, or `beside`.
    """
    share, _, how = name.partition(" ")
    student = talker()
    student.generation_config.eos_token_id = list(range(4, 70))
    responses = {"share": float(share), "max_new_tokens": 6}
    losses = {"labels": {}, "logits": {}, "responses": responses | ({"by": how} if how else {})}
    if how == "beside":
        losses = {"distillm2": {}, "responses": responses | {"beside": True}}
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "logging_steps": 2}
    settings |= {"per_device_train_batch_size": 4 // processes(), "gradient_accumulation_steps": 2}
    rows = prompt_rows([PROMPTS[row // 3] for row in range(12)])
    return trained(answering_trainer(folder, student, talker(num_hidden_layers=3), rows, losses, **settings))


def of_retokenized(folder: Path, name: str) -> Learned:
    """Four steps with a teacher that reads the texts, of uneven length, in tokens of its own."""
    own, other = llama_tokenizer(), bytes_tokenizer()
    teacher = CrossTokenizerTeacher(model_for(other, seed=1), other)
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "logging_steps": 2, "processing_class": own}
    settings |= {"per_device_train_batch_size": 8 // processes(), "data_collator": CausalCollator(own)}
    return trained(trainer_of(folder, model_for(own), teacher, rows_of(own, 2 * TEXTS), TERM, **settings))


def of_augmented(folder: Path, share: float) -> Learned:
    """Four steps on rows of which words are replaced and others mixed in; and what was counted of them."""
    teacher, student = (
        model_of("sequence-classification", layers=2),
        model_of("sequence-classification", layers=1, seed=1),
    )
    data = Dataset.from_list([{name: each.tolist() for name, each in row.items()} for row in rows(teacher, count=16)])
    tokenizer = make_tokenizer()
    settings = Augment(share, backoff=Spans(0.3), cutout=Spans(0.2), mixup=Mixup())
    collator = AugmentingCollator(PaddingCollator(tokenizer), data, tokenizer, settings, seed=3)
    own = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "logging_steps": 2, "data_collator": collator}
    own |= {"per_device_train_batch_size": 8 // processes()}
    trainer = trainer_of(folder, student, teacher, data, LOSSES["both"], **own)
    weights, logs, seen = trained(trainer)
    return {**weights, "counted": torch.tensor([*trainer.augmented.totals().values()])}, logs, seen


def of_sparse(folder: Path, share: float) -> Learned:
    """Four steps of a student with this share of zeros, with momentum, decay and clipping."""
    teacher = model_of("sequence-classification", layers=2)
    rules = SparsityRules(share, criterion="magnitude")
    student, masks = sparsify(model_of("sequence-classification", layers=1, seed=1), rules=rules)
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "weight_decay": 0.1, "max_steps": 4}
    settings |= {"max_grad_norm": 0.5, "logging_steps": 2, "per_device_train_batch_size": 8 // processes()}
    data = rows(teacher, count=16)
    return trained(trainer_of(folder, student, teacher, data, LOSSES["both"], callbacks=[KeepZeros(masks)], **settings))


def of_dropout(folder: Path, share: float) -> Learned:
    """The first step of an encoder with dropout in its embeddings, on a row that comes eight times: what it let through."""
    student = tiny_model(layers=1, hidden_dropout_prob=share)
    data = rows(student, count=1) * 8
    kept: list[torch.Tensor] = []
    student.bert.embeddings.dropout.register_forward_hook(lambda module, given, out: kept.append(out != 0))
    settings = {"per_device_train_batch_size": 8 // processes()}
    _, logs, seen = trained(trainer_of(folder, student, None, data, TERMS["labels"], **settings))
    return {"kept": kept[0]}, logs, seen


class SpoilsARow(OnlineTeacher):
    """A teacher whose output is nan for one row."""

    def __init__(self, model: PreTrainedModel, row: torch.Tensor):
        super().__init__(model)
        self.row = row

    def signals(self, batch: Any, *args: Any, **kwargs: Any) -> Signals:
        found = super().signals(batch, *args, **kwargs)
        spoilt = (batch["input_ids"] == self.row).all(-1, keepdim=True)
        return replace(found, logits=found.logits.masked_fill(spoilt, torch.nan))


def of_skips(folder: Path, row: float) -> Learned:
    """Four steps with a teacher that spoils one row, so one process alone sees it; that step is skipped."""
    head = "sequence-classification"
    teacher, student = model_of(head, layers=2), model_of(head, layers=1, seed=1)
    data = rows(teacher, count=32)
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "logging_steps": 2, "on_nonfinite": "skip"}
    settings |= {"per_device_train_batch_size": 8 // processes()}
    source = SpoilsARow(teacher, data[int(row)]["input_ids"])
    trainer = trainer_of(folder, student, source, data, LOSSES["both"], **settings)
    weights, logs, seen = trained(trainer)
    skipped = sum(log.get("skipped_steps", 0) for log in trainer.state.log_history)
    return {**weights, "skipped": torch.tensor(float(skipped))}, logs, seen
