"""Prompts with their responses, or chats: from files to token ids in which only the response has labels."""

from collections.abc import Mapping

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.notices import tell
from distill_llm.data.answer_choice import LOGPROB, chosen_answers
from distill_llm.data.chats import as_chats, is_chat
from distill_llm.data.complete import complete, numbered
from distill_llm.data.labelled import TEACHER_OF, check_columns, check_texts, column_names, of_split, teacher_names
from distill_llm.data.prompt_encoder import CHAT, CUT, FINISH, GENERATED, PAIR, TOKENIZER, PromptEncoder
from distill_llm.data.sources import read_splits
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.data.splitting import Splits, with_test
from distill_llm.data.tasks import TaskData
from distill_llm.data.unlearnable import FAULT, NUMBER, places_of, unlearnable

FIRST = 100  # rows of a split that are encoded before any work
REASONS = (CUT, "stop", "eos", "tool_calls", None)
"""Why a model stopped: its answer was cut, or (all others) ended."""


def read_prompts(spec: DataSpec, training: bool = True) -> tuple[tuple[str, ...], Splits]:
    """Rows with the columns `prompt` and `response`, or with `messages`.

    Chats are taken where the columns of `spec` name `messages`, or where they name nothing and the data have `messages` but
    no `prompt`. With `spec.chat`, prompts and responses become chats: the user asks, the assistant answers. Splits are made
    as by `read_labelled`.

    Columns that say how a model gave the answer are kept: `finish_reason`, and `response_ids` with their `tokenizer`.

    Returns:
        Our names of the columns of text, and the splits.

    Raises:
        InputError: a column is missing or is not text, a chat does not end with an answer of the assistant, or a finish reason is
            not known.
    """
    assert spec.path is not None
    columns, splits = dict(spec.columns or {}), read_splits(spec.path, training=training, form=spec.form)
    by = {TEACHER_OF: columns.pop(TEACHER_OF)} if TEACHER_OF in columns else {}
    present = next(iter(splits.values())).column_names
    chats = "messages" in columns or (not columns and "messages" in present and "prompt" not in present)
    names = column_names(columns, CHAT if chats else PAIR, CHAT if chats else PAIR)
    for split, rows in splits.items():
        own = of_split({**names, **by}, split)
        check_columns(rows, own, split)
        splits[split] = rows = complete(rows, own, split, spec.drop_incomplete)
        if chats:
            _check_chats(rows, names["messages"], split)
        else:
            check_texts(rows, names, split)
        _check_reasons(rows, split)
        if named := teacher_names(rows, own):
            others = rows.remove_columns([name for name in (TEACHER_OF,) if name in rows.column_names])
            splits[split] = rows = others.add_column(TEACHER_OF, named[TEACHER_OF])
        if spec.answers is not None and (split == "train" or LOGPROB in rows.column_names):
            splits[split] = chosen_answers(rows, names, spec.answers, split)
    standard = {column: name for name, column in names.items() if column != name}
    kept = {
        split: rows.select_columns(
            [*names.values(), *_generated(rows, names), *(by if split == "train" else ())]
        ).rename_columns(standard)
        for split, rows in splits.items()
    }
    if chats or not spec.chat:
        return tuple(names), with_test(kept)
    asked = {"batched": True, "remove_columns": list(PAIR), "desc": "Making chats"}
    return CHAT, with_test({split: rows.map(as_chats, **asked) for split, rows in kept.items()})


def _generated(rows: Dataset, names: Mapping[str, str]) -> list[str]:
    """The columns that say how a model gave the answers, of those that the rows have."""
    ids = (GENERATED, TOKENIZER) if {GENERATED, TOKENIZER} <= {*rows.column_names} else ()
    return [name for name in (FINISH, *ids) if name in rows.column_names and name not in names.values()]


def _check_reasons(rows: Dataset, split: str) -> None:
    if FINISH not in rows.column_names:
        return
    given = rows[FINISH][:]
    if unknown := [place for place, reason in enumerate(given) if reason not in REASONS]:
        shown = f"the {FINISH} {given[unknown[0]]!r} in {numbered(unknown)} of the {split} rows"
        fix = f"write {CUT} where an answer was cut off, and stop where it ended"
        raise InputError("data.path", shown, fix=fix)


def _check_chats(rows: Dataset, column: str, split: str) -> None:
    for chat in rows[column]:
        if not (is_chat(chat) and len(chat) > 1 and chat[-1]["role"] == "assistant"):
            accepted = f"chats of at least 2 turns with role and content, the last by the assistant (the {split} split)"
            raise InputError("data.columns.messages", column, accepted)


def check_first_rows(data: TaskData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if one of the first rows of a split cannot be learnt, or its chat is refused by the chat template.

    Says where generated answers are of another tokenizer.
    """
    others = {name for rows in (data.train, data.test) for name in _tokenizers(rows)} - {
        tokenizer_fingerprint(tokenizer)
    }
    if others:
        tell(
            "the responses were generated with another tokenizer: they are trained on as texts, not as their response_ids"
        )
    if data.task.kind.missing(data.task, tokenizer):  # check_tokenizer says what
        return
    work = PromptEncoder(data.task, tokenizer, tokenizer.model_max_length)
    for rows in (data.train, data.test):
        some = rows.select(range(min(FIRST, len(rows))))
        raise_all(unlearnable(work({**some[:], NUMBER: places_of(some, range(len(some)))})[FAULT]))


def _tokenizers(rows: Dataset) -> set[str]:
    return {*rows.unique(TOKENIZER)} - {None} if TOKENIZER in rows.column_names else set()
