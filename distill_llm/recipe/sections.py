"""The sections of a recipe: the one place for the names, defaults and meanings of its fields."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from distill_llm.common.errors import raise_all
from distill_llm.common.validation import faults_of
from distill_llm.losses.objective import Objective, parse_objective
from distill_llm.pruning.criteria import CRITERIA, Need, find_criterion
from distill_llm.pruning.names import Unit
from distill_llm.recipe.adapter_fields import check_adapter_fields
from distill_llm.recipe.pruning_rules import pruning_faults
from distill_llm.recipe.training_fields import check_training_fields


class Section(BaseModel):
    """A part of a recipe: unknown names are errors, and assignments are checked like input."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, given: Any, field: ValidationInfo) -> Any:
        """Pydantic takes true for 1; as a word it is refused like any other."""
        types = _types(cls.model_fields[field.field_name or ""].annotation)
        return str(given).lower() if isinstance(given, bool) and types & {int, float} and bool not in types else given


def _types(annotation: Any) -> set[Any]:
    """The types of an annotation and of its parts."""
    return {annotation}.union(*map(_types, get_args(annotation)))


def training_fields(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Pydantic validator of a mapping of TrainingArguments fields."""
    if fields is None:
        return None
    clean, faults = check_training_fields(fields)
    raise_all(faults)
    return clean


def _known_criterion(given: Any) -> str:
    return find_criterion(str(given), field="").name


Criterion = Annotated[str, BeforeValidator(_known_criterion)]
"""The name of a registered criterion: one of the package's or of a module of the user's."""


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


class PruningSection(Section):
    """What to remove, and how to choose it."""

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the transformer layers' cost that remains; of the whole model's with cost latency",
    )
    rounds: int = Field(default=1, ge=1, description="times to prune and recover until `keep` is reached")
    schedule: Literal["linear", "cubic"] = Field(
        default="cubic", description="how the kept share falls over the rounds"
    )
    cuts: int = Field(
        default=1,
        ge=1,
        description="small cuts that a round's removal is done in, each keeping the same part of what it finds, importance"
        " measured anew before each on rows of its own, no training between",
    )
    units: list[Unit] = Field(
        default=["heads", "neurons"],
        min_length=1,
        description="what may be removed: heads (KV groups), queries of every group, FFN neurons, whole layers, the attention"
        " or ffn of a layer, hidden (channels of the residual stream)",
    )
    criterion: Criterion = Field(
        default="fisher", description=f"how the importance of a unit is measured: {', '.join(CRITERIA)}"
    )
    layer_criterion: Criterion | None = Field(
        default=None,
        description="how that of whole layers is measured, where `units` has them beside others; left out: by `criterion`",
    )
    loss: Literal["labels", "kl"] | None = Field(
        default=None,
        description="what gradients are taken of: the task's labels, or kl, the model's own predictions; left out: labels"
        " where the rows have them",
    )
    cost: Literal["params", "flops", "memory", "latency"] = Field(
        default="params",
        description="what `keep` is a share of; memory counts a decoder's keys and values too; latency is measured on this"
        " device; both for the batch of evaluation.latency",
    )
    scope: Literal["global", "local"] = Field(
        default="global", description="rank units over all layers, or in each layer"
    )
    round_to: int = Field(
        default=1, ge=1, description="kept FFN neurons of a layer, and channels (hidden), are a multiple of this"
    )
    uniform: bool = Field(
        default=False,
        description="the same number of heads and of neurons in every layer, such as plain transformers can load where the budget"
        " allows",
    )
    min_heads: int = Field(default=0, ge=0, description="heads (KV groups) that every remaining layer keeps at least")
    min_neurons: int = Field(default=0, ge=0, description="FFN neurons that every remaining layer keeps at least")
    compensate: bool = Field(
        default=True,
        description="fold what removed units contributed into the kept columns, and what removed layers added into the FFN"
        " before them",
    )
    calibration_examples: int = Field(
        default=1024,
        ge=1,
        description="training rows that importance is measured on; with several cuts, of each: other rows while there are"
        " any, then the first ones again",
    )
    moment_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the calibration tokens, drawn at random, that compensation is fitted to (removed layers: always"
        " all); left out: all until"
        " there are half as many as a layer has neurons, then one in four; 1 takes half a forward pass more",
    )
    moment_layers: int | None = Field(
        default=None,
        ge=1,
        description="layers whose second moments are held at a time, with a calibration pass for each so many, where those of all"
        " do not fit: about 1 GB a layer of an 8B model; left out: all in the pass that measures importance, kept in its file"
        " (what takes over removed layers has moments of its own, as large, all at once)",
    )
    precision: Literal["bfloat16"] | None = Field(
        default=None, description="run the calibration passes under autocast in this precision; sums stay in float32"
    )
    offload: bool = Field(
        default=False,
        description="hold what is pruned in main memory and bring one layer at a time to the GPU for calibration, for models of"
        " which not even the float32 weights fit there; goes with checkpointing",
    )
    checkpointing: bool = Field(
        default=False,
        description="hold one layer's activations at a time in calibration, for models of which all do not fit, for about"
        " one more forward pass in time",
    )
    statistics: Path | None = Field(
        default=None,
        description="file for what round 1 measures, in place of one in its folder: used where it is of the same model"
        " and rows, measured alike, so that another criterion or budget reads no data; else written, with gradients whatever the"
        " criterion. Data are read again for another loss, leave_one_out, moment_layers, what takes over removed layers, and"
        " compensation of heads and neurons, or of hidden, where the first run had no such units",
    )
    layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="indices of the layers to keep, in place of `keep`: nothing else is removed",
    )

    @property
    def criteria(self) -> set[str]:
        """Every criterion that is asked for."""
        return {self.criterion, self.layer_criterion or self.criterion}

    def needs(self, need: Need) -> bool:
        """Whether one of the criteria needs this of the statistics."""
        return any(need in CRITERIA[name].needs for name in self.criteria)

    @property
    def reads_loss(self) -> bool:
        """Whether one of the criteria depends on the calibration loss."""
        return any(CRITERIA[name].reads_loss for name in self.criteria)

    @property
    def folds(self) -> bool:
        """Whether compensation needs statistics: whole layers alone leave nothing to fold into."""
        return self.compensate and self.layers is None and self.units != ["layers"]

    @property
    def holds_moments(self) -> bool:
        """Whether the pass that measures importance collects the second moments of heads and neurons, of all layers at once."""
        return self.folds and self.moment_layers is None and not set(self.units) <= {"layers", "hidden"}

    @model_validator(mode="after")
    def _consistent(self) -> "PruningSection":
        raise_all(pruning_faults(self))
        return self


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
