"""Texts that a language model drafts with its first layers and checks with all of them: what is accepted, and the time."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.clocks import in_turns, seconds


class Drafting(NamedTuple):
    """What drafting after some layers gave.

    Attributes:
        accepted: the share of the drafted tokens that all layers agreed with.
        tokens: new tokens for each run of all layers.
        times: of each text the seconds token by token, by all layers, and with drafts; the two took turns.
        same: how many texts are the same as those, token for token.
        written: new tokens of all texts.
    """

    accepted: float
    tokens: float
    times: tuple[tuple[float, float], ...]
    same: int
    written: int

    @property
    def seconds(self) -> float:
        """Of all texts, with drafts."""
        return sum(after for _, after in self.times)

    @property
    def plain(self) -> float:
        """Of all texts, token by token."""
        return sum(before for before, _ in self.times)

    @property
    def speedup(self) -> float:
        """How many times as fast as token by token."""
        return self.plain / self.seconds

    @property
    def parts(self) -> list[float]:
        """By how much each text's own times would raise the speed-up, above 0, or lower it, in the mean over texts (which is 0).

        Their standard error is that of the speed-up: a ratio of sums.
        """
        mean = self.seconds / len(self.times)
        return [(before - self.speedup * after) / mean for before, after in self.times]

    @property
    def error(self) -> float:
        """The standard error of the speed-up over texts; infinite of a single text."""
        return standard_error(self.parts)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of these values; infinite of a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def fastest(made: Mapping[int, Drafting]) -> int | None:
    """The exit to draft with: the earliest that is within one standard error of the fastest; None where none is surely faster.

    An exit is faster than no drafts where its speed-up is more than one standard error above 1.

    Args:
        made: by exit, of the same texts.
    """
    surely = {layers: each for layers, each in made.items() if each.speedup - each.error > 1}
    if not surely:
        return None
    best = max(surely.values(), key=lambda each: each.speedup)

    def as_fast(other: Drafting) -> bool:
        apart = [a - b for a, b in zip(best.parts, other.parts, strict=True)]
        return best.speedup - other.speedup <= standard_error(apart)

    return min(layers for layers, each in surely.items() if as_fast(each))


def drafting(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, layers: int) -> Drafting:
    """Continue prompts greedily, one at a time, with drafts by the first `layers` layers and without.

    Drafts are transformers' own (`assistant_early_exit`), which end where they are unsure.

    Args:
        model: a causal language model of the families in DRAFTING_FAMILIES.
        prompts: token ids, at least one each.
        new_tokens: at most so many of each text.
    """
    plain: list[list[int]] = []
    drafted: list[list[int]] = []
    runs = _Runs()

    def turns(at: int | None, texts: list[list[int]]) -> Callable[[], float]:
        waiting = iter(prompts)

        def turn() -> float:
            prompt = next(waiting)
            with nullcontext() if at is None else runs.counted(layers_of(model)):
                return seconds(lambda: texts.append(_written(model, prompt, new_tokens, at)), model.device)

        return turn

    with evaluating(model), _growing_cache(model):
        for at in (None, layers):  # a warm-up
            _written(model, prompts[0], new_tokens, at)
        times = in_turns(turns(None, plain), turns(layers, drafted), len(prompts))
    written = sum(map(len, drafted))
    drafts = runs.first - runs.last
    return Drafting(
        (written - runs.last) / drafts if drafts else 0.0,
        written / runs.last,
        tuple(times),
        sum(map(list.__eq__, plain, drafted)),
        written,
    )


@contextmanager
def _growing_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model's own settings name no cache, since transformers refuses drafts with a static one.

    Given to `generate` alone it would not reach the drafts.
    """
    given: Any = model
    before = given.generation_config.cache_implementation
    given.generation_config.cache_implementation = None
    try:
        yield
    finally:
        given.generation_config.cache_implementation = before


def _written(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, layers: int | None) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    more: dict[str, Any] = {"use_cache": True}  # also of a checkpoint that says false: drafts need one
    if layers is not None:
        more["assistant_early_exit"] = layers
    given: Any = model
    found = given.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=new_tokens, **more
    )
    return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


class _Runs:
    """How often the first and the last layer ran: both for a check, the first alone for a drafted token."""

    def __init__(self) -> None:
        self.first = self.last = 0

    @contextmanager
    def counted(self, layers: nn.ModuleList) -> Iterator[None]:
        def of_first(*given: Any) -> None:
            self.first += 1

        def of_last(*given: Any) -> None:
            self.last += 1

        handles = [layers[0].register_forward_hook(of_first), layers[-1].register_forward_hook(of_last)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
