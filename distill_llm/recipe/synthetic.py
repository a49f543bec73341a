"""The sections `data.synthetic` and `data.test`: rows made from models, and real rows to score on."""

import os
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from distill_llm.common.errors import InputError
from distill_llm.recipe.columns import ColumnsSection
from distill_llm.recipe.section import Section

TASK = "synthetic"
METHODS = ("generator", "inversion", "noise", "sampled")


class GeneratorSection(Section):
    """A generator of embeddings that learns beside the student (Fang et al., 2019; Chen et al., 2019)."""

    noise: int = Field(default=32, ge=1, description="number of random numbers that each token is made of")
    width: int = Field(default=128, ge=1, description="width of the generator's hidden layers")
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False, description="of the generator's Adam")
    every: int = Field(default=5, ge=1, description="number of steps of the student for each step of the generator")
    batch_size: int = Field(default=32, ge=2, description="number of rows in a step of the generator")
    warmup_steps: int = Field(
        default=100, ge=0, description="number of the generator's steps before there is a student, by the teacher alone"
    )
    disagreement: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the mean absolute difference of student's and teacher's logits, which the generator makes large",
    )
    balance: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the entropy of the teacher's mean distribution, made large so that all classes occur",
    )
    confidence: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="weight of the cross-entropy of the teacher with its own likeliest class, which the generator makes small",
    )


class NoiseSection(Section):
    """Embeddings that begin as noise and are changed until the teacher's logit of a class is large."""

    steps: int = Field(default=50, ge=1, description="number of steps of Adam for each batch of rows")
    learning_rate: float = Field(
        default=0.05, gt=0, allow_inf_nan=False, description="of these steps, in standard deviations of the embeddings"
    )
    prior: float = Field(
        default=0.01,
        ge=0,
        allow_inf_nan=False,
        description="weight of the mean square distance from the mean embedding",
    )
    batch_size: int = Field(default=64, ge=2, description="number of rows that are optimised together")


class InversionSection(NoiseSection):
    """The same by the class's cross-entropy and the statistics of the layers (DeepInversion, Yin et al., 2020)."""

    steps: int = Field(default=100, ge=1, description="number of steps of Adam for each batch of rows")
    statistics: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="weight of the distance of the layers' channel statistics from what their norms expect",
    )


class SampledSection(Section):
    """Texts sampled from a language model (LLM-QAT, Liu et al., 2023)."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="causal or masked LM: folder, Hub id, GGUF file or package://PACKAGE/PATH; of a teacher that is a language"
        " model, one with its tokenizer. Left out: the teacher itself, where it is a language model",
    )
    prompts: Path | None = Field(
        default=None,
        description="text file with a prompt on each line, which the texts of a causal LM begin with in turn; left out: its"
        " begin token",
    )
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="divides the logits; 0 is greedy")
    top_k: int = Field(default=0, ge=0, description="of a causal LM: draw from so many likeliest tokens; 0: from all")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of a causal LM: draw from the likeliest tokens with this much mass together",
    )
    sweeps: int = Field(default=2, ge=1, description="of a masked LM: how often each token is drawn")
    batch_size: int = Field(default=32, ge=1, description="number of texts that are drawn together")

    @field_validator("prompts")
    @classmethod
    def _expand_home(cls, file: Path | None) -> Path | None:
        return None if file is None else Path(os.path.expanduser(file))


class SyntheticSection(Section):
    """How the rows of `task: synthetic` are made; one of generator, inversion, noise and sampled is given."""

    examples: int = Field(default=2000, ge=1, description="number of rows to learn from, and to prune by")
    test_examples: int = Field(
        default=500,
        ge=1,
        description="number of further rows, which scores are of where data.test is left out: agreement with the teacher",
    )
    length: int = Field(
        default=32, ge=4, description="number of tokens of a row, special ones included; of sampled texts the most"
    )
    generator: GeneratorSection | None = Field(default=None, description="embeddings of a generator that learns")
    inversion: InversionSection | None = Field(default=None, description="embeddings that layers recognise as real")
    noise: NoiseSection | None = Field(default=None, description="embeddings that make a class likely")
    sampled: SampledSection | None = Field(default=None, description="texts of a language model")

    @model_validator(mode="after")
    def _one_method(self) -> "SyntheticSection":
        given = [name for name in METHODS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError("", given, f"exactly one of {', '.join(METHODS)}, for example {{noise: {{}}}}")
        return self

    @property
    def method(self) -> str:
        """The name of the one that is given."""
        return next(name for name in METHODS if getattr(self, name) is not None)

    @property
    def embeds(self) -> bool:
        """Whether rows hold embeddings in the place of tokens."""
        return self.sampled is None


class TestSection(Section):
    """Real rows that models are scored on where they learn from synthetic ones."""

    __test__ = False  # no class of tests

    task: str = Field(description="a GLUE task, embedded, text or classification; with the teacher's classes")
    path: str | None = Field(default=None, description="folder, file, Hub id or package://PACKAGE/PATH")
    columns: ColumnsSection | None = Field(default=None, description="column names of the user's own data")
    examples: int | None = Field(default=None, ge=1, description="number of rows to score on; left out: all")


OF_REAL_ROWS = (
    "path",
    "columns",
    "join_rows",
    "packing",
    "chat",
    "chat_template_kwargs",
    "train_examples",
    "holdout_examples",
    "test_examples",
    "separator",
    "encoding",
    "drop_incomplete",
)
"""Fields of the data section that say something about the rows of a real task."""


def check_synthetic(data: Section) -> None:
    """Whether a data section has what its task goes with.

    Raises:
        InputError: naming the field, below `data`.
    """
    synthetic, test, task = (getattr(data, name) for name in ("synthetic", "test", "task"))
    if task != TASK:
        fix = f"remove it, or set data.task to {TASK}: other tasks have rows of their own"
        for name, given in (("synthetic", synthetic), ("test", test)):
            if given is not None:
                raise InputError(name, given.model_dump(exclude_none=True), fix=fix)
        return
    if synthetic is None:
        raise InputError("synthetic", None, fix="say how the rows are made, for example synthetic: {noise: {}}")
    for name in OF_REAL_ROWS:
        if getattr(data, name) != type(data).model_fields[name].default:
            fix = "remove it: no row is read with task synthetic (real rows to score on are data.test)"
            raise InputError(name, getattr(data, name), fix=fix)
