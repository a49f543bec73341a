"""Checks of training fields against the task, the rows, the device, the installed packages, and each other."""

import enum
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils as integrations
from transformers.training_args import OptimizerNames

from distill_llm.common.errors import InputError, faults_in, first_line, one_of, raise_all
from distill_llm.common.notices import tell
from distill_llm.common.precision import fast_bf16
from distill_llm.common.processes import open_processes
from distill_llm.data.tasks import Task, TaskData
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms.term import Use
from distill_llm.recipe.recipe import Recipe
from distill_llm.training.config import DistillationConfig
from distill_llm.training.mask_trainer import masked_training_faults
from distill_llm.training.refusals import (
    compiling,
    differentiating,
    dispatching,
    divided_faults,
    rows_at_once,
    skipping,
    whole_copies,
)

Stage = Literal["teacher", "masks", "recovery", "final", "quantized"]

MEANT = {"adam": "adamw_torch", "adamw": "adamw_torch", "adamw_hf": "adamw_torch"}
"""What people mean by some names of optimizers, whose nearest name by spelling is another one."""

OPTIMIZER_PACKAGES = (
    ("adamw_torch_[48]bit", "torchao"),
    ("adamw_torch_xla", "torch_xla"),
    ("adamw_torch_npu_fused", "torch_npu"),
    ("adamw_anyprecision", "torchdistx"),
    ("galore_.*", "galore_torch"),
    (".*lomo", "lomo_optim"),
    ("grokadamw", "grokadamw"),
    ("schedule_free_.*", "schedulefree"),
    ("apollo_.*", "apollo_torch"),
    ("stable_adamw", "optimi"),
    ("ademamix.*|lion_.*|paged_.*|rmsprop_bnb.*|.*_8bit", "bitsandbytes"),
)
"""Patterns of optimizer names with the package that each needs; the first match counts. All others are part of torch."""

OPTIMIZER_FIELDS = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE_FIELDS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")

CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


def check_training(recipe: Recipe, data: TaskData | None, widths: tuple[int, int] | None = None) -> None:
    """Check the training fields of every stage, by making the `DistillationConfig` that the stage will use.

    Args:
        data: the task's rows. None, if they could not be read, skips the checks that depend on them.
        widths: widths of the hidden states of student and teacher, if projections bridge the difference.

    Raises:
        InputError: one line per fault, named by the section that has the field.
    """
    stages: list[Stage] = ["teacher"] if recipe.teacher.train is not None else []
    if recipe.distillation is not None:
        stages += ["masks"] if recipe.pruning is not None and recipe.pruning.masks is not None else []
        stages += ["recovery"] if recipe.pruning is not None and recipe.pruning.rounds > 1 else []
        stages.append("final")
        stages += ["quantized"] if recipe.quantize is not None and recipe.quantize.train is not None else []
    faults: dict[str, InputError] = {}
    kind = data.task.kind.item if data is not None else None
    for stage in stages:
        try:
            args = _check_stage(recipe, stage, data)
            if stage == "teacher":
                keeps = isinstance(recipe.teacher.checkpoints, int)
                raise_all(divided_faults(keeps, sharding_of(args), "teacher.checkpoints"))
            if stage != "teacher" and recipe.distillation is not None:
                use = Use(rows=rows_at_once(args))
                raise_all(recipe.distillation.losses.faults(use, "distillation.losses"))
                _check_sharding(recipe, Use(widths=widths, sharding=sharding_of(args), kind=kind))
        except InputError as error:
            faults |= {str(fault): fault for fault in faults_in(error)}
    raise_all(list(faults.values()))


def sharding_of(args: TrainingArguments) -> Literal["DeepSpeed", "FSDP1", "FSDP2"] | None:
    """What shards a model in training over processes, as `accelerate launch` or the arguments say; None: it is not sharded."""
    if args.deepspeed_plugin is not None:
        return "DeepSpeed"
    given, launched = args.fsdp_plugin_args, parse_flag_from_env("ACCELERATE_USE_FSDP")
    whole = args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if whole or not (given or launched):
        return None
    version = given["fsdp_version"] if given else int(os.environ.get("FSDP_VERSION", 1))
    return "FSDP1" if version == 1 else "FSDP2"


