"""Loading models, pruned or not, with a check that every weight came from the checkpoint."""

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

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
    return load_checked(model_class, model, config=config, **kwargs)


def load_checked(
    model_class: type, model: str | os.PathLike, *, fresh: tuple[str, ...] = (), **kwargs: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained`, refused unless the checkpoint and the model agree on every key and size.

    Args:
        model_class: a model class or an auto class.
        fresh: prefixes of keys that may be newly initialised or unused, such as a new task head.

    Raises:
        InputError: naming the first keys that are missing, unexpected or of another size.
    """
    loaded, info = model_class.from_pretrained(model, output_loading_info=True, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key if isinstance(key, str) else key[0] for key in info[kind]]
        keys = sorted(key for key in keys if not key.startswith(fresh or ("\0",)))
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(
                "model", str(model), f"a checkpoint with all of the model's weights ({kind.replace('_', ' ')}: {shown})"
            )
    return loaded


def is_local(model: str) -> bool:
    """Whether a model's name is a folder on this machine."""
    return Path(model).is_dir()
