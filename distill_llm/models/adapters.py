"""Models with adapters of peft: refused where only a plain one will do, looked into, and merged into one plain model."""

import copy
from collections import Counter
from os import PathLike
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from distill_llm.common.errors import InputError

UNTIED = (
    "modules whose weight is not tied: merging these would change another module too (modules_to_save takes tied ones)"
)


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PeftModel, its layers adapted all the same; any other model as it is."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def tied_adapters(model: Any) -> list[str]:
    """Names of adapted modules whose weight is another module's too: merged, an adapter would change both.

    An output map tied to the embeddings is one. A copy in `modules_to_save` is not: the copy ends the tie.
    """
    if without_adapters(model) is model:
        return []
    from peft.tuners.trainable_tokens import TrainableTokensLayer  # keeps tied modules together
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules())
    uses = Counter(id(each) for module in modules.values() for each in module.parameters(recurse=False))
    layers = {
        name: module.get_base_layer()
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    }
    tied = [name for name, base in layers.items() if any(uses[id(each)] > 1 for each in base.parameters(recurse=False))]
    return [name.rpartition(".")[2] for name in tied]


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model's weights are quantised (bitsandbytes or another method)."""
    return bool(getattr(model, "is_quantized", False))


def unmerged_faults(model: nn.Module) -> list[InputError]:
    """A fault of a model with adapters of peft: around it, or around any of its layers, its head or its embeddings."""
    # By name, because peft need not be installed.
    adapted = [name for name, module in model.named_modules() if type(module).__module__.partition(".")[0] == "peft"]
    if not adapted:
        return []
    inside = next((name for name in adapted if name not in ("", "base_model")), None)
    given = type(model).__name__ + (f" with an adapter at {inside}" if inside else "")
    merging = hasattr(model, "merge_and_unload")
    plain = (
        "merge first: model = model.merge_and_unload()" if merging else "load the model without adapters, or merge them"
    )
    return [InputError("model", given, fix=plain)]


def adapter_folder_faults(field: str, name: str, model: str | PathLike) -> list[InputError]:
    """A fault of a folder or Hub id that holds adapters: transformers would put them on a model that the folder names.

    Args:
        field, name: what the user called it.
        model: where it is.
    """
    try:
        found = find_adapter_config_file(str(model))
    except OSError:  # no such model: opening its config says so
        found = None
    if found is None:
        return []
    fix = (
        "it holds adapters: merge them first, AutoPeftModelFor...from_pretrained(folder).merge_and_unload()"
        ".save_pretrained(other), and give the other folder"
    )
    return [InputError(field, name, fix=fix)]


def merged(model: Any) -> PreTrainedModel:
    """A model with the active adapter's changes in its own weights, to be saved under the keys it always had.

    Quantised weights are dequantised first: rounded again, they would lose much of what was learned.

    Args:
        model: a PeftModel, which stays as it is; any other model is returned itself.

    Returns:
        the transformers or pruned model, with the outputs of the adapted one; none of its weights is frozen.
    """
    if without_adapters(model) is model:
        return model
    model = copy.deepcopy(model)
    if is_quantized(without_adapters(model)):
        model = _dequantized(model)
    plain: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    plain.requires_grad_(True)
    return plain


def _dequantized(model: Any) -> Any:
    """The same adapter around the same model in floating point."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, weights = model.active_peft_config, get_peft_model_state_dict(model)
    plain = model.unload()
    plain = plain.dequantize(dtype=plain.dtype)
    adapted = get_peft_model(plain, config)
    set_peft_model_state_dict(adapted, weights)
    return adapted
