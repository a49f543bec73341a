"""Configs, tokenizers and classes of models. A folder's own code runs only where the caller trusts it."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from distill_llm.architectures import modeling_pruned
from distill_llm.architectures.configuration_pruned import (
    STOCK_PREFIX,
    family_type,
    pruned_config_class,
    stock_config_class,
)
from distill_llm.architectures.families import NotPrunable
from distill_llm.architectures.modeling_exits import EXIT_CODE_NAMES, EXIT_PREFIX, exit_class
from distill_llm.architectures.modeling_pruned import pruned_class
from distill_llm.common.errors import InputError, first_line

TRUST = "it has code of its own: read that, then allow it with `trust_remote_code`"
"""What to do about a model whose code is not trusted."""


def open_config(model: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedConfig:
    """The config of a folder or a Hub id, of a model pruned or not.

    Args:
        trust_remote_code: run the code of the folder where it has a config class of its own. Never a pruned model's.
        kwargs: as for `AutoConfig.from_pretrained`.
    """
    said, _ = PreTrainedConfig.get_config_dict(model, **kwargs)
    family = family_type(said.get("model_type"))
    if family is None:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **kwargs)
    else:
        config = pruned_config_class(CONFIG_MAPPING[family]).from_pretrained(model, trust_remote_code=False, **kwargs)
    config.return_dict = True  # old checkpoints say false, and decoders of transformers no longer run so
    return config


def open_tokenizer(model: str | os.PathLike, config: PreTrainedConfig, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a folder or a Hub id whose config was opened; a pruned model's is that of its family.

    Raises:
        ValueError: its class is in code that is not trusted. transformers would take that of the family without a word.
    """
    said = get_tokenizer_config(model)
    known = any(hasattr(transformers, f"{said.get('tokenizer_class')}{end}") for end in ("", "Fast"))
    if "AutoTokenizer" in (said.get("auto_map") or ()) and not known and not trust_remote_code:
        raise ValueError(f"{said.get('tokenizer_class')} is in code of its own, which needs trust_remote_code")
    own = copy.copy(config)
    own.__class__ = stock_config_class(type(config))
    return AutoTokenizer.from_pretrained(model, config=own, trust_remote_code=trust_remote_code)


def needs_trust(error: Exception) -> bool:
    """Whether transformers raised this because a model has code that it may not run."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def class_of(
    model: str | os.PathLike, config: PreTrainedConfig, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from: of transformers, of this package, or of the folder's trusted code.

    Raises:
        InputError: naming `model`: the config names no class, or an unknown one, or one whose code is not trusted; or the
            code of a model pruned or with exits is not this package's.
    """
    names = config.architectures
    if not names:
        raise InputError("model", str(model), "a checkpoint whose config.json names its class under `architectures`")
    name = names[0]
    plain = name.removeprefix(EXIT_PREFIX)
    stock = getattr(transformers, plain.removeprefix(STOCK_PREFIX), None)
    if stock is not None and name.startswith((STOCK_PREFIX, EXIT_PREFIX)):
        check_own_code(model)
        base = pruned_class(stock) if plain.startswith(STOCK_PREFIX) else stock
        return exit_class(base) if name.startswith(EXIT_PREFIX) else base
    if stock is not None:
        return stock  # type: ignore[no-any-return]
    auto = next((auto for auto, ref in _code_map(config).items() if ref.rpartition(".")[2] == name), None)
    return code_class(model, config, auto or "", trust_remote_code, name)


def code_class(
    model: str | os.PathLike, config: PreTrainedConfig, auto: str, trust_remote_code: bool, name: str = ""
) -> type[PreTrainedModel]:
    """The class in a folder's own code for an auto class of transformers.

    Raises:
        InputError: naming `model`: there is none, or the code is not trusted.
    """
    ref = _code_map(config).get(auto)
    if ref is None:
        accepted = "a class of the installed transformers, or a pruned one made here"
        raise InputError("model", name or config.model_type, accepted)
    if not trust_remote_code:
        raise InputError("model", str(model), fix=TRUST)
    repository, _, own = ref.rpartition("--")
    return get_class_from_dynamic_module(own, repository or model)  # type: ignore[no-any-return]


def unloadable(field: str, name: str, error: Exception) -> Exception:
    """The fault of a model that transformers cannot build from its config, or whose weights it cannot read.

    A device without room for it is no fault of the model: that error is returned as it is.
    """
    if isinstance(error, InputError | torch.OutOfMemoryError):
        return error
    if isinstance(error, NotPrunable):
        return InputError(field, error.given, error.accepted)
    if "ignore_mismatched_sizes" in str(error):
        return InputError(field, name, "a checkpoint with weights of the sizes in its config.json")
    if isinstance(error, UnpicklingError | EOFError):
        return InputError(
            field, name, "weights that hold nothing but tensors, undamaged (*.safetensors, or *.bin of torch)"
        )
    reason = f"{type(error).__name__}: {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
    return InputError(field, name, f"a checkpoint that transformers can load ({reason})")


@contextmanager
def readable(model: str | os.PathLike) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint's files into one line (`unloadable`).

    Raises:
        InputError: naming `model`.
    """
    try:
        yield
    except Exception as error:  # each class raises its own kinds
        found = unloadable("model", str(model), error)
        if found is error:
            raise
        raise found from error


def _code_map(config: PreTrainedConfig) -> dict[str, str]:
    found = getattr(config, "auto_map", None)
    return {str(auto): ref for auto, ref in found.items() if isinstance(ref, str)} if isinstance(found, dict) else {}


def check_own_code(model: str | os.PathLike) -> None:
    """Check that the code beside weights (of pruned models, of exits) is this package's, byte for byte; files may be missing.

    The weights are laid out as that code says; they are loaded with the package's own, and the folder's is never run.

    Raises:
        InputError: naming `model`.
    """
    own = Path(modeling_pruned.__file__).parent
    for name in EXIT_CODE_NAMES:
        file = cached_file(
            model,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None and Path(file).read_bytes() != (own / name).read_bytes():
            fix = (
                f"make the model again: its {name} is not that of the installed distill_llm; or, if you trust it, open it"
                " with transformers and trust_remote_code=True"
            )
            raise InputError("model", str(model), fix=fix)
