"""How much of the rows of a training was changed: counted over all processes, and through resumes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.notices import tell
from distill_llm.data.augmenting.collator import COUNTED, AugmentingCollator
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Use
from distill_llm.teachers.base import Teacher

NAMES = ("rows_changed", "tokens_changed", "tokens", "rows")


class AugmentedRows(TrainerCallback, ExportableState):
    """Counts the rows and tokens of augmented batches.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sums = torch.zeros(len(NAMES), dtype=torch.long, device=accelerator.device)

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The micro-batches of an optimizer step; all processes call it together. The device is not waited for."""
        there = [batch[COUNTED] for batch in batches if COUNTED in batch]
        if not there:
            return
        rows = self._sums.new_tensor([sum(map(len, there))])
        found = torch.cat([torch.cat(there).sum(0).to(self._sums), rows])
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, reduction="sum")
        self._sums += found

    def totals(self) -> dict[str, int]:
        """By NAMES: rows that were changed, in all epochs together, and their changed tokens; tokens and rows in all."""
        return dict(zip(NAMES, self._sums.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": self.totals()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint's numbers."""
        kept = state.stateful_callbacks.get(type(self).__name__) or self.state()
        found = (kept[0] if isinstance(kept, list) else kept)["attributes"]
        self._sums.copy_(torch.tensor([found[name] for name in NAMES]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how much was changed."""
        if self._sums[-1]:
            tell(shown(self.totals()))


def shown(totals: Mapping[str, int]) -> str:
    """`augmented 40 of 80 rows (50%), 120 of 1,000 tokens (12%)`."""
    pairs = ((totals[f"{name}_changed"], totals[name], name) for name in ("rows", "tokens"))
    return "augmented " + ", ".join(
        f"{some:,} of {all_:,} {name} ({some / max(all_, 1):.0%})" for some, all_, name in pairs
    )


def check_augmentation(collator: Any, teacher: Teacher | None, objective: Objective) -> None:
    """Whether augmented rows can be taught.

    Raises:
        InputError: the teacher has no signals of them, or a term of the objective does not go with mixtures.
    """
    if not isinstance(collator, AugmentingCollator):
        return
    if teacher is not None and not teacher.gives.new_text:
        fix = "use a teacher in memory, or rows as they are: a cache has no signals of changed rows"
        raise InputError("data_collator", f"augmented rows with {teacher.gives.name}", fix=fix)
    if not collator.mixes:
        return
    if teacher is not None and not teacher.gives.mixtures:
        fix = "use a model as the teacher, or augment without mixup: this teacher cannot read mixtures"
        raise InputError("data_collator", f"mixup with {teacher.gives.name}", fix=fix)
    raise_all(objective.faults(Use(mixed="mixup")))
