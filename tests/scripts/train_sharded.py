"""What students learn whole in one process, or sharded over several: saved as FOLDER/PROCESSES-RANK.pt.

Usage: train_sharded.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from builders.answers import answering_trainer, prompt_rows
from builders.causal import causal_model as talker
from builders.sharding import shard_on_processors
from builders.trainers import TERMS, causal_model, rows, trainer_of
from torch.distributed.tensor import DTensor

FOLDER = Path(sys.argv[1])
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
BATCH = {"per_device_train_batch_size": 8 // PROCESSES}
found = {}


def keep(name, trainer, resume=None):
    """Train; note the weights and the logs."""
    assert trainer.is_fsdp_enabled == (PROCESSES > 1)
    trainer.train(resume_from_checkpoint=resume)
    weights = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    assert all(isinstance(weight, DTensor) == (PROCESSES > 1) for weight in weights.values())
    weights = {key: weight.full_tensor() if PROCESSES > 1 else weight for key, weight in weights.items()}
    logs = [
        {key: value for key, value in log.items() if key in ("loss", "grad_norm") or key.startswith("loss/")}
        for log in trainer.state.log_history
    ]
    found[name] = ({**weights, **dict(trainer.terms.projections.named_parameters())}, logs)


def projected(**settings):
    """A narrower student, whose hidden states go through projections."""
    student = causal_model(layers=2, seed=1, hidden_size=24, head_dim=6)
    settings = {"max_steps": 4, "max_grad_norm": 0.5, **BATCH, **settings}
    return trainer_of(FOLDER / str(PROCESSES), student, teacher, data, TERMS["all"], **settings)


def answering(share):
    """A student that learns from its own answers; one process has its answers before the other."""
    losses = {"labels": {"weight": 0.5}, "logits": {}, "responses": {"share": share, "max_new_tokens": 16}}
    student = talker()
    student.generation_config.eos_token_id = list(range(4, 40))
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "logging_steps": 1, **BATCH}
    return answering_trainer(FOLDER / "r", student, talker(num_hidden_layers=3), prompt_rows(), losses, **settings)


if PROCESSES > 1:
    shard_on_processors()
teacher = causal_model()
data = rows(teacher, count=20)
keep("clipped", projected(optim="sgd", learning_rate=0.1))
keep("adam", projected(save_strategy="steps", save_steps=2))
keep("resumed", projected(save_strategy="steps", save_steps=2), FOLDER / str(PROCESSES) / "checkpoint-2")
for share in (1.0, 0.5):
    keep(f"answering {share}", answering(share))
torch.save(found, FOLDER / f"{PROCESSES}-{os.environ.get('RANK', '0')}.pt")
