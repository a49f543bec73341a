"""What a model can read: how many tokens at once, which tokens, and whether it keeps packed sequences apart.

The rules here are asked by every door: recipes, commands, the trainer, evaluation, responses. Each takes facts and returns the
faults that it finds, under the name that the caller gives the field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.architectures.families import facts_of
from distill_llm.common.errors import InputError
from distill_llm.data.decoders import is_decoder, packing_faults
from distill_llm.losses.items import sequence_numbers
from distill_llm.losses.labels import IGNORED

_COLUMNS = ("input_ids", "position_ids", "attention_mask")
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class InputLimits:
    """What one model can read.

    Attributes:
        name: what the user calls the model.
        family: its `model_type`.
        longest: the most tokens at once; None where the config sets no bound.
        vocabulary: tokens that have an embedding; None where the config does not say.
        decoder: whether it predicts the next token.
    """

    name: str
    family: str
    longest: int | None
    vocabulary: int | None
    decoder: bool


@dataclass(frozen=True)
class RowFacts:
    """What is read of encoded rows before a model sees them.

    Attributes:
        longest: positions of the row that has the most: its tokens, or, of packed rows, those of one sequence.
        beyond: the first token without an embedding, as (row, token id).
        packed: whether a row holds several sequences.
    """

    longest: int = 0
    beyond: tuple[int, int] | None = None
    packed: bool = False


def longest_input(config: PreTrainedConfig) -> int | None:
    """The most tokens a model takes at once; None where its config sets no bound."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    skipped = facts_of(config).skipped_positions
    if positions is None or not skipped:
        return positions
    return positions - (skipped if isinstance(skipped, int) else (config.pad_token_id or 0) + 1)


def limits_of(config: PreTrainedConfig, name: str) -> InputLimits:
    """The limits that a model's config sets; `name` is what messages call the model."""
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    return InputLimits(name, config.model_type, longest_input(text), vocabulary, is_decoder(config))


