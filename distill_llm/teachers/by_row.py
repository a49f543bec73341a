"""A teacher that is several models, of which one teaches each row: its column `teacher_of` says which."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from distill_llm.common.errors import InputError
from distill_llm.data.labelled import TEACHER_OF
from distill_llm.losses.signals import Signals
from distill_llm.losses.terms.term import Gives
from distill_llm.teachers.several import Several

BY_ROW = Gives("teachers by row", ("logits", "hidden", "attention", "vectors", "neurons"), new_text=False)
"""Signals inside of layers are those of the first model; no teacher is named for text that is in no row."""


class ByRow(Several):
    """The outputs of a row are those of the model whose number its column `teacher_of` has: rows of mathematics learn from
    one model, chats from another.

    A model reads its own rows alone; the first reads all where losses compare layers. The device is waited for once in every
    micro-batch, to know how many rows each model gets.

    Args:
        models: as of `Several`; number n of the column is the n-th, from 0.
    """

    columns = (TEACHER_OF,)

    @property
    def gives(self) -> Gives:
        """See `BY_ROW`."""
        return BY_ROW

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`.

        Raises:
            InputError: the batch does not say of every row which model teaches it, or names one that is not there.
        """
        owners = self._owners(batch)
        rows = [(owners == number).nonzero().squeeze(-1) for number in range(len(self.members))]
        if sum(map(len, rows)) < len(owners):  # their lengths are known by now
            known = f"numbers from 0 to {len(rows) - 1}, one of them for each row"
            raise InputError(TEACHER_OF, sorted(set(owners.tolist())), known)
        of_item = owners if positions is None else owners[positions // batch["input_ids"].shape[1]]
        found = None
        logits: torch.Tensor | None = None
        for number, own in enumerate(rows):
            if found is not None and positions is not None and not len(positions):
                return found  # no output is asked for
            mine = (of_item == number).nonzero().squeeze(-1)
            if not number and self.looks_inside:
                found = self.outputs(0, batch, step, None if positions is None else positions[mine])
                part = found.logits[mine] if positions is None else found.logits
            elif len(own):
                part = self.outputs(
                    number, *_rows_of(batch, own, step, None if positions is None else positions[mine])
                ).logits
            else:
                continue
            if logits is None:
                logits = part.new_empty(len(of_item), part.shape[-1])
            logits[mine] = part
        assert logits is not None, "the owners are checked"
        return Signals(logits=logits) if found is None else replace(found, logits=logits)

    def _owners(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B,) the number of each row's model; the values are not looked at, since the device would be waited for."""
        owners = batch.get(TEACHER_OF)
        if owners is None or owners.shape != batch["input_ids"].shape[:1]:
            given = "a batch without it" if owners is None else f"shape {tuple(owners.shape)}"
            raise InputError(TEACHER_OF, given, "a column with the number of a model for each row, from 0")
        return owners


def _rows_of(
    batch: Mapping[str, torch.Tensor], rows: torch.Tensor, step: int, positions: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], int, torch.Tensor | None]:
    """Some rows of a batch, the step, and the flat positions of tokens as they are among these rows."""
    count, width = batch["input_ids"].shape
    own = {name: each[rows] if each.dim() and len(each) == count else each for name, each in batch.items()}
    if positions is None:
        return own, step, None
    places = rows.new_zeros(count)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return own, step, places[positions // width] * width + positions % width
