"""Configs and tokenizers opened without running any code of the model's folder."""

import copy
import os
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.architectures.configuration_pruned import family_type, pruned_config_class, stock_config_class


def open_config(model: str | os.PathLike, **kwargs: Any) -> PreTrainedConfig:
    """The config of a folder or a Hub id, of a model pruned or not.

    Args:
        kwargs: as for `AutoConfig.from_pretrained`.
    """
    said, _ = PreTrainedConfig.get_config_dict(model, **kwargs)
    family = family_type(said.get("model_type"))
    if family is None:
        config = AutoConfig.from_pretrained(model, **{"trust_remote_code": False} | kwargs)
    else:
        config = pruned_config_class(CONFIG_MAPPING[family]).from_pretrained(model, **kwargs)
    config.return_dict = True  # old checkpoints say false, and decoders of transformers no longer run so
    return config


def open_tokenizer(model: str | os.PathLike, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub id whose config was opened; a pruned model's is that of its family."""
    own = copy.copy(config)
    own.__class__ = stock_config_class(type(config))
    return AutoTokenizer.from_pretrained(model, config=own, trust_remote_code=False)