def _check_sharding(recipe: Recipe, use: Use) -> None:
    """Check that everything that learns can be sharded in this way."""
    sharding = use.sharding
    if sharding is None or recipe.distillation is None:
        return
    losses, faults = recipe.distillation.losses, []
    if recipe.student is not None and recipe.student.peft is not None:
        faults.append(InputError("student.peft", sharding, fix="use DDP: adapters cannot be sharded here"))
    for name in ("moving_average", "peers"):
        faults += divided_faults(getattr(recipe.teacher, name) is not None, sharding, f"teacher.{name}")
    if recipe.pruning is not None and recipe.pruning.masks is not None:
        faults.append(InputError("pruning.masks", sharding, fix="use DDP: masks read whole layers"))
    if recipe.pruning is not None and recipe.pruning.weights is not None:
        faults.append(InputError("pruning.weights", sharding, fix="use DDP: zeros are kept in whole weights only"))
    raise_all(faults + losses.faults(use, "distillation.losses"))


def _check_stage(recipe: Recipe, stage: Stage, data: TaskData | None) -> DistillationConfig:
    where, training = _given(recipe, stage), recipe.training(stage)
    faults = _choices(training) + compiling(training)
    if not faults:
        faults += _installed(training) + ([] if data is None else _evaluation(training, data)) + _precision(training)
    for name in CONFIG_FILES:
        value = training.get(name)
        if isinstance(value, str) and value and not value.startswith("{") and not Path(value).is_file():
            faults.append(InputError(name, value, "a mapping, or an existing JSON file"))
    later = [name for name in ("quantize.train", "pruning.masks.train", "final") if name in where.values()]
    section = "teacher.train" if stage == "teacher" else later[0] if later else "distillation"

    def named(faults: list[InputError]) -> list[InputError]:
        return [f.renamed(f"{where.get(f.field, section)}.{f.field}") for f in faults]

    raise_all(named(faults))
    losses: dict[str, Any] = {"labels": {}}
    if stage != "teacher" and recipe.distillation is not None:
        losses = recipe.distillation.losses.model_dump(mode="json", exclude_none=True)
    try:
        open_processes(training["use_cpu"], training.get("ddp_backend"), training["ddp_timeout"])
        args = DistillationConfig(output_dir=str(recipe.output_dir), losses=losses, **training)
    except Exception as error:  # each integration raises its own kinds of errors
        raise _together(error, where, training, section) from None
    adds = recipe.teacher.cache is not None or recipe.teacher.server is not None or recipe.teacher.is_own
    faults = whole_copies(args) + skipping(args) + differentiating(args, parse_objective(losses))
    faults += masked_training_faults(args) if stage == "masks" else []
    raise_all(named(faults + dispatching(adds and stage != "teacher", args)))
    for make, likely in ((_optimizer, OPTIMIZER_FIELDS), (_schedule, SCHEDULE_FIELDS)):
        try:
            make(args)
        except Exception as error:
            raise _together(error, where, training, section, likely) from None
    kwargs: Any = args.activation_checkpointing_kwargs or {}
    if kwargs.get("use_reentrant"):
        name = next(n for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if n in where)
        raise_all(parse_objective(losses).faults(Use(reentrant=f"{where[name]}.{name}.use_reentrant")))
    return args


def _optimizer(args: TrainingArguments) -> None:
    """Make the optimizer with one parameter. Optimizers that need the whole model are skipped."""
    if re.search("galore|apollo|lomo", OptimizerNames(args.optim).value) or args.deepspeed:
        return
    make, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    settings.pop("optimizer_dict", None)
    make([torch.nn.Parameter(torch.zeros(1))], **settings)


def _schedule(args: TrainingArguments) -> None:
    """Make the schedule of the learning rate."""
    optimizer, settings = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), args.lr_scheduler_kwargs
    get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10, settings)  # type: ignore[arg-type]


