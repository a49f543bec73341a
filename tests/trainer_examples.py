"""Objectives, students, rows and trainers for the tests of the trainer."""

import copy

import torch
from helpers import random_batch
from transformers import PreTrainedModel

from distill_llm.pruning.modeling_pruned import LayerLineage, pruned_class, set_lineage
from distill_llm.trainer import DistillationConfig, DistillationTrainer

TERMS = {
    "labels": {"labels": {}},
    "logits": {"logits": {"temperature": 2.0}},
    "hidden": {"hidden": {"layers": "uniform"}},
    "cosine": {"hidden": {"layers": "uniform", "distance": "cosine"}},
    "attention": {"attention": {"layers": "uniform"}},
    "attention_mse": {"attention": {"layers": "last", "distance": "mse"}},
    "all": {
        "labels": {"weight": 0.3},
        "logits": {"weight": 0.7, "divergence": "jsd"},
        "hidden": {"layers": "uniform"},
        "attention": {"layers": "uniform"},
    },
}
OPTIONS = ("processing_class", "optimizers", "model_init", "compute_loss_func")  # of the trainer, not of its arguments
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pruned_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """Layers 1 and 3 of a four-layer teacher, with some of its heads and neurons."""
    config = copy.deepcopy(teacher.config)
    set_lineage(config, [LayerLineage(1, (0, 2), tuple(range(40))), LayerLineage(3, (1, 2, 3), tuple(range(9, 64)))])
    student = pruned_class(type(teacher))(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0, 0.2)
    return student.eval()


def rows(model: PreTrainedModel, count: int = 8, length: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    batch = random_batch(model, batch=count, length=length, seed=seed)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]


def trainer_of(folder, student, teacher, data, losses, **settings) -> DistillationTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    args = DistillationConfig(output_dir=str(folder), losses=losses, **{**defaults, **settings})
    data = {"train_dataset": data, "eval_dataset": data}
    return DistillationTrainer(model=student, teacher=teacher, args=args, **data, **options)


def step_gradient(
    folder, student, teacher, data, losses, **settings
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of one optimizer step and the first log, by way of the whole Trainer."""
    found: dict[str, torch.Tensor] = {}
    student = copy.deepcopy(student)
    trainer = trainer_of(folder, student, teacher, data, losses, optim="sgd", **settings)
    step = trainer.create_optimizer().step

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        found.update({f"projection {name}": p.grad.clone() for name, p in trainer.terms.projections.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = keep
    trainer.train()
    return found, trainer.state.log_history[0]
