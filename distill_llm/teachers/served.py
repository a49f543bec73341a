"""A teacher behind an endpoint: it is asked for the likeliest tokens of each batch."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.special_tokens import token_count
from distill_llm.losses.items import kind_of, sequence_numbers, valid_tokens
from distill_llm.losses.signals import Signals, SparseSignals
from distill_llm.losses.sparse import SparseTargets
from distill_llm.losses.terms.term import Gives
from distill_llm.models.endpoint import Client, Endpoint
from distill_llm.models.served_logprobs import Asking, ServedLogprobs
from distill_llm.teachers.base import Teacher

COLUMNS = ("served_ids", "served_probabilities", "served_rest", "served_teacher_nll")


class ServedTeacher(Teacher):
    """A causal LM that a server runs, known at its k likeliest tokens of each place.

    Batches are sent as token ids, one request for each sequence, in the processes of the data loader where it has some. The
    targets are those of a `topk` cache without its coding: a temperature of 1, and forward KL over these tokens and all others
    as one. Rows are asked for anew in every epoch; a cache is asked for once.

    Args:
        endpoint: where it is served.
        tokenizer: the served model's, which is that of the data.
        asking: how many log-probabilities, and in which form.
        classes: how many of the first tokens count; None: all of the tokenizer.

    Raises:
        InputError: more than all tokens are asked for.
    """

    compact = True
    prefetches = True

    def __init__(
        self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase, asking: Asking, classes: int | None = None
    ):
        self.classes = token_count(tokenizer) if classes is None else classes
        if not 1 <= asking.k <= self.classes:
            raise InputError(f"{endpoint.field}.k", asking.k, f"a whole number from 1 to {self.classes}, all tokens")
        self.tokenizer, self.asking = tokenizer, asking
        self.client = Client(endpoint)
        self.ask = ServedLogprobs(self.client, tokenizer, asking, self.classes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.client.endpoint, self.tokenizer, self.asking, self.classes)

    @property
    def gives(self) -> Gives:
        """See `served_gives`."""
        return served_gives(self.asking.k, self.classes)

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`.

        Raises:
            InputError: the student is no causal LM, or has no output for some of the tokens.
        """
        if kind_of(student) != "next_token":
            fix = "teach a causal LM: a served teacher gives probabilities of the next token"
            raise InputError("teacher", f"a served teacher for {type(student).__name__}", fix=fix)
        own = student.config.get_text_config().vocab_size
        if self.classes > own:
            accepted = f"a student with the teacher's tokenizer ({self.classes} tokens)"
            raise InputError("teacher", f"a student with {own} outputs", accepted)
        return None if self.classes == own else self.classes

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`: those that `prefetch` added to the batch, or else asked for now.

        Raises:
            InputError: as `ServedLogprobs`.
        """
        device = batch["input_ids"].device
        found = batch if COLUMNS[0] in batch else self.prefetch(batch, positions)
        targets = SparseTargets(*(found[name].to(device, non_blocking=True) for name in COLUMNS))
        return SparseSignals(logits=targets.probabilities.new_empty(len(targets.ids), 0), targets=targets)

    def prefetch(self, batch: Mapping[str, torch.Tensor], positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """See `Teacher.prefetch`: the columns COLUMNS, as of SparseTargets.

        Raises:
            InputError: as `ServedLogprobs`; a position at the end of a sequence, where nothing follows.
        """
        if positions is None:
            raise InputError("positions", None, "flat positions of tokens, because a server has signals of tokens")
        ids, valid, wanted = batch["input_ids"].cpu(), valid_tokens(batch).cpu(), positions.cpu()
        numbers = sequence_numbers(batch)
        apart = torch.zeros_like(ids) if numbers is None else numbers.cpu()
        places, sequences, total = torch.full(ids.shape, -1), [], 0
        for row in (wanted // ids.shape[1]).unique().tolist():
            for number in apart[row][valid[row]].unique().tolist():
                tokens = (valid[row] & (apart[row] == number)).nonzero().squeeze(-1)
                places[row, tokens[:-1]] = torch.arange(total, total + len(tokens) - 1)
                sequences.append(ids[row, tokens].tolist())
                total += len(tokens) - 1
        items = places.flatten()[wanted]
        if (items < 0).any():
            at = divmod(int(wanted[items < 0][0]), ids.shape[1])
            accepted = "positions before the last token of a sequence"
            raise InputError("positions", f"example {at[0]} of the batch, token {at[1]}", accepted)
        answers = self.ask(sequences)
        targets = SparseTargets(*map(torch.cat, zip(*answers, strict=True))) if answers else _none(self.asking.k)
        return dict(zip(COLUMNS, targets.rows(items), strict=True))

    def close(self) -> None:
        """End the connection."""
        self.client.close()


def served_gives(k: int, classes: int) -> Gives:
    """What such a teacher gives: its k likeliest tokens, also of text that is in no dataset."""
    return Gives("a served teacher", few=(k, classes))


def _none(k: int) -> SparseTargets:
    """Targets of no item."""
    return SparseTargets(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0), torch.zeros(0))
