"""What `DistillationTrainer` refuses, each in one line, before anything is set up."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from distill_llm.errors import InputError
from distill_llm.losses.items import kind_of
from distill_llm.losses.objective import Objective

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForCausalLM", "GPT2LMHeadModel")
UNUSED = {
    "model_init": "None: the student is given as a model, made once",
    "compute_loss_func": "None: the loss is the objective of DistillationConfig",
}


def check_model(model: Any) -> None:
    """Whether the trainer knows what the outputs of a student mean.

    Raises:
        InputError: another head than those of HEADS, or labels that are neither one class nor one value per item.
    """
    name = type(model).__name__
    if not (isinstance(model, PreTrainedModel) and name.endswith(HEADS)):
        raise InputError("model", name, "a transformers model whose class ends in " + " or ".join(HEADS))
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


def check_teacher(teacher: Any, student: PreTrainedModel, objective: Objective) -> None:
    """Whether there is a teacher where the objective needs one, with a divergence that fits the outputs.

    Raises:
        InputError: no teacher, something that is no model, a divergence of probabilities of a single output.
    """
    if teacher is not None and not isinstance(teacher, PreTrainedModel):
        raise InputError("teacher", type(teacher).__name__, "a transformers model, or None")
    if objective.needs_teacher and teacher is None:
        terms = [name for name in objective.terms() if name != "labels"]
        raise InputError("teacher", None, f"a model, since the objective has {', '.join(terms)}")
    single = type(student).__name__.endswith("ForSequenceClassification") and student.config.num_labels == 1
    if single and objective.logits and objective.logits.divergence != "mse":
        accepted = "mse, for a student with a single output"
        raise InputError("losses.logits.divergence", objective.logits.divergence, accepted)


def check_arguments(args: TrainingArguments, objective: Objective, options: Mapping[str, Any]) -> None:
    """Whether training can be exact under these arguments.

    Args:
        args: of the training.
        objective: its losses.
        options: further arguments of the trainer.

    Raises:
        InputError: names the argument.
    """
    for name, accepted in UNUSED.items():
        if options.get(name) is not None:
            raise InputError(name, type(options[name]).__name__, accepted)
    if args.n_gpu > 1:
        raise InputError("args", f"{args.n_gpu} devices in one process", "a process per device: accelerate launch")
    if args.save_only_model:
        accepted = (
            "false: without the optimizer a checkpoint cannot be resumed exactly; save_model() saves the student alone"
        )
        raise InputError("save_only_model", True, accepted)
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        for name in objective.terms():
            if name in ("attention", "relations"):
                raise InputError("activation_checkpointing_kwargs.use_reentrant", True, f"false with losses.{name}")
