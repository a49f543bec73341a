"""The recipe: a YAML file that says what to make. The models here are the one place for names, defaults, docs."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from distill_llm.adapter_fields import check_adapter_fields
from distill_llm.errors import InputError, one_of
from distill_llm.faults import InputErrors, faults_of, raise_all
from distill_llm.losses.objective import LabelsLoss, LogitsLoss, Objective
from distill_llm.pruning_rules import pruning_faults
from distill_llm.training_fields import check_training_fields, with_defaults
from distill_llm.yaml_input import override, read_yaml

Unit = Literal["heads", "queries", "neurons", "layers", "attention", "ffn", "hidden"]
Criterion = Literal[
    "random",
    "magnitude",
    "magnitude_l1",
    "taylor",
    "fisher",
    "activation",
    "wanda",
    "block_influence",
    "leave_one_out",
]


class Section(BaseModel):
    """A part of a recipe: unknown names are errors, and assignments are checked like input."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def _training_fields(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Pydantic validator of a mapping of TrainingArguments fields."""
    if fields is None:
        return None
    clean, faults = check_training_fields(fields)
    raise_all(faults)
    return clean


class TeacherSection(Section):
    """The model to learn from."""

    model: str = Field(min_length=1, description="Hub id, folder, or package://PACKAGE/PATH")
    train: dict[str, Any] | None = Field(
        default=None,
        description="TrainingArguments fields; given, the teacher is first fine-tuned on the task with a fresh head",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="precision of the teacher's weights while a student learns; left out: as the student is trained",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None, description="hold the teacher's weights in fewer bits while a student learns (bitsandbytes)"
    )
    cache: Path | None = Field(
        default=None, description="folder that `distill-llm cache` wrote: learn from it, with no teacher in memory"
    )

    _check_train = field_validator("train")(_training_fields)

    @field_validator("cache")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        return None if folder is None else Path(os.path.expanduser(folder))


