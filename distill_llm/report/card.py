"""The student's model card: a README.md that the Hub shows, with the metadata that the Hub indexes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from distill_llm.common.files import written_whole
from distill_llm.data.glue import GLUE, HUB_ID
from distill_llm.report.report import HARNESS, headline, notes, provenance, short_name, summary
from distill_llm.report.tables import harness_table, results_table, rounds_table
from distill_llm.report.usage import kind_of_student, needs_code, read_config, snippet

NO_PATHS = ("description", "hub")
"""Parts of a recipe that hold no paths: prose, and the name of a repository."""


def write_card(student_dir: str | Path, metrics: Mapping[str, Any], recipe_yaml: str) -> Path:
    """Write README.md into the student's folder and, beside it, its evaluation results as `metrics.json`.

    The metadata names library, base model (if the teacher is on the Hub), task, data and score (`model-index`).
    Both files are pushed with the student, so they show only the last part of a local path.
    The code in the card loads the student from a placeholder, which `distill_llm.report.hub.push` replaces.

    Args:
        student_dir: folder with the student's config.json.
        metrics: what `metrics.json` holds.
        recipe_yaml: the resolved recipe, shown in the card.

    Returns:
        The path of README.md.

    Raises:
        InputError: the folder holds no config.json.
    """
    student_dir = Path(student_dir)
    config = read_config(student_dir)
    card = ModelCard(f"---\n{card_data(metrics, config).to_yaml()}\n---\n\n{_body(student_dir, metrics, recipe_yaml)}")
    shown = {**metrics, "teacher_model": shown_name(str(metrics["teacher_model"]))}
    with written_whole(student_dir / "metrics.json") as file:
        file.write_text(json.dumps(shown, indent=2) + "\n")
    path = student_dir / "README.md"
    with written_whole(path) as file:
        card.save(file)
    return path


def card_data(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> ModelCardData:
    """The card's metadata, for the student with this config."""
    task, tag = metrics["task"], kind_of_student(config).pipeline_tag
    if task in GLUE:
        split = "validation_matched" if task == "mnli" else "validation"
        data = {"dataset_type": HUB_ID, "dataset_name": f"GLUE {task}", "dataset_config": task}
    else:
        split, data = "test", {"dataset_type": task, "dataset_name": task}
    result = EvalResult(
        task_type=tag,
        metric_type=metrics["metric"],
        metric_value=round(metrics["student"]["score"], 6),
        dataset_split=split,
        **data,
    )
    teacher = str(metrics["teacher_model"])
    return ModelCardData(
        base_model=teacher if _on_the_hub(teacher) else None,
        datasets=[HUB_ID] if task in GLUE else None,
        eval_results=[result],
        library_name="transformers",
        metrics=[metrics["metric"]],
        model_name=f"{short_name(metrics)}-{task}-student",
        pipeline_tag=tag,
        tags=_tags(metrics),
    )


def _tags(metrics: Mapping[str, Any]) -> list[str]:
    distilled, pruned = metrics.get("learned_from") == "teacher", bool(metrics.get("rounds"))
    return ["distill_llm", *(["knowledge-distillation"] if distilled else []), *(["pruning"] if pruned else [])]


def _body(student_dir: Path, metrics: Mapping[str, Any], recipe_yaml: str) -> str:
    trust = (
        "Its layers have sizes that a stock configuration cannot express. The Python files in this repository build them, so"
        " loading needs `trust_remote_code=True`. Only torch and transformers have to be installed."
        if needs_code(read_config(student_dir))
        else "This is a stock transformers model."
    )
    rounds = rounds_table(metrics)
    parts = [
        f"# {headline(metrics)}",
        f"{summary(metrics)} [Made](#how-it-was-made) with `distill_llm`.".strip(),
        "## Use",
        f"```python\n{snippet(student_dir, 'path/to/student')}```",
        trust,
        "## Results",
        results_table(metrics).rstrip(),
        notes(metrics),
        *(["### Benchmarks", harness_table(metrics).rstrip(), HARNESS] if metrics.get("harness") else []),
        "## How it was made",
        f"Teacher: `{shown_name(str(metrics['teacher_model']))}`."
        " The licence and the limitations of the teacher and of its data apply.",
        rounds.rstrip(),
        f"<details>\n<summary>The recipe</summary>\n\n```yaml\n{shown_recipe(recipe_yaml).rstrip()}\n```\n\n</details>",
        provenance(metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _on_the_hub(model: str) -> bool:
    if "://" in model or model.startswith(("/", ".", "~")) or Path(model).exists():
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def shown_name(name: str) -> str:
    """The name of a model or data set. Of a local path only the last part: the rest means nothing on other machines."""
    known = "://" in name or _on_the_hub(name.partition(":")[0])  # after a colon comes the data set's configuration
    return name if known else name.rstrip("/").rsplit("/", 1)[-1]


def shown_recipe(recipe_yaml: str) -> str:
    """The recipe, its local paths cut to their last parts."""
    recipe = yaml.safe_load(recipe_yaml)
    shown = {name: part if name in NO_PATHS else _shown_values(part) for name, part in recipe.items()}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _shown_values(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _shown_values(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_shown_values(value) for value in part]
    return shown_name(part) if isinstance(part, str) else part
