"""What the terms of a loss are computed from: the signals of both models, and the batch that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distill_llm.common.errors import InputError
from distill_llm.losses.attention import AttentionInputs
from distill_llm.losses.head import Head
from distill_llm.losses.sparse import SparseTargets

EMBEDDINGS = -1  # the layer before the first: its output is what the first reads


class MixedLabels(NamedTuple):
    """The labels of the examples that a batch's examples are mixed with, (B,), and an example's own share, (B,) in fp32."""

    labels: torch.Tensor
    share: torch.Tensor


class Exits(NamedTuple):
    """What a student's exits give: (B, E, C) logits, and (B, E + 1, H) what they make of their states, and the last state."""

    logits: torch.Tensor
    states: torch.Tensor


class TokenExits(NamedTuple):
    """What exits of a language model give: the `head`, and (items, H) of its inputs after each exit and, last, all layers."""

    states: tuple[torch.Tensor, ...]
    head: Head


class Vectors(NamedTuple):
    """What an attention layer was given: queries (B, N, T, D), and keys and values, which may have fewer heads."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Wanted:
    """Layers to record.

    Attributes:
        hidden: layers whose output hidden states are wanted; EMBEDDINGS for those that the first layer reads.
        attention: layers whose attention probabilities are wanted, as queries and keys.
        vectors: layers whose queries, keys and values are wanted.
        neurons: layers whose FFN neurons are wanted, before their activation.
        graph: whether outputs are to be differentiated in the hidden states.
        fields: by kind of signal, the setting that asks for it: what an error names.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    vectors: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    graph: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)

    def field(self, kind: str) -> str:
        """What an error about signals of a kind names: the setting that asks for them, or the kind itself."""
        return self.fields.get(kind, kind)


@dataclass
class Signals:
    """The signals of a batch.

    Attributes:
        hidden: by layer, (B, T, H) output hidden states.
        attention: by layer, what attention probabilities were computed from.
        vectors: by layer, queries, keys and values.
        neurons: by layer, (B, T, N) FFN neurons before their activation.
        live: the same with their graph, of a teacher whose outputs are to be differentiated in its hidden states.
        exits: of a student that has some.
        logits: (B, C), or (items, V) of a model with an output per token.
    """

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    vectors: dict[int, Vectors] = field(default_factory=dict)
    neurons: dict[int, torch.Tensor] = field(default_factory=dict)
    live: "Signals | None" = None
    exits: Exits | TokenExits | None = None
    logits: torch.Tensor = field(kw_only=True)

    def detached(self) -> "Signals":
        """The same without graph, which is in `live`; only hidden states and logits can be differentiated."""
        attention = {
            layer: each._replace(query=each.query.detach(), key=each.key.detach())
            for layer, each in self.attention.items()
        }
        return Signals(
            {layer: each.detach() for layer, each in self.hidden.items()},
            attention,
            {layer: Vectors(*(part.detach() for part in each)) for layer, each in self.vectors.items()},
            {layer: each.detach() for layer, each in self.neurons.items()},
            live=self,
            logits=self.logits.detach(),
        )

    def soundness(self) -> torch.Tensor:
        """0-dim in fp32: 0 where every number is finite, else nan; made without waiting for the device.

        Of a row of logits some may be minus infinity (masked classes).
        """
        tops = [each.amax(-1) for each in self._outputs() if each.numel()]
        inside = [*self.hidden.values(), *self.neurons.values()]
        inside += [each for inputs in self.attention.values() for each in (inputs.query, inputs.key)]
        inside += [each for vectors in self.vectors.values() for each in vectors]
        spans = [end for each in (*tops, *inside) if each.numel() for end in each.aminmax()]
        zero = self.logits.new_zeros((), dtype=torch.float32)
        return sum((each.float() * 0 for each in spans), zero)

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        return (self.logits,)


@dataclass
class SparseSignals(Signals):
    """Signals of a teacher known at a few tokens per item: `targets` in place of `logits`, which is (items, 0)."""

    targets: SparseTargets = field(kw_only=True)

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        return self.targets.probabilities, self.targets.teacher_nll[:, None]


