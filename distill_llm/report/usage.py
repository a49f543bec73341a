"""Python code that loads a student, made from the student's own config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.data.kinds import KINDS, TaskKind, kind_of_head


def read_config(student_dir: str | Path) -> dict[str, Any]:
    """The student's config.json.

    Raises:
        InputError: the folder holds no config.json, or it is not JSON.
    """
    path = Path(student_dir) / "config.json"
    accepted = "a folder with a model: config.json and weights, for example student/ of a run"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError("student_dir", str(student_dir), accepted) from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise InputError("student_dir", str(student_dir), accepted)
    return config


def kind_of_student(config: Mapping[str, Any]) -> TaskKind:
    """The kind of task that the student has a head for, by its config.json.

    Raises:
        InputError: its head is of no known kind.
    """
    classes = config.get("architectures") or []
    kind = kind_of_head(classes)
    if kind is None:
        heads = dict.fromkeys(head for each in KINDS.values() for head in each.head_classes)
        raise InputError("student_dir", ", ".join(classes), f"a model of a class that ends in {' or '.join(heads)}")
    return kind


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has code of its own, which needs `trust_remote_code=True`."""
    return bool(config.get("auto_map"))


def loading(student_dir: str | Path) -> str:
    """One line that says how the student loads, and why."""
    config = read_config(student_dir)
    why = "a stock transformers model"
    if needs_code(config):
        why = _why_not_stock(student_dir, config) if "pruning" in config else "a model with code of its own"
    return f"{_call(config, json.dumps(str(student_dir)))}: {why}"


def _why_not_stock(student_dir: str | Path, config: dict[str, Any]) -> str:
    """Why the stock class cannot hold a pruned model of these sizes; found without weights."""
    import torch

    from distill_llm.models.configs import open_config, readable
    from distill_llm.pruning.cutting.surgery import pruned_class, why_not_stock

    with readable(student_dir), torch.device("meta"):
        own = open_config(student_dir)
        reason = why_not_stock(pruned_class(kind_of_student(config).stock_class(own))(own))
    return reason or "its sizes are in a config of its own"


def snippet(student_dir: str | Path, model_id: str) -> str:
    """Python source that loads the student and its tokenizer from `model_id` and runs it on a sentence."""
    config = read_config(student_dir)
    kind = kind_of_student(config)
    text, use = kind.usage(config)
    return (
        "import torch\n"
        f"from transformers import {kind.auto_class}, AutoTokenizer\n\n"
        f'model_id = "{model_id}"\n'
        f"tokenizer = AutoTokenizer.from_pretrained(model_id{_trust(config)})\n"
        f"model = {_call(config, 'model_id')}.eval()\n\n"
        f'inputs = tokenizer({text}, return_tensors="pt")\n'
        "with torch.inference_mode():\n"
        f"{use}"
    )


def _call(config: dict[str, Any], model_id: str) -> str:
    """The expression that loads a model with this config. `model_id` is a Python expression."""
    return f"{kind_of_student(config).auto_class}.from_pretrained({model_id}{_trust(config)})"


def _trust(config: dict[str, Any]) -> str:
    """The argument that runs the checkpoint's code; the tokenizer's class reads the config, and would ask for it too."""
    return ", trust_remote_code=True" if needs_code(config) else ""
