"""What a term of the loss is: its settings, what it reads, what it is averaged over, its sum, and what it goes with.

A term is read and checked without torch, so its file imports what needs torch inside its methods.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from distill_llm.common.errors import InputError
from distill_llm.losses.registry import refuse_taken
from distill_llm.losses.schedules import Weight
from distill_llm.losses.terms import BUILT_IN
from distill_llm.losses.units import OUTPUT_UNITS, Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.head_parts import Part
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.memory import Memory
    from distill_llm.losses.signals import Batch

Signal = Literal["logits", "hidden", "attention", "vectors", "neurons", "graph", "linked", "exits"]
INSIDE: tuple[Signal, ...] = ("attention", "vectors", "neurons")
"""Signals that are made inside of layers."""


@dataclass(frozen=True)
class Gives:
    """What a teacher can give.

    Attributes:
        name: what messages call the teacher.
        signals: the kinds of signals that it has; `logits` stands for any form of outputs of the student's tokens, `linked`
            for outputs of tokens of its own.
        few: (k, classes) of a teacher that knows at most k classes of each item; None: all classes.
        new_text: whether it has signals of text that is in no dataset, such as the student's own answers.
        writes: whether one model in memory can write a text with the student, token by token.
        mixtures: whether it has signals of examples whose embeddings are mixed.
    """

    name: str
    signals: tuple[Signal, ...] = ("logits",)
    few: tuple[int, int] | None = None
    new_text: bool = True
    writes: bool = False
    mixtures: bool = False


@dataclass(frozen=True)
class Use:
    """What an objective is to be used with, as far as the one who asks knows it; what is left out raises no fault.

    Attributes:
        teacher: what the teacher can give.
        single_output: whether the student has one output, the value of a regression.
        classes: of the student's outputs, where they are classes of a task.
        rows: of a micro-batch of one process, and of all processes' at once.
        reentrant: the field that asks for checkpointing of the re-entrant kind.
        layers: numbers of layers of student and teacher.
        cut: whether the student was, or will be, pruned from this teacher.
        widths: of the hidden states of student and teacher, where projections are to make up for the difference.
        sharding: DeepSpeed, FSDP1 or FSDP2, where the student is divided among processes.
        vector_widths: channels of all heads' queries and keys in layers that are compared with each other.
        head_size: channels of a head, where pruning chooses how many heads stay.
        kind: what an output of the student is about.
        packed: the field whose rows hold several sequences.
        mixed: the field by which examples are mixtures of two.
        unlabelled: what rows without labels are called, where there are no others.
    """

    teacher: Gives | None = None
    single_output: bool = False
    classes: int | None = None
    rows: tuple[int, int] | None = None
    reentrant: str | None = None
    layers: tuple[int, int] | None = None
    cut: bool | None = None
    widths: tuple[int, int] | None = None
    sharding: str | None = None
    vector_widths: frozenset[int] = frozenset()
    head_size: int | None = None
    kind: Kind | None = None
    packed: str | None = None
    mixed: str | None = None
    unlabelled: str | None = None


class Term(BaseModel):
    """Base of all terms: a section of an objective whose fields are the settings of the term.

    Attributes:
        name: what objectives and logs call it; set by `@term(name)`.
        signals: what it reads of the student and, if `needs_teacher`, of the teacher. `logits` are those of the items that
            count; the others are recorded at the layers of `layer_pairs`. With `graph`, they can be differentiated in these
            states, the student's twice. `exits` are outputs of the student alone.
        of_teacher: what it reads of the teacher, where that is something else.
        needs_teacher: whether it compares the student with a teacher.
        of_data: whether it compares with the labels of the data: a batch that the student answered itself has none.
        projects: whether it compares states that must be projected where widths differ.
        packed_rows: whether it keeps sequences that share a row apart.
        sparse_targets: whether a few tokens of each item are enough, of a teacher's outputs that it reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    signals: ClassVar[tuple[Signal, ...]] = ()
    of_teacher: ClassVar[tuple[Signal, ...] | None] = None
    needs_teacher: ClassVar[bool] = True
    of_data: ClassVar[bool] = False
    projects: ClassVar[bool] = False
    packed_rows: ClassVar[bool] = True
    sparse_targets: ClassVar[bool] = False

    weight: Weight = Field(default=1.0, description="Factor of the term in the whole loss: a number or a schedule.")

    def unit(self, kind: Kind) -> Unit:
        """What the sum is divided by the number of, for a model whose outputs are about `kind`."""
        return OUTPUT_UNITS[kind] if "logits" in self.signals else "tokens"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """The layers of student and teacher that are compared.

        Raises:
            InputError: layers that do not exist, or settings that do not fit them.
        """
        return []

    def memory(self, match: "Match", pairs: "list[LayerPair]") -> "Memory | None":
        """What the term keeps from step to step, new for each training; `sum` finds it as `match.memories[self.name]`.

        Args:
            match, pairs: see `sum`.
        """
        return None

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over the items of a batch, 0-dim in fp32.

        Args:
            batch: the signals of both models, and what they are of.
            match: how student and teacher correspond.
            pairs: what `layer_pairs` gave.
        """
        raise NotImplementedError

    def in_head(self, batch: "Batch", match: "Match", factor: "Tensor") -> "Part":
        """The same as a part of `head_losses`, made before the student's forward; a term without it needs whole logits.

        Args:
            batch: the teacher's signals are HeadSignals or SparseSignals, the student's are not there yet.
            match: see `sum`.
            factor: 0-dim, what the sum is multiplied by in the loss.
        """
        raise NotImplementedError

    @property
    def learns_projections(self) -> bool:
        """Whether states of unequal width go through learned projections."""
        return self.projects

    @property
    def shares_projection(self) -> bool:
        """Whether that is one projection for all of its layer pairs."""
        return False

    @property
    def asks_for_labels(self) -> str | None:
        """The setting by which it reads the labels of the data, empty for the whole term; None: it reads none."""
        return "" if self.of_data else None

    @classmethod
    def needs_logits(cls) -> bool:
        """Whether the term needs the whole logits of a language model."""
        return "logits" in cls.signals and cls.in_head is Term.in_head

    @classmethod
    def differentiates(cls) -> bool:
        """Whether it takes gradients of both models."""
        return "graph" in cls.signals

    @classmethod
    def looks_inside(cls) -> bool:
        """Whether it reads what is made inside of layers."""
        return not set(INSIDE).isdisjoint(cls.signals)

    def _beyond(self, teacher: Gives) -> Iterator[InputError]:
        """Signals that a teacher does not have, the first fault alone."""
        wanted = self.signals if self.of_teacher is None else self.of_teacher
        missing = [signal for signal in wanted if signal not in teacher.signals]
        if missing:
            accepted = f"a teacher that gives {', '.join(missing)}: this one gives only {', '.join(teacher.signals)}"
            yield InputError("", teacher.name, accepted)
        elif teacher.few is not None and not self.sparse_targets:
            what = f"{teacher.name} that knows" if teacher.new_text else "a cache of"
            given = "{} {} of {} classes".format(what, *teacher.few)
            yield InputError("", given, "a teacher in memory, or a cache of all classes")

    def faults(self, use: Use) -> Iterator[InputError]:
        """What the term does not go with; fields are named as within the term's section.

        A term that overrides this goes on with the faults of this one: `yield from super().faults(use)`.
        """
        if use.teacher is not None and self.needs_teacher:
            yield from self._beyond(use.teacher)
        if use.unlabelled and (asks := self.asks_for_labels) is not None:
            given, what = (getattr(self, asks), "set another one") if asks else (use.unlabelled, "remove it")
            yield InputError(asks, given, fix=f"{what}: {use.unlabelled} have no labels")
        if use.packed and not self.packed_rows:
            yield InputError("", f"rows of several sequences ({use.packed})", "rows of one sequence each")
        if self.learns_projections and use.widths is not None and use.sharding == "DeepSpeed":
            given = f"states of {use.widths[0]} and {use.widths[1]} channels under DeepSpeed"
            yield InputError("", given, "a student as wide as its teacher, or DDP or FSDP in place of DeepSpeed")


TERMS: dict[str, type[Term]] = {}
AnyTerm = TypeVar("AnyTerm", bound=type[Term])


def term(name: str) -> Callable[[AnyTerm], AnyTerm]:
    """A decorator: the class becomes the term that objectives call `name`.

    Raises:
        ValueError: a name that is taken or no identifier, or a class that is no term or lacks a method.
    """
    if not name.isidentifier():
        raise ValueError(f"term {name!r}: choose a name of letters, digits and underscores")

    def register(cls: AnyTerm) -> AnyTerm:
        if not issubclass(cls, Term):
            raise ValueError(f"term {name!r}: {cls.__name__} is no subclass of Term")
        missing = sorted(cls.__abstractmethods__) or (["sum"] if cls.sum is Term.sum else [])
        if missing:
            raise ValueError(f"term {name!r}: {cls.__name__} must define {', '.join(missing)}")
        if name == "responses":
            raise ValueError("term 'responses' exists already: choose another name")
        refuse_taken(TERMS.get(name), cls, f"term {name!r}")
        cls.name, TERMS[name] = name, cls
        return cls

    return register


def all_terms() -> dict[str, type[Term]]:
    """Every term by name: those of the package in the order of BUILT_IN, then others as they were imported."""
    for name in BUILT_IN:
        import_module(f"distill_llm.losses.terms.{name}")
    return {name: TERMS[name] for name in (*BUILT_IN, *(name for name in TERMS if name not in BUILT_IN))}
