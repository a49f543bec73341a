"""How to load a student, as Python that can be pasted; read from the student's own config.json."""

import json
from pathlib import Path
from typing import Any

from distill_llm.common.errors import InputError

# Head of the architecture's name -> (auto class, the Hub's pipeline tag)
HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
}


def read_config(student_dir: str | Path) -> dict[str, Any]:
    """The student's config.json.

    Raises:
        InputError: the folder holds no config.json, or it is not JSON.
    """
    path = Path(student_dir) / "config.json"
    accepted = "a folder with a model: config.json and its weights, such as student/ of a run"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError("student_dir", str(student_dir), accepted) from error


def auto_class(config: dict[str, Any]) -> tuple[str, str]:
    """The transformers auto class that loads the model, and the Hub's name for what it does."""
    architecture = config["architectures"][0]
    return next(names for head, names in HEADS.items() if architecture.endswith(head))


def needs_code(config: dict[str, Any]) -> bool:
    """Whether the checkpoint carries its own modelling file, to be run with `trust_remote_code=True`."""
    return bool(config.get("auto_map"))


def loading(student_dir: str | Path) -> str:
    """One line that says how the student loads, and why so."""
    config = read_config(student_dir)
    why = "a stock transformers model"
    if needs_code(config):
        why = _why_not_stock(student_dir, config) if "pruning" in config else "a model with code of its own"
    return f"{_call(config, json.dumps(str(student_dir)))}: {why}"


def _why_not_stock(student_dir: str | Path, config: dict[str, Any]) -> str:
    """What the stock class has against the sizes of a pruned model, tried without weights."""
    import torch
    import transformers

    from distill_llm.pruning.cutting.surgery import pruned_class, why_not_stock

    own = transformers.AutoConfig.from_pretrained(student_dir)
    stock = getattr(transformers, auto_class(config)[0])._model_mapping[type(own)]
    with torch.device("meta"):
        reason = why_not_stock(pruned_class(stock)(own))
    return reason or "its sizes are said in a config of its own"


def snippet(student_dir: str | Path, model_id: str) -> str:
    """Python source that loads the student and its tokenizer from `model_id` and runs it on a sentence."""
    config = read_config(student_dir)
    loader, tag = auto_class(config)
    if tag == "text-classification" and config.get("problem_type") != "regression" and _num_labels(config) > 1:
        result = "print(model.config.id2label[logits.argmax(-1).item()])"
    elif tag == "fill-mask":
        result = "print(tokenizer.batch_decode(logits.argmax(-1)))"
    else:
        result = "print(logits)"
    text = 'f"A good film is a {tokenizer.mask_token} thing."' if tag == "fill-mask" else '"A sentence to try it on."'
    use = f"    logits = model(**inputs).logits\n{result}\n"
    if tag == "text-generation":
        use = "    ids = model.generate(**inputs, max_new_tokens=32)\nprint(tokenizer.decode(ids[0], skip_special_tokens=True))\n"
    return (
        "import torch\n"
        f"from transformers import {loader}, AutoTokenizer\n\n"
        f'model_id = "{model_id}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(model_id)\n"
        f"model = {_call(config, 'model_id')}.eval()\n\n"
        f'inputs = tokenizer({text}, return_tensors="pt")\n'
        "with torch.inference_mode():\n"
        f"{use}"
    )


def _call(config: dict[str, Any], model_id: str) -> str:
    """The expression that loads a model with this config; `model_id` as Python says it."""
    trust = ", trust_remote_code=True" if needs_code(config) else ""
    return f"{auto_class(config)[0]}.from_pretrained({model_id}{trust})"


def _num_labels(config: dict[str, Any]) -> int:
    # transformers leaves the labels out of config.json where there are two
    return len(config.get("id2label") or (0, 1))
