"""Rows made from models alone, some at a time: the same numbers of rows give the same rows again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.data.embeddings import embedding_rows
from distill_llm.data.padding import Collator
from distill_llm.models.inputs import forward_inputs
from distill_llm.responses.sampling import random_numbers
from distill_llm.synthesis.ascent import Ascent, climb
from distill_llm.synthesis.generator import Adversary
from distill_llm.synthesis.spaces import EmbeddingSpace
from distill_llm.synthesis.texts import TextSource


class RowMaker(ABC):
    """Makes the rows of consecutive numbers; which rows are made together is part of what they are."""

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> Dataset:
        """Encoded rows of these numbers, in order."""


class ClimbedRows(RowMaker):
    """Embeddings that are optimised (see `climb`), as many for each class. Labels are the teacher's own classes of them.

    Args:
        teacher: a classifier on its device.
        space: its inputs.
        settings: of the optimisation.
        seed: of the noise at its begin.
    """

    def __init__(self, teacher: PreTrainedModel, space: EmbeddingSpace, settings: Ascent, seed: int):
        self.teacher, self.space, self.settings, self.seed = teacher, space, settings, seed

    def rows(self, numbers: Sequence[int]) -> Dataset:
        """See `RowMaker.rows`."""
        classes = torch.tensor([number % (self.teacher.config.num_labels or 1) for number in numbers])
        draws = torch.Generator().manual_seed(int(random_numbers(f"{self.seed} {numbers[0]}".encode()).integers(2**62)))
        inputs = climb(self.teacher, self.space, classes, self.settings, draws)
        return _labelled(self.teacher, self.space, inputs)


class GeneratedRows(RowMaker):
    """Embeddings that a generator makes as it is now; labels are the teacher's classes of them.

    Args:
        teacher: a classifier on its device.
        adversary: with the teacher's space.
    """

    STEP = -(2**40)
    """No step of a training or a warm-up: these rows are none of the student's."""

    def __init__(self, teacher: PreTrainedModel, adversary: Adversary):
        self.teacher, self.adversary = teacher, adversary

    def rows(self, numbers: Sequence[int]) -> Dataset:
        """See `RowMaker.rows`."""
        space = self.adversary.space
        assert isinstance(space, EmbeddingSpace)
        with torch.no_grad():
            inputs = self.adversary.inputs(len(numbers), self.STEP, first=numbers[0])
        return _labelled(self.teacher, space, inputs)


class TextRows(RowMaker):
    """Sampled texts: of a language model their own token ids, of a classifier encoded anew with the teacher's classes as labels.

    Args:
        source: of the texts.
        encoded: from texts to encoded rows without labels; None: the ids as they were drawn.
        teacher, collator: a classifier on its device and what makes its batches; None of a language model.
        predicts: whether rows of ids get labels, those of a causal LM.
    """

    def __init__(
        self,
        source: TextSource,
        encoded: Callable[[list[str]], Dataset] | None = None,
        teacher: PreTrainedModel | None = None,
        collator: Collator | None = None,
        predicts: bool = True,
    ):
        self.source, self.encoded, self.teacher, self.collator = source, encoded, teacher, collator
        self.predicts = predicts

    def rows(self, numbers: Sequence[int]) -> Dataset:
        """See `RowMaker.rows`."""
        found = self.source(numbers)
        if self.encoded is None or self.teacher is None or self.collator is None:
            columns = {"input_ids": found, "attention_mask": [[1] * len(row) for row in found]}
            labels = {"labels": found} if self.predicts else {}
            return Dataset.from_dict({**columns, **labels, "length": [len(row) for row in found]})
        rows = self.encoded(self.source.tokenizer.batch_decode(found, skip_special_tokens=True))
        names = [name for name in rows.column_names if name != "labels"]
        batch = self.collator(rows.select_columns(names).to_list())
        with evaluating(self.teacher), torch.no_grad():
            inputs = {name: each.to(self.teacher.device) for name, each in batch.items()}
            classes = self.teacher(**forward_inputs(self.teacher, inputs)).logits.argmax(-1).tolist()
        plain = rows.remove_columns("labels") if "labels" in rows.column_names else rows
        return plain.add_column("labels", classes)  # type: ignore[no-any-return, call-arg]


def _labelled(teacher: PreTrainedModel, space: EmbeddingSpace, inputs: torch.Tensor) -> Dataset:
    with evaluating(teacher), torch.no_grad():
        logits = teacher(**forward_inputs(teacher, space.batch(inputs))).logits
    return embedding_rows(inputs, space.ids, logits.argmax(-1).tolist())
