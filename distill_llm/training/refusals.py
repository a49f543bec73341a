"""What `DistillationTrainer` refuses, each in one line, before anything is set up."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.items import kind_of
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Use
from distill_llm.models.adapters import UNTIED, is_quantized, tied_adapters, without_adapters
from distill_llm.teachers.base import Teacher

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForCausalLM", "GPT2LMHeadModel")
UNUSED = {
    "model_init": "None: the student is given as a model, made once",
    "compute_loss_func": "None: the loss is the objective of DistillationConfig",
}
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def check_model(model: Any) -> None:
    """Whether the trainer knows what the outputs of a student mean, and can train it.

    Args:
        model: a transformers model, or a PeftModel around one.

    Raises:
        InputError: another head than those of HEADS, labels that are neither one class nor one value per item, adapters
            that lengthen the input or are on tied weights, or quantised weights with nothing to train.
    """
    adapted = without_adapters(model) is not model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("model", type(model.active_peft_config).__name__, "LoRA or another adapter inside of layers")
    if tied := tied_adapters(model):
        raise InputError("model", f"adapters on {', '.join(tied)}", UNTIED)
    model = without_adapters(model)
    name = type(model).__name__
    if not (isinstance(model, PreTrainedModel) and name.endswith(HEADS)):
        raise InputError("model", name, "a transformers model whose class ends in " + " or ".join(HEADS))
    if is_quantized(model) and not adapted:
        raise InputError(
            "model", f"a quantised {name}", "a PeftModel around it (LoRA): its own weights cannot be trained"
        )
    if name.endswith("ForMaskedLM") or kind_of(model) == "next_token":
        return
    labels, problem = model.config.num_labels or 0, getattr(model.config, "problem_type", None)
    if name.endswith("ForTokenClassification"):
        if labels == 1:
            raise InputError("model.config.num_labels", 1, "2 or more classes per token")
    elif problem == "multi_label_classification":
        accepted = "single_label_classification, or regression with one output: an example has one label"
        raise InputError("model.config.problem_type", problem, accepted)
    elif problem == "regression" and labels > 1:
        raise InputError("model.config.num_labels", labels, "1 for a regression: an example has one value")


def check_teacher(teacher: Teacher | None, student: PreTrainedModel, objective: Objective) -> None:
    """Whether there is a teacher where the objective needs one, with a divergence that fits the outputs.

    Args:
        teacher: may be None where the objective needs none.
        student: without its adapters.
        objective: what is to be learned.

    Raises:
        InputError: no teacher, terms that it has no signals for, a divergence of probabilities of a single output.
    """
    if teacher is not None:
        raise_all(objective.faults(Use(teacher=teacher.gives)))
    if objective.needs_teacher and teacher is None:
        terms = [name for name, term in objective.terms().items() if term.needs_teacher]
        raise InputError("teacher", None, f"a model, since the objective has {', '.join(terms)}")
    single = type(student).__name__.endswith("ForSequenceClassification") and student.config.num_labels == 1
    for fault in objective.faults(Use(single_output=single)):
        raise fault


def check_arguments(args: TrainingArguments, objective: Objective, options: Mapping[str, Any]) -> None:
    """Whether training can be exact under these arguments.

    Args:
        args: of the training.
        objective: its losses.
        options: further arguments of the trainer.

    Raises:
        InputError: names the argument.
    """
    for fault in compiling(vars(args)):
        raise fault
    for name, accepted in UNUSED.items():
        if options.get(name) is not None:
            raise InputError(name, type(options[name]).__name__, accepted)
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        for fault in objective.faults(Use(reentrant="activation_checkpointing_kwargs.use_reentrant")):
            raise fault


def compiling(training: Mapping[str, Any]) -> list[InputError]:
    """The fault of fields, or of an `accelerate launch`, that would compile the student: the first alone."""
    given = [(name, training[name]) for name in COMPILING if training.get(name)]
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if not given and launched.lower() != "no":
        given = [("torch_compile", f"{launched} (ACCELERATE_DYNAMO_BACKEND)")]
    accepted = "nothing: losses look into the student's forward, which compiled code would pass by"
    return [InputError(name, value, accepted) for name, value in given[:1]]
