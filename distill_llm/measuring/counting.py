"""What can be counted of one forward pass, exactly and without a clock: parameters, FLOPs and peak memory."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import evaluating, frozen
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.tensors import parts_of
from distill_llm.measuring.live import LiveStorages
from distill_llm.models.adapters import unmerged_faults
from distill_llm.models.limits import length_faults, limits_of


def count_params(model: PreTrainedModel) -> tuple[int, int]:
    """Number of parameters of the whole model and of its transformer layers alone; a shared tensor counts once."""
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in layers_of(model).parameters())


def count_flops(model: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64) -> int:
    """Count the floating point operations of one forward pass of a batch of full-length sequences.

    `torch.utils.flop_counter` counts the operations that are really dispatched, a multiply-add as two: linear layers
    (bias left out) and both products of attention. PyTorch has formulas for the attention kernels of CUDA only; those
    of the CPU and of MPS are added here, so that SDPA counts as eager attention does. Causal attention counts in full.

    Raises:
        InputError: as `profile`.
    """
    inputs = full_length_inputs(model, batch_size, sequence_length)
    counter = flop_counter()
    # The counter follows what requires gradients into modules, and stumbles over a parameter's view (DeBERTa's positions).
    with frozen(model), torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Counts what is dispatched inside it, attention on a CPU and on MPS too."""
    flash, math = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps"
    formulas: dict[Any, Any] = {getattr(torch.ops.aten, kernel): _attention_flops for kernel in (flash, math)}
    formulas[getattr(torch.ops.aten, f"{flash}_backward")] = _attention_backward_flops
    formulas[torch.ops.aten._int_mm] = _product_flops  # products of whole numbers, of layers in 8 bits
    return FlopCounterMode(display=False, custom_mapping=formulas)


def weights_memory(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once; of those in fewer bits, with their scales."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _held(model)}.values())


def _held(model: nn.Module) -> list[torch.Tensor]:
    """The tensors in memory that parameters and buffers are made of."""
    return [part for tensor in (*model.parameters(), *model.buffers()) for part in parts_of(tensor)]


def peak_memory(model: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64) -> int:
    """Bytes held at once, at most, by the weights and what one forward pass allocates.

    On CUDA: `torch.cuda.max_memory_allocated` over one forward pass, less what was held before it, plus this model's
    weights; another model on the same device therefore does not count. Elsewhere the tensors themselves are followed:
    each storage that an operation creates counts from its creation until it is freed. This is exact and repeatable,
    where the process's resident memory depends on the allocator and on everything else in the process; scratch space
    inside a kernel is not seen. The input ids do not count.

    Raises:
        InputError: as `profile`.
    """
    inputs = full_length_inputs(model, batch_size, sequence_length)
    with evaluating(model), torch.no_grad():
        return _peak_memory(model, inputs)


def full_length_inputs(model: PreTrainedModel, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """Seeded random ids and an attention mask of ones, both (B, T), on the model's device; no id is the padding id.

    A model of images gets random images of the size in its config, whatever `sequence_length` says.
    A model with encoder and decoder gets the ids for both.
    A multiple-choice head gets (B, 1, T): as many sequences as any other, each the one choice of its question.

    Raises:
        InputError: a size below 1, more tokens than the model has positions for, or adapters that are not merged.
    """
    at_least_one("batch_size", batch_size)
    at_least_one("sequence_length", sequence_length)
    raise_all(unmerged_faults(model))
    limits = limits_of(model.config, type(model).__name__)
    raise_all(length_faults(limits, sequence_length, "sequence_length"))
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" and hasattr(model.config, "image_size"):
        return {"pixel_values": random_images(model, batch_size)}
    if main != "input_ids":
        accepted = f"a model of text or of images; {type(model).__name__} reads {main}"
        raise InputError("model", model.config.name_or_path or type(model).__name__, accepted)
    vocabulary = limits.vocabulary or cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = torch.randint(0, vocabulary, (batch_size, sequence_length), generator=torch.Generator().manual_seed(0))
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % vocabulary
    ids = ids[:, None] if "ForMultipleChoice" in type(model).__name__ else ids
    inputs = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def random_images(model: PreTrainedModel, rows: int) -> torch.Tensor:
    """Seeded images (rows, channels, height, width) of the size in a model's config, on its device and in its dtype."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (rows, model.config.num_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


def at_least_one(field: str, given: int) -> None:
    """Refuse a count below 1.

    Raises:
        InputError: naming `field`.
    """
    if given < 1:
        raise InputError(field, given, "a whole number, at least 1")


def _product_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward_flops(
    _: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any
) -> int:
    """Scores once more, and a product each for the gradients of probabilities, values, queries and keys."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (3 * width + 2 * value[-1])


def _peak_memory(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> int:
    weights = weights_memory(model)
    if model.device.type == "cuda":
        model(**inputs)  # libraries take their workspaces at the first call
        torch.cuda.synchronize(model.device)
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        model(**inputs)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    with LiveStorages([*_held(model), *inputs.values()]) as live:
        model(**inputs)
    return weights + live.peak
