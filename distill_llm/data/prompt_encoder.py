"""Prompts and their answers to token ids in which only the answer has labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill_llm.data.answers import Divided, answer_text, divided, encoded
from distill_llm.data.causal import as_rows
from distill_llm.data.chats import Chat, TemplateRefusal, answered, asked
from distill_llm.data.labelled import TEACHER_OF
from distill_llm.data.padding import Rows
from distill_llm.data.special_tokens import document_end, special_ends, tokenizer_fingerprint
from distill_llm.data.tasks import Task
from distill_llm.data.unlearnable import FAULT, NUMBER, fault_of
from distill_llm.losses.labels import IGNORED

PAIR = ("prompt", "response")
CHAT = ("messages",)
FINISH, GENERATED, TOKENIZER = "finish_reason", "response_ids", "tokenizer"
"""Columns of an answer that a model gave: why it stopped, its token ids, and the fingerprint of the tokenizer they are of."""
CUT = "length"
"""The finish reason of an answer that was cut off at the most tokens."""


@dataclass(frozen=True)
class _Answer:
    """A row before it is tokenized.

    Attributes:
        prompt, text: as text; where there are ids, `text` is what people read of them.
        ids: token ids that a model generated.
        cut: whether the answer was cut off, and so has no end.
        fault: the kind of what is wrong with it as a chat, and what shows it.
    """

    prompt: str
    text: str
    ids: list[int] | None
    cut: bool
    fault: tuple[str, str] | None = None


class PromptEncoder:
    """A function from raw rows to token ids with labels at the response and at the EOS that ends it.

    A row with the token ids that a model generated (`response_ids`) has exactly these, if they are of this tokenizer. Otherwise
    prompt and response are tokenized as one text (see `divided`), and end with EOS unless the finish reason says that the
    answer was cut. A response is cut where the row is full; a row whose prompt leaves no room for it is left out. The prompt of
    a chat is all turns but the last, as the tokenizer's chat template writes them.

    What is wrong with a row is in the column FAULT (see `unlearnable`).

    Args:
        task: `prompts`, with the text columns `("prompt", "response")` or `("messages",)`.
        tokenizer: with an EOS or BOS token, and for chats a template.
        max_length: most tokens in a row.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int):
        end = document_end(tokenizer)
        assert end is not None, "checked by check_tokenizer"
        self.tokenizer, self.end, self.max_length = tokenizer, end, max_length
        self.chats, self.kwargs = task.text_columns == CHAT, task.chat_template_kwargs
        self.first = [] if self.chats else special_ends(tokenizer)[0]
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def __call__(self, rows: Rows) -> Rows:
        """Encoded rows."""
        answers = [self._answer(row) for row in _each(rows)]
        ids, labels, faults, kept = [], [], [], []
        numbers = rows.get(NUMBER, range(len(answers)))
        both = zip(numbers, answers, self._divided(answers), strict=True)
        for place, (number, answer, (prompt, response, shared)) in enumerate(both):
            prompt = [*self.first, *prompt] or [self.end]
            fault = self._fault(number, answer, prompt, shared)
            if len(prompt) < self.max_length or fault:
                response = self._ended(answer, response)[: max(0, self.max_length - len(prompt))]
                ids.append([*prompt, *response])
                labels.append([*[IGNORED] * len(prompt), *response])
                faults.append(fault)
                kept.append(place)
        by = {name: [rows[name][place] for place in kept] for name in (TEACHER_OF,) if name in rows}
        return as_rows(ids, labels) | {FAULT: faults} | by

    def _answer(self, row: Mapping[str, Any]) -> _Answer:
        cut = row.get(FINISH) == CUT
        ids = row.get(GENERATED) if row.get(TOKENIZER) == self.fingerprint else None
        if not self.chats:
            return _Answer(row["prompt"], row["response"], ids, cut)
        try:
            return self._last_turn(row["messages"], ids, cut)
        except TemplateRefusal as error:
            return _Answer("", "", None, cut, ("refused", error.reason))

    def _last_turn(self, chat: Chat, ids: list[int] | None, cut: bool) -> _Answer:
        if ids is not None:
            turns = [{name: value for name, value in turn.items() if value is not None} for turn in chat[:-1]]
            return _Answer(asked(turns, self.tokenizer, self.kwargs, "data.path"), chat[-1]["content"], ids, cut)
        found = answered(chat, self.tokenizer, self.kwargs, "data.path")
        return _Answer(found.prompt, found.said + ("" if cut else found.closing), None, cut, found.fault)

    def _divided(self, answers: Sequence[_Answer]) -> list[Divided]:
        """The tokens of prompts and responses in the order of the answers."""
        texts = [answer for answer in answers if answer.ids is None]
        made = iter(divided([each.prompt for each in texts], [each.text for each in texts], self.tokenizer))
        prompts = iter(encoded([each.prompt for each in answers if each.ids is not None], self.tokenizer))
        return [next(made) if each.ids is None else Divided(next(prompts), each.ids) for each in answers]

    def _ended(self, answer: _Answer, response: list[int]) -> list[int]:
        """A response with its end, if it has one: what a model generated has its own."""
        if answer.cut or answer.ids is not None or response[-1:] == [self.end]:
            return response
        return [*response, self.end]

    def _fault(self, number: int, answer: _Answer, prompt: list[int], shared: str | None) -> str:
        if answer.fault is not None:
            return fault_of(number, *answer.fault)
        if shared is not None:
            return fault_of(number, "joined" if self.chats else "shared", shared)
        if answer.ids is not None:
            ids = answer.ids if answer.cut else answer.ids[:-1]
            text = answer_text(self.tokenizer, ids, () if self.chats else prompt)
            if text != answer.text:
                return fault_of(number, "edited", answer.text)
        return ""


def _each(rows: Rows) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
