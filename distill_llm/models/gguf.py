"""Models in GGUF files, as plain checkpoints: read once, kept in the cache folder of huggingface_hub."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.processes import open_processes

SUFFIX = ".gguf"
PER_LAYER = ("deci", "openelm")
"""Architectures under which llama.cpp reads the sizes of each layer; transformers has no model for them."""


def plain_checkpoint(file: str | os.PathLike, field: str = "model") -> Path:
    """The folder of a GGUF file's model and tokenizer in safetensors, fp32, made on first use.

    Weights that the file holds in four or eight bits stay rounded; the original ones cannot be had from it.

    Args:
        file: a GGUF file of a family that transformers can read.
        field: what the setting is called in error messages.

    Raises:
        InputError: without the `gguf` package, or for a file that cannot be read.
    """
    file = Path(file)
    if importlib.util.find_spec("gguf") is None:
        raise InputError(field, str(file), fix="install the package that reads GGUF files: pip install gguf")
    folder = Path(constants.HF_HOME) / "distill_llm" / "gguf" / f"{file.stem}-{_digest(file)}"
    with open_processes().main_process_first():
        if not folder.is_dir():
            try:
                with written_whole(folder) as own:
                    _convert(file, own)
            except (OSError, ValueError, NotImplementedError) as error:
                if not folder.is_dir():  # else another run converted the same file at the same time, and was first
                    accepted = f"a GGUF file that transformers can read ({error})"
                    raise InputError(field, str(file), accepted) from error
    return folder


def _digest(file: Path) -> str:
    """Digest of the whole file: two fine-tunes of one model differ only in the weights."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:16]


def _convert(file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    named = GGUFReader(file).fields.get("general.architecture")
    if named is not None and (name := named.contents()) in PER_LAYER:
        raise ValueError(f"{name} files run in llama.cpp only: give the folder that it was exported from")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    both: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused below, in one line
    )
    source, info = both
    if lost := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {lost[0]}")
    if other := sorted(info["mismatched_keys"]):
        raise ValueError(f"{other[0][0]} is read at another size by transformers")
    model = type(source)(config).to(torch.float32)  # a model read from GGUF counts as quantized and cannot be saved
    model.load_state_dict(source.state_dict())
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