@dataclass
class HeadSignals(Signals):
    """Signals of a language model with `head_inputs` (items, H) and the `head` in place of `logits`, which is (0, V)."""

    head: Head = field(kw_only=True)
    head_inputs: torch.Tensor = field(kw_only=True)

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        return (self.head_inputs,)


@dataclass(frozen=True)
class Links:
    """How the outputs of two models with tokenizers of their own belong together.

    Outputs of either model are numbered as its logits are; a chunk is a stretch of text that both tokenizers cut out.

    Attributes:
        own: (n, 3) of the student, for each token in a chunk: the output that predicts it, its id, the number of the chunk.
        other: (m, 3) of the teacher.
        same: (chunks,) of bool: one token on both sides, and the same text.
        shared: (k, 2) ids of tokens with the same text in both vocabularies, of the student and of the teacher.
        sizes: how many leading logits of student and teacher are tokens.
        all_shared: whether `shared` is every token of both, in the same order.
    """

    own: torch.Tensor
    other: torch.Tensor
    same: torch.Tensor
    shared: torch.Tensor
    sizes: tuple[int, int]
    all_shared: bool = False


@dataclass
class LinkedSignals(Signals):
    """Signals of a teacher with another tokenizer: `logits` (m, V') of its own tokens, and the links to the student's."""

    links: Links = field(kw_only=True)


def check_outputs(given: Any, student: torch.Tensor | None, classes: int | None) -> None:
    """Whether a teacher's outputs can be compared with the student's; only shapes are looked at.

    Args:
        given: what the teacher's `signals` returned.
        student: (items, C) logits; None: outputs are not compared.
        classes: how many leading logits mean the same; None: all of them.

    Raises:
        InputError: no Signals, or logits of other items or classes.
    """
    if not isinstance(given, Signals):
        fix = "return Signals(logits=...) of distill_llm.losses.signals"
        raise InputError("teacher.signals", f"a {type(given).__name__}", fix=fix)
    if student is None or isinstance(given, HeadSignals | SparseSignals | LinkedSignals):
        return
    shape, (items, width) = tuple(given.logits.shape), student.shape
    if len(shape) != 2 or shape[0] != items or (shape[1] != width if classes is None else shape[1] < classes):
        most = "" if classes is None else " or more"
        accepted = f"({items}, {classes or width}{most}): a row for each item, with the classes that `meet` agreed on"
        raise InputError("teacher.signals", f"logits of shape {shape}", accepted)


@dataclass(frozen=True)
class Batch:
    """What terms are computed from.

    Attributes:
        teacher: None where the objective does not need a teacher.
        labels: (B,) or (items,) as the logits have them; None where the data has none.
        valid: (B, T), 1 at valid tokens and 0 at padding.
        step, steps: optimizer steps done, and those of the whole training.
        student: of the training forward; None before it.
        sequences: (B, T) of packed rows, the number of the sequence that each token belongs to; None: a sequence per row.
        mixed: where examples are mixtures of two.
        tokens: (B, T) token ids, of models that read such.
        weights: (items,) what comparisons of outputs with the teacher are multiplied by, where the student's answers were drawn
            from something else than the student; None: 1.
        data_items: of a batch in which the student's answers stand, how many items, the first ones, are of the data; None: all.
    """

    teacher: Signals | None
    labels: torch.Tensor | None
    valid: torch.Tensor
    step: int = 0
    steps: int = 1
    student: Signals | None = None
    sequences: torch.Tensor | None = None
    mixed: MixedLabels | None = None
    tokens: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    data_items: int | None = None

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """Values (items,) times `weights`."""
        return values if self.weights is None else values * self.weights

    @property
    def own(self) -> Signals:
        """The student's signals."""
        assert self.student is not None
        return self.student

    @property
    def target(self) -> Signals:
        """The teacher's signals, for a term that needs them."""
        assert self.teacher is not None
        return self.teacher

    def zero(self) -> torch.Tensor:
        """0 in fp32 on the device of the student's signals."""
        return self.own.logits.new_zeros((), dtype=torch.float32)

    def needed_labels(self, field: str) -> torch.Tensor:
        """The labels, for a term that needs them.

        Raises:
            InputError: there are none.
        """
        if self.labels is None:
            raise InputError(
                field, "a batch without labels", f"data with a labels column, or an objective without {field}"
            )
        return self.labels.flatten()
