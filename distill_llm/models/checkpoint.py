"""Loading models, pruned or not, with a check that every weight came from the checkpoint."""

import copy
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.configuration_pruned import STOCK_PREFIX, stock_config_class
from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modeling_pruned import pruned_class, stock_class
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.hub import check_hub_name
from distill_llm.data.tasks import Task, label_names, same_names
from distill_llm.models.adapters import adapter_folder_faults
from distill_llm.models.configs import check_own_code, class_of, code_class, open_config, readable
from distill_llm.models.exits import without_exits


def load_pretrained(model: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a model, pruned or stock, with the head it was saved with; every weight must be in the checkpoint.

    A stock checkpoint may hold more, as many on the Hub do: heads and poolers that its class does not have, or buffers that
    older versions of its layers saved (masks of GPT-2). It may not hold other weights of layers, nor more layers than its
    config.json counts. A pruned checkpoint holds its model and nothing else.

    Args:
        model: a local folder or a Hub id.
        trust_remote_code: run the code that the folder brings along, where its class is not one of transformers. The code
            of a pruned model is not run: it must be this package's.
        kwargs: as for `from_pretrained` (`dtype`, `device_map`, ...). The dtype is the checkpoint's unless given.

    Raises:
        InputError: if the config names no model class, or one whose code is not trusted, a file is missing or damaged, or a
            key is missing, unexpected or of another size.
    """
    if not os.path.exists(model):
        check_hub_name(str(model), "model", str(model), "an existing folder, or a Hub id")
    raise_all(adapter_folder_faults("model", str(model), model))
    with readable(model):
        config = open_config(model, trust_remote_code)
        model_class = class_of(model, config, trust_remote_code)
    loaded, info = _load(model_class, model, trust_remote_code, config=config, **kwargs)
    stray = info["unexpected_keys"]
    pruned = stock_class(model_class) is not model_class
    found = {**info, "unexpected_keys": stray if pruned else _weights_of_layers(loaded, stray)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in found[kind])
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(
                "model", str(model), f"a checkpoint with all of the model's weights ({kind.replace('_', ' ')}: {shown})"
            )
    return loaded


def _load(
    model_class: type[PreTrainedModel], model: str | os.PathLike, trust_remote_code: bool, **kwargs: Any
) -> tuple[PreTrainedModel, dict]:
    """A model and its loading report."""
    with readable(model):
        both: Any = model_class.from_pretrained(
            model, output_loading_info=True, trust_remote_code=trust_remote_code, **kwargs
        )
        return both


def _weights_of_layers(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """The keys of a checkpoint that belong to transformer layers, whether the config counts these layers or not.

    Keys of a module that exists and has no weights of its own are left out: such as the mask that an attention once saved.
    """
    try:
        layers = layers_of(model)
    except (AttributeError, ValueError):  # no single list of layers, such as that of an encoder with a decoder
        return []
    path = next(name for name, module in model.base_model.named_modules() if module is layers)
    found = []
    for key in keys:
        match = re.search(rf"(^|\.){re.escape(path)}\.(\d+)\.(?:(.+)\.)?\w+$", key)
        if match is None:
            continue
        modules = dict(layers[int(match[2])].named_modules()) if int(match[2]) < len(layers) else {}
        module = modules.get(match[3] or "")
        if module is None or list(module.parameters(recurse=False)):
            found.append(key)
    return found


def name_labels(
    config: PreTrainedConfig, task: Task, names: Sequence[str] | None = None, of_task: bool = False
) -> bool:
    """Set the class names of a model that is about to learn a task; returns whether the head that it has fits them.

    A head fits if it has as many outputs, with the same names (in capitals or not) or with none.

    Args:
        names: of the classes, in the task's order; None: the task's own.
        of_task: a head with as many outputs already belongs to the task and keeps its names, whatever they are.
    """
    if task.is_language_model:
        return True
    names = tuple(names or task.label_names or ("value",))
    own = label_names(config) if task.kind.has_head(config.architectures) else None
    same_count = config.num_labels == task.num_labels
    if same_count and of_task and own is not None:
        return True
    fits = same_count and (own is None or same_names(own, names))
    config.num_labels = task.num_labels
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = task.kind.problem_type
    return fits


def name_unnamed(config: PreTrainedConfig, task: Task) -> None:
    """Give the classes of a model that has no names for them (LABEL_0, LABEL_1, ...) those of the task, if these are words."""
    names = task.label_names or ()
    if len(names) != config.num_labels or label_names(config) is not None or all(map(str.isdecimal, names)):
        return
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def load_for_task(
    model: str | os.PathLike,
    task: Task,
    names: Sequence[str] | None = None,
    of_task: bool = False,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with a head for a task, for training, in fp32: the checkpoint's own head where it fits, else a new one.

    Exits of the checkpoint are left out: they belong to the body that they were trained with.

    A causal LM always has the checkpoint's own head (see `TaskKind.keeps_head`).

    Args:
        names, of_task: of the classes (see `name_labels`).
        config: of the checkpoint, where it was opened already; it stays as it is.
        trust_remote_code: as of `load_pretrained`.

    Raises:
        InputError: if weights below the head, or of a causal LM's head, are missing from the checkpoint, or the family has
            no such head.
    """
    with readable(model):
        config = open_config(model, trust_remote_code) if config is None else copy.deepcopy(config)
    stock, keeps_head = task.kind.stock_class(config), task.kind.keeps_head
    has_code = stock is None and trust_remote_code
    if has_code:
        stock = code_class(model, config, task.kind.auto_class, trust_remote_code)
    if stock is None:
        raise InputError("model", config.model_type, f"a family with a head for {task.kind.name}")
    fits = name_labels(config, task, names, of_task)
    without_exits(config)
    is_pruned = any(name.startswith(STOCK_PREFIX) for name in config.architectures or ())
    if is_pruned:
        check_own_code(model)
    model_class = pruned_class(stock) if is_pruned else stock
    if fits or has_code:  # of a model with code of its own, transformers makes the new head
        given = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": not fits}
        loaded, info = _load(model_class, model, trust_remote_code, **given)
        missing = info["missing_keys"]
    else:  # a head for other classes: take the weights below it, through the family's base model
        base: Any = AutoModel._model_mapping[stock_config_class(type(config))]
        below, info = _load(
            pruned_class(base) if is_pruned else base, model, dtype=torch.float32, trust_remote_code=False
        )
        missing = {f"{model_class.base_model_prefix}.{key}" for key in info["missing_keys"]}
        weights = {f"{model_class.base_model_prefix}.{key}": value for key, value in below.state_dict().items()}
        loaded = model_class.from_pretrained(None, config=config, state_dict=weights, trust_remote_code=False)
    prefix = f"{model_class.base_model_prefix}."
    lost = sorted(key for key in missing if keeps_head or (key.startswith(prefix) and ".pooler." not in key))
    if lost:
        wanted = "all weights" if keeps_head else "the weights below the head"
        raise InputError("model", str(model), f"a checkpoint with {wanted} ({lost[0]} is missing)")
    return loaded


def converted(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A copy of a model as `from_pretrained(dtype=...)` would load it, made tensor by tensor; the model stays as it is.

    Buffers that a checkpoint does not hold (positions, frequencies of rotary embeddings) keep their precision.
    """
    held = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()}
    with torch.no_grad():
        made = {key: tensor.to(device, dtype, copy=True) for key, tensor in held.items()}
    parameters = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    memo = {key: nn.Parameter(each, parameters[key]) if key in parameters else each for key, each in made.items()}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]
