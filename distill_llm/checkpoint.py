"""Loading models, pruned or not, with a check that every weight came from the checkpoint."""

import os
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from distill_llm.data.tasks import Task
from distill_llm.errors import InputError
from distill_llm.pruning.modeling_pruned import STOCK_PREFIX, pruned_class


def load_pretrained(model: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a model with the head it was saved with, pruned or stock, and refuse it unless every weight was in the checkpoint.

    Args:
        model: a local folder or a Hub id.
        kwargs: as for `from_pretrained` (`dtype`, `device_map`, ...). The dtype is the checkpoint's unless given.

    Raises:
        InputError: if the config names no model class, or a key is missing, unexpected or of another size.
    """
    config = AutoConfig.from_pretrained(model)
    if not config.architectures:
        raise InputError("model", str(model), "a checkpoint whose config.json names its class under `architectures`")
    name = config.architectures[0]
    stock = getattr(transformers, name.removeprefix(STOCK_PREFIX), None)
    if stock is None:
        raise InputError("model", name, "a class of the installed transformers, or a pruned one made here")
    model_class = pruned_class(stock) if name.startswith(STOCK_PREFIX) else stock
    loaded, info = _load(model_class, model, config=config, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(
                "model", str(model), f"a checkpoint with all of the model's weights ({kind.replace('_', ' ')}: {shown})"
            )
    return loaded


def _load(model_class: type[PreTrainedModel], model: str | os.PathLike, **kwargs: Any) -> tuple[PreTrainedModel, dict]:
    """A model and its loading report."""
    try:
        both: Any = model_class.from_pretrained(model, output_loading_info=True, **kwargs)
        return both
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError("model", str(model), "a checkpoint with weights of the sizes in its config.json") from None


def name_labels(config: PreTrainedConfig, task: Task) -> None:
    """Give a config the task's labels, in place, unless its model has a head for as many with names of its own."""
    trained = any("ForSequenceClassification" in name for name in config.architectures or ())
    named = not any(str(name).startswith("LABEL_") for name in config.id2label.values())
    if task.is_language_model or (config.num_labels == task.num_labels and trained and named):
        return
    names = task.label_names or ("value",)
    config.num_labels = task.num_labels
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"


def load_for_task(model: str | os.PathLike, task: Task) -> PreTrainedModel:
    """A model with a head for a task, for training, in fp32: the checkpoint's own head where it fits, else a new one.

    A causal LM always has the checkpoint's own head: nothing good comes of a new one.

    Raises:
        InputError: if weights below the head, or of a causal LM's head, are missing from the checkpoint, or the family has
            no such head.
    """
    causal = task.kind in ("causal_lm", "prompts")
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    auto = AutoModelForMaskedLM if task.kind == "masked_lm" else auto
    config = AutoConfig.from_pretrained(model)
    stock: Any = auto._model_mapping.get(type(config), None)
    if stock is None:
        raise InputError("model", config.model_type, f"a family with a head for {task.kind}")
    fits = task.is_language_model or config.num_labels == task.num_labels
    name_labels(config, task)
    is_pruned = any(name.startswith(STOCK_PREFIX) for name in config.architectures or ())
    model_class = pruned_class(stock) if is_pruned else stock
    if fits:
        loaded, info = _load(model_class, model, config=config, dtype=torch.float32)
        missing = info["missing_keys"]
    else:  # a head of another size: take the weights below it, through the family's base model
        base: Any = AutoModel._model_mapping[type(config)]
        below, info = _load(pruned_class(base) if is_pruned else base, model, dtype=torch.float32)
        missing = {f"{model_class.base_model_prefix}.{key}" for key in info["missing_keys"]}
        weights = {f"{model_class.base_model_prefix}.{key}": value for key, value in below.state_dict().items()}
        loaded = model_class.from_pretrained(None, config=config, state_dict=weights)
    prefix = f"{model_class.base_model_prefix}."
    lost = sorted(key for key in missing if causal or (key.startswith(prefix) and ".pooler." not in key))
    if lost:
        wanted = "all weights" if causal else "the weights below the head"
        raise InputError("model", str(model), f"a checkpoint with {wanted} ({lost[0]} is missing)")
    return loaded
