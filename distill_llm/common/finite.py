"""NaN and infinity: one test and one error, wherever numbers enter, so that no plan, step or checkpoint is made of them."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import TYPE_CHECKING

from distill_llm.common.errors import InputError

if TYPE_CHECKING:  # recipes are read without torch
    import torch
    from torch import nn

ON_NONFINITE = ("stop", "skip")
"""What training may do at a step that is not finite."""


class NotFinite(InputError):
    """A NaN or an infinity that work would build on: one line with the place, exit code 2 on the command line.

    Args:
        what: the numbers: "losses.logits", "fisher of heads".
        found: which of them ("nan", "inf", "-inf").
        fix: what to do.
        stage: of a run, or what else was going on.
        layer: its number, or the name of what is in it.
        step: optimizer step, from 1.
    """

    def __init__(
        self,
        what: str,
        found: str,
        fix: str,
        *,
        stage: str | None = None,
        layer: int | str | None = None,
        step: int | None = None,
    ):
        super().__init__(what, found, fix=fix)
        self.stage, self.layer, self.step = stage, layer, step
        where = "" if layer is None else f" in layer {layer}" if isinstance(layer, int) else f" in {layer}"
        when = "" if step is None else f" at step {step}"
        self.args = (f"{f'{stage}: ' if stage else ''}{what} is {found}{where}{when}; {fix}",)

    def renamed(self, field: str) -> "NotFinite":
        """The same: it names numbers that were computed, no field that a user wrote."""
        return self

    def in_stage(self, stage: str) -> "NotFinite":
        """The same with the stage that the caller knows."""
        return NotFinite(self.field, self.given, self.fix, stage=stage, layer=self.layer, step=self.step)


def first_unsound(tensors: Mapping[str, "torch.Tensor"], masks: Iterable[str] = ()) -> tuple[str, str] | None:
    """The first tensor with a NaN or an infinity: its name and what it holds; None where all are finite.

    Waits for each device once. Tensors without numbers to look at (meta, fake, integers) are sound; of a tensor that is
    divided among processes this process's part is looked at, of one in fewer bits its scales.

    Args:
        tensors: by name.
        masks: names of those that may hold minus infinity.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from distill_llm.common.tensors import parts_of

    masks = set(masks)
    spans: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        tensor = getattr(tensor, "to_local", lambda whole=tensor: whole)().detach()
        tensor = max(parts_of(tensor), key=torch.is_floating_point)
        numbers = not (tensor.is_meta or isinstance(tensor, FakeTensor))
        if tensor.is_floating_point() and tensor.numel() and numbers:
            span = torch.stack((tensor if tensor.itemsize > 1 else tensor.float()).aminmax()).double()
            spans.setdefault(tensor.device, {})[name] = span[1:].repeat(2) if name in masks else span
    found: dict[str, str] = {}
    for here in spans.values():
        unsound = ~torch.stack(list(here.values())).isfinite().all(-1)
        if unsound.any():
            found |= {name: _word(here[name]) for name, is_so in zip(here, unsound.tolist(), strict=True) if is_so}
    return next(((name, found[name]) for name in tensors if name in found), None)


def _word(span: "torch.Tensor") -> str:
    return str(next(value for value in reversed(span.tolist()) if not isfinite(value)))


def unsound_weight(model: "nn.Module | Mapping[str, torch.Tensor]") -> tuple[str, str] | None:
    """As `first_unsound`, of a model's weights and buffers; its biases may be minus infinity, which masks classes.

    Args:
        model: or its weights by name.
    """
    held = model
    if not isinstance(held, Mapping):
        held = {**dict(held.named_parameters()), **dict(held.named_buffers())}
    return first_unsound(held, [name for name, each in held.items() if name.endswith("bias") and each.dim() == 1])


def check_weights(model: "nn.Module | Mapping[str, torch.Tensor]", fix: str) -> None:
    """Refuse a model with a weight that is not finite (see `unsound_weight`).

    Raises:
        NotFinite: names the weight.
    """
    if (found := unsound_weight(model)) is not None:
        raise NotFinite("a weight", found[1], fix, layer=found[0])
