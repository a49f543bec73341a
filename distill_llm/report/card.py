"""The student's model card: a README.md that the Hub shows, with the metadata that the Hub indexes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from transformers import PreTrainedConfig

from distill_llm.architectures.configuration_pruned import family_type
from distill_llm.architectures.lineage import lineage_of
from distill_llm.common.files import written_whole
from distill_llm.data.glue import GLUE, HUB_ID
from distill_llm.pruning.plan import PruningPlan
from distill_llm.report.exits import exits_note, exits_summary, exits_table
from distill_llm.report.origins import on_the_hub, origin_of, shown_name
from distill_llm.report.report import (
    HARNESS,
    headline,
    notes,
    provenance,
    rows_note,
    short_name,
    summary,
    teachers_note,
)
from distill_llm.report.tables import bits_note, bits_table, harness_table, results_table, rounds_table
from distill_llm.report.usage import kind_of_student, needs_code, read_config, snippet

NO_PATHS = ("description", "hub")
"""Parts of a recipe that hold no paths: prose, and the name of a repository."""
SERVER = "http://SERVER/v1"
"""What a card shows for the address of a served teacher."""


def write_card(student_dir: str | Path, metrics: Mapping[str, Any], recipe_yaml: str) -> Path:
    """Write into the student's folder what is to be known of it wherever it is copied or pushed.

    - `README.md`, the model card. Its metadata names library, base model, licence, task, data and score (`model-index`).
    - `.eval_results/TASK.yaml`: the score in the form that the Hub reads, where the data are on the Hub.
    - `metrics.json`, `recipe.yaml`, and for a pruned student `plan.json`: the `PruningPlan` that makes its architecture of the
      original teacher.

    All files are pushed with the student, so they show only the last part of a local path. The code in the card loads the student
    from a placeholder, which `distill_llm.report.hub.push` replaces.

    Args:
        student_dir: folder with the student's config.json.
        metrics: what `metrics.json` of the run holds.
        recipe_yaml: the resolved recipe.

    Returns:
        The path of README.md.

    Raises:
        InputError: the folder holds no config.json.
    """
    student_dir = Path(student_dir)
    config, given = read_config(student_dir), yaml.safe_load(recipe_yaml)
    data, recipe = tested_on(metrics, given), shown_recipe(recipe_yaml)
    start = (given.get("student") or {}).get("model")
    front = card_data(metrics, config, data, start or metrics["teacher_model"]).to_yaml()
    card = ModelCard(f"---\n{front}\n---\n\n{_body(student_dir, metrics, recipe, start)}")
    told = {**metrics, "teacher_model": shown_name(str(metrics["teacher_model"]))}
    if (ensemble := metrics.get("ensemble")) is not None:
        models = [{**each, "model": shown_name(each["model"])} for each in ensemble["models"]]
        told["ensemble"] = {**ensemble, "models": models}
    if (served := metrics.get("served")) is not None:
        told["served"] = {**served, "model": shown_name(served["model"])}
    texts = {"metrics.json": json.dumps(told, indent=2) + "\n", "recipe.yaml": recipe} | eval_results(metrics, data)
    for name, text in texts.items():
        (student_dir / name).parent.mkdir(exist_ok=True)
        with written_whole(student_dir / name) as file:
            file.write_text(text)
    _write_plan(student_dir, metrics, config)
    path = student_dir / "README.md"
    with written_whole(path) as file:
        card.save(file)
    return path


@dataclass(frozen=True)
class TestedOn:
    """The rows that a score is of: their data set (`hub`: its id on the Hub), configuration, and split where it is known.

    Of the user's own data it is not: they are the test split, the validation split or, without both, rows set apart.
    """

    name: str
    hub: str | None = None
    config: str | None = None
    split: str | None = None


def tested_on(metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> TestedOn:
    """What the run scored the student on."""
    task = metrics["task"]
    if task in GLUE:
        return TestedOn(f"GLUE {task}", HUB_ID, task, "validation_matched" if task == "mnli" else "validation")
    path, _, config = str((recipe.get("data") or {}).get("path") or task).partition(":")
    if path != task and on_the_hub(path):
        return TestedOn(path, path, config or None)
    return TestedOn(task)


def card_data(metrics: Mapping[str, Any], config: Mapping[str, Any], data: TestedOn, start: str) -> ModelCardData:
    """The card's metadata, for the student with this config, whose weights began as those of the model `start`."""
    tag, origin = kind_of_student(config).pipeline_tag, origin_of(start)
    result = EvalResult(
        task_type=tag,
        metric_type=metrics["metric"],
        metric_value=_score(metrics),
        dataset_type=data.hub or data.name,
        dataset_name=data.name,
        dataset_config=data.config,
        dataset_split=data.split,
    )
    return ModelCardData(
        base_model=origin.base_model,
        datasets=list(dict.fromkeys([*([data.hub] if data.hub else []), *origin.datasets])) or None,
        eval_results=[result],
        library_name="transformers",
        metrics=[metrics["metric"]],
        model_name=f"{short_name(metrics)}-{metrics['task']}-student",
        pipeline_tag=tag,
        tags=_tags(metrics),
        **origin.carried,
    )


