"""The TrainingArguments fields of a recipe, checked without torch, and this project's defaults for them."""

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill_llm.common.errors import InputError, one_of
from distill_llm.common.finite import ON_NONFINITE
from distill_llm.common.precision import AUTO, fast_bf16

RESERVED = {
    "output_dir": "set output_dir at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "do_train": "remove it: the run decides which stage trains",
    "do_eval": "remove it: every stage is evaluated",
    "do_predict": "remove it: every stage is evaluated",
    "resume_from_checkpoint": "remove it: the same command, run again, continues where it stopped",
    "push_to_hub": "add a hub section, or use `distill-llm push`",
    "hub_model_id": "set hub.repo_id",
    "hub_private_repo": "set hub.private",
    "hub_token": "remove it: a token does not belong in a recipe; log in with `hf auth login`",
    "local_rank": "remove it: `accelerate launch` sets it",
    "ignore_data_skip": "remove it: a stopped run continues with the rows that it has not seen",
    "save_only_model": "remove it: a stopped run also needs the optimizer's state to continue",
}
"""Fields of TrainingArguments that a recipe may not set, and what to do instead."""

OWN = {"on_nonfinite": ON_NONFINITE}
"""Fields of `DistillationConfig` that a recipe may set besides, with the words that they take."""

RENAMED = {
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "evaluation_strategy": "write eval_strategy",
    "warmup_ratio": "write warmup_steps with a number below 1",
    "no_cuda": "write use_cpu",
}
"""Fields of earlier versions of transformers, and how to say the same now."""

MINIMUM = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "dataloader_num_workers": 0,
    "num_train_epochs": 0,
    "save_total_limit": 2,
}
"""Smallest sensible values. A smaller one would fail late, train nonsense or leave no checkpoint to resume from."""

TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 0.25,  # a share of all steps: four checkpoints in a training
    "save_total_limit": 2,
    "logging_steps": 0.05,
    "eval_strategy": "no",
    "ddp_timeout": 86400,  # seconds: the other processes wait while the first one prunes
}
"""What a stage is trained with if the recipe does not say otherwise."""

NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


@cache
def training_fields() -> dict[str, tuple[str, ...]]:
    """Names of the fields of the installed `transformers.TrainingArguments`, each with the types of its annotation.

    Read from the source of the class: importing it takes seconds, as it imports torch.
    """
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {
        node.target.id: tuple(part.strip() for part in ast.unparse(node.annotation).split("|"))
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(node.annotation)
    }


def check_training_fields(
    given: Mapping[str, Any], also: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[InputError]]:
    """Check names and values that are meant for TrainingArguments.

    Args:
        given: field name to value, as read from YAML.
        also: other names that are known in the same section, to suggest the nearest one from.

    Returns:
        The fields with their values converted (text such as `5e-5` to a number), and one InputError per fault.
    """
    known, clean, faults = training_fields(), {}, []
    for name, value in ((str(name), value) for name, value in given.items()):
        if name in RESERVED:
            faults.append(InputError(name, value, fix=RESERVED[name]))
        elif name in OWN:
            clean[name] = value
            if value not in OWN[name]:
                faults.append(InputError(name, value, one_of(OWN[name], str(value))))
        elif name not in known and name in RENAMED:
            faults.append(InputError(name, value, fix=RENAMED[name]))
        elif name not in known:
            # TrainingArguments has over a hundred fields: only the nearest is worth naming.
            near = get_close_matches(name, [*also, *OWN, *(set(known) - set(RESERVED))], n=1)
            accepted = [f"{near[0]!r} (the nearest)"] if near else []
            faults.append(InputError(name, value, " or ".join([*accepted, *also, "a field of TrainingArguments"])))
        else:
            try:
                clean[name] = _convert(name, value, known[name])
            except InputError as fault:
                faults.append(fault)
    return clean, faults


def _convert(name: str, value: Any, types: tuple[str, ...]) -> Any:
    """`value` as the first plain type of the field that it fits; unchanged if the annotation also has other types."""
    if value is False and name.endswith("_strategy"):
        value = "no"  # YAML 1.1 reads a bare no as false
    if name == "bf16" and value == AUTO:
        return value
    given, plain = value, [kind for kind in types if kind in TYPES]
    if value is None and "None" in types:
        return None
    if len(plain) + ("None" in types) == len(types):
        # An on/off word must not pass as a number, nor a number as text.
        if isinstance(value, bool) and "bool" not in plain:
            plain = []
        for kind in plain:
            try:
                value = TypeAdapter(TYPES[kind]).validate_python(value)
                break
            except ValidationError:
                continue
        else:
            raise InputError(name, value, " or ".join(NOUNS[kind] for kind in types if kind in NOUNS))
    if isinstance(value, float) and not isfinite(value):
        raise InputError(name, given, "a finite number")
    low = MINIMUM.get(name)
    if low is not None and isinstance(value, (int, float)) and not value >= low:
        raise InputError(name, given, f"a number of at least {low}")
    if name == "label_smoothing_factor" and value >= 1:
        raise InputError(name, given, "a number of at least 0 and below 1")
    if name == "max_steps" and value < 1 and value != -1:
        raise InputError(name, given, "a whole number of at least 1, or -1 for no limit")
    return value


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields of a stage, with this project's defaults for the fields that are not given.

    `use_cpu` is true where torch finds no accelerator, `bf16: auto` where the device is fast in bf16. With
    `load_best_model_at_end`, checkpoints are saved whenever the model is evaluated, unless `save_strategy` or `save_steps`
    is given.
    """
    fields = {**TRAINING_DEFAULTS, **given}
    if "use_cpu" not in fields:
        import torch

        fields["use_cpu"] = not torch.accelerator.is_available()
    if fields.get("bf16") == AUTO:
        import torch

        fields["bf16"] = fast_bf16(torch.device("cpu") if fields["use_cpu"] else None)
    if fields.get("load_best_model_at_end") and fields["eval_strategy"] != "no":
        fields["save_strategy"] = given.get("save_strategy", fields["eval_strategy"])
        fields["save_steps"] = given.get("save_steps", fields.get("eval_steps") or fields["logging_steps"])
    return fields
