"""Fingerprints of models: they tell whether something on disk was made from them."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.common.seals import Seal, seal_of

WEIGHTS = ("*.safetensors", "*.bin")
OTHERS = ("config.json", "generation_config.json", "chat_template*", "*.py", "*.index.json")
TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")


def checkpoint_identity(path: str, config: PreTrainedConfig, known: Any = None) -> Seal | str:
    """What tells a checkpoint from another one under the same name: of a folder the seal of its files, else the revision.

    The files are those that make the model and its tokens: config, tokenizer, code, and weights (safetensors where there are
    any). Cards, scores and other things beside them may change.

    Args:
        path: a folder or a Hub id.
        config: the checkpoint's; of a Hub id it knows the revision.
        known: an earlier identity, which saves reading large files that it still fits.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"revision {getattr(config, '_commit_hash', None)}"
    weights = next((found for pattern in WEIGHTS if (found := [*folder.glob(pattern)])), [])
    beside = {file for pattern in (*OTHERS, *TOKENIZERS) for file in folder.glob(pattern)}
    return seal_of([*weights, *beside], folder, known if isinstance(known, dict) else None)


def teacher_fingerprint(teacher: PreTrainedModel | str | Path) -> str:
    """A hash of a model's config and of every byte of its weights: about a second per GB, once in a process.

    For a model in memory it covers names, shapes, dtypes and values of its tensors; for a folder, its safetensors files. The two
    hashes of one model differ, so compare like with like. Names of folders and versions of transformers do not count.

    Raises:
        InputError: a folder without config.json or safetensors.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(teacher, PreTrainedModel):
        digest.update(_stable_config(teacher.config.to_dict()))
        for name, tensor in sorted(teacher.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
        return "memory:" + digest.hexdigest()
    folder = Path(teacher)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise InputError("teacher", str(folder), "a folder with config.json and safetensors files")
    digest.update(_stable_config(json.loads((folder / "config.json").read_text())))
    with ThreadPoolExecutor() as threads:  # hashing and reading let other threads run
        stamps = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        for path, own in zip(files, threads.map(lambda stamp: _file_digest(*stamp), stamps), strict=True):
            digest.update(path.name.encode() + own)
    return "files:" + digest.hexdigest()


@cache
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """Hash of a whole file; known for the rest of the process unless its size or time of change differ."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _stable_config(config: Any) -> bytes:
    def stable(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {str(k): stable(v) for k, v in value.items()}
        return {
            k: v for k, v in kept.items() if not k.startswith("_") and k not in ("transformers_version", "use_cache")
        }

    return json.dumps(stable(config), sort_keys=True, default=str).encode()
