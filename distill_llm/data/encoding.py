"""Rows to token ids (cached on disk by `datasets`), and token ids to padded batches."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.notices import tell
from distill_llm.data.causal import sequence_packer
from distill_llm.data.padding import Collator, Rows
from distill_llm.data.special_tokens import check_tokenizer, tokenizer_state
from distill_llm.data.tasks import Task, TaskData
from distill_llm.data.unlearnable import FAULT, NUMBER, places_of, unlearnable

CACHE_FORMAT = 3


def encode(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """The same data as token ids, not padded.

    Columns: `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, `labels` (not for masked
    LM) and `length` (tokens of the row, which `train_sampling_strategy="group_by_length"` of transformers reads).
    Documents of language modelling are joined and cut into rows of `max_length` tokens. Labels of causal LM are the
    tokens themselves, not shifted; the tokens of prompts have the label -100. With `packing`, training sequences share
    rows, which then have `position_ids`. Prompts that leave no room for a response are left out, with a line in the log.
    The result is kept in the cache folder of `datasets`; a second call with the same rows, tokenizer and length reads it.

    Args:
        data: raw rows.
        tokenizer: the tokenizer of the model that will read them.
        max_length: most tokens in a row, special tokens included; longer rows are cut.

    Raises:
        InputError: `max_length` is more than the tokenizer's model takes, or leaves no room for text; the tokenizer
            lacks a token or template that the task needs; rows of prompts cannot be learnt as they are (see `unlearnable`).
    """
    task = data.task
    check_tokenizer(task, tokenizer)
    most_tokens(task, tokenizer, max_length)
    work = task.kind.encoder(task, tokenizer, max_length)
    given = json.dumps(task.chat_template_kwargs, sort_keys=True)
    identity = [tokenizer_state(tokenizer), task.kind.name, task.text_columns, given, max_length, CACHE_FORMAT]

    def encoded(rows: Dataset) -> Dataset:
        result = mapped(rows, work, identity, "Tokenizing")
        if FAULT in result.column_names:
            raise_all(unlearnable(result[FAULT][:]))
            result = result.remove_columns(FAULT)
        if not len(result):
            raise InputError(
                "data.max_length", max_length, "a length at which rows remain: every text is empty or too long"
            )
        if not task.kind.joins_documents and len(result) < len(rows):
            tell(
                f"left out {len(rows) - len(result)} of {len(rows)} rows, whose prompts have {max_length} tokens or more"
            )
        return result

    train = encoded(data.train)
    if task.packing:
        train = mapped(train, sequence_packer(max_length), ["packing", max_length, CACHE_FORMAT], "Packing")
    validation = encoded(data.validation) if data.validation is not None else None
    return TaskData(task, train, validation, encoded(data.test))


def most_tokens(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Check `data.max_length`.

    Raises:
        InputError: rows of this length leave no room for text, or are longer than the tokenizer's model takes.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2 and not task.is_language_model)
    if not special < max_length <= tokenizer.model_max_length:
        accepted = f"{special + 1} to {tokenizer.model_max_length} for this tokenizer"
        raise InputError("data.max_length", max_length, accepted)


def mapped(rows: Dataset, work: Callable[[Rows], Rows], identity: list, title: str) -> Dataset:
    """The rows that `work` makes, read from the cache where rows and identity are those of an earlier call.

    Args:
        work: from columns of rows, and NUMBER, the place of each in the data, to the columns that they become.
        identity: of all that the work depends on.
        title: of the progress bar.
    """
    key = Hasher.hash([rows._fingerprint, *identity])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "distill_llm"
    folder.mkdir(parents=True, exist_ok=True)
    return rows.map(
        lambda columns, numbers: work({**columns, NUMBER: places_of(rows, numbers)}),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc=title,
    )


def collator(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Collator:
    """A function from encoded rows to one batch, padded to its longest row.

    Batches hold `input_ids`, `attention_mask`, `token_type_ids` or `position_ids` if any (all (B, T), int64) and
    `labels`: (B,) int64 class ids or float32 values; for language models (B, T) int64 with -100 at tokens that are not
    predicted (causal LM: not shifted). `length` is dropped. Packed rows have `position_ids` that start
    again: see `distill_llm.models.inputs.packed_sequences`.

    Args:
        task: says which labels to make.
        tokenizer: knows the padding, mask and special tokens. Causal LM pads with EOS where there is no padding token.
        seed: of the masks of masked LM.

    Raises:
        InputError: the tokenizer lacks the padding token, or the mask token that masked LM needs.
    """
    check_tokenizer(task, tokenizer)
    return task.kind.collator(tokenizer, seed)
