"""Loading a teacher, or a student that learns in adapters, if need be with weights rounded to 8 or 4 bits."""

import importlib.util
import logging
import os
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.models.checkpoint import load_pretrained

QUANTIZATIONS = ("8bit", "4bit")
HEADS = (
    "classifier", "cls", "decoder", "embed_out", "generator_lm_head", "generator_predictions", "head", "lm_head",
    "pre_classifier", "qa_outputs", "score", "sequence_summary", "vocab_projector", "vocab_transform",
)  # fmt: skip
"""Modules beside the base model, in all families. transformers leaves out language-model heads alone, and bitsandbytes' kernels
for CPUs cannot multiply by a head of a few classes."""


def load_teacher(
    path: str | os.PathLike,
    quantization: Literal["8bit", "4bit"] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with the head it was saved with, pruned or stock, in evaluation mode: a teacher, or what adapters are put around.

    `8bit` is LLM.int8() (Dettmers et al., 2022). `4bit` is NormalFloat with quantised constants (QLoRA, Dettmers et al.,
    2023, section 3). Both are done by bitsandbytes, for all linear layers of the base model; heads keep their weights.

    Args:
        path: a local folder or a Hub id.
        quantization: None leaves the weights as they are.
        dtype: dtype of the weights that are not quantised, and of the products of 4-bit layers; None: the checkpoint's.
        device: where the weights go; None: the CPU, or for a quantised model the accelerator if there is one. A quantised
            model cannot be moved afterwards.
        trust_remote_code: as of `load_pretrained`.

    Raises:
        InputError: the quantization is unknown, bitsandbytes is not installed, or the checkpoint lacks weights.
    """
    settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if device is not None:
        settings["device_map"] = {"": torch.device(device)}
    raise_all(quantization_faults(quantization, "quantization"))
    if quantization is not None:
        settings["quantization_config"] = _settings(quantization, dtype)
    return load_pretrained(path, trust_remote_code, **settings).eval()


def quantization_faults(quantization: str | None, field: str) -> list[InputError]:
    """A fault if this way to round weights is unknown or its package is not installed."""
    if quantization is None:
        return []
    if quantization not in QUANTIZATIONS:
        return [InputError(field, quantization, one_of(QUANTIZATIONS, str(quantization)))]
    if importlib.util.find_spec("bitsandbytes") is None:
        return [
            InputError(
                field, quantization, fix="install bitsandbytes (pip install bitsandbytes), or leave this field out"
            )
        ]
    return []


def _settings(quantization: str, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    if quantization == "8bit":
        # Every product of every forward would warn that it runs in fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(HEADS))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(HEADS),
    )