def beyond_vocabulary(limits: InputLimits, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens of a tokenizer for which a model has no embedding, by their id."""
    if limits.vocabulary is None or len(tokenizer) <= limits.vocabulary:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= limits.vocabulary}


def length_faults(limits: InputLimits, tokens: int, field: str) -> list[InputError]:
    """A fault where `tokens` at once are more than the model takes."""
    if limits.longest is None or tokens <= limits.longest:
        return []
    return [InputError(field, tokens, f"at most {limits.longest}, the longest input of {limits.name}")]


def room_faults(limits: InputLimits, prompt: int, new: int, field: str, prompts_field: str) -> list[InputError]:
    """A fault where a response to the longest prompt would pass the model's last position.

    Args:
        prompt: tokens of the longest prompt.
        new: the most tokens of a response.
        field: the setting of the response's length.
        prompts_field: what gives the prompts, or their length.
    """
    if limits.longest is None or prompt + new <= limits.longest:
        return []
    room = limits.longest - prompt
    if room < 1:
        accepted = f"prompts of fewer than {limits.longest} tokens, the longest input of {limits.name}"
        return [InputError(prompts_field, f"a prompt of {prompt} tokens", accepted)]
    accepted = f"at most {room}: {limits.name} takes {limits.longest} tokens, and a prompt has {prompt}"
    return [InputError(field, new, accepted)]


def masking_faults(limits: InputLimits, tokens: int, field: str, given: str) -> list[InputError]:
    """A fault where a masked word may become a token that has no embedding.

    Args:
        tokens: of the tokenizer, among which random words are drawn.
        given: the model or the collator, in words.
    """
    if limits.vocabulary is None or tokens <= limits.vocabulary:
        return []
    accepted = (
        f"a tokenizer of at most {limits.vocabulary} tokens, as {limits.name} has: a masked word may become any of them"
    )
    return [InputError(field, f"{given} with a tokenizer of {tokens} tokens", accepted)]


def row_faults(
    limits: InputLimits, facts: RowFacts, field: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[InputError]:
    """The faults of encoded rows for a model: too long, with unknown tokens, or packed where that mixes sequences.

    Args:
        field: what the rows are called.
        tokenizer: names the token at fault.
    """
    faults = []
    if limits.longest is not None and facts.longest > limits.longest:
        accepted = f"rows of at most {limits.longest} tokens, the longest input of {limits.name}"
        faults.append(InputError(field, f"a row of {facts.longest} tokens", accepted))
    if facts.beyond is not None:
        row, token = facts.beyond
        shown = repr(tokenizer.convert_ids_to_tokens(token)) if tokenizer is not None else f"token {token}"
        accepted = f"texts whose tokens are among the {limits.vocabulary} that {limits.name} knows"
        faults.append(InputError(field, f"{shown} in row {row}", accepted))
    return faults + (packing_faults(limits.family, field) if facts.packed else [])


def batch_faults(limits: InputLimits, batch: Mapping[str, Any], field: str) -> list[InputError]:
    """A fault where a row of a batch of tensors has more tokens than the model has positions.

    The device is waited for only where the batch, with its padding, is wider than that. Where a decoder is given
    `position_ids`, as in packed rows, the largest of them counts; those of an encoder are not looked at.
    """
    ids, longest, positions = batch.get("input_ids"), limits.longest, batch.get("position_ids")
    if ids is None or longest is None or ids.shape[-1] <= longest or (positions is not None and not limits.decoder):
        return []
    mask = batch.get("attention_mask")
    if positions is not None:
        tokens = int((positions if mask is None else positions.masked_fill(mask == 0, -1)).max()) + 1
    else:
        tokens = ids.shape[-1] if mask is None else int(mask.sum(-1).max())
    return row_faults(limits, RowFacts(longest=tokens), field)


def read_rows(rows: Any, limits: InputLimits, tokens: bool = True) -> RowFacts:
    """The facts of encoded rows that matter to a model.

    Args:
        rows: a data set of `datasets`, or a list or tuple of mappings. Nothing is read of other data sets, which may make a row
            anew whenever it is asked for.
        limits: of the model; only a decoder takes several sequences in a row.
        tokens: whether to look at every token, not only at lengths.
    """
    longest, beyond, packed, start = 0, None, False, 0
    for columns in _read(rows) if isinstance(rows, Dataset | list | tuple) else ():
        ids = columns["input_ids"]
        positions = columns.get("position_ids") if limits.decoder else None
        if positions is None:
            longest = max(longest, int(ids.lengths.max(initial=0)))
        else:
            own, of_row = _valid(positions, columns.get("attention_mask"))
            longest = max(longest, int(own.max(initial=-1)) + 1)
            packed = packed or _several(own, of_row)
        if tokens and beyond is None and limits.vocabulary is not None:
            unknown = np.flatnonzero(ids.values >= limits.vocabulary)
            if len(unknown):
                row = int(np.searchsorted(ids.lengths.cumsum(), unknown[0], side="right"))
                beyond = (start + row, int(ids.values[unknown[0]]))
        start += len(ids.lengths)
    return RowFacts(longest, beyond, packed)


def longest_prompt(rows: Any) -> int:
    """The most tokens before a row's first label: the longest prompt. 0 where rows are not read.

    Args:
        rows: as of `read_rows`, with `labels` that are -100 where nothing is predicted.
    """
    longest = 0
    for columns in _read(rows, ("labels",)) if isinstance(rows, Dataset | list | tuple) else ():
        labels = columns["labels"]
        prompts = labels.lengths.copy()  # of rows without a label
        of_row = np.repeat(np.arange(len(prompts)), prompts)
        begins = labels.lengths.cumsum() - labels.lengths
        predicted = np.flatnonzero(labels.values != IGNORED)
        answered, first = np.unique(of_row[predicted], return_index=True)
        prompts[answered] = predicted[first] - begins[answered]
        longest = max(longest, int(prompts.max(initial=0)))
    return longest


@dataclass(frozen=True)
class _Column:
    """A column of lists: how long each row's is, and the values of all in one array."""

    lengths: np.ndarray
    values: np.ndarray


def _read(rows: Dataset | list | tuple, wanted: tuple[str, ...] = _COLUMNS) -> Iterator[dict[str, _Column]]:
    """Columns of lists of numbers, some rows at a time; nothing of rows without the first of those that are wanted."""
    if isinstance(rows, Dataset):
        names = [name for name in wanted if name in rows.column_names]
        if wanted[0] not in names:
            return
        for table in rows.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
            if not all(pa.types.is_list(table[name].type) for name in names):
                return
            yield {
                name: _Column(pc.list_value_length(table[name]).to_numpy(), pc.list_flatten(table[name]).to_numpy())
                for name in names
            }
        return
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        names = [name for name in wanted if all(isinstance(row, Mapping) and name in row for row in some)]
        if wanted[0] not in names:
            return
        found = {name: [np.asarray(row[name]).ravel() for row in some] for name in names}
        yield {
            name: _Column(np.array([len(each) for each in values]), np.concatenate(values))
            for name, values in found.items()
        }


def _valid(positions: _Column, mask: _Column | None) -> tuple[np.ndarray, np.ndarray]:
    """The positions of tokens, without those of padding, and the number of the row of each."""
    of_row = np.repeat(np.arange(len(positions.lengths)), positions.lengths)
    if mask is None:
        return positions.values, of_row
    kept = mask.values.astype(bool)
    return positions.values[kept], of_row[kept]


def _several(positions: np.ndarray, of_row: np.ndarray) -> bool:
    """Whether a row holds several sequences, by the positions of its tokens and the row of each; the batch may get a mask."""
    own = torch.tensor(positions)[None]  # a copy: what Arrow holds cannot be written to
    numbers = sequence_numbers({"input_ids": own, "position_ids": own, "attention_mask": torch.ones_like(own)})
    return numbers is not None and bool(((numbers[0].diff() > 0) & (torch.tensor(of_row).diff() == 0)).any())
