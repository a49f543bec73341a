"""Rows to token ids (cached on disk by `datasets`), and token ids to padded batches."""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.data.sources import DOCUMENT_MARK
from distill_llm.data.tasks import Task, TaskData
from distill_llm.errors import InputError

Features = Sequence[Mapping[str, Any]]
Collator = Callable[[Features], dict[str, Tensor]]

LENGTH = "length"
MASKED_SHARE = 0.15
CACHE_FORMAT = 1


def encode(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """The same data as token ids, not padded.

    Columns: `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, `labels` (not for masked
        LM) and
    `length` (tokens of the row; what `train_sampling_strategy="group_by_length"` of transformers reads). Masked-LM
    documents are joined with a separator and cut into rows of `max_length` tokens. The result lies in the cache folder
    of `datasets`, under a key of the rows, the tokenizer and the length: the second call reads it.

    Args:
        data: raw rows.
        tokenizer: the tokenizer of the model that will read them.
        max_length: most tokens in a row, special tokens included; longer rows are cut.

    Raises:
        InputError: `max_length` is more than the tokenizer's model takes, or leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(data.task.text_columns) == 2)
    if not special < max_length <= tokenizer.model_max_length:
        raise InputError(
            "data.max_length", max_length, f"{special + 1} to {tokenizer.model_max_length} for this tokenizer"
        )
    work = (
        _packer(data.task, tokenizer, max_length)
        if data.task.kind == "masked_lm"
        else _row_encoder(data.task, tokenizer, max_length)
    )
    identity = [_tokenizer_state(tokenizer), data.task.kind, data.task.text_columns, max_length, CACHE_FORMAT]

    def encoded(rows: Dataset) -> Dataset:
        key = Hasher.hash([rows._fingerprint, *identity])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "distill_llm"
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(
            work,
            batched=True,
            remove_columns=rows.column_names,
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc="Tokenizing",
        )

    validation = encoded(data.validation) if data.validation is not None else None
    return TaskData(data.task, encoded(data.train), validation, encoded(data.test))


def collator(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Collator:
    """A function from encoded rows to one batch, padded to its longest row.

    Batches hold `input_ids`, `attention_mask`, `token_type_ids` if any (all (B, T), int64) and `labels`: (B,) int64
    class ids or float32 values; for masked LM (B, T) int64 with -100 at tokens that are not predicted. `length` is
    dropped.

    Args:
        task: says which labels to make.
        tokenizer: knows the padding, mask and special tokens.
        seed: of the masks of masked LM.

    Raises:
        InputError: the tokenizer lacks the padding token, or the mask token that masked LM needs.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("teacher.model", tokenizer.name_or_path, "a model whose tokenizer has a padding token")
    if task.kind != "masked_lm":
        return PaddingCollator(tokenizer)
    if tokenizer.mask_token_id is None:
        raise InputError("teacher.model", tokenizer.name_or_path, "a model whose tokenizer has a mask token")
    return MaskingCollator(tokenizer, seed)


class PaddingCollator:
    """Pads rows to the longest of the batch, on the tokenizer's side.

    Args:
        tokenizer: gives the padding values and the side.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.left = tokenizer.padding_side == "left"
        self.values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch of `features`, without their `length`."""
        batch = {}
        for name in features[0]:
            if name == LENGTH:
                continue
            rows = [torch.as_tensor(row[name]) for row in features]
            batch[name] = torch.stack(rows) if rows[0].dim() == 0 else self._pad(rows, self.values.get(name, 0))
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        side = "left" if self.left else "right"
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


class MaskingCollator(PaddingCollator):
    """Pads, then hides 15% of the tokens: 80% become the mask token, 10% a random one, 10% stay (BERT, Devlin et al.
    2018, 3.1).

    Which tokens is a function of the seed and the batch's tokens alone: no generator has to be saved to resume, two
    models see the same masks, and an epoch in another order has other masks. At least one token of every batch is
    predicted.

    Args:
        tokenizer: gives the special tokens, which are never hidden.
        seed: other seeds, other masks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        super().__init__(tokenizer)
        self.seed = seed
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch of `features` with masked `input_ids` and `labels`."""
        batch = super().__call__(features)
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed & 0xFFFFFFFF))
        usable = ~torch.isin(ids, self.special)
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~usable, 2.0)
        chosen = usable & (draw <= max(MASKED_SHARE, draw.min().item()))
        fate = torch.rand(ids.shape, generator=generator)
        random = torch.randint(self.vocabulary, ids.shape, generator=generator)
        batch["labels"] = ids.masked_fill(~chosen, -100)
        hidden = ids.masked_fill(chosen & (fate < 0.8), self.mask)
        batch["input_ids"] = torch.where(chosen & (fate >= 0.9), random, hidden)
        return batch


def _row_encoder(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[dict], dict]:
    def work(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in task.text_columns]
        result = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        return {**result, "labels": rows["labels"], LENGTH: [len(ids) for ids in result["input_ids"]]}

    return work


def _packer(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[dict], dict]:
    begin_ids, end_ids = _special_ends(tokenizer)
    room = max_length - len(begin_ids) - len(end_ids)
    separator = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else []

    def work(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        documents = [part for text in rows[task.text_columns[0]] for part in text.split(DOCUMENT_MARK) if part.strip()]
        if not documents:
            return {"input_ids": [], "attention_mask": [], LENGTH: []}
        tokens: list[int] = []
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += [*separator, *ids] if tokens else ids
        pieces = [tokens[begin : begin + room] for begin in range(0, len(tokens), room)]
        result = [[*begin_ids, *piece, *end_ids] for piece in pieces]
        return {
            "input_ids": result,
            "attention_mask": [[1] * len(ids) for ids in result],
            LENGTH: [len(ids) for ids in result],
        }

    return work


def _special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    before = next(place for place in range(len(full)) if full[place : place + len(bare)] == bare)
    return full[:before], full[before + len(bare) :]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What decides the tokens, without the padding and truncation that calls leave behind in a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"vocabulary": tokenizer.get_vocab(), "settings": str(tokenizer.init_kwargs)}
    else:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return [json.dumps(state, sort_keys=True), type(tokenizer).__name__, transformers.__version__]
