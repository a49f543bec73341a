"""How strongly the kept weights take over what is removed, chosen on rows that they were not fitted to.

A compensated linear is fitted to what it read in the dense model. In the cut model all linears before it are changed too, and
a fit to few tokens follows their noise. Both can cost more than the removal did, and neither shows in the fit itself.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.losses.items import kind_of, row_count, targets
from distill_llm.models.placement import streamed
from distill_llm.pruning.compensation.bypass import Bypasses
from distill_llm.pruning.compensation.in_order import InOrder
from distill_llm.pruning.cutting.in_order import prune_in_order
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.calibration_loss import divergences, items_of
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings

Batches = Iterable[Mapping[str, torch.Tensor]]
Way = float | InOrder | None
"""A ridge of linears that are each fitted alone, linears that are fitted in order, or None: plain removal."""
RIDGES = (None, 10.0, 1.0, 0.1, 0.01)
"""The strengths that are tried, the weakest first; None: plain removal."""
IN_ORDER = (InOrder(1.0, 0.5), InOrder(1.0, 1.0), InOrder(0.1, 0.5), InOrder(0.1, 1.0))
"""Those of compensation in order that are tried after them, the weakest first."""


@dataclass(frozen=True)
class Strength:
    """The strength that was chosen, and what each did.

    Attributes:
        ridge: for `prune(..., ridge=)`; None: plain removal, or in order.
        losses: by ridge, or by `InOrder`, the divergence of the cut model from the dense one on the held-out rows: the mean over
            rows.
        rows: how many rows there were.
        in_order: for `prune_in_order`, where linears fitted in order were chosen.
    """

    ridge: float | None
    losses: Mapping[Way, float]
    rows: int
    in_order: InOrder | None = None

    @property
    def compensates(self) -> bool:
        """Whether anything takes over."""
        return self.ridge is not None or self.in_order is not None

    def record(self) -> dict[str, Any]:
        """For JSON: `ridge` (and `share`, in order), `rows`, and `divergence` by these, that of plain removal under `none`."""
        divergence = {_name(way): loss for way, loss in self.losses.items()}
        how: dict[str, Any] = {"ridge": self.ridge} if self.in_order is None else asdict(self.in_order)
        return {**how, "rows": self.rows, "divergence": divergence}


def _name(way: Way) -> str:
    if isinstance(way, InOrder):
        return f"in order, ridge {way.ridge:g}, share {way.share:g}"
    return "none" if way is None else f"{way:g}"


def described(record: Mapping[str, Any]) -> str:
    """A strength's record in words. A way whose outputs were not finite on some row has no divergence there."""
    divergence, ridge, share = dict(record["divergence"]), record["ridge"], record.get("share")
    plain = divergence.pop("none", None)
    if ridge is None:
        chosen, best = "no compensation", min(divergence.values(), default=None)
    else:
        name = _name(ridge if share is None else InOrder(ridge, share))
        chosen, best = f"compensated {'with ridge ' if share is None else ''}{name}", divergence[name]
    without, with_it = ("not finite" if loss is None else f"{loss:.4g}" for loss in (plain, best))
    return f"{chosen}: divergence on {record['rows']} held-out rows {without} without, {with_it} with it"


def choose_strength(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensate: Statistics | None,
    held_out: Batches,
    *,
    bypasses: Bypasses | None = None,
    in_order: Batches | None = None,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> Strength:
    """Choose the ridge of a cut's compensation, or none, by the cut model's divergence from the model on held-out rows.

    The model is cut with each strength and run over the rows; no labels are needed. The weakest strength is chosen whose
    divergence is within one standard error of the least (of the difference, over rows), so that compensation has to be worth
    more than chance. Then `prune(model, plan, compensate, bypasses=bypasses, ridge=strength.ridge)`, or, with
    `strength.in_order`, `prune_in_order(model, plan, dataloader, strength.in_order)`.

    Args:
        model, plan, compensate, bypasses: as for `prune`.
        held_out: batches as for `collect_statistics`, of rows that neither the statistics nor the bypasses are of; they are
            read once.
        in_order: batches to fit linears in order to; None: this is not tried.
        settings: the device and precision of the passes; with `sharded`, each process fits to a part of `in_order`.

    Returns:
        The strength, with the divergences of all that were tried.

    Raises:
        InputError: there are no rows; and as `prune`.
    """
    batches = list(held_out)
    if not batches:
        raise InputError("held_out", batches, "at least one batch of rows")
    fitted_to = None if in_order is None else list(in_order)
    ways: tuple[Way, ...] = (*RIDGES, *(IN_ORDER if fitted_to is not None else ()))
    found: dict[Way, torch.Tensor] = {}
    dense: list[torch.Tensor] | None = [] if kind_of(model) == "example" else None  # of tokens they would be large
    for way in ways:
        if isinstance(way, InOrder):
            student = prune_in_order(model, plan, fitted_to or [], way, settings=settings)
        elif way is None or compensate or bypasses:
            student = prune(model, plan, compensate, bypasses=bypasses, ridge=way)
        else:  # there is nothing that takes over by itself
            continue
        rows = row_divergences(model, student, batches, settings, dense)
        if bool(rows.isfinite().all()):
            found[way] = rows
        del student  # before the next is cut
    if not found:
        fix = "prune less, or check the rows that are held out: no student gives finite outputs on them"
        raise NotFinite("outputs of the pruned model", "nan", fix, stage="compensation")
    least = found[min(found, key=lambda way: float(found[way].mean()))]
    chosen = next(way for way, rows in found.items() if _as_good(rows, least))
    losses = {way: float(rows.mean()) for way, rows in found.items()}
    if isinstance(chosen, InOrder):
        return Strength(None, losses, len(least), chosen)
    return Strength(chosen, losses, len(least))


def _as_good(rows: torch.Tensor, least: torch.Tensor) -> bool:
    """Whether the mean of a value per row is within one standard error of the difference from the least."""
    more = rows - least
    return float(more.mean()) <= float(more.std(correction=0)) / max(len(more) - 1, 1) ** 0.5


@torch.no_grad()
def row_divergences(
    model: PreTrainedModel,
    student: PreTrainedModel,
    batches: Batches,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
    dense: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """(rows,) the divergence of a student from its model: KL(model || student), the mean over a row's outputs that count.

    Of a regression it is the squared difference.

    Args:
        dense: the model's outputs, a tensor for each batch, from an earlier call with the same batches; an empty list is
            filled. None: they are made and not kept.
    """
    device, kind = settings.device_for(model), kind_of(model)
    found: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, settings.precision, enabled=settings.precision is not None))
        for each in (model, student):
            stack.enter_context(frozen(each))
            if device != each.device:
                stack.enter_context(streamed(each, layers_of(each), device))
        for index, batch in enumerate(batches):
            batch = {name: value.to(device) for name, value in batch.items() if kind != "example" or name != "labels"}
            target = dense[index] if dense and index < len(dense) else items_of(model, batch, labelled=False)[0]
            if dense is not None and index == len(dense):
                dense.append(target)
            logits, _ = items_of(student, batch, labelled=False)
            items = divergences(target, logits)
            rows = row_count(batch)
            if kind == "example":  # of question answering, a row has a start and an end
                found.append(items.view(-1, rows).mean(0))
                continue
            positions, _ = targets({name: value for name, value in batch.items() if name != "labels"}, kind)
            row = positions // batch["input_ids"].shape[-1]
            count = row.bincount(minlength=rows)
            found.append((row.bincount(items, minlength=rows) / count)[count > 0].float())
    return torch.cat(found).double().cpu()
