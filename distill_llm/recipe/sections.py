"""The sections of a recipe, except pruning: the one place for the names, defaults and meanings of their fields."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from distill_llm.common.errors import raise_all
from distill_llm.common.validation import faults_of
from distill_llm.losses.objective import Objective, parse_objective
from distill_llm.recipe.adapter_fields import check_adapter_fields
from distill_llm.recipe.answers import AnswersSection
from distill_llm.recipe.augment import AugmentSection
from distill_llm.recipe.columns import ColumnsSection
from distill_llm.recipe.generations import GenerationsSection
from distill_llm.recipe.section import Section
from distill_llm.recipe.synthetic import SyntheticSection, TestSection, check_synthetic
from distill_llm.recipe.training_fields import check_training_fields


def training_fields(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Pydantic validator of a mapping of TrainingArguments fields."""
    if fields is None:
        return None
    clean, faults = check_training_fields(fields)
    raise_all(faults)
    return clean


class StudentSection(Section):
    """An existing student (any smaller model with the teacher's tokenizer), or LoRA settings."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id, folder, GGUF file, or package://PACKAGE/PATH; left out: the pruned teacher",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="hold the student's weights in fewer bits while its adapters learn (bitsandbytes, QLoRA); it is saved with"
        " the adapters merged, in the dtype of its checkpoint",
    )
    peft: dict[str, Any] | None = Field(
        default=None,
        description="fields of peft's LoraConfig: only adapters learn, and are merged into the weights when the student is saved",
    )

    @field_validator("peft")
    @classmethod
    def _check_peft(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        return given if given is None else check_adapter_fields(given)


class DataSection(Section):
    """The task and where its data are."""

    task: str = Field(
        description="a GLUE task (sst2, mrpc, ...), embedded, text, prompts, classification or regression; synthetic: no data"
    )
    path: str | None = Field(
        default=None, description="folder, file, Hub id or package://PACKAGE/PATH; GLUE: nyu-mll/glue"
    )
    columns: ColumnsSection | None = Field(default=None, description="column names of the user's own data")
    max_length: int = Field(default=128, ge=8, description="number of tokens that an example is cut to")
    join_rows: bool = Field(
        default=False,
        description="for text: the rows are lines of longer documents, as WikiText's are, so 1,000 at a time are joined by"
        " blank lines. Otherwise each row is a document, which begins and ends with special tokens",
    )
    packing: bool = Field(
        default=False, description="for prompts: short training examples share rows of max_length tokens"
    )
    chat: bool = Field(
        default=False,
        description="for prompts: put prompts and responses into the tokenizer's chat template, as turns of user and assistant",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default={}, description="further arguments of the chat template, for example {enable_thinking: false}"
    )
    train_examples: int | None = Field(default=None, ge=1, description="number of training rows to use; left out: all")
    holdout_examples: int = Field(
        default=0, ge=0, description="number of training rows kept aside to choose settings with; never trained on"
    )
    test_examples: int | None = Field(default=None, ge=1, description="number of test rows to score on; left out: all")
    separator: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="character between the columns of .csv and .tsv files; left out: a tab in .tsv, and in .csv the one of"
        " comma, semicolon, tab and | that the header line has most of",
    )
    encoding: str | None = Field(
        default=None,
        min_length=1,
        description="encoding of files of text, for example cp1252; left out: what a byte order mark says, else UTF-8",
    )
    drop_incomplete: bool = Field(
        default=False, description="leave out rows that lack a text or a label; otherwise they are an error"
    )
    answers: AnswersSection | None = Field(
        default=None, description="for prompts with several answers of a teacher: which are kept; left out: all"
    )
    augment: AugmentSection | None = Field(
        default=None,
        description="how the student's training rows are changed anew in every epoch; left out: not at all",
    )
    synthetic: SyntheticSection | None = Field(default=None, description="how rows of the task synthetic are made")
    test: TestSection | None = Field(
        default=None, description="with the task synthetic: real rows to score on; left out: synthetic ones"
    )

    @model_validator(mode="after")
    def _synthetic(self) -> "DataSection":
        check_synthetic(self)
        return self


class DistillationSection(Section):
    """Recovery after each round: the losses, and any field of TrainingArguments."""

    model_config = ConfigDict(extra="allow")

    losses: Objective = Field(
        default_factory=lambda: parse_objective({"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}),
        description="the terms of the objective; docs/reference/losses.md explains them",
    )

    generations: GenerationsSection | None = Field(
        default=None,
        description="how many students learn one after the other in the last round, each from the one before (born-again"
        " networks); left out: one. All begin where the first began. The best on held-out rows is the student; without"
        " data.holdout_examples the last",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _check_fields(
        cls, given: Any, handler: ModelWrapValidatorHandler["DistillationSection"]
    ) -> "DistillationSection":
        if not isinstance(given, dict):
            return handler(given)
        fields = {name: value for name, value in given.items() if name not in cls.model_fields}
        clean, faults = check_training_fields(fields, also=tuple(cls.model_fields))
        section = None
        try:
            section = handler({**{name: given[name] for name in given if name in cls.model_fields}, **clean})
        except ValidationError as error:
            faults = faults_of(error, cls) + faults
        raise_all(faults)
        assert section is not None
        return section


class LatencySection(Section):
    """The batch that latency, memory and FLOPs are measured on."""

    batch_size: int = Field(default=32, ge=1, description="number of examples in the batch")
    sequence_length: int = Field(default=64, ge=1, description="number of tokens in each example")


class HarnessSection(Section):
    """Benchmarks of lm-evaluation-harness (extra `harness`), for decoders; a list of tasks is short for `tasks`."""

    tasks: list[str] = Field(min_length=1, description="names of tasks, groups or tags of the harness")
    limit: int | None = Field(default=None, ge=1, description="most rows of each task; left out: all")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question; left out: as many as the task says"
    )
    include_path: Path | None = Field(
        default=None, description="folder with tasks of your own, as YAML files; found before those of the harness"
    )
    chat: bool = Field(default=False, description="put questions into the tokenizer's chat template")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, given: Any) -> Any:
        return {"tasks": [given] if isinstance(given, str) else given} if isinstance(given, str | list) else given

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(names))

    @field_validator("include_path")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        return None if folder is None else Path(os.path.expanduser(folder))


class EvaluationSection(Section):
    """How models are scored and profiled."""

    batch_size: int = Field(default=64, ge=1, description="number of examples at once in scoring")
    metric: str | None = Field(
        default=None,
        min_length=1,
        description="the main metric; left out: the task's own. Classification: accuracy, f1 or matthews_correlation."
        " Regression: spearmanr or pearsonr. Prompts: perplexity of the data's responses; or, for generated responses,"
        " exact_match, final_answer (what follows the last ####, else the last number), or a metric of the library evaluate as"
        " NAME or NAME:VALUE, for example rouge:rougeL: its code then runs and may need further packages",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="largest number of tokens in a generated response")
    latency: LatencySection = Field(default_factory=LatencySection, description="the batch that is timed")
    harness: HarnessSection | None = Field(
        default=None, description="benchmarks that teacher and student are scored on at the end"
    )


class ExportSection(Section):
    """A file or folder that other programs read, written when the student is finished."""

    format: str = Field(description="gguf (llama.cpp) or onnx (onnxruntime)")
    quantize: str | None = Field(
        default=None,
        description="type of the weights; gguf: f16 (the default), bf16, f32 or q8_0; onnx: f32 (the default) or int8",
    )


class ReportSection(Section):
    """What the report shows beside scores and costs. Each costs the report stage about as much time as a scoring."""

    examples: int = Field(
        default=10,
        ge=0,
        le=100,
        description="number of test rows to show, those on which teacher and student disagree most; 0 shows no rows of the data",
    )
    latency_grid: bool = Field(
        default=True,
        description="time teacher and student on further batch sizes and lengths, none with more tokens than the batch of"
        " evaluation.latency, for at most half a minute",
    )


class HubSection(Section):
    """Where to push the student when the run has ended."""

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="USER_OR_ORGANISATION/NAME")
    private: bool = Field(default=False, description="make a new repository private")


class GallerySection(Section):
    """What `distill-llm recipes --show NAME` tells about a recipe. A run does not read it, and its folder does not keep it."""

    models: Literal["encoder", "llm"] = Field(description="the kind of models that the recipe is for")
    does: str = Field(min_length=1, description="what the recipe does, in a few sentences")
    paper: str = Field(default="", description="authors, year, title and section that it follows, with a link")
    differs: str = Field(default="", description="where the recipe does something else than the paper")
    cost: str = Field(min_length=1, description="time on what device, and memory")
    before: list[str] = Field(default=[], description="commands to run first")
    here: list[str] = Field(default=[], description="settings (NAME=VALUE) of a small run whose result is shown")
    here_before: list[str] = Field(default=[], description="commands to run before the small run")
    untried: str = Field(default="", description="why there is no result")
