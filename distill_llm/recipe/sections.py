"""The sections of a recipe but pruning: the one place for the names, defaults and meanings of their fields."""

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
from distill_llm.recipe.section import Section
from distill_llm.recipe.training_fields import check_training_fields


def training_fields(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Pydantic validator of a mapping of TrainingArguments fields."""
    if fields is None:
        return None
    clean, faults = check_training_fields(fields)
    raise_all(faults)
    return clean


class TeacherSection(Section):
    """The model to learn from."""

    model: str = Field(min_length=1, description="Hub id, folder, GGUF file, or package://PACKAGE/PATH")
    train: dict[str, Any] | None = Field(
        default=None,
        description="TrainingArguments fields; given, the teacher is first fine-tuned on the task: with its own head where that"
        " has the task's classes, else with a new one",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="precision of the teacher's weights while a student learns; left out: as the student is trained. It is"
        " scored and measured in the dtype of its checkpoint whatever this says",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="hold the teacher's weights in fewer bits while a student learns (bitsandbytes); pruned, scored and"
        " measured is the checkpoint itself",
    )
    cache: Path | None = Field(
        default=None, description="folder that `distill-llm cache` wrote: learn from it, with no teacher in memory"
    )

    _check_train = field_validator("train")(training_fields)

    @field_validator("cache")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        return None if folder is None else Path(os.path.expanduser(folder))


class StudentSection(Section):
    """The student: one that exists already (any smaller model with the teacher's tokenizer), or how it learns."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id, folder, GGUF file, or package://PACKAGE/PATH; left out: the pruned teacher",
    )
    peft: dict[str, Any] | None = Field(
        default=None, description="fields of peft's LoraConfig: only adapters learn, merged into the weights when saved"
    )

    @field_validator("peft")
    @classmethod
    def _check_peft(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        return given if given is None else check_adapter_fields(given)


class ColumnsSection(Section):
    """Names of the columns of the user's own data."""

    text: str | None = Field(default=None, description="column with the text, or the first of two")
    text_pair: str | None = Field(default=None, description="column with the second text of a pair")
    label: str | None = Field(default=None, description="column with the class or the number")
    prompt: str | None = Field(default=None, description="column with the prompt")
    response: str | None = Field(default=None, description="column with the response to learn")
    messages: str | None = Field(default=None, description="column with chats, in place of prompt and response")


class DataSection(Section):
    """The task and where its data are."""

    task: str = Field(description="a GLUE name, embedded, text, prompts, classification or regression")
    path: str | None = Field(
        default=None, description="folder, file, Hub id or package://PACKAGE/PATH; GLUE: nyu-mll/glue"
    )
    columns: ColumnsSection | None = Field(default=None, description="column names of the user's own data")
    max_length: int = Field(default=128, ge=8, description="tokens an example is cut to")
    join_rows: bool = Field(
        default=False,
        description="text: rows are lines of longer documents, as WikiText's are: 1,000 at a time are joined by blank lines,"
        " else each is a document, which begins and ends with special tokens",
    )
    packing: bool = Field(default=False, description="prompts: short training examples share rows of max_length")
    chat: bool = Field(
        default=False,
        description="prompts: ask and answer in the words of the tokenizer's chat template, as a user asks",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default={}, description="what the chat template is given beside the chats, such as {enable_thinking: false}"
    )
    train_examples: int | None = Field(default=None, ge=1, description="training rows to use; all where left out")
    holdout_examples: int = Field(default=0, ge=0, description="training rows kept aside for choices, never trained on")


class DistillationSection(Section):
    """Recovery after each round: what is learnt from the teacher, and any TrainingArguments field beside it."""

    model_config = ConfigDict(extra="allow")

    losses: Objective = Field(
        default_factory=lambda: parse_objective({"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}),
        description="the terms of the objective; docs/reference/losses.md explains them",
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

    batch_size: int = Field(default=32, ge=1, description="examples in the batch")
    sequence_length: int = Field(default=64, ge=1, description="tokens of each example")


class EvaluationSection(Section):
    """How models are scored and profiled."""

    batch_size: int = Field(default=64, ge=1, description="examples at once when scoring")
    metric: str | None = Field(
        default=None,
        min_length=1,
        description="the main metric, by default the task's own; classification: accuracy, f1 or matthews_correlation;"
        " regression: spearmanr or pearsonr; prompts: perplexity of the data's responses, or of generated ones exact_match,"
        " final_answer (after the last ####, else the last number), or NAME or NAME:VALUE of a metric of evaluate, such as"
        " rouge:rougeL, which brings packages of its own",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="most tokens of a generated response")
    latency: LatencySection = Field(default_factory=LatencySection, description="the batch that is timed")


class HubSection(Section):
    """Where to push the student when the run has ended."""

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="USER_OR_ORGANISATION/NAME")
    private: bool = Field(default=False, description="whether a new repository is private")
