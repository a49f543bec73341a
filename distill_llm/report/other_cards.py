"""Cards of what is pushed without one: a model, adapters, an exported model, a teacher cache, responses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from distill_llm.report.origins import Origin, on_the_hub, origin_of, shown_name
from distill_llm.report.usage import kind_of_student, read_config, snippet
from distill_llm.responses.folder import ABOUT, KEPT
from distill_llm.teachers.cache_format import CacheIndex

TAG = "distill_llm"


def model_card(folder: Path, repo_id: str) -> str:
    """The card of a model that no run has measured: how to load it."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag=kind_of_student(read_config(folder)).pipeline_tag, tags=[TAG]
    )
    return _model(data, repo_id, "Made with `distill_llm`.", f"## Use\n\n```python\n{snippet(folder, repo_id)}```")


def adapter_card(folder: Path, repo_id: str) -> str:
    """The card of peft adapters: the model that they belong to."""
    base = str(json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
    data = ModelCardData(library_name="peft", base_model=base if on_the_hub(base) else None, tags=[TAG])
    use = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "{repo_id}")\n'
    about = f"Adapters for `{shown_name(base)}`, as `base_model` below."
    return _model(data, repo_id, about, f"## Use\n\n```python\n{use}```")


def export_card(files: Sequence[str], repo_id: str, origin: Origin) -> str:
    """The card of a model that was written for llama.cpp or onnxruntime: how these take it, and what its student's card says."""
    said: dict[str, Any] = {
        "base_model": origin.base_model,
        "datasets": list(origin.datasets) or None,
        **origin.carried,
    }
    gguf = [name for name in files if name.endswith(".gguf")]
    if gguf:
        data = ModelCardData(library_name="gguf", tags=[TAG, "gguf"], **said)
        use = f"```bash\nllama-cli --hf-repo {repo_id} --hf-file {gguf[0]}\n```"
    else:
        data = ModelCardData(library_name="onnx", tags=[TAG, "onnx"], **said)
        use = (
            f"```bash\nhf download {repo_id} --local-dir model\n```\n\n`onnxruntime.InferenceSession` reads the graphs."
        )
    return _model(data, repo_id, f"Holds {_listed(files)}, written by `distill-llm export`.", f"## Use\n\n{use}")


def cache_card(index: CacheIndex, repo_id: str) -> str:
    """The card of a teacher cache: what it holds, and the field of a recipe that reads it."""
    examples, items = (sum(column) for column in zip(*index.shards, strict=True)) if index.shards else (0, 0)
    coded = "all logits" if index.coding == "full" else f"{index.settings.k} tokens of each output ({index.coding})"
    about = (
        f"Outputs of a teacher, for students to learn from without it: {items:,} outputs on {examples:,} examples over"
        f" {index.classes:,} classes, {coded}."
    )
    return _data_set(repo_id, about, ["teacher-cache"], _download(repo_id, "cache", "teacher:\n  cache: cache"))


def responses_card(folder: Path, repo_id: str) -> str:
    """The card of responses: who gave how many, and the field of a recipe that reads them."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    counts, teacher = about.get("counts") or {}, shown_name(str(about.get("teacher", "")))
    said = f"{counts.get('kept', 0):,} responses of `{teacher}`, made with `distill-llm respond`."
    files = [{"config_name": "default", "data_files": [{"split": "train", "path": KEPT}]}]
    use = f"```yaml\ndata:\n  task: prompts\n  path: {repo_id}\n```"
    return _data_set(repo_id, said, ["text-generation", "knowledge-distillation"], use, configs=files)


def origin_of_export(folder: Path) -> Origin:
    """What the card of a run's student says, for an export that lies in the same run; nothing for any other."""
    student = next(
        (run / "student" for run in folder.resolve().parents[:3] if (run / "student" / "README.md").is_file()), None
    )
    return Origin() if student is None else origin_of(str(student))


def shown_adapters(folder: Path) -> str:
    """`adapter_config.json` without the folder that the base model is in on this machine."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    return json.dumps(config | ({"base_model_name_or_path": shown_name(base)} if base else {}), indent=2) + "\n"


def shown_about(folder: Path) -> str:
    """`responses.json` without the folders that teacher and prompts are in on this machine."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    names = {name: shown_name(about[name]) for name in ("teacher", "data") if isinstance(about.get(name), str)}
    return json.dumps({**about, **names}, indent=2, ensure_ascii=False) + "\n"


def _download(repo_id: str, folder: str, recipe: str) -> str:
    command = f"hf download {repo_id} --repo-type dataset --local-dir {folder}"
    return f"```bash\n{command}\n```\n\n```yaml\n{recipe}\n```"


def _model(data: ModelCardData, repo_id: str, about: str, use: str) -> str:
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {_title(repo_id)}\n\n{about}\n\n{use}\n"))


def _data_set(repo_id: str, about: str, tags: Sequence[str], use: str, **fields: Any) -> str:
    data = DatasetCardData(tags=[TAG, *tags], **fields)
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n# {_title(repo_id)}\n\n{about}\n\n## Use\n\n{use}\n"))


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2]


def _listed(files: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in files)
