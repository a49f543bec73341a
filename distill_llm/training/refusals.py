"""What training refuses, each in one line, before anything is set up.

Each rule stands here once, as a function from facts to faults. `DistillationTrainer` asks it under the names of its
arguments, the door of recipes under the names of the recipe's fields.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

from accelerate.utils import DistributedType, parse_flag_from_env
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, PreTrainedModel, TrainingArguments

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.decoders import packing_faults
from distill_llm.data.masked import MaskingCollator
from distill_llm.losses.items import ITEMS, is_language_model, kind_of
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Use
from distill_llm.models.adapters import UNTIED, is_quantized, tied_adapters, without_adapters
from distill_llm.models.limits import (
    InputLimits,
    batch_faults,
    beyond_vocabulary,
    longest_prompt,
    masking_faults,
    read_rows,
    room_faults,
    row_faults,
)
from distill_llm.teachers.base import Teacher
from distill_llm.training.config import DistillationConfig

UNUSED = {
    "model_init": "leave it out: the student is given as a model, made once",
    "compute_loss_func": "leave it out: the loss is the objective of DistillationConfig",
}
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def compiling(training: Mapping[str, Any]) -> list[InputError]:
    """The fault of fields, or of an `accelerate launch`, that would compile the student: the first alone."""
    given = [(name, training[name]) for name in COMPILING if training.get(name)]
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if not given and launched.lower() != "no":
        given = [("torch_compile", f"{launched} (ACCELERATE_DYNAMO_BACKEND)")]
    fix = "leave it out: losses read values inside the student's forward, which compiled code does not run"
    return [InputError(name, value, fix=fix) for name, value in given[:1]]


def whole_copies(args: DistillationConfig) -> list[InputError]:
    """The fault of fields, or of an `accelerate launch`, that would divide the student among processes of CPUs."""
    if args.distributed_state is None or args.distributed_state.distributed_type != DistributedType.MULTI_CPU:
        return []
    given = {"fsdp": args.fsdp_plugin_args, "deepspeed": args.deepspeed}
    asked: list[tuple[str, Any]] = [(name, True) for name, value in given.items() if value]
    for name in given:
        variable = f"ACCELERATE_USE_{name.upper()}"
        asked += [(name, f"true ({variable})")] if parse_flag_from_env(variable) else []
    fix = "take ddp: accelerate divides a model among GPUs only, and each process here would train a whole copy"
    return [InputError(name, value, fix=fix) for name, value in asked[:1]]


def skipping(args: DistillationConfig) -> list[InputError]:
    """The fault of steps that are to be skipped where nothing can be looked at before they are taken."""
    if args.on_nonfinite != "skip" or args.deepspeed_plugin is None:
        return []
    fix = "set it to stop: DeepSpeed takes each step within the backward pass, before its numbers can be checked"
    return [InputError("on_nonfinite", "skip", fix=fix)]


def differentiating(args: DistillationConfig, objective: Objective) -> list[InputError]:
    """The fault of activations that are computed again, where a term differentiates the student's forward twice."""
    if not (objective.differentiates and args.activation_checkpointing):
        return []
    fix = f"set it to false, or leave out losses.{objective.differentiates[0]}: it differentiates the forward itself"
    return [InputError("activation_checkpointing", True, fix=fix)]


def tied_adapter_faults(model: Any, field: str) -> list[InputError]:
    """A fault of adapters on weights that the model has twice; `field` names what says where they go."""
    tied = tied_adapters(model)
    return [InputError(field, ", ".join(tied), UNTIED)] if tied else []


def router_faults(config: Any, field: str) -> list[InputError]:
    """A fault of a mixture of experts whose config asks its forward for a loss of its router, which no term of ours adds.

    Args:
        config: of the student.
        field: what messages call the config.
    """
    weight = getattr(config, "router_aux_loss_coef", 0.0)
    if not (getattr(config, "output_router_logits", False) and weight):
        return []
    fix = f"set it to false: the losses have no term for the router, so its loss (times {weight}) would be lost"
    return [InputError(f"{field}.output_router_logits", True, fix=fix)]


def check_model(model: Any) -> None:
    """Whether the trainer knows what the outputs of a student mean, and can train it.

    Args:
        model: a transformers model, or a PeftModel around one.

    Raises:
        InputError: another head than those of ITEMS, labels that are neither one class nor one value per item, adapters
            that lengthen the input or are on tied weights, quantised weights with nothing to train, or a router's own loss.
    """
    adapted = without_adapters(model) is not model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("model", type(model.active_peft_config).__name__, "LoRA or another adapter inside layers")
    raise_all(tied_adapter_faults(model, "model"))
    model = without_adapters(model)
    name = type(model).__name__
    if not (isinstance(model, PreTrainedModel) and name.endswith(tuple(ITEMS))):
        raise InputError("model", name, "a transformers model whose class ends in " + " or ".join(ITEMS))
    if is_quantized(model) and not adapted:
        raise InputError(
            "model", f"a quantised {name}", "a PeftModel around it (LoRA): its own weights cannot be trained"
        )
    if is_language_model(model):
        return raise_all(router_faults(model.config, "model.config"))
    labels, problem = model.config.num_labels or 0, getattr(model.config, "problem_type", None)
    if kind_of(model) == "token":
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
    classes = None if is_language_model(student) else student.config.num_labels
    single = kind_of(student) == "example" and classes == 1
    raise_all(objective.faults(Use(single_output=single, classes=classes)))