def eval_results(metrics: Mapping[str, Any], data: TestedOn) -> dict[str, str]:
    """The score as a file of `.eval_results/`, by its name; the Hub takes only scores on data that it has."""
    if data.hub is None:
        return {}
    where = f"the {data.split} split" if data.split else f"{metrics['student']['rows']:,} rows"
    notes = f"{metrics['metric']} on {where}; the teacher's: {metrics['teacher']['score']:.4g}"
    entry = EvalResultEntry(data.hub, data.config or "default", _score(metrics), notes=notes)
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return {f".eval_results/{metrics['task']}.yaml": text}


def _score(metrics: Mapping[str, Any]) -> float:
    return round(metrics["student"]["score"], 6)


def _write_plan(student_dir: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write `plan.json` for a student whose config holds a lineage."""
    lineage = lineage_of(PreTrainedConfig.from_dict({"pruning": config.get("pruning")}))
    if lineage is not None:
        family, kept = family_type(config["model_type"]) or config["model_type"], metrics.get("layer_params_kept")
        PruningPlan(family, lineage.layers, kept, whole=lineage.whole).save(student_dir / "plan.json")


def _tags(metrics: Mapping[str, Any]) -> list[str]:
    distilled, pruned = metrics.get("learned_from") == "teacher", bool(metrics.get("rounds"))
    tags = {"knowledge-distillation": distilled, "pruning": pruned, "quantization": bool(metrics.get("quantization"))}
    return ["distill_llm", *(tag for tag, wanted in tags.items() if wanted)]


def _body(student_dir: Path, metrics: Mapping[str, Any], recipe: str, start: str | None) -> str:
    rounds, exits, config = rounds_table(metrics), exits_table(metrics).rstrip(), read_config(student_dir)
    trust = _trust(config) + (
        " Its weights are in fewer bits, which needs torchao." if metrics.get("quantization") else ""
    )
    parts = [
        f"# {headline(metrics)}",
        f"{summary(metrics)} [Made](#how-it-was-made) with `distill_llm`.".strip(),
        "## Use",
        f"```python\n{snippet(student_dir, 'path/to/student')}```",
        trust,
        "## Results",
        results_table(metrics).rstrip(),
        notes(metrics),
        *(["### Fewer bits", bits_table(metrics).rstrip(), bits_note(metrics)] if metrics.get("quantization") else []),
        *(["### Early exits", exits_summary(metrics), exits, exits_note(metrics)] if exits else []),
        *(["### Benchmarks", harness_table(metrics).rstrip(), HARNESS] if metrics.get("harness") else []),
        "## How it was made",
        _sources(shown_name(str(metrics["teacher_model"])), start),
        teachers_note(metrics, shown_name),
        rows_note(metrics),
        rounds.rstrip(),
        f"<details>\n<summary>The recipe</summary>\n\n```yaml\n{recipe.rstrip()}\n```\n\n</details>",
        provenance(metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trust(config: Mapping[str, Any]) -> str:
    """What the code beside the weights is for."""
    if not needs_code(config):
        return "This is a stock transformers model."
    installed = "Only torch and transformers have to be installed."
    if config.get("exits") and not str(config.get("model_type")).startswith("pruned_"):
        plain = "The Python files in this repository build its early exits: without `trust_remote_code=True` it is the same model"
        return f"{plain} without exits. {installed}"
    return (
        "Its layers have sizes that a stock configuration cannot express. The Python files in this repository build them, so"
        f" loading needs `trust_remote_code=True`. {installed}"
    )


def _sources(teacher: str, start: str | None) -> str:
    if start is None:
        return f"Teacher: `{teacher}`. The licence and the limitations of the teacher and of its data apply."
    began = f"The student began as `{shown_name(start)}`."
    return f"Teacher: `{teacher}`. {began} The licences and the limitations of both and of their data apply."


def shown_recipe(recipe_yaml: str) -> str:
    """The recipe, its local paths cut to their last parts."""
    recipe = yaml.safe_load(recipe_yaml)
    if server := (recipe.get("teacher") or {}).get("server"):
        server["url"] = SERVER  # where a model is served is the business of those who serve it
    values = {name: part if name in NO_PATHS else _shown_values(part) for name, part in recipe.items()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _shown_values(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _shown_values(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_shown_values(value) for value in part]
    return shown_name(part) if isinstance(part, str) else part
