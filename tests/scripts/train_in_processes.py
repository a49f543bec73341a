"""What students learn in one process or in several, of the same global batches: saved as FOLDER/PROCESSES-RANK.pt.

Usage: train_in_processes.py FOLDER CASES, where CASES is JSON: [[head, width of the student, [name, ...]], ...]
"""

import json
import os
import sys
from pathlib import Path

import torch
from builders.answers import answering_trainer, prompt_rows
from builders.causal import causal_model as talker
from builders.trainers import TERMS, cached, model_of, rows, trainer_of, with_lora

TERMS = TERMS | {"both": {"labels": {}, "logits": {}}}
FOLDER = Path(sys.argv[1])
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def trained(trainer):
    """Weights, logged losses, and the number of labels in each batch that this process saw."""
    seen, loss = [], trainer.loss

    def counting(model, batch, *rest):
        seen.append(int((batch["labels"] >= 0).sum()))
        return loss(model, batch, *rest)

    trainer.loss = counting
    trainer.train()
    trainer.loss = loss
    history = [log for log in trainer.state.log_history if "loss" in log]
    logs = [{name: value for name, value in log.items() if name.startswith("loss")} for log in history]
    projections = trainer.terms.projections.state_dict(prefix="projection.")
    return {**trainer.model.state_dict(), **projections}, logs, seen


def of_rows(head, width, name):
    """Four steps on labelled rows, and the loss of evaluation afterwards."""
    teacher = model_of(head, layers=4)
    tied = {"tie_word_embeddings": True} if "tied" in name else {}
    student = model_of(head, layers=2, seed=1, hidden=width, **tied)
    if "lora" in name:
        student = with_lora(student)
    data = rows(teacher, count=32 if "one rank" in name else 20)
    trainer = trainer_of(
        FOLDER,
        student,
        cached(FOLDER / "cache", teacher, data, k=20) if "cached" in name else teacher,
        data,
        TERMS[name.split()[0]],
        ddp_find_unused_parameters=False if "strict" in name else None,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        per_device_eval_batch_size=8 if PROCESSES == 1 else 3,  # of two, the last process only repeats rows at the end
        per_device_train_batch_size=8 // PROCESSES,
        train_sampling_strategy="group_by_length",
        logging_steps=2,
    )
    if "one rank" in name:  # of each global batch the first four rows are rank 0's, the others rank 1's
        order = list(trainer._get_train_sampler())
        for start in range(4, 32, 8):
            for index in order[start : start + 4]:
                data[index]["labels"].fill_(-100)
    assert (trainer.loss.head_terms is not None) == (head != "sequence-classification" and name != "hidden")
    weights, logs, seen = trained(trainer)
    logs[-1]["eval_loss"] = trainer.evaluate()["eval_loss"]
    return weights, logs, seen


def of_answers(share):
    """Four steps on the student's own answers, which are of uneven length."""
    student = talker()
    student.generation_config.eos_token_id = list(range(4, 70))
    losses = {"labels": {}, "logits": {}, "responses": {"share": share, "max_new_tokens": 6}}
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "logging_steps": 2}
    settings |= {"per_device_train_batch_size": 4 // PROCESSES, "gradient_accumulation_steps": 2}
    return trained(answering_trainer(FOLDER, student, talker(num_hidden_layers=3), prompt_rows(), losses, **settings))


found = {}
for head, width, names in json.loads(sys.argv[2]):
    for name in names:
        found[f"{head} {name}"] = of_answers(float(name)) if head == "answers" else of_rows(head, width, name)
torch.save(found, FOLDER / f"{PROCESSES}-{os.environ.get('RANK', '0')}.pt")