class StudentSection(Section):
    """The student: one that exists already (any smaller model with the teacher's tokenizer), or how it learns."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id, folder, or package://PACKAGE/PATH; left out: the pruned teacher",
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
    packing: bool = Field(default=False, description="prompts: short training examples share rows of max_length")
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
        " measured anew before each, no training between",
    )
    units: list[Unit] = Field(
        default=["heads", "neurons"],
        min_length=1,
        description="what may be removed: heads (KV groups), queries of every group, FFN neurons, whole layers, the attention"
        " or ffn of a layer, hidden (channels of the residual stream)",
    )
    criterion: Criterion = Field(default="fisher", description="how the importance of a unit is measured")
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
    uniform: bool = Field(default=False, description="the same number of heads and of neurons in every layer")
    min_heads: int = Field(default=0, ge=0, description="heads (KV groups) that every remaining layer keeps at least")
    min_neurons: int = Field(default=0, ge=0, description="FFN neurons that every remaining layer keeps at least")
    compensate: bool = Field(default=True, description="fold what removed units contributed into the kept columns")
    calibration_examples: int = Field(default=1024, ge=1, description="training rows that importance is measured on")
    statistics: Path | None = Field(
        default=None,
        description="file for what round 1 measures, in place of one in its folder: used where it is of the same model"
        " and rows, so that another criterion or budget reads no data; else written",
    )
    layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="indices of the layers to keep, in place of `keep`: nothing else is removed",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PruningSection":
        raise_all(pruning_faults(self))
        return self


class DistillationSection(Section):
    """Recovery after each round: what is learnt from the teacher, and any TrainingArguments field beside it."""

    model_config = ConfigDict(extra="allow")

    losses: Objective = Field(
        default_factory=lambda: Objective(
            labels=LabelsLoss(weight=0.5), logits=LogitsLoss(weight=0.5, temperature=1.0)
        ),
        description="the terms of the objective: labels, logits, hidden, attention",
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
    metric: Literal["perplexity", "exact_match"] | None = Field(
        default=None, description="for prompts; default: perplexity"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="tokens to generate for a response, for exact_match")
    latency: LatencySection = Field(default_factory=LatencySection, description="the batch that is timed")


class HubSection(Section):
    """Where to push the student when the run has ended."""

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="USER_OR_ORGANISATION/NAME")
    private: bool = Field(default=False, description="whether a new repository is private")


class Recipe(Section):
    """A whole run: `pipeline.run(recipe, output_dir)`."""

    description: str = Field(default="", description="one line for `distill-llm recipes`")
    seed: int = Field(default=0, ge=0, description="of data splits, training and random choices")
    output_dir: Path = Field(
        default=Path("runs/recipe"), description="the run folder; from a file: runs/NAME_OF_THE_FILE"
    )
    teacher: TeacherSection
    student: StudentSection | None = Field(
        default=None, description="an existing student; left out: the pruned teacher"
    )
    data: DataSection
    pruning: PruningSection | None = Field(default=None, description="how the student is cut from the teacher")
    distillation: DistillationSection | None = Field(
        default=None, description="recovery; left out: no training of the student"
    )
    final: dict[str, Any] = Field(default_factory=dict, description="TrainingArguments fields of the last recovery")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="scoring and profiling")
    hub: HubSection | None = Field(default=None, description="push the student at the end")

    _check_final = field_validator("final")(_training_fields)

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, folder: Path) -> Path:
        return Path(os.path.expanduser(folder))

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        faults = []
        given = self.student.model if self.student else None
        if self.pruning is None and given is None:
            faults.append(InputError("pruning", None, "a pruning section, or student.model for distillation alone"))
        if self.pruning is not None and given is not None:
            faults.append(InputError("student.model", given, "nothing where pruning makes the student"))
        if self.student is not None and self.distillation is None:
            faults.append(InputError("distillation", None, "a distillation section where there is a student section"))
        if self.teacher.cache is not None:
            faults += self._cache_faults()
        elif self.teacher.quantization is not None and not (
            self.distillation and self.distillation.losses.needs_teacher
        ):
            given = self.teacher.quantization
            faults.append(InputError("teacher.quantization", given, "nothing where no loss needs the teacher"))
        if self.final and self.distillation is None:
            faults.append(InputError("final", self.final, "nothing without a distillation section"))
        raise_all(faults)
        return self

    def _cache_faults(self) -> list[InputError]:
        faults, cache = [], str(self.teacher.cache)
        if self.teacher.train is not None:
            faults.append(
                InputError("teacher.cache", cache, "nothing with teacher.train: a cache is of a finished teacher")
            )
        if self.teacher.quantization is not None:
            faults.append(InputError("teacher.quantization", self.teacher.quantization, "nothing with teacher.cache"))
        if self.distillation is None or not self.distillation.losses.needs_teacher:
            faults.append(InputError("teacher.cache", cache, "nothing where no loss needs the teacher"))
        return faults

    def training(self, stage: Literal["teacher", "recovery", "final"]) -> dict[str, Any]:
        """All TrainingArguments fields of a stage but output_dir: the recipe's, its seed, and the defaults.

        `teacher`: fine-tuning of the teacher; `recovery`: after a round; `final`: that with the overrides of `final`.
        Imports torch, to see whether there is an accelerator, unless the stage sets `use_cpu`.
        """
        if stage == "teacher":
            fields = dict(self.teacher.train or {})
        else:
            fields = dict((self.distillation.model_extra if self.distillation else None) or {})
        if stage == "final":
            fields |= self.final
        return with_defaults({"seed": self.seed, **fields})

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out, as YAML that `load_recipe` reads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """Folder of the shipped recipes: inside an installed package, else beside the package in the repository."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes: `quickstart` for recipes/quickstart.yaml."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_descriptions() -> dict[str, str]:
    """The shipped recipes by name, each with its line of description."""
    return {name: str(read_yaml(find_recipe(name)).get("description", "")) for name in recipe_names()}


def find_recipe(name: str) -> Path:
    """Path of a recipe given by path or by the bare name of a shipped one; InputError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    raise InputError("RECIPE", name, f"a YAML file, or {one_of(recipe_names(), name)}")


def parse_recipe(given: dict[str, Any]) -> Recipe:
    """The recipe of a plain mapping; all its faults at once as InputErrors, with dotted field names."""
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise InputErrors(faults_of(error, Recipe)) from None


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file, or the bare name of a shipped recipe.
        overrides: `a.b=c` each; the value is YAML, `pruning=null` takes a section out.

    Raises:
        InputError: one line per fault: field, what was given, what is accepted, the nearest name for an unknown one.
    """
    file = find_recipe(str(path))
    given = {"output_dir": f"runs/{file.stem}", **read_yaml(file)}
    for text in overrides or []:
        override(given, text)
    return parse_recipe(given)
