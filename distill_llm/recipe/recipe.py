"""The recipe: what a YAML file says to make, read as a whole and checked."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from distill_llm.common.errors import InputError, InputErrors, one_of, raise_all
from distill_llm.common.secrets import holds_token
from distill_llm.common.validation import faults_of
from distill_llm.recipe.exits import ExitsSection, exit_section_faults, with_loss
from distill_llm.recipe.masks import mask_recipe_faults
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.quantize import QuantizeSection, quantize_faults
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import (
    DataSection,
    DistillationSection,
    EvaluationSection,
    ExportSection,
    GallerySection,
    HubSection,
    ReportSection,
    StudentSection,
    training_fields,
)
from distill_llm.recipe.several_rules import several_faults
from distill_llm.recipe.teacher import TeacherSection
from distill_llm.recipe.teacher_rules import teacher_faults
from distill_llm.recipe.training_fields import with_defaults
from distill_llm.recipe.yaml_input import override, read_yaml

RECIPE, STATE, BACKUP = "recipe.yaml", "state.json", "state.backup.json"
"""Files of a run folder: the resolved recipe, what is done, and a copy of that. A folder with one of them is a run's."""


class Recipe(Section):
    """A whole run: `pipeline.run(recipe, output_dir)`."""

    description: str = Field(default="", description="one line for `distill-llm recipes`")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of data splits, training and random choices")
    output_dir: Path = Field(
        default=Path("runs/recipe"),
        description="the run folder; for a recipe from a file, runs/NAME_OF_THE_FILE by default",
    )
    teacher: TeacherSection
    student: StudentSection | None = Field(
        default=None, description="an existing student; left out: the pruned teacher"
    )
    data: DataSection
    pruning: PruningSection | None = Field(default=None, description="how the student is cut from the teacher")
    distillation: DistillationSection | None = Field(
        default=None, description="recovery; left out: the student is not trained"
    )
    final: dict[str, Any] = Field(
        default_factory=dict,
        description="TrainingArguments fields that differ in the last recovery; all others are as in distillation, max_steps too",
    )
    quantize: QuantizeSection | None = Field(
        default=None, description="the finished student's weights in fewer bits; left out: they keep their precision"
    )
    exits: ExitsSection | None = Field(
        default=None, description="exits of the student, by which rows leave early or it drafts; left out: it has none"
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="scoring and profiling")
    report: ReportSection = Field(default_factory=ReportSection, description="what the report shows")
    export: list[ExportSection] = Field(
        default=[], description="formats of other programs to write the student in, into export/ of the run folder"
    )
    hub: HubSection | None = Field(default=None, description="push the student at the end")
    gallery: GallerySection | None = Field(
        default=None, exclude=True, description="what `distill-llm recipes` tells; a run does not read it"
    )

    _check_final = field_validator("final")(training_fields)

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, folder: Path) -> Path:
        return Path(os.path.expanduser(folder))

    @model_validator(mode="before")
    @classmethod
    def _exits_learn(cls, given: Any) -> Any:
        return with_loss(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        faults = []
        given = self.student.model if self.student else None
        if self.pruning is None and given is None:
            faults.append(InputError("pruning", None, fix="add a pruning section, or a student.model to distill into"))
        if self.pruning is not None and given is not None:
            faults.append(
                InputError(
                    "student.model",
                    given,
                    fix="remove it, or the pruning section: pruning makes the student from the teacher",
                )
            )
        if self.student is not None and self.student.quantization is not None and self.student.peft is None:
            given, fix = self.student.quantization, "add student.peft, or remove it: rounded weights cannot learn"
            faults.append(InputError("student.quantization", given, fix=fix))
        if self.student is not None and self.distillation is None:
            faults.append(
                InputError("distillation", None, fix="add a distillation section, or remove the student section")
            )
        if self.student is not None and self.student.peft is not None and self.pruning and self.pruning.weights:
            fix = "remove it, or pruning.weights: adapters that are merged into sparse weights would fill their zeros"
            faults.append(InputError("student.peft", self.student.peft, fix=fix))
        if self.teacher.peers is not None and self.pruning and self.pruning.weights:
            fix = "remove it, or pruning.weights: the zeros of peers are not kept"
            faults.append(InputError("teacher.peers", self.teacher.peers.model_dump(mode="json"), fix=fix))
        faults += teacher_faults(self.teacher, self.student, self.pruning, self.distillation, self.final)
        faults += several_faults(self.teacher, self.data, self.distillation)
        faults += mask_recipe_faults(self.pruning, self.teacher, self.student, self.distillation, self.data)
        beside: dict[str, Section | None] = {
            "quantize": self.quantize,
            "teacher.peers": self.teacher.peers,
            "teacher.moving_average": self.teacher.moving_average,
            "distillation.generations": self.distillation.generations if self.distillation else None,
        }
        losses = None if self.distillation is None else self.distillation.losses
        faults += exit_section_faults(self.exits, losses, self.student, beside)
        if self.final and self.distillation is None:
            faults.append(InputError("final", self.final, fix="remove it, or add a distillation section"))
        if self.quantize is not None:
            faults += quantize_faults(self.quantize, self.teacher, self.student, self.distillation, self.export)
        raise_all(faults)
        return self

    def training(self, stage: Literal["teacher", "masks", "recovery", "final", "quantized"]) -> dict[str, Any]:
        """All TrainingArguments fields of a stage except output_dir: the recipe's, its seed, and the defaults.

        `teacher`: fine-tuning of the teacher; `masks`: learning masks, with the fields of `pruning.masks.train` in place of the
        same fields of `distillation`; `recovery`: training after a round; `final`: the last recovery, with the fields of
        `final` in place of the same fields of `distillation`; `quantized`: learning as if rounded, with those of
        `quantize.train` in place of these.
        Imports torch, to see whether there is an accelerator, unless the stage sets `use_cpu`.
        """
        if stage == "teacher":
            fields = dict(self.teacher.train or {})
        else:
            fields = dict((self.distillation.model_extra if self.distillation else None) or {})
        if stage == "masks" and self.pruning is not None and self.pruning.masks is not None:
            fields |= self.pruning.masks.train
        if stage in ("final", "quantized"):
            fields |= self.final
        if stage == "quantized" and self.quantize is not None:
            fields |= self.quantize.train or {}
        return with_defaults({"seed": self.seed, **fields})

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out, as YAML that `load_recipe` reads to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_folder() -> Path:
    """Folder of the shipped recipes: inside an installed package, else beside the package in the repository."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes: `quickstart` for recipes/quickstart.yaml."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Path of a recipe that is given by path or by the bare name of a shipped one; InputError if there is none."""
    if os.path.isfile(name):
        return Path(name)
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    raise InputError("RECIPE", name, f"a YAML file, or {one_of(recipe_names(), name)}")


def parse_recipe(given: dict[str, Any]) -> Recipe:
    """The recipe that a plain mapping describes; raises all its faults together as InputErrors, with dotted field names."""
    fix = "take the access token out, and log in with `hf auth login`: recipes are saved with runs and shown in cards"
    raise_all([InputError(name, text, fix=fix) for name, text in _texts(given) if holds_token(text)])
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise InputErrors(faults_of(error, Recipe)) from None


def _texts(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a mapping, each with its dotted name."""
    if isinstance(part, str):
        yield name, part
    elif isinstance(part, (dict, list)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _texts(value, f"{name}.{key}" if name else str(key))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file, or the bare name of a shipped recipe.
        overrides: `a.b=c` each; the value is YAML, `pruning=null` takes a section out.

    Raises:
        InputError: one line per fault: the field, what was given, what is accepted; for an unknown name, the nearest known one.
    """
    return parse_recipe(read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe as a plain mapping that is not checked yet. Arguments: as for `load_recipe`."""
    file = find_recipe(str(path))
    given = {"output_dir": f"runs/{file.stem}", **read_yaml(file)}
    for text in overrides or []:
        override(given, text)
    return given


def budget_batch(recipe: Recipe, decoder: bool) -> tuple[int, int]:
    """The batch (B, T) that costs are counted or measured for. With cost memory, B is 0 unless a decoder holds a KV cache."""
    latency, cost = recipe.evaluation.latency, recipe.pruning.cost if recipe.pruning else "params"
    held = decoder or cost != "memory"
    return latency.batch_size if held else 0, latency.sequence_length