def _given(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """The fields that the recipe sets for a stage, each with its section."""
    if stage == "teacher":
        return dict.fromkeys(recipe.teacher.train or {}, "teacher.train")
    own = (recipe.distillation.model_extra if recipe.distillation else None) or {}
    found = {
        **dict.fromkeys(own, "distillation"),
        **dict.fromkeys({} if stage in ("masks", "recovery") else recipe.final, "final"),
    }
    if stage == "masks" and recipe.pruning is not None and recipe.pruning.masks is not None:
        found |= dict.fromkeys(recipe.pruning.masks.train, "pruning.masks.train")
    later = recipe.quantize.train if recipe.quantize is not None and stage == "quantized" else None
    return found | dict.fromkeys(later or {}, "quantize.train")


def _together(
    error: Exception,
    where: Mapping[str, str],
    training: Mapping[str, Any],
    section: str,
    likely: tuple[str, ...] = (),
) -> InputError:
    """A fault for fields that contradict each other: those that the error mentions, else the likely ones."""
    accepted = f"values that TrainingArguments accepts together ({first_line(error)})"
    named = [name for name in dict.fromkeys(re.findall(r"\w+", str(error))) if name in where]
    named = named or [name for name in likely if name in where]
    if len(named) == 1:
        return InputError(f"{where[named[0]]}.{named[0]}", training[named[0]], accepted)
    return InputError(
        section, {name: training[name] for name in named} or "fields that contradict each other", accepted
    )


def _choices(training: Mapping[str, Any]) -> list[InputError]:
    """Faults of fields of TrainingArguments that accept one of a few words."""
    hints, faults = typing.get_type_hints(TrainingArguments), []
    for field in fields(TrainingArguments):
        value = training.get(field.name)
        kinds = [k for k in (hints[field.name], *typing.get_args(hints[field.name])) if isinstance(k, type)]
        words = [str(member.value) for kind in kinds if issubclass(kind, enum.Enum) for member in kind]
        words = words or [str(word) for word in field.metadata.get("choices") or ()]
        is_word = isinstance(value, str) or (isinstance(value, bool) and bool not in kinds)
        if is_word and words and value not in words:
            accepted = one_of(words, MEANT.get(str(value), str(value)))
            faults.append(InputError(field.name, value, accepted))
    return faults


def _installed(training: Mapping[str, Any]) -> list[InputError]:
    """Faults of fields that need a package that is not installed."""
    faults, optimizer = [], str(training.get("optim", ""))
    package = next((package for names, package in OPTIMIZER_PACKAGES if re.fullmatch(names, optimizer)), None)
    if package is not None and find_spec(package) is None:
        faults.append(InputError("optim", optimizer, fix=f"set it to adamw_torch, or install {package}"))
    if training.get("deepspeed") and find_spec("deepspeed") is None:
        faults.append(InputError("deepspeed", training["deepspeed"], fix="install deepspeed, or leave this field out"))
    reporters = training["report_to"]
    for name in reporters if isinstance(reporters, list) else [reporters]:
        known = ("none", "all", *integrations.INTEGRATION_TO_CALLBACK)
        if name not in known:
            faults.append(InputError("report_to", name, one_of(known, str(name))))
        elif name not in ("none", "all") and name not in (installed := _reporters()):
            words = one_of(("none", "all", *installed))
            faults.append(InputError("report_to", name, f"{words} ({name} is not installed or not set up)"))
    return faults


def _reporters() -> list[str]:
    """Integrations that are installed and set up here. transformers lists all but two; these are added."""
    found = set(integrations.get_available_reporting_integrations())
    found |= {"azure_ml"} if integrations.is_azureml_available() else set()
    found |= {"flyte"} if integrations.is_flytekit_available() else set()
    return sorted(found)


def _evaluation(training: Mapping[str, Any], data: TaskData) -> list[InputError]:
    """Faults of evaluation during training: no held-out rows, or a metric that the task does not have."""
    faults: list[InputError] = []
    best = {"load_best_model_at_end": True, "save_strategy": "best"}
    chosen = [name for name, value in best.items() if training.get(name) == value]
    evaluates = [
        name for name, off in (("eval_strategy", "no"), ("eval_on_start", False)) if training.get(name, off) != off
    ]
    if data.validation is None and (evaluates or chosen):
        name = (evaluates or chosen)[0]
        off = {"eval_strategy": "no", "save_strategy": "no, steps or epoch"}.get(name, "false")
        fix = f"set it to {off}, or set data.holdout_examples, for rows to evaluate on"
        faults.append(InputError(name, training[name], fix=fix))
    elif chosen and training["eval_strategy"] == "no":
        fix = "set eval_strategy to steps or epoch too, or leave this field out"
        faults.append(InputError(chosen[0], training[chosen[0]], fix=fix))
    metric, known = training.get("metric_for_best_model"), _metrics(data.task)
    if metric is not None and metric.removeprefix("eval_") not in known:
        faults.append(InputError("metric_for_best_model", metric, one_of(known, metric)))
    return faults


def _metrics(task: Task) -> list[str]:
    """The metrics of an evaluation during training."""
    return ["loss", *(() if task.is_language_model else task.metrics)]


def _precision(training: Mapping[str, Any]) -> list[InputError]:
    """Faults of precisions that this device cannot train in."""
    gpu = torch.accelerator.is_available() and not training["use_cpu"]
    if training.get("fp16") and not gpu:
        return [InputError("fp16", True, fix="set it to false: a CPU cannot train in it (bf16 works)")]
    if training.get("bf16") and not gpu and not fast_bf16(torch.device("cpu")):
        tell(
            "bf16: true on a CPU without instructions for it is many times slower than fp32; bf16: auto lets the device decide"
        )
    if training.get("bf16") and gpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return [InputError("bf16", True, fix="set it to false: this GPU cannot train in it (fp16 works)")]
    return []
