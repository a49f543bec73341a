"""What data need to know about decoder models: which models they are, and which of them take packed rows."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from distill_llm.architectures.configuration_pruned import STOCK_PREFIX
from distill_llm.architectures.families import FAMILIES, OTHERS
from distill_llm.common.errors import InputError

PACKED_FAMILIES = tuple(name for name, facts in (FAMILIES | OTHERS).items() if facts.packs)
"""Families that keep the sequences of a packed row apart by their `position_ids`; all others mix them silently."""


def keeps_packed_apart(family: str) -> bool:
    """Whether models of a family (`model_type`) keep the sequences of a packed row apart."""
    return family in PACKED_FAMILIES


def packing_faults(family: str, field: str, given: Any = "packed rows") -> list[InputError]:
    """A fault where packed rows are for a family that would mix their sequences; `given` is what the user gave."""
    if keeps_packed_apart(family):
        return []
    fix = f"leave packing out: {family} mixes the sequences of a row (these do not: {', '.join(PACKED_FAMILIES)})"
    return [InputError(field, given, fix=fix)]


def is_decoder(config: PreTrainedConfig) -> bool:
    """Whether a model predicts the next token: judged by its class where the config names one, else by its family.

    An encoder-decoder does not count as one. A family with both kinds of head (BERT) counts as an encoder unless the
    checkpoint's class says otherwise.
    """
    if config.is_encoder_decoder:
        return False
    causal, masked = (
        {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    )
    if any(name.removeprefix(STOCK_PREFIX) in causal - masked for name in config.architectures or ()):
        return True
    families = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    return config.model_type in families
