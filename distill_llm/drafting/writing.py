"""A recipe as a file for people: YAML with a comment where something was decided."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from distill_llm.drafting.draft import Draft

WIDTH, LONGEST = 118, 100
STARTER = Draft(
    {
        "description": "what this makes, in a line",
        "output_dir": "runs/my_student",
        "teacher": {"model": "my-org/my-fine-tuned-model"},
        "data": {
            "task": "classification",
            "path": "rows.csv",
            "columns": {"text": "text", "label": "label"},
            "max_length": 128,
        },
        "pruning": {"keep": 0.5, "round_to": 16},
        "distillation": {
            "losses": {
                "labels": {"weight": 0.5},
                "logits": {"weight": 0.5, "temperature": 2.0},
                "hidden": {"weight": 1.0, "layers": "lineage"},
            },
            "num_train_epochs": 3,
            "learning_rate": 5e-5,
            "per_device_train_batch_size": 32,
        },
        "evaluation": {"latency": {"batch_size": 32, "sequence_length": 128}},
    },
    {
        "teacher.model": "Hub id, folder, GGUF file, or package://PACKAGE/PATH",
        "data.task": "or regression, text, prompts, embedded, a GLUE task",
        "data.path": "a file, a folder with train.* and test.*, or a Hub id",
        "pruning.keep": "share of the layers' parameters that stays; with cost: latency, of the time",
        "distillation.losses": "labels of the data; outputs and hidden states of the teacher",
        "distillation.num_train_epochs": "this and what follows: any field of TrainingArguments",
    },
    (),
)
"""For `init` without a model."""


def written(draft: Draft, made_by: str) -> str:
    """The text of a recipe file that `load_recipe` reads to the draft's recipe.

    Args:
        made_by: the command.
    """
    head = ["#!/usr/bin/env -S distill-llm run", f"# made by: {made_by}"]
    head += [f"# {line}" for line in draft.said]
    lines = []
    for name, value in draft.recipe.items():
        gap = [""] if isinstance(value, Mapping) else []
        lines += [*gap, *_lines(name, value, draft.comments, name, 0)]
    return "\n".join([*head, *lines]) + "\n"


def _lines(name: str, value: Any, comments: Mapping[str, str], path: str, depth: int) -> Iterable[str]:
    indent, why = "  " * depth, comments.get(path)
    if isinstance(value, Mapping) and (
        depth == 0 or any(isinstance(each, Mapping) for each in value.values()) or len(_flow(value)) > LONGEST
    ):
        yield f"{indent}{name}:" + (f" # {why}" if why else "")
        for key, inner in value.items():
            yield from _lines(key, inner, comments, f"{path}.{key}", depth + 1)
        return
    text = f"{indent}{name}: {_flow(value)}"
    if why and len(text) + len(why) + 3 > WIDTH:
        yield f"{indent}# {why}"
    yield text + (f" # {why}" if why and len(text) + len(why) + 3 <= WIDTH else "")


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