def divided_faults(whole_student: bool, sharding: str | None, field: str) -> list[InputError]:
    """The fault of a teacher that reads the student's weights, where no process has all of them.

    Args:
        whole_student: see `Teacher.whole_student`.
        sharding: what divides the student among processes; None: nothing.
        field: what names the teacher.
    """
    fix = "use DDP: this teacher reads the student's weights, which would be divided among processes"
    return [InputError(field, sharding, fix=fix)] if whole_student and sharding else []


def best_faults(teacher: Teacher | None, args: TrainingArguments) -> list[InputError]:
    """The fault of weights that are taken back at the end, where further students would keep those of the last step."""
    if teacher is None or not teacher.learners or not args.load_best_model_at_end:
        return []
    fix = "set it to false: only the student's weights would be those of its best step, not its peers'"
    return [InputError("load_best_model_at_end", True, fix=fix)]


def dispatching(prefetches: bool, args: TrainingArguments, rows: Any = None) -> list[InputError]:
    """The fault of batches that one process makes and cuts into rows for all, where a teacher adds columns that are no rows.

    Args:
        prefetches: see `Teacher.prefetches`.
        rows: of the training; where they are iterable, accelerate dispatches unless told not to.
    """
    asked = args.accelerator_config.dispatch_batches
    by_itself = asked is None and isinstance(rows, IterableDataset) and args.world_size > 1
    fix = "set dispatch_batches to false: what this teacher adds to a batch cannot be cut by rows"
    return (
        [InputError("accelerator_config", {"dispatch_batches": asked}, fix=fix)]
        if prefetches and (asked or by_itself)
        else []
    )


def rows_at_once(args: TrainingArguments) -> tuple[int, int]:
    """The rows of a micro-batch of one process, and of those that all processes have at the same time."""
    return args.train_batch_size, args.train_batch_size * args.world_size


def check_arguments(args: DistillationConfig, objective: Objective, options: Mapping[str, Any]) -> None:
    """Whether training can be exact under these arguments.

    Args:
        args: of the training.
        objective: its losses.
        options: further arguments of the trainer.

    Raises:
        InputError: names the argument.
    """
    raise_all(compiling(vars(args)) + whole_copies(args) + skipping(args) + differentiating(args, objective))
    raise_all(objective.faults(Use(rows=rows_at_once(args))))
    for name, fix in UNUSED.items():
        if options.get(name) is not None:
            raise InputError(name, type(options[name]).__name__, fix=fix)
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise_all(objective.faults(Use(reentrant="activation_checkpointing_kwargs.use_reentrant")))


def check_datasets(
    datasets: Mapping[str, Any], models: Collection[InputLimits], tokenizer: Any, collator: Any = None
) -> set[str]:
    """Whether student and teacher can read the rows: their lengths, their tokens, and whether they are packed.

    Args:
        datasets: by the name of the trainer's argument, one or several by name; None, and data sets that make their rows on the
            fly, are not read.
        models: the limits of student and teacher.
        tokenizer: of the data; where it has no token beyond a model's vocabulary, the rows' tokens are not looked at.
        collator: of the batches.

    Returns:
        The names of the arguments that have rows of several sequences.

    Raises:
        InputError: names the argument.
    """
    packed = set()
    counts = hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "__len__")
    namer = tokenizer if hasattr(tokenizer, "convert_ids_to_tokens") else None
    for limits in models:
        if isinstance(collator, MaskingCollator):
            raise_all(masking_faults(limits, collator.vocabulary, "data_collator", "masks drawn"))
        if isinstance(collator, DataCollatorWithFlattening):
            raise_all(packing_faults(limits.family, "data_collator", type(collator).__name__))
            packed |= {name for name, given in datasets.items() if given is not None}
        tokens = not counts or bool(beyond_vocabulary(limits, tokenizer))
        for name, given in datasets.items():
            several = given if isinstance(given, Mapping) else {"": given}
            for part, rows in several.items():
                field = f"{name}.{part}" if part else name
                facts = read_rows(rows, limits, tokens)
                raise_all(row_faults(limits, facts, field, namer))
                packed |= {name} if facts.packed else set()
    return packed


def check_prompts(rows: Any, models: Collection[InputLimits], new_tokens: int) -> None:
    """Whether student and teacher have room for the student's own responses behind every prompt.

    Args:
        rows: of the training, with labels at the responses.
        models: the limits of student and teacher.
        new_tokens: the most of a response.

    Raises:
        InputError: names the setting.
    """
    longest = longest_prompt(rows)
    for limits in models:
        raise_all(room_faults(limits, longest, new_tokens, "losses.responses.max_new_tokens", "train_dataset"))


def check_batch(batch: Mapping[str, Any], models: Collection[InputLimits]) -> None:
    """Whether student and teacher have positions for the rows of a batch, which may come from a data set that was not read.

    Raises:
        InputError: a row is too long.
    """
    for limits in models:
        raise_all(batch_faults(limits, batch, "input_ids"))
