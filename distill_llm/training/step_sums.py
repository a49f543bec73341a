"""The sums of a training's steps: what the log shows of each term, and whether the running step's numbers are finite."""

from collections.abc import Collection, Sequence

import torch
from accelerate import Accelerator

TEACHER, LOSS, GRADIENT = "the teacher's output", "the whole loss", "the norm of the gradient"


class StepSums:
    """Sums over the micro-batches of the running step, and over the steps since the last log that were kept.

    Nothing here waits for the device but `unsound` and `means`.

    Args:
        terms: names of the objective's terms.
        accelerator: of the trainer.

    Attributes:
        steps, kept: since the last log.
        all_steps, all_kept: since the training began.
        in_a_row: steps skipped since the last one that was kept.
    """

    def __init__(self, terms: Sequence[str], accelerator: Accelerator):
        self.terms, self.accelerator = list(terms), accelerator
        self._step = torch.zeros(len(self.terms) + 2, device=accelerator.device)
        self._kept = torch.zeros(len(self.terms), device=accelerator.device)
        self._counted: Collection[str] = ()
        self._counts = dict.fromkeys(self.terms, 0)
        self.steps = self.kept = self.all_steps = self.all_kept = self.in_a_row = 0

    def begin(self, counted: Collection[str]) -> None:
        """A step begins; `counted`: the terms that count in it."""
        self._step.zero_()
        self._counted = counted

    def add(self, terms: Sequence[torch.Tensor], loss: torch.Tensor, teacher: torch.Tensor) -> None:
        """A micro-batch: each term, the loss, and what `Signals.soundness` says of the teacher; all 0-dim."""
        self._step += torch.stack([each.detach().float() for each in (teacher, *terms, loss)])

    def unsound(self, norm: torch.Tensor | float | None) -> dict[str, str]:
        """What of the step is not finite, and what it is instead; the same on all processes. Waits for the device.

        A sum of finite and other numbers is not finite, so one look at the end of a step sees all its micro-batches.

        Args:
            norm: of the gradient; None: not known.
        """
        last = self._step.new_zeros(1) if norm is None else torch.as_tensor(norm).detach().to(self._step).reshape(1)
        numbers = torch.cat([self._step, last])
        numbers = numbers.masked_fill(numbers.isfinite(), 0)
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.reduce(numbers, reduction="sum")
        names = [TEACHER, *(f"losses.{name}" for name in self.terms), LOSS, GRADIENT]
        return {name: str(number) for name, number in zip(names, numbers.tolist(), strict=True) if number}

    def keep(self) -> None:
        """The step counts."""
        self._kept += self._step[1:-1]
        for name in self._counted:
            self._counts[name] += 1
        self.kept, self.all_kept = self.kept + 1, self.all_kept + 1
        self._passed()
        self.in_a_row = 0

    def skip(self) -> None:
        """The step does not count."""
        self.in_a_row += 1
        self._passed()

    def _passed(self) -> None:
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1

    def means(self) -> dict[str, float]:
        """By term, the mean over the kept steps that it counted in, and over processes."""
        if not any(self._counts.values()):
            return {}
        sums = self._kept
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="mean")
        counted = zip(self._counts.items(), sums.tolist(), strict=True)
        return {name: value / steps for (name, steps), value in counted if steps}

    def logged(self) -> None:
        """Begin anew after a log."""
        self._kept.zero_()
        self._counts = dict.fromkeys(self.terms, 0)
        self.steps = self.kept = 0
