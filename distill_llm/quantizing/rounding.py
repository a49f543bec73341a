"""Models rounded by torchao: after training, or imitated while they learn."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modeling_pruned import EmptyLinear
from distill_llm.architectures.modes import evaluating
from distill_llm.common.errors import InputError, raise_all
from distill_llm.models.inputs import forward_inputs
from distill_llm.quantizing.refusals import model_faults
from distill_llm.quantizing.scheme import Scheme


def quantize(
    model: PreTrainedModel,
    scheme: Scheme,
    batches: Iterable[Mapping[str, Any]] = (),
) -> PreTrainedModel:
    """A copy of a model whose layers' linear weights are rounded; `save_pretrained` and `from_pretrained` know it.

    Embeddings, heads, norms and biases keep their precision.

    Args:
        model: stays as it is; pruned or not, in a floating point dtype.
        scheme: how.
        batches: without padding, for a scheme with `smooth`, which is calibrated on them: for each input channel j of a linear
            layer, s_j = max|x_j|^alpha / max|w_j|^(1 - alpha); inputs are divided by s_j and weights multiplied by it.

    Raises:
        InputError: the scheme contradicts itself, or does not fit the model; `smooth` without batches; torchao is not installed.
    """
    raise_all(scheme.faults() or model_faults(model, scheme, "model", type(model).__name__))
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import quantize_

    rounded = copy.deepcopy(model).eval().requires_grad_(False)
    names = linears_of(rounded)
    own = _config(scheme)
    if scheme.smooth is None:
        quantize_(rounded, own, _named(names))
    else:
        for step in ("prepare", None, "prepare_for_smoothquant_smoothing_factor", "convert"):
            if step is None:
                if not _run(rounded, batches):
                    raise InputError("batches", "none", "batches of inputs, which `smooth` is calibrated on")
            else:
                smooth = SmoothQuantConfig(own, step=step, alpha=scheme.smooth, use_running_absmax=True)
                quantize_(rounded, smooth, _named(names))
    _note(rounded, own, names)
    return rounded


def imitate(model: PreTrainedModel, scheme: Scheme) -> PreTrainedModel:
    """The same model, whose linear layers compute from now on as if they were rounded, and learn all the same.

    Gradients pass the rounding as if it were not there (straight-through; Jacob et al., 2018, quantization-aware training). The
    weights keep their names, and stay in floating point: `quantize` rounds what was learnt.

    Raises:
        InputError: as `quantize`; or the scheme is one that cannot be learnt under.
    """
    faults = scheme.faults() or scheme.learning_faults("scheme")
    raise_all(faults or model_faults(model, scheme, "model", type(model).__name__))
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    sizes: Any = "per_channel" if scheme.group_size is None else None
    weights = IntxFakeQuantizeConfig(
        getattr(torch, f"int{scheme.bits}"), granularity=sizes, group_size=scheme.group_size, is_symmetric=True
    )
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if scheme.activations else None
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights), _named(linears_of(model)))
    return model


def linears_of(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose weights are rounded: linears of the transformer layers that have inputs and outputs."""
    inside = {id(module) for module in layers_of(model).modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, EmptyLinear) and id(module) in inside
    ]


def bytes_of(model: nn.Module) -> int:
    """Bytes that a model's weights take in a checkpoint: parameters and saved buffers, shared ones once."""
    found = {id(each): each for each in model.state_dict(keep_vars=True).values()}
    return sum(each.numel() * each.itemsize for each in found.values())


def bytes_in(folder: Path) -> int:
    """Bytes of the files with weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _config(scheme: Scheme) -> Any:
    """torchao's name for a scheme. Its classes for 8 bits multiply whole numbers; the others turn weights back first."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow
    from torchao.quantization.quant_primitives import MappingType

    dtype, size = getattr(torch, f"int{scheme.bits}"), scheme.group_size
    kind = MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC
    grouped = PerAxis(0) if size is None else PerGroup(size)
    if scheme.bits == 8 and scheme.symmetric:
        if not scheme.activations:
            own = PerRow() if size is None else PerGroup(size)
            return Int8WeightOnlyConfig(granularity=own, set_inductor_config=False)
        if size is None:
            tokens = MappingType.ASYMMETRIC
            return Int8DynamicActivationInt8WeightConfig(act_mapping_type=tokens, set_inductor_config=False)
    if scheme.activations:
        return Int8DynamicActivationIntxWeightConfig(dtype, grouped, kind)
    return IntxWeightOnlyConfig(dtype, grouped, kind)


def _named(names: Iterable[str]) -> Any:
    """torchao's filter for the modules with these names."""
    wanted = set(names)
    return lambda module, name: name in wanted


def _run(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> int:
    """Read batches, and say how many there were."""
    count = 0
    with evaluating(model), torch.no_grad():
        for count, batch in enumerate(batches, 1):  # noqa: B007
            given = {name: value.to(model.device) for name, value in batch.items() if torch.is_tensor(value)}
            model(**forward_inputs(model, given))
    return count


def _note(model: Any, own: Any, names: Iterable[str]) -> None:
    """Have transformers save the model as one that it rounded itself."""
    rounded = set(names)
    others = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name not in rounded]
    settings = TorchAoConfig(own, modules_to_not_convert=others)
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, settings.quant_method
