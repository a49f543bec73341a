"""Models given exits: classifiers get heads after some of their layers; language models read exits with their own head."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.modeling_exits import EXIT_PREFIX, exit_class, exit_fault, has_exits
from distill_llm.common.errors import InputError, raise_all
from distill_llm.models.language_exits import END, language_exit_fault, language_exits


def exit_faults(config: PreTrainedConfig, model_class: str, after: Sequence[int], field: str) -> list[InputError]:
    """The fault of exits `after` so many layers of a model.

    Args:
        model_class: the name of its class.
        field: what messages call the exits.
    """
    fault = (language_exit_fault if model_class.endswith(END) else exit_fault)(config, model_class, after)
    return [] if fault is None else [InputError(f"{field}.{fault[0]}".rstrip("."), fault[1], fault[2])]


def with_exits(model: PreTrainedModel, after: Sequence[int], field: str = "exits") -> PreTrainedModel:
    """A model with new exits, to be trained by the loss `exits`; its other outputs are the same, bit for bit.

    Of a classifier it is a copy. A language model gets no weights: it is returned itself, and its config names the exits.

    Args:
        model: a ...ForSequenceClassification of the families in EXIT_FAMILIES, or a ...ForCausalLM of DRAFTING_FAMILIES, pruned
            or not.
        after: numbers of layers that a row goes through before each exit, in rising order.
        field: what messages call the exits.

    Raises:
        InputError: another model or head, layers that do not exist, or a model that has exits already.
    """
    name = type(model).__name__
    if exits_in(model):
        raise InputError("model", name, "a model without exits")
    raise_all(exit_faults(model.config, name, after, field))
    if name.endswith(END):
        model.config.exits = {"after": list(after), "draft": None}
        return model
    config: Any = copy.deepcopy(model.config)
    config.exits = {"after": list(after), "threshold": None}
    made: Any = exit_class(type(model))(config)
    made.to(device=model.device, dtype=model.dtype)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    lost = [*(name for name in missing if not name.startswith("exit_heads.")), *unexpected]
    if lost:
        raise InputError("model", name, f"a model that its class builds from its config ({lost[0]})")
    return made.train(model.training)  # type: ignore[no-any-return]


def exits_in(model: PreTrainedModel) -> bool:
    """Whether a model has exits, of either kind."""
    return has_exits(model) or bool(language_exits(model))


def exits_to_prune(config: PreTrainedConfig, field: str, given: str) -> list[InputError]:
    """The fault of a model to prune that has exits: they read states that pruning changes."""
    fix = "prune the model that it was made from, and give the student exits afterwards"
    return [InputError(field, f"{given} with exits", fix=fix)] if getattr(config, "exits", None) else []


def without_exits(config: PreTrainedConfig) -> None:
    """Make a config, in place, that of the model without exits."""
    if vars(config).pop("exits", None) is None:
        return
    vars(config).pop("auto_map", None)
    config.architectures = [name.removeprefix(EXIT_PREFIX) for name in config.architectures or []]
