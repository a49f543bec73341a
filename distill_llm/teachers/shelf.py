"""A teacher whose weights are in memory only while it reads a batch."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Signals, Wanted
from distill_llm.models.adapters import is_quantized
from distill_llm.teachers.online import OnlineTeacher


class ShelvedTeacher(OnlineTeacher):
    """A frozen model whose weights wait in a file, and are mapped into memory for its turn in each batch.

    Of several such teachers one at a time is held. Their signals are those of models in memory, bit for bit: weights are
    written in the precision in which they are used.

    Args:
        model: the teacher, not quantised. Its parameters have no values between two calls.
        folder: for the file; it goes when this object does.

    Raises:
        InputError: a quantised model.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path):
        if is_quantized(model):
            fix = "hold its weights as they are: quantised ones stay in memory"
            raise InputError("model", f"a quantised {type(model).__name__}", fix=fix)
        super().__init__(model)
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(prefix="teacher-", dir=folder, ignore_cleanup_errors=True)
        self._file = Path(self._folder.name) / "weights.pt"
        self._device = model.device
        self._write()
        self._shelve()

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Never: its head is gone when outputs are compared."""
        return False

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `OnlineTeacher.place`; the weights go to the device for each turn."""
        before = self.model
        self._take(torch.device("cpu"))
        super().place(device, dtype, layers)
        self._device = device
        if self.model is not before:
            self._write()
        self._shelve()

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`."""
        self._take(self._device)
        try:
            return super().signals(batch, step, positions)
        finally:
            self._shelve()

    def _write(self) -> None:
        torch.save({name: each.detach().cpu() for name, each in self.model.named_parameters()}, self._file)

    def _take(self, device: torch.device) -> None:
        weights = torch.load(self._file, map_location="cpu", mmap=True, weights_only=True)
        for name, parameter in self.model.named_parameters():
            parameter.data = weights[name].to(device)

    def _shelve(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.new_empty(1).expand(parameter.shape)  # of its shape, but a single number
