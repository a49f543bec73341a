"""A student and its teacher, matched: which layers, heads and channels of the two are compared, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import FAMILIES, any_layers_of, dims_of, width_of
from distill_llm.architectures.firing import neuron_widths
from distill_llm.architectures.lineage import lineage_of
from distill_llm.common.errors import InputError
from distill_llm.losses.adapters import Adapter, interpolated
from distill_llm.losses.hidden import hidden_distance
from distill_llm.losses.items import kind_of
from distill_llm.losses.mapping import (
    LayerPair,
    attention_pairs,
    cut_from,
    hidden_pairs,
    need_lineage,
    query_heads,
    relative_lineage,
    unequal_widths,
)
from distill_llm.losses.signals import EMBEDDINGS, Batch

SHARED = "shared"
"""The name of the projection that all layers share."""


@dataclass(frozen=True)
class MatchSettings:
    """What terms of one training share.

    Attributes:
        smoothing: of labels.
        classes: compare logits over the first `classes` entries only (vocabularies of padded sizes); None: all.
        seed: of the projections' first weights.
        precision: what the projections multiply in, as mixed precision has it for the student; None: their own.
    """

    smoothing: float = 0.0
    classes: int | None = None
    seed: int = 0
    precision: torch.dtype | None = None


class Match:
    """What terms ask about the student and the teacher that they compare.

    Args:
        student: a model with the head that it is trained with.
        teacher: None where it is no model in memory: then there are no layers to compare.
        settings: see `MatchSettings`.

    Attributes:
        kind: what an output of the models is about.
        smoothing, classes: see `MatchSettings`.
        projections: learned bias-free maps from the student's width to the teacher's, by layer pair; empty where the
            widths agree, and where the student was cut from the teacher and keeps known channels of it. They belong to
            the loss, not to the student.
        memories: what terms keep from step to step, by term (see `Memory`).
        widths: of student and teacher, where there are projections.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, settings: MatchSettings):
        self.settings, self.kind = settings, kind_of(student)
        self.smoothing, self.classes = settings.smoothing, settings.classes
        self.projections = nn.ModuleDict()
        self.memories = nn.ModuleDict()
        self.widths: tuple[int, int] | None = None
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        if teacher is not None:
            self._configs = student.config, teacher.config
            self._lineages = lineage_of(student), lineage_of(teacher)
            self._rows = [None if lineage is None else lineage.layers for lineage in self._lineages]
            self._counts = len(any_layers_of(student)), len(any_layers_of(teacher))
            self._neurons = neuron_widths(student), neuron_widths(teacher)

    def hidden_pairs(self, layers: str | Sequence[tuple[int, int]], field: str) -> list[LayerPair]:
        """Layers whose outputs are compared (see `mapping.hidden_pairs`); `field` is what errors call the setting."""
        self._check_layers(field)
        return hidden_pairs(layers, *self._counts, self._lineage, field)

    def attention_pairs(self, layers: str | Sequence[tuple[int, int]], field: str) -> list[LayerPair]:
        """Layers and heads whose attention is compared (see `mapping.attention_pairs`), but for those without any head."""
        self._check_layers(field)
        own, original = self._rows
        pairs = attention_pairs(layers, *self._counts, self._lineage, field, self._group_size)
        pairs = [pair for pair in pairs if own is None or own[pair.student].heads]
        return [pair for pair in pairs if original is None or original[pair.teacher].heads]

    def _check_layers(self, field: str) -> None:
        """Check that both models have transformer layers."""
        if not all(self._counts):
            which = "student" if self._counts[1] else "teacher"
            fix = "leave this loss out: only models with one list of transformer layers have pairs of them"
            raise InputError(field, f"a {which} without transformer layers", fix=fix)

    def ffn_pairs(self, layers: str | Sequence[tuple[int, int]], field: str) -> list[LayerPair]:
        """Layers whose FFN neurons are compared, each by lineage with the one that it was copied from; but for those without any.

        Raises:
            InputError: as `mapping.attention_pairs`; a family whose neurons are not known, or FFNs of unequal width that do not
                come from each other.
        """
        if layers == "lineage":
            rows = need_lineage(self._lineage, self._counts[1], field)
            pairs = [LayerPair(index, row.source) for index, row in enumerate(rows)]
        else:
            pairs = hidden_pairs(layers, *self._counts, self._lineage, field)
        own, source = self._neurons
        if not (any(own) and any(source)):
            given = " and ".join(dict.fromkeys(config.model_type for config in self._configs))
            raise InputError(field, given, "models of the families that can be pruned (`distill-llm families`)")
        pairs = [pair for pair in pairs if own[pair.student] and source[pair.teacher]]
        for pair in pairs:
            widths = own[pair.student], source[pair.teacher]
            if self.neurons(pair) is None and widths[0] != widths[1]:
                fix = f"compare layers of one width: student layer {pair.student} was not cut from teacher layer {pair.teacher}"
                raise InputError(field, "{} and {} neurons".format(*widths), fix=fix)
        return pairs

    def neurons(self, pair: LayerPair) -> tuple[int, ...] | None:
        """The teacher's neurons that a layer's were copied from; None: it was not copied from that layer."""
        lineage = self._lineage
        return lineage[pair.student].neurons if lineage and lineage[pair.student].source == pair.teacher else None

    @property
    def _group_size(self) -> int:
        """Query heads that share a key-value head in a student with lineage in this teacher; 1 where it does not matter."""
        if self._rows[0] is None or not cut_from(*self._configs):
            return 1
        dims = dims_of(self._configs[0])
        return dims.queries // dims.groups

    @cached_property
    def _lineage(self) -> "Sequence | None":
        """The student's lineage counted in this teacher; None: it was not cut from it."""
        own, original = self._rows
        if own is None or not cut_from(*self._configs):
            return None
        return own if original is None else relative_lineage(own, original, self._group_size)

    def vector_widths(self, pair: LayerPair) -> set[int]:
        """Channels of all heads' queries and of all heads' keys in two layers, where the families' sizes are known."""
        widths: set[int] = set()
        for config, rows, layer in zip(self._configs, self._rows, (pair.student, pair.teacher), strict=True):
            if config.model_type not in FAMILIES:
                continue
            dims = dims_of(config)
            if rows is None:
                widths |= {dims.queries * dims.head_size, dims.groups * dims.head_size}
            else:
                queries = query_heads(rows[layer], dims.queries // dims.groups)
                widths |= {len(queries) * dims.head_size, len(rows[layer].heads) * dims.head_size}
        return widths

    @cached_property
    def _channels(self) -> tuple[int, ...] | None:
        """The teacher's channels that the student kept, counted in this teacher; None: the same, or projected."""
        kept, there = (None if lineage is None else lineage.hidden for lineage in self._lineages)
        if not cut_from(*self._configs):
            return None
        if kept is None or there is None:
            return kept
        if not set(kept) <= set(there):
            accepted = "a teacher that has all channels of the student"
            raise InputError(
                "teacher", f"a model that lacks {len(set(kept) - set(there))} of the student's channels", accepted
            )
        return tuple(map(there.index, kept))

    def project(self, pairs: Sequence[LayerPair], shared: bool = False) -> None:
        """Make projections for states of these pairs, where student and teacher are of unequal width.

        Args:
            shared: whether there is to be one for states of any layers too.

        Raises:
            InputError: the student kept channels that this teacher does not have.
        """
        widths = unequal_widths(*self._configs)
        if self._channels is not None or widths is None:
            return
        self.widths = widths
        generator = torch.Generator().manual_seed(self.settings.seed)
        names = [_name(pair) for pair in sorted(pairs, key=lambda pair: pair.student == EMBEDDINGS)]
        for name in [*names, *([SHARED] if shared else [])]:
            linear = nn.Linear(*widths, bias=False, device="meta")  # draws no random numbers of the run
            linear.weight = nn.Parameter(torch.empty(linear.weight.shape))
            nn.init.normal_(linear.weight, std=widths[0] ** -0.5, generator=generator)
            self.projections[name] = linear

    def states(
        self, batch: Batch, pair: LayerPair, adapter: Adapter = "projection"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (B, T, H) hidden states of a pair as they are compared: in the same channels, or adapted to the teacher's width."""
        return self.compared(batch.own.hidden[pair.student], batch.target.hidden[pair.teacher], pair, adapter)

    def compared(
        self, state: torch.Tensor, target: torch.Tensor, pair: LayerPair, adapter: Adapter = "projection"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `states`, of (..., H) and (..., H') states of a pair."""
        return self.adapted(state, adapter, pair), self.same_channels(target)

    def adapted(self, state: torch.Tensor, adapter: Adapter, pair: LayerPair | None = None) -> torch.Tensor:
        """(..., width) states of the student's (..., H) as they are compared; a projection of its own needs the `pair`."""
        if adapter == "interpolation":
            return interpolated(state, self.width)
        name = SHARED if adapter == "shared" or pair is None else _name(pair)
        if name not in self.projections:
            return state
        precision = self.settings.precision
        with torch.autocast(state.device.type, precision, enabled=precision is not None):
            return self.projections[name](state)

    @property
    def layer_counts(self) -> tuple[int, int]:
        """How many layers student and teacher have."""
        return self._counts

    @property
    def width(self) -> int:
        """Channels in which states are compared."""
        return width_of(self._configs[1]) if self._channels is None else len(self._channels)

    @property
    def classes_of_task(self) -> int:
        """How many classes the student's task has."""
        return int(self._configs[0].num_labels or 0)

    def check_differentiable(self, field: str) -> None:
        """Raise an InputError where the gradients of two models cannot be compared: other widths, other attention."""
        if (widths := unequal_widths(*self._configs)) is not None:
            accepted = "a student as wide as its teacher, or cut from it: gradients in other states cannot be compared"
            raise InputError(field, "states of {} and {} channels".format(*widths), accepted)
        for config in self._configs:
            if (kernel := config._attn_implementation) not in (None, "eager", "sdpa"):
                raise InputError(
                    field, f"attn_implementation {kernel}", "sdpa or eager: others have no second derivative"
                )

    def same_channels(self, target: torch.Tensor) -> torch.Tensor:
        """(B, T, H) states or gradients of the teacher in the channels that the student kept."""
        if self._channels is None:
            return target
        return target.index_select(-1, self.indices(self._channels, target.device))

    def state_distance(
        self, batch: Batch, pairs: Sequence[LayerPair], distance: str, adapter: Adapter = "projection"
    ) -> torch.Tensor:
        """The sum over valid tokens of the mean over pairs of a distance of hidden states (see `hidden_distance`)."""
        total = batch.zero()
        for pair in pairs:
            total = total + (hidden_distance(*self.states(batch, pair, adapter), distance) * batch.valid.float()).sum()
        return total / len(pairs)

    def indices(self, chosen: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """A choice of heads or channels as a tensor, put on the device once."""
        if chosen not in self._indices:
            self._indices[chosen] = torch.tensor(chosen, device=device)
        return self._indices[chosen]


def _name(pair: LayerPair) -> str:
    return "embeddings" if pair.student == EMBEDDINGS else f"{pair.student}-{pair.teacher}"
