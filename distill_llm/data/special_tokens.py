"""Special tokens: what tokenizers add to a text, which of them a task needs, and what decides the tokens of a text."""

import hashlib
import json
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.chats import check_template_kwargs
from distill_llm.data.tasks import Task


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer itself puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    before = next(place for place in range(len(full)) if full[place : place + len(bare)] == bare)
    return full[:before], full[before + len(bare) :]


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document or a response: end of sequence, else begin of sequence, else None."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a token: how many rows of a model's vocabulary mean something, the others being padding.

    Where ids have gaps, there are fewer tokens. This lists the whole vocabulary: call it once, not for every batch.
    """
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(task: Task, tokenizer: PreTrainedTokenizerBase, field: str = "teacher.model") -> None:
    """Check that a tokenizer has the special tokens and the chat template that the rows of a task need.

    Raises:
        InputError: naming `field`, the setting that gave the tokenizer; or a name in `data.chat_template_kwargs` that the
            template does not read.
    """
    missing = task.kind.missing(task, tokenizer)
    if missing is not None:
        raise InputError(field, tokenizer.name_or_path, f"a model whose tokenizer has {missing}")
    check_template_kwargs(task.chat_template_kwargs, tokenizer, "data.chat_template_kwargs")


def token_rules(tokenizer: Any) -> str:
    """A tokenizer's rules as JSON, without the padding and truncation settings that earlier calls left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    return json.dumps(rules | {"padding": None, "truncation": None}, sort_keys=True)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what makes tokens of a text (`token_rules`); None gives 'none'."""
    if tokenizer is None:
        return "none"
    return hashlib.blake2b(token_rules(tokenizer).encode(), digest_size=16).hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All that decides the tokens of a row: the rules, the special tokens, the chat template, and the code's version."""
    settings = str(tokenizer.init_kwargs) if getattr(tokenizer, "backend_tokenizer", None) is None else ""
    added = json.dumps([settings, tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True, default=str)
    return [token_rules(tokenizer), added, type(tokenizer).__name__, transformers.__version__]
