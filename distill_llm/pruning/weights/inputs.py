"""What criteria of single weights need to know of a model's linears: one pass over calibration data."""

from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.common.errors import InputError
from distill_llm.models.masks import linears_of
from distill_llm.pruning.statistics.calibration_loss import Loss
from distill_llm.pruning.statistics.calibration_pass import Batches, CalibrationPass
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.moments import MomentsSum
from distill_llm.pruning.statistics.processes import from_main_process, sum_over_processes
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.weights.rules import Need


def collect_inputs(
    model: PreTrainedModel,
    batches: Batches,
    needs: Need,
    settings: CalibrationSettings,
    loss: Loss | None = None,
    names: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """By the name of a linear of O outputs and I inputs, what a criterion needs, fp32; padding does not count.

    Args:
        needs: "norms": the norm over tokens of each input feature (I,); "moments": the mean over tokens of x x^T (I, I);
            "gradients": the mean over examples of the absolute gradient of the loss with respect to each weight (O, I).
        settings: how the pass runs.
        loss: what gradients are taken of.
        names: of the linears to look at; None: all of `linears_of`.

    Raises:
        InputError: there is no token in the data.
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
        sums.shared = from_main_process(sums.shared)  # a process may have seen no batch
        sum_over_processes(sums.tensors())
    if not tokens:
        raise InputError("calibration data", "no token", "at least one row")
    return sums.finish(examples)


class _InputSums:
    """Sums over the inputs of linears. Those that read the same tensor (queries, keys, values) share one."""

    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        self.batch, self.linears = batch, linears
        self.shared: dict[str, str] = {}
        self._latest: tuple[torch.Tensor | None, str] = (None, "")

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks on a linear."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tensor, first = self._latest
            if args[0] is tensor:
                self.shared[name] = first
                return
            self._latest, self.shared[name] = (args[0], name), name
            with torch.no_grad(), self.batch.fp32():
                self.add(name, self.by_token(args[0]))

        return [module.register_forward_pre_hook(hook)]

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """(R, T, C) of what enters or leaves a linear."""
        found = self.batch.by_token(values)
        assert found is not None, "a linear inside a layer that does not see every token"
        return found

    def add(self, name: str, values: torch.Tensor) -> None:
        raise NotImplementedError

    def of(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def finish(self, examples: int) -> dict[str, torch.Tensor]:
        """The result by name; linears with a shared input have the same tensor."""
        self._latest = (None, "")
        found = {name: self.of(name) for name in dict.fromkeys(self.shared.values())}
        return {name: found[self.shared[name]] for name in self.linears if name in self.shared}


class _Norms(_InputSums):
    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        super().__init__(batch, linears)
        self.squares = {name: torch.zeros(inputs_of(module), device=batch.device) for name, module in linears.items()}

    def add(self, name: str, values: torch.Tensor) -> None:
        self.squares[name] += self.batch.squares(values)

    def tensors(self) -> list[torch.Tensor]:
        return list(self.squares.values())

    def of(self, name: str) -> torch.Tensor:
        return self.squares[name].sqrt()


class _SecondMoments(_InputSums):
    def __init__(self, batch: CalibrationBatch, linears: dict[str, nn.Linear | Conv1D]):
        super().__init__(batch, linears)
        self.moments: dict[str, MomentsSum] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        self.sum_of(name).add(values.flatten(0, 1), before=self.batch.before, valid=self.batch.valid)

    def sum_of(self, name: str) -> MomentsSum:
        """The sum that a linear adds to; begun where there is none yet."""
        if name not in self.moments:
            self.moments[name] = MomentsSum(inputs_of(self.linears[name]), self.batch.device)
        return self.moments[name]

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for name in dict.fromkeys(self.shared.values()) for tensor in self.sum_of(name).tensors()]

    def of(self, name: str) -> torch.Tensor:
        return self.sum_of(name).finish().second


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
            self.shared[name] = name
            entering = self.by_token(args[0].detach()) * self.batch.mask.unsqueeze(-1)
            output.register_hook(lambda gradient: self.add_product(name, entering, gradient))

        return [module.register_forward_hook(hook)]

    def add_product(self, name: str, entering: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of a weight for each example is the sum over its tokens of g x^T."""
        with torch.no_grad(), self.batch.fp32():
            examples = self.batch.examples
            x = entering.float().reshape(examples, -1, entering.shape[-1])
            g = self.by_token(gradient).float().reshape(examples, x.shape[1], -1)
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
