"""Objectives, students, rows and trainers for the tests of the trainer."""

import copy
from typing import Any

import pytest
import torch
from builders.models import random_batch, tiny_model
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, default_data_collator

from distill_llm.architectures.lineage import LayerPlan, ModelPlan, packed
from distill_llm.architectures.modeling_pruned import pruned_class
from distill_llm.losses import chunked_head
from distill_llm.losses.items import kind_of
from distill_llm.teachers import CachedTeacher, OnlineTeacher
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.training import loss as training_loss
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer

TERMS = {
    "labels": {"labels": {}},
    "logits": {"logits": {"temperature": 2.0}},
    "dkd": {"logits": {"divergence": "dkd", "temperature": 2.0, "beta": 0.5}},
    "hidden": {"hidden": {"layers": "uniform"}},
    "cosine": {"hidden": {"layers": "uniform", "distance": "cosine"}},
    "attention": {"attention": {"layers": "uniform"}},
    "attention_mse": {"attention": {"layers": "last", "distance": "mse"}},
    "gradients": {"labels": {}, "gradients": {}},
    "gathered": {name: {"over": "processes"} for name in ("rkd_distance", "rkd_angle", "similarity", "correlation")},
    "stages": {
        "labels": {"weight": {"start": 0, "end": 0.5, "schedule": "constant", "share": 0.5}},
        "logits": {"weight": {"start": 0, "end": 1, "schedule": "constant", "share": 0.75}},
        "hidden": {"layers": "uniform", "weight": {"start": 1, "end": 0, "schedule": "constant", "share": 0.5}},
    },
    "remembered": {
        "contrast": {"queue": 12, "layers": "uniform"},
        "qud": {"queue": 12, "adapter": "interpolation"},
        "adadistill": {"scale": 8.0, "layers": [[0, 1], [1, 3]], "hard": True},
    },
    "all": {
        "labels": {"weight": {"start": 0.3, "end": 0.1, "share": 0.5}},
        "logits": {"weight": 0.7, "divergence": "jsd", "temperature": {"start": 2, "end": 1, "schedule": "cosine"}},
        "embeddings": {"distance": "normalized_mse"},
        "hidden": {"layers": "uniform"},
        "attention": {"layers": "uniform"},
        "relations": {"layers": "last", "heads": 4},
    },
}
OPTIONS = (
    "processing_class",
    "data_collator",
    "optimizers",
    "model_init",
    "compute_loss_func",
    "callbacks",
)  # of the trainer, not of its arguments
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Vocabulary:
    """What a tokenizer of so many tokens says of them; every second id is none."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(1 - self.tokens % 2, self.tokens, 2)}


def student_of_rows(
    teacher: PreTrainedModel, rows: list[LayerPlan], hidden: tuple[int, ...] | None = None
) -> PreTrainedModel:
    """A pruned student with random weights that keeps these rows, and channels, of a teacher."""
    config = copy.deepcopy(teacher.config)
    stock = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
    config.pruning = packed(ModelPlan(rows, hidden=hidden), stock)
    config.num_hidden_layers = len(rows)
    student = pruned_class(type(teacher))(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0, 0.2)
    return student.eval()


def pruned_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """Layers 1 and 3 of a four-layer teacher, with some of its heads and neurons."""
    rows = [LayerPlan(1, (0, 2), tuple(range(40))), LayerPlan(3, (1, 2, 3), tuple(range(9, 64)))]
    return student_of_rows(teacher, rows)


def causal_model(family: str = "llama", layers: int = 3, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random causal LM with 4 query heads, 2 key-value heads where the family has them, and 100 tokens; eval mode."""
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    tokens = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    settings = {**sizes, **tokens, "attention_dropout": 0.0, **config}
    if family == "gpt2":
        settings |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    if family not in ("gemma2", "llama", "mistral", "qwen3", "granite"):
        settings.pop("head_dim")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def model_of(head: str, layers: int, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny model without dropout: a BERT with this head, or a Llama for `causal-lm`."""
    if head == "causal-lm":
        own = {"hidden_size" if name == "hidden" else name: value for name, value in config.items()}
        return causal_model(layers=layers, seed=seed, **own)
    return tiny_model(layers=layers, head=head, seed=seed, **NO_DROPOUT, **config)


def with_lora(model: PreTrainedModel, seed: int = 0, **settings: Any) -> Any:
    """A PeftModel around a model, with low-rank changes of queries and of an FFN layer that are not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    causal = kind_of(model) == "next_token"
    layers = ["q_proj", "up_proj"] if causal else ["query", "intermediate.dense"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return adapted.eval()


def cached(
    folder: Any, teacher: PreTrainedModel, data: list[dict[str, torch.Tensor]], **settings: Any
) -> CachedTeacher:
    """A cache of a teacher's signals of rows of tensors; `settings` are those of CacheSettings."""
    dataset = Dataset.from_list([{name: tensor.tolist() for name, tensor in row.items()} for row in data])
    settings = {"kind": kind_of(teacher), "unlabelled": kind_of(teacher) == "token", **settings}
    source = CacheSource(OnlineTeacher(teacher), dataset, default_data_collator, identity=teacher)
    write_cache(folder, source, CacheSettings(**settings), Writing(progress=False))
    return CachedTeacher(folder, teacher, dataset=dataset)


def rows(model: PreTrainedModel, count: int = 8, length: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens and labels; those of a causal LM are its tokens, but for a prompt of uneven length."""
    batch = random_batch(model, batch=count, length=length, seed=seed)
    if kind_of(model) == "next_token":
        prompt = torch.arange(length) < torch.arange(count)[:, None] % 4
        batch["labels"] = batch["input_ids"].masked_fill(prompt | (batch["attention_mask"] == 0), -100)
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


def both_ways(monkeypatch, folder, student, teacher, data, losses, **settings):
    """(gradients, log) of a step with logits made in small chunks and with logits held whole."""
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 7 * 4 * student.config.vocab_size)
    found = [step_gradient(folder, student, teacher, data, losses, **settings)]
    monkeypatch.setattr(training_loss, "output_head", lambda model: None)
    return [*found, step_gradient(folder, student, teacher, data, losses, **settings)]


def assert_same_step(found, rtol=1e-4, atol=1e-6):
    """Two (gradients, log) of a step are the same up to rounding."""
    (chunked, chunked_log), (dense, dense_log) = found
    assert chunked.keys() == dense.keys() and len(dense) > 5
    for name, gradient in dense.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=rtol, atol=atol, msg=name)
    for name in dense_log:
        if name.startswith("loss"):
            assert chunked_log[name] == pytest.approx(dense_log[name], rel=rtol)
