"""A teacher with a tokenizer of its own: it reads the same text in its own tokens."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.aligning import Aligned, Aligner
from distill_llm.data.special_tokens import token_count
from distill_llm.losses.items import kind_of, sequence_numbers, targets, valid_tokens
from distill_llm.losses.signals import LinkedSignals, Links, Wanted
from distill_llm.losses.terms.term import Gives
from distill_llm.models.limits import longest_input
from distill_llm.models.sharing import check_apart
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.online import OnlineTeacher

COLUMNS = ("teacher_ids", "teacher_mask", "own_tokens", "teacher_tokens", "same_chunks")


GIVES = Gives("a teacher with a tokenizer of its own", ("linked",))


class CrossTokenizerTeacher(Teacher):
    """A causal language model with another tokenizer than its student.

    The text of each sequence, taken from the student's tokens, is tokenized anew; sequences that share a row get rows of their
    own. What the teacher's positions have no room for is not compared. The work is done where batches are made.

    Args:
        model: the teacher, quantised or not.
        tokenizer: its own, a fast one.

    Raises:
        InputError: no causal language model.
    """

    prefetches = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if kind_of(model) != "next_token":
            raise InputError("teacher", type(model).__name__, "a causal language model, where tokenizers differ")
        self.inner: OnlineTeacher | None = OnlineTeacher(model)
        self.tokenizer = tokenizer
        self.longest = longest_input(model.config)
        self.sizes = (0, model.config.get_text_config().vocab_size)
        self.aligner: Aligner | None = None
        self._shared: torch.Tensor | None = None
        self._alike = False

    @property
    def gives(self) -> Gives:
        """Outputs of its own tokens, with links to the student's."""
        return GIVES

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`; the tokenizer of the data is needed."""
        assert self.inner is not None
        if not hasattr(tokenizer, "get_vocab"):
            accepted = "the student's tokenizer, because the teacher has another one"
            raise InputError("processing_class", type(tokenizer).__name__, accepted)
        check_apart(student, self.inner.model)
        if kind_of(student) != "next_token":
            raise InputError("model", type(student).__name__, "a causal language model, where tokenizers differ")
        self.aligner = Aligner(tokenizer, self.tokenizer)
        vocabularies = student.config.get_text_config().vocab_size, self.inner.model.config.get_text_config().vocab_size
        counts = token_count(tokenizer), token_count(self.tokenizer)
        first, second = (min(pair) for pair in zip(vocabularies, counts, strict=True))
        self.sizes = first, second
        return None

    @cached_property
    def _pairs(self) -> torch.Tensor:
        """(k, 2) of `Links.shared`, of tokens that both models have."""
        assert self.aligner is not None
        if self.aligner.alike:
            return torch.arange(min(self.sizes))[:, None].expand(-1, 2).clone()
        pairs = torch.tensor(self.aligner.shared, dtype=torch.long).T
        return pairs[(pairs < torch.tensor(self.sizes)).all(-1)]

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `OnlineTeacher.place`."""
        assert self.inner is not None
        self.inner.place(device, dtype)
        self._shared = self._pairs.to(device)
        every = torch.arange(max(self.sizes))[:, None]
        self._alike = self._pairs.shape == (len(every), 2) and bool((self._pairs == every).all())

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> LinkedSignals:
        """See `Teacher.signals`: of what `prefetch` added to the batch, or else of the text of its tokens now."""
        assert self.inner is not None and self._shared is not None
        device = batch["input_ids"].device
        found = batch if COLUMNS[0] in batch else self.prefetch(batch, positions)
        ids, mask, own, other, same = (found[name].to(device, non_blocking=True) for name in COLUMNS)
        read = {"input_ids": ids, "attention_mask": mask}
        logits = self.inner.signals(read, step, other[:, 0]).logits
        numbered = torch.cat([torch.arange(len(other), device=device)[:, None], other[:, 1:]], dim=1)
        return LinkedSignals(logits=logits, links=Links(own, numbered, same, self._shared, self.sizes, self._alike))

    def prefetch(self, batch: Mapping[str, torch.Tensor], positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """See `Teacher.prefetch`.

        Returns:
            `teacher_ids`, `teacher_mask` (R, W), a row for each sequence; `own_tokens` (n, 3) as of `Links`;
            `teacher_tokens` (m, 3) the same, with places in the flattened (R * W) for outputs; `same_chunks` (chunks,).
        """
        assert self.aligner is not None
        rows = {name: each.cpu() for name, each in batch.items() if name in ("input_ids", "attention_mask", "labels")}
        if "position_ids" in batch:
            rows["position_ids"] = batch["position_ids"].cpu()
        wanted = targets(rows, "next_token")[0] if positions is None else positions.cpu()
        item_at = torch.full((rows["input_ids"].numel(),), -1).index_put_((wanted,), torch.arange(len(wanted))).tolist()
        ids, places = _sequences(rows)
        made = self.aligner(ids)
        width = min(max([len(each.ids) for each in made] + [1]), self.longest or 10**9)
        links = _Linked(width)
        for number, (tokens, at, aligned) in enumerate(zip(ids, places, made, strict=True)):
            links.add(number, tokens, [item_at[place] for place in at], aligned)
        read = [torch.tensor((each.ids or [0])[:width]) for each in made] or [torch.zeros(1, dtype=torch.long)]
        masks = pad_sequence([torch.ones_like(each) for each in read], batch_first=True)
        return {COLUMNS[0]: pad_sequence(read, batch_first=True), COLUMNS[1]: masks, **links.columns()}

    def __getstate__(self) -> dict[str, Any]:
        """What a worker of a data loader needs: not the model."""
        return {**self.__dict__, "inner": None, "_shared": None}


class _Linked:
    """Collects the chunks that count: with an output of either model for each of their tokens."""

    def __init__(self, width: int):
        self.width = width
        self.own: list[tuple[int, int, int]] = []
        self.other: list[tuple[int, int, int]] = []
        self.same: list[bool] = []

    def add(self, row: int, tokens: Sequence[int], items: Sequence[int], aligned: Aligned) -> None:
        """The chunks of a sequence; `items`: of each token, the number of its output, or -1."""
        for chunk in aligned.chunks:
            (first, last), (there, until) = chunk.own, chunk.other
            if not (first and there and until <= self.width) or min(items[first - 1 : last - 1]) < 0:
                continue
            number = len(self.same)
            self.own += [(items[at - 1], tokens[at], number) for at in range(first, last)]
            self.other += [(row * self.width + at - 1, aligned.ids[at], number) for at in range(there, until)]
            self.same.append(chunk.same)

    def columns(self) -> dict[str, torch.Tensor]:
        """See `CrossTokenizerTeacher.prefetch`."""
        both = [torch.tensor(each, dtype=torch.long).reshape(-1, 3) for each in (self.own, self.other)]
        return dict(zip(COLUMNS[2:], (*both, torch.tensor(self.same, dtype=torch.bool)), strict=True))


def _sequences(batch: Mapping[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each sequence of a batch, and their places in the flattened batch."""
    valid, numbers = valid_tokens(batch), sequence_numbers(batch)
    ids, width = batch["input_ids"], batch["input_ids"].shape[1]
    tokens: list[list[int]] = []
    places: list[list[int]] = []
    for row in range(len(ids)):
        columns = valid[row].nonzero().flatten()
        counts = [len(columns)]
        if numbers is not None:
            counts = numbers[row][columns].unique_consecutive(return_counts=True)[1].tolist()
        for part in columns.split(counts):
            if len(part):
                tokens.append(ids[row][part].tolist())
                places.append((part + row * width).tolist())
    return tokens, places
