"""What criteria of single weights need to know of a model's linears: one pass over calibration data."""

from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite, first_unsound
from distill_llm.models.masks import linears_of
from distill_llm.pruning.statistics.calibration_loss import Loss
from distill_llm.pruning.statistics.calibration_pass import CALIBRATE, Batches, CalibrationPass
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.moments import MomentsSum
from distill_llm.pruning.statistics.processes import from_main_process, sum_over_processes
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.weights.rules import Need

Source = tuple[str, bool]
"""A tensor that linears read: the first linear that does, and whether it has a row for each token."""


def collect_inputs(
    model: PreTrainedModel,
    batches: Batches,
    needs: Need,
    settings: CalibrationSettings,
    loss: Loss | None = None,
    names: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """By the name of a linear of O outputs and I inputs, what a criterion needs, fp32.

    Padding does not count. What is not of tokens (DeBERTa's embeddings of distances) counts whole, once for each batch.

    Args:
        needs: "norms": the norm over tokens of each input feature (I,); "moments": the mean over tokens of x x^T (I, I);
            "gradients": the mean over examples of the absolute gradient of the loss with respect to each weight (O, I).
        settings: how the pass runs.
        loss: what gradients are taken of.
        names: of the linears to look at; None: all of `linears_of`.

    Raises:
        InputError: there is no token in the data.
        NotFinite: what a linear reads, or its gradient, is nan or infinite.
    """
    calibration = CalibrationPass(model, loss if needs == "gradients" else None, settings=settings)
    batch = calibration.batch()
    linears = {name: each for name, each in linears_of(model).items() if names is None or name in names}
    sums = _SUMS[needs](batch, linears)
    with ExitStack() as stack:
        stack.enter_context(calibration.prepared(from_embeddings=True))
        for name, module in linears.items():
            for handle in sums.watch(name, module):
                stack.enter_context(handle)
        examples, tokens = calibration.over(batches, batch)
    if settings.sharded:
        sums.read = from_main_process(sums.read)  # a process may have seen no batch
        sum_over_processes(sums.tensors())
    if not tokens:
        raise InputError("calibration data", "no token", "at least one row")
    found = sums.finish(examples)
    if (unsound := first_unsound(found)) is not None:
        raise NotFinite(
            f"{'a gradient' if needs == 'gradients' else 'an input'} of {unsound[0]}",
            unsound[1],
            CALIBRATE,
            stage="statistics",
        )
    return found


class _InputSums:
    """Sums over what linears read, for each tensor once: queries, keys and values share one.

    A linear may read two in a forward pass, tokens and embeddings of distances (DeBERTa); it has the sums of both.
    """

    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        self.batch, self.linears = batch, linears
        self.read: dict[str, tuple[Source, ...]] = {}
        self._latest: tuple[torch.Tensor | None, Source] = (None, ("", True))

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks on a linear."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tensor, source = self._latest
            if args[0] is not tensor:
                of_tokens = self.batch.by_token(args[0]) is not None
                rows, source = args[0].detach().flatten(0, -2), (name, of_tokens)
                self._latest = args[0], source
                if of_tokens and self.batch.valid is not None:
                    rows = rows[self.batch.valid]
                with torch.no_grad(), self.batch.fp32():
                    self.add(source, rows)
            if source not in (known := self.read.get(name, ())):
                self.read[name] = (*known, source)

        return [module.register_forward_pre_hook(hook)]

    def sources(self) -> list[Source]:
        """All, in an order that is the same on every process."""
        return list(dict.fromkeys(source for each in self.read.values() for source in each))

    def add(self, source: Source, rows: torch.Tensor) -> None:
        """Add what is read, (rows, C)."""
        raise NotImplementedError

    def of(self, sources: tuple[Source, ...]) -> torch.Tensor:
        """The result of linears that read these; asked for once each."""
        raise NotImplementedError

    def finish(self, examples: int) -> dict[str, torch.Tensor]:
        """The result by name; linears that read the same have the same tensor."""
        self._latest = (None, ("", True))
        found = {sources: self.of(sources) for sources in dict.fromkeys(self.read.values())}
        return {name: found[self.read[name]] for name in self.linears if name in self.read}

    def inputs(self, source: Source) -> int:
        """Channels of what is read."""
        return inputs_of(self.linears[source[0]])


class _Norms(_InputSums):
    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        super().__init__(batch, linears)
        self.squares: dict[Source, torch.Tensor] = {}

    def add(self, source: Source, rows: torch.Tensor) -> None:
        self._sum(source).add_(rows.float().square().sum(0))

    def _sum(self, source: Source) -> torch.Tensor:
        if source not in self.squares:
            self.squares[source] = torch.zeros(self.inputs(source), device=self.batch.device)
        return self.squares[source]

    def tensors(self) -> list[torch.Tensor]:
        return [self._sum(source) for source in self.sources()]

    def of(self, sources: tuple[Source, ...]) -> torch.Tensor:
        return torch.stack([self._sum(source) for source in sources]).sum(0).sqrt()


class _SecondMoments(_InputSums):
    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        super().__init__(batch, linears)
        self.moments: dict[Source, MomentsSum] = {}
        self._means: dict[Source, tuple[float, torch.Tensor]] = {}

    def add(self, source: Source, rows: torch.Tensor) -> None:
        self._sum(source).add(rows)

    def _sum(self, source: Source) -> MomentsSum:
        if source not in self.moments:
            self.moments[source] = MomentsSum(self.inputs(source), self.batch.device)
        return self.moments[source]

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for source in self.sources() for tensor in self._sum(source).tensors()]

    def of(self, sources: tuple[Source, ...]) -> torch.Tensor:
        for source in sources:
            if source not in self._means:
                self._means[source] = float(self._sum(source).weight), self._sum(source).finish().second
        (weight, second), *others = (self._means[source] for source in sources)
        for more, other in others:
            weight, second = weight + more, second + (other - second) * (more / (weight + more))
        return second


class _Gradients(_InputSums):
    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        super().__init__(batch, linears)
        self.absolute = {
            name: torch.zeros(module.weight.numel() // inputs_of(module), inputs_of(module), device=batch.device)
            for name, module in linears.items()
        }

    def watch(self, name: str, module: nn.Module) -> list:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.batch.skipped:
                return
            self.read[name] = ((name, True),)
            entering = self._by_token(args[0].detach()) * self.batch.mask.unsqueeze(-1)
            output.register_hook(lambda gradient: self.add_product(name, entering, gradient))

        return [module.register_forward_hook(hook)]

    def _by_token(self, values: torch.Tensor) -> torch.Tensor:
        found = self.batch.by_token(values)
        assert found is not None, "weight_faults refuses linears that do not see every token"
        return found

    def add_product(self, name: str, entering: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of a weight for each example is the sum over its tokens of g x^T."""
        with torch.no_grad(), self.batch.fp32():
            examples = self.batch.examples
            x = entering.float().reshape(examples, -1, entering.shape[-1])
            g = self._by_token(gradient).float().reshape(examples, x.shape[1], -1)
            for i in range(examples):
                self.absolute[name] += (g[i].T @ x[i]).abs_()

    def tensors(self) -> list[torch.Tensor]:
        return list(self.absolute.values())

    def finish(self, examples: int) -> dict[str, torch.Tensor]:
        return {name: each / max(examples, 1) for name, each in self.absolute.items()}


_SUMS: dict[str, Callable] = {"norms": _Norms, "moments": _SecondMoments, "gradients": _Gradients}


def inputs_of(module: nn.Linear | Conv1D) -> int:
    """How many inputs a linear has."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]
