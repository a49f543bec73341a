"""Small real inputs for recipes: a model with its tokenizer, labelled rows, a recipe that fits both."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from builders.causal import causal_model, word_tokenizer
from builders.models import tiny_model
from transformers import BertTokenizer

from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import InputError, faults_in
from distill_llm.recipe.recipe import Recipe, parse_recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "not", "very", "the"]


def write_model(folder: Path, words: list[str] = WORDS, **model: Any) -> Path:
    """A tiny model as `save_pretrained` writes it, with a tokenizer of `words`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(**{"vocab": len(words), **model}).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def write_rows(file: Path, labels: tuple[str, ...] = ("neg", "pos"), rows: int = 40) -> Path:
    """A CSV with the columns `review` and `mood`."""
    lines = [f"the film {i},{labels[i % len(labels)]}" for i in range(rows)]
    file.write_text("\n".join(["review,mood", *lines]) + "\n")
    return file


def recipe_for(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe over the model in `folder`/teacher and the rows in `folder`/rows.csv; sections replace or add to it."""
    return {
        "description": "a test",
        "output_dir": str(folder / "run"),
        "teacher": {"model": str(folder / "teacher")},
        "data": {
            "task": "classification",
            "path": str(folder / "rows.csv"),
            "columns": {"text": "review", "label": "mood"},
            "max_length": 16,
        },
        "pruning": {"keep": 0.5, "calibration_examples": 8},
        "distillation": {"losses": {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}, "num_train_epochs": 1},
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
        **sections,
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as a YAML file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def recipe_with(folder: Path, **changes: Any) -> Recipe:
    """The recipe of `recipe_for` with fields changed: `pruning__keep=1`."""
    mapping = recipe_for(folder)
    for path, value in changes.items():
        inner, names = mapping, path.split("__")
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
    return parse_recipe(mapping)


def faults_at_the_door(recipe: Recipe) -> list[str]:
    """The lines of the recipe's faults; none where it passes."""
    try:
        open_recipe(recipe)
    except InputError as error:
        return [str(fault) for fault in faults_in(error)]
    return []


def write_decoder(folder: Path, family: str = "llama", tokenizer: Any = None, **model: Any) -> None:
    """A tiny causal LM with a tokenizer of words that has no padding token."""
    shutil.rmtree(folder, ignore_errors=True)
    causal_model(family, **model).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)


def causal_recipe(folder: Path, task: str = "text", **changes: Any) -> Recipe:
    """A recipe for language modelling without pruning: the teacher learns, and teaches a student of its kind."""
    (folder / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1}" for i in range(40)))
    chats = [{"prompt": f"w{i}", "response": f"w{i + 1}"} for i in range(40)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    path = folder / ("text.txt" if task == "text" else "chats.jsonl")
    data = {"task": task, "path": str(path), "max_length": 16}
    return recipe_with(folder, **{"data": data, "pruning": None, "student__model": str(folder / "teacher"), **changes})
